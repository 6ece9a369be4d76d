"""The singular value decompositions under the inits: exact, seeded, cached."""

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


def test_the_seed_alone_decides() -> None:
    W, _ = matrix(500, 500, 0.5)
    runs = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        runs.append(_svd.krylov(W, 8, torch.Generator().manual_seed(5)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_factors_are_cached_and_a_damaged_file_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(_svd, "CACHED_FROM", 1)
    W, _ = matrix(300, 200, 0.5)
    first = _svd.top(W, 4, "krylov", torch.Generator().manual_seed(1))
    (file,) = (tmp_path / "factors").iterdir()
    monkeypatch.setattr(_svd, "_compute", None)  # a second computation would fail
    again = _svd.top(W, 4, "krylov", torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    monkeypatch.undo()
    monkeypatch.setenv("LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(_svd, "CACHED_FROM", 1)
    file.write_bytes(file.read_bytes()[:50])
    healed = _svd.top(W, 4, "krylov", torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(first, healed, strict=True))
    _svd.top(W, 5, "krylov", torch.Generator().manual_seed(1))
    _svd.top(W + 1, 4, "krylov", torch.Generator().manual_seed(1))
    assert len(list((tmp_path / "factors").iterdir())) == 3


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
