"""The singular value decompositions under the inits: exact, seeded, cached."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

import variants
from variants import _svd


def matrix(m: int, n: int, decay: float) -> tuple[Tensor, Tensor]:
    """A matrix with singular values k^-decay, and those values."""
    generator = torch.Generator().manual_seed(0)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=generator)).Q
    S = torch.arange(1, k + 1).float() ** -decay
    return U * S @ V.mT, S


@pytest.mark.parametrize("shape", [(600, 520), (520, 600)])
@pytest.mark.parametrize("r", [4, 16])
def test_krylov_is_exact_to_fp32(
    shape: tuple[int, int], r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Singular values to 1e-5 and the same subspaces, without falling back."""
    W, S = matrix(*shape, 0.5)
    monkeypatch.setattr(_svd, "exact", None)
    U, found, Vh = _svd.krylov(W, r, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, S[:r], rtol=1e-5, atol=0)
    monkeypatch.undo()
    exact_U, _, exact_Vh = _svd.exact(W, r)
    assert (U.mT @ exact_U).diagonal().abs().min() > 0.9999
    assert (Vh @ exact_Vh.mT).diagonal().abs().min() > 0.9999


def test_a_flat_spectrum_falls_back_to_the_exact_method() -> None:
    W = torch.randn(400, 400, generator=torch.Generator().manual_seed(0))
    found = _svd.krylov(W, 8, torch.Generator().manual_seed(1))
    for a, b in zip(found, _svd.exact(W, 8), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("decay", "n"), [(0.5, 400), (0.5, 40), (0.0, 300)])
def test_a_rank_s_triplets_are_the_first_of_a_larger_one(decay: float, n: int) -> None:
    """To the bit: by stages, where the stages go over to the exact method, and where all of it is.
    They are W's: orthogonal, U^T W V = S, to 1e-5 the singular values of float64."""
    generator = torch.Generator().manual_seed(2)
    W = matrix(400, n, decay)[0] * (1 - 2.0 * torch.randint(2, (n,), generator=generator))
    ranks = [r for r in (4, 16, 20, 33, 40, 64, 100) if r <= n]
    found = {r: _svd.krylov(W, r, torch.Generator().manual_seed(0)) for r in ranks}
    U, S, Vh = found[ranks[-1]]
    for r in ranks:
        for mine, theirs in zip(found[r], (U[:, :r], S[:r], Vh[:r]), strict=True):
            assert torch.equal(mine, theirs)
    exact = torch.linalg.svdvals(W.double())[: ranks[-1]].float()
    torch.testing.assert_close(S, exact, rtol=1e-5, atol=0)
    for own in (U.mT @ U, Vh @ Vh.mT):
        torch.testing.assert_close(own, torch.eye(ranks[-1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(U.mT @ W @ Vh.mT, S.diag(), rtol=0, atol=1e-5 * S[0].item())


@pytest.mark.parametrize("rank", [0, 10, 20, 400])
def test_triplets_beyond_the_rank_are_orthogonal_still(rank: int) -> None:
    """Of a matrix of that rank, or of one whose spectrum falls as exp(-i / 2)."""
    generator = torch.Generator().manual_seed(0)
    L, R = (torch.linalg.qr(torch.randn(k, 400, generator=generator)).Q for k in (500, 400))
    S = torch.exp(-torch.arange(400) / 2) if rank == 400 else (torch.arange(400) < rank).float()
    W = L * S @ R.mT
    for M in (W, W.mT):
        U, found, Vh = _svd.krylov(M, 32, generator)
        for own in (U.mT @ U, Vh @ Vh.mT):
            torch.testing.assert_close(own, torch.eye(32), rtol=0, atol=1e-5)
        assert (found.diff() <= 0).all()
        torch.testing.assert_close(found, S[:32], rtol=0, atol=1e-5)


def test_the_seed_alone_decides() -> None:
    W, _ = matrix(500, 500, 0.5)
    runs = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        runs.append(_svd.krylov(W, 8, torch.Generator().manual_seed(5)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of factors, of matrices of any size."""
    monkeypatch.setenv("LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(_svd, "CACHED_FROM", 1)
    return tmp_path / "factors"


def top(W: Tensor, r: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return _svd.top(W, r, "krylov", torch.Generator().manual_seed(seed))


def test_a_damaged_file_is_replaced(cache: Path) -> None:
    W, _ = matrix(300, 200, 0.5)
    first = top(W, 4)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    healed = top(W, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, healed, strict=True))
    assert list(cache.iterdir()) == [file]
    top(W + 1, 4)
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_or_read_costs_time_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, _ = matrix(300, 200, 0.5)
    first = top(W, 4)
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o444 == 0o444 & ~umask(), "others of a shared cache may read it"
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read what others may not
    assert all(map(torch.equal, first, top(W, 4)))
    assert list(cache.iterdir()) == [file]
    monkeypatch.setenv("LORA_CACHE", str(file))  # no folder
    assert all(map(torch.equal, first, top(W, 4)))


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("which", ["top", "last"])
def test_a_sweep_over_ranks_and_seeds_factorizes_once(
    which: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve runs, whose driver says how far their ranks go; each has its rank's own triplets."""
    W, S = matrix(300, 200, 0.5)
    made: list[int] = []
    compute = _svd._compute
    monkeypatch.setattr(_svd, "_compute", lambda M, r, *a: made.append(r) or compute(M, r, *a))
    monkeypatch.setenv(_svd.FACTORS, "24")
    for r in (2, 4, 8, 24):
        for seed in range(3):
            g = torch.Generator().manual_seed(seed)
            U, found, Vh = _svd.sliced(W, r, which, "krylov", g)
            wanted = S[:r] if which == "top" else S[-r:]
            torch.testing.assert_close(found, wanted, rtol=2e-5, atol=0)
            torch.testing.assert_close((U * found) @ Vh, U @ (U.mT @ W), rtol=0, atol=1e-5)
    assert made == [32] and len(list(cache.iterdir())) == 1


def test_a_rank_keeps_what_it_found(cache: Path) -> None:
    """A larger rank's file comes beside: a run that is resumed after that has its numbers still."""
    W, _ = matrix(300, 200, 0.5)
    before = top(W, 4)
    top(W, 20)
    assert len(list(cache.iterdir())) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, top(W, 4, seed=5), strict=True))


def test_a_sweep_s_largest_rank_is_that_of_runs_with_an_init() -> None:
    from experiments.plan import Job
    from experiments.sweep import largest_rank

    jobs = [
        Job([], {"rank": rank, "variant": {"init": {"name": init}}}, None)
        for rank, init in ((4, "pissa"), (16, "pissa"), (64, "default"), (None, "olora"))
    ]
    assert largest_rank(jobs) == 16 and largest_rank(jobs[2:]) == 0


def test_pissa_by_either_method_is_the_same_part_of_the_weight() -> None:
    W, _ = matrix(300, 260, 0.5)
    starts = [
        variants._registry.find_part("init", "pissa")
        .load(method=method)
        .start(W, 8, 2.0, torch.Generator().manual_seed(1), {})
        for method in ("exact", "krylov")
    ]
    torch.testing.assert_close(
        starts[0].B @ starts[0].A, starts[1].B @ starts[1].A, rtol=0, atol=2e-6
    )
