"""The functions of analysis/ on (W0, dW): against dense references in float64 and closed forms."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import IDS, llama, seeded
from torch import Tensor, nn

import variants
from analysis.curvature import lanczos, top_eigenvalue
from analysis.direction import magnitude_direction, slope
from analysis.forgetting import forgetting
from analysis.intruders import counts, newcomers, rescaled
from analysis.opened import change
from analysis.spectra import (
    Factors,
    Triplets,
    dense,
    effective_rank,
    frobenius,
    rank_for,
    spectrum,
    stable_rank,
    triplets,
)
from analysis.starts import cosine, first_order, start
from analysis.subspaces import (
    alignment,
    amplification,
    chance,
    directions,
    energies,
    random_directions,
    similarity,
)
from variants import Incompatible


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def factors(m: int, n: int, r: int, seed: int = 0) -> Factors:
    """With a column of zeros, as a masked triplet leaves it."""
    B = drawn(m, r, seed=seed)
    B[:, 1] = 0
    return Factors(drawn(r, n, seed=seed + 1), B, 0.5)


SHAPES = [(40, 28), (28, 40)]
ANALYSES: dict[str, Callable[[Tensor, Any, Any], Any]] = {
    "spectrum": lambda W0, dW, other: [
        v for k, v in spectrum(dW).items() if k not in ("values", "effective_rank")
    ],
    "effective rank": lambda W0, dW, other: effective_rank(triplets(dW).S[:5]),
    "values": lambda W0, dW, other: triplets(dW).S[:4],
    "frobenius": lambda W0, dW, other: frobenius(dW),
    "similarity": lambda W0, dW, other: similarity(
        directions(dW)[:, :4], directions(other, "right")[:, :4]
    ),
    "left similarity": lambda W0, dW, other: similarity(
        directions(dW, "left")[:, :3], directions(other, "left")[:, :4]
    ),
    "amplification": lambda W0, dW, other: list(amplification(W0, dW, 4).values()),
    "alignment": lambda W0, dW, other: list(alignment(triplets(W0), dW, 6).values()),
    "left energies": lambda W0, dW, other: energies(triplets(W0), dW, "left"),
    "right energies": lambda W0, dW, other: energies(triplets(W0), dW, "right"),
    "magnitude": lambda W0, dW, other: magnitude_direction(W0, dW),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ANALYSES)
def test_factors_give_what_the_dense_matrix_gives(name: str, shape: tuple[int, int]) -> None:
    """From fp32 factors, and from triplets, to 1e-5 of the dense definition in float64."""
    analysis, W0 = ANALYSES[name], drawn(*shape, seed=9)
    dW, other = factors(*shape, 5), factors(*shape, 5, seed=5)
    exact = [dW.s * dW.B.double() @ dW.A.double(), other.s * other.B.double() @ other.A.double()]
    reference = torch.as_tensor(analysis(W0.double(), *exact), dtype=torch.float64)
    for made in (lambda f: f, triplets, dense):
        found = torch.as_tensor(analysis(W0, made(dW), made(other)), dtype=torch.float64)
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-6)


def test_phi_by_its_definition() -> None:
    U, V = random_directions(30, 4, 0), random_directions(30, 6, 1)
    phi = similarity(U, V)
    for i in range(1, 5):
        for j in range(1, 7):
            overlap = torch.linalg.matrix_norm(U[:, :i].T @ V[:, :j]) ** 2 / min(i, j)
            assert math.isclose(phi[i - 1, j - 1].item(), overlap.item(), rel_tol=1e-12)


def test_phi_of_equal_and_of_random_subspaces() -> None:
    """A turned basis of one subspace has phi(k, k) = 1; 50 random pairs the mean that chance has,
    to 5 %."""
    U = random_directions(60, 5)
    turn = torch.linalg.qr(drawn(5, 5).double()).Q
    assert math.isclose(similarity(U, U @ turn)[-1, -1].item(), 1, rel_tol=1e-12)
    pairs = [(random_directions(80, 4, 2 * i), random_directions(80, 12, 2 * i + 1))
             for i in range(50)]  # fmt: skip
    found = sum(similarity(*pair)[-1, -1].item() for pair in pairs) / 50
    assert math.isclose(found, chance(80, 4, 12), rel_tol=0.05)


def test_ranks_of_known_spectra() -> None:
    """k equal values: k, whichever way; values 1, q, q^2, ...: the closed forms."""
    flat = torch.cat((torch.ones(7), torch.zeros(3)))
    assert math.isclose(effective_rank(flat), 7) and stable_rank(flat) == 7
    assert rank_for(flat) == 7 and rank_for(torch.ones(20)) == 18
    S = 0.5 ** torch.arange(40, dtype=torch.float64)
    entropy = math.log(2) * 2  # of a geometric law of ratio 1/2: two bits
    assert math.isclose(effective_rank(S), math.exp(entropy), rel_tol=1e-9)
    assert math.isclose(stable_rank(S), 4 / 3, rel_tol=1e-9)
    assert rank_for(S) == 2  # 3/4, then 15/16
    zero = spectrum(Factors(torch.ones(2, 5), torch.zeros(4, 2)))
    assert (zero["effective_rank"], zero["stable_rank"], zero["rank_90"]) == (0, 0, 0)


def test_a_change_of_its_own_and_one_of_the_weight() -> None:
    """All of dW in W0's bottom subspace, and amplified by how little W0 has there."""
    U, V = (torch.linalg.qr(drawn(20, 20, seed=i).double()).Q for i in (1, 2))
    S = torch.linspace(10, 1, 20, dtype=torch.float64)
    W0, base = (U * S) @ V.T, Triplets(U, S, V.T)
    dW = Factors(V.T[-2:], U[:, -2:] * 3.0)
    found = alignment(base, dW, 2)
    for side in ("left", "right", "both"):
        bottom, top = found[f"{side}_bottom"], found[f"{side}_top"]
        assert bottom is not None and math.isclose(bottom, 1)
        assert top is not None and top < 1e-20
    assert alignment(base, Factors(V.T[:2], 0 * U[:, :2]), 2)["left_top"] is None
    factor = amplification(W0, dW)["factor"]
    assert factor is not None
    assert math.isclose(factor, math.hypot(3, 3) / math.hypot(S[-1].item(), S[-2].item()))
    still = Factors(V.T[:2], 0 * U[:, :2])
    nothing = amplification(W0, still)
    assert (nothing["factor"], nothing["inside"], nothing["random"]) == (None, None, None)
    assert {v for k, v in alignment(base, still, 2).items() if "chance" not in k} == {None}
    with pytest.raises(Incompatible, match="k=21: W0 has 20"):
        alignment(base, dW, 21)


def test_small_moves_keep_their_digits() -> None:
    """1 - cos of 1e-9, which fp32 cannot say as a difference from one: to 1e-4, in float64's eyes;
    a row of zeros does not count."""
    W0, dW = drawn(12, 30), factors(12, 30, 4)
    W0[3] = 0
    dW = Factors(dW.A, 1e-4 * dW.B, dW.s)
    before, after = W0.double(), W0.double() + dW.dense().double()
    rows = torch.arange(12) != 3
    turned = 1 - torch.cosine_similarity(before[rows], after[rows])
    moved = (after[rows].norm(dim=1) - before[rows].norm(dim=1)).abs()
    dM, dD = magnitude_direction(W0, dW)
    assert 1e-10 < dD < 1e-7 and math.isclose(dD, turned.mean().item(), rel_tol=1e-4)
    assert math.isclose(dM, moved.mean().item(), rel_tol=1e-4)
    line, correlation = slope([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)])
    assert (line, correlation) == (2, 1) and math.isnan(slope([(1.0, 2.0)])[0])


def rows_of_zeros(W0: Tensor) -> Factors:
    """dW = -W0 in rows 0 to 9 to fp32's last digit, where W0 has rank 5."""
    U, S, Vh = torch.linalg.svd(W0.double(), full_matrices=False)
    B = (U * S)[:, :5].float()
    B[10:] *= -0.5  # the others grow by a half
    return Factors(Vh[:5].float(), -B)


def across(W0: Tensor) -> Factors:
    """A small move of each row at right angles to it, as of W0 (I + e K), K skew."""
    U, S, Vh = torch.linalg.svd(W0.double(), full_matrices=False)
    K = drawn(5, 5, seed=8).double()
    return Factors((K - K.T) @ Vh[:5], 1e-5 * (U * S)[:, :5])


ADVERSARIAL: dict[str, Callable[[Tensor], Factors]] = {
    "nearly -W0": rows_of_zeros,
    "along the rows": lambda W0: Factors(W0.clone(), 1e-3 * torch.eye(len(W0))),
    "across the rows": across,
    "tiny": lambda W0: Factors(drawn(4, W0.shape[1]), 1e-9 * drawn(len(W0), 4, seed=1)),
    "huge": lambda W0: Factors(drawn(4, W0.shape[1]), 1e6 * drawn(len(W0), 4, seed=1)),
    "cancelling factors": lambda W0: factors(*W0.shape, 4).less(*nearly(factors(*W0.shape, 4))),
    "one row alone": lambda W0: Factors(drawn(4, W0.shape[1]), torch.eye(len(W0))[:, 7:11]),
    "none": lambda W0: Factors(drawn(4, W0.shape[1]), torch.zeros(len(W0), 4)),
}


def nearly(dW: Factors) -> tuple[Tensor, Tensor]:
    """Factors whose product differs from dW by a ten-thousandth."""
    return dW.A, dW.s * dW.B * (1 + 1e-4 * drawn(*dW.B.shape, seed=7))


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=str)
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_rows_whose_terms_cancel_are_formed(case: str, shape: tuple[int, int]) -> None:
    """dM and dD of fp32's W0, by the definition in float64 on rows: to 1e-5. (1 - cos as half the
    squared distance of unit vectors, which is the same and keeps its digits.)"""
    U, Vh = drawn(shape[0], 5, seed=2), drawn(5, shape[1], seed=3)
    W0 = U @ Vh  # of rank 5, so that factors can cancel it
    dW = ADVERSARIAL[case](W0)
    before = W0.double()
    after = before + dW.s * dW.B.double() @ dW.A.double()
    b, a = before.norm(dim=1), after.norm(dim=1)
    turned = (after / a[:, None] - before / b[:, None]).square().sum(1) / 2
    # of ||w|| - ||w0|| itself a tiny change would keep few digits in float64 too
    moved = ((after + before) * (dW.s * dW.B.double() @ dW.A.double())).sum(1) / (a + b)
    expected = moved.abs().mean().item(), turned.mean().item()
    for made in (dW, triplets(dW)):
        dM, dD = magnitude_direction(W0, made)
        assert math.isclose(dM, expected[0], rel_tol=1e-5)
        assert math.isclose(dD, expected[1], rel_tol=1e-5, abs_tol=1e-24)


def cancelling(name: str) -> tuple[Tensor, Factors]:
    """W0 [40, 60] in fp32 and a change of it where something nearly vanishes in every row."""
    A, B = torch.linalg.qr(drawn(60, 5).double()).Q.mT.float(), drawn(40, 5, seed=1)
    turn = drawn(5, 5, seed=2)
    turn = torch.linalg.matrix_exp(0.3 * (turn - turn.T))
    other, W0 = drawn(5, 60, seed=3), B @ A
    return {
        "rows that vanish": (W0, Factors(A, (1e-3 * drawn(40, 5, seed=4) - 1) * B)),
        "rows that turn": (W0, Factors(A, B @ turn - B)),
        "rows that stretch": (W0, Factors(A, (0.3 + 1e-4 * drawn(40, 5, seed=4)) * B)),
        "a tiny change": (drawn(40, 60, seed=5), Factors(other, 1e-5 * B)),
        "a huge change": (drawn(40, 60, seed=5), Factors(other, 1e5 * B)),
        "a change across": (W0, Factors(1e-3 * (other - other @ A.mT @ A), B)),
        "nearly equal factors": (
            drawn(40, 60, seed=5),
            Factors(A + 1e-5 * other, B * (1 + 1e-5), 2.0).less(A, 2 * B),
        ),
    }[name]


CANCELLING = ("rows that vanish", "rows that turn", "rows that stretch", "a tiny change",
              "a huge change", "a change across", "nearly equal factors")  # fmt: skip


@pytest.mark.parametrize("name", CANCELLING)
def test_what_cancels_keeps_its_digits(name: str) -> None:
    """By factors, by triplets, and by an fp32 matrix, to 1e-5 of the definitions in float64."""
    W0, factors = cancelling(name)
    exact, narrow = factors.s * factors.B.double() @ factors.A.double(), factors.dense().float()
    for dW, wide in ((factors, exact), (triplets(factors), exact), (narrow, narrow.double())):
        W = W0.double() + wide
        moved = (W.norm(dim=1) - W0.double().norm(dim=1)).abs().mean().item()
        cosines = torch.cosine_similarity(W, W0.double(), dim=1)
        turned = (1 - cosines).mean().item()
        dM, dD = magnitude_direction(W0, dW)
        assert math.isclose(dM, moved, rel_tol=1e-5), (dM, moved)
        assert math.isclose(dD, turned, rel_tol=1e-5), (dD, turned)
        base = Triplets(*torch.linalg.svd(W0, full_matrices=False))
        own = base.U[:, :3].double().mT @ wide @ base.Vh[:3].double().mT
        found = alignment(base, dW, 3)["both_top"]
        assert found is not None
        assert math.isclose(
            found, (own.norm() / wide.norm()).item() ** 2, rel_tol=1e-5, abs_tol=1e-12
        )


def test_one_row_of_many_that_cancels() -> None:
    """Beside rows that do not, to 1e-5: dM and dD of that row alone are read off two means."""
    W0, dW = drawn(2000, 60, seed=8), factors(2000, 60, 5, seed=9)
    rows = slice(1500, 1501)
    W0[rows] = -(1 + 1e-4) * dW.dense()[rows]
    change = dW.s * dW.B.double() @ dW.A.double()
    before, after = W0.double(), W0.double() + change
    moved = (after.norm(dim=1) - before.norm(dim=1)).abs()
    turned = 1 - torch.cosine_similarity(before, after, dim=1)
    dM, dD = magnitude_direction(W0, dW)
    assert math.isclose(dM, moved.mean().item(), rel_tol=1e-5)
    assert math.isclose(dD, turned.mean().item(), rel_tol=1e-5)
    alone = magnitude_direction(W0[rows], Factors(dW.A, dW.B[rows], dW.s))
    assert math.isclose(alone[0], moved[rows].item(), rel_tol=1e-5)
    assert math.isclose(alone[1], turned[rows].item(), rel_tol=1e-5)


def test_a_planted_intruder_is_found_and_taken_out() -> None:
    """One direction far from all of W0's, on top of the spectrum; a change within W0's own
    directions plants none."""
    U, V = (torch.linalg.qr(drawn(n, 50, seed=n).double()).Q for n in (50, 60))
    S = torch.linspace(5, 1, 50, dtype=torch.float64)
    W0 = (U * S) @ V.T
    spread = U.sum(1, keepdim=True) / 50**0.5  # as far from each u_i as can be: cosine 50^-0.5
    planted = Factors(V.T[:1], 30 * spread)
    found = newcomers(U, W0 + planted.dense())
    assert found.under(0.5).tolist() == [True] + [False] * 9
    sweep = list(counts(found.cosines).values())
    assert sweep == sorted(sweep) and sweep[4] == 1
    assert not newcomers(U, W0 + Factors(V.T[:3], 4 * U[:, :3]).dense()).under(0.9).any()
    W = W0 + planted.dense()
    assert torch.linalg.svdvals(rescaled(W, found, 0.5, 0.0))[0] < 6
    half = rescaled(W, found, 0.5, 0.5)
    assert math.isclose(torch.linalg.svdvals(half)[0], found.S[0].item() / 2, rel_tol=1e-9)
    torch.testing.assert_close(rescaled(W, found, 0.5, 1.0), W)


def test_large_matrices_go_by_krylov_to_the_same_cosines() -> None:
    """1024 x 1024, ten directions of the exact decomposition, to 1e-4."""
    U, V = (torch.linalg.qr(drawn(1024, 1024, seed=i)).Q for i in (1, 2))
    W0 = (U * 0.99 ** torch.arange(1024)) @ V.T
    W = W0 + Factors(drawn(2, 1024, seed=3), 2e-3 * drawn(1024, 2, seed=4)).dense()
    found, (X, S, _) = newcomers(U, W), torch.linalg.svd(W)
    torch.testing.assert_close(found.S, S[:10], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.cosines, (U.T @ X[:, :10]).abs().amax(0), rtol=0, atol=1e-4)


def test_lanczos_finds_the_ends_of_a_known_spectrum() -> None:
    """300 eigenvalues from -4 to 9: both ends to 1e-6 (float64), in far fewer steps."""
    Q = torch.linalg.qr(drawn(300, 300).double()).Q
    values = torch.cat((torch.tensor([9.0, -4.0]), torch.linspace(-1, 1, 298))).double()
    H = (Q * values) @ Q.T
    found = lanczos(lambda v: H @ v, Q[0], steps=60, tolerance=1e-8, seed=0)
    assert found.steps < 60
    assert math.isclose(found.value, 9, rel_tol=1e-6) and math.isclose(
        found.least, -4, rel_tol=1e-6
    )


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("preset", ["lora", "lora_fa", "dora", "adalora"])
def test_the_hessian_is_that_of_the_equation(preset: str) -> None:
    """Over all tensors of an adapter, through its fast paths, against the full Hessian of the net
    with W by the form's equation, in float64: 1e-6."""
    model, x, y = net().double(), drawn(9, 6).double(), drawn(9, 3, seed=1).double()
    adapter = variants.attach(model, preset, rank=2, targets=["0", "2"])
    for i, t in enumerate(adapter.parameters()):
        t.data += 0.3 * drawn(*t.shape, seed=i).to(t)
    tensors = adapter.parameters()
    found = top_eigenvalue(lambda: (model(x) - y).square().mean(), tensors, 100, 1e-9)

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([t.numel() for t in tensors])
        own = {id(t): part.view(t.shape) for t, part in zip(tensors, parts, strict=True)}
        h = x
        for i, layer in enumerate(adapter.layers.values()):
            p = {k: own.get(id(t), t) for k, t in layer.params.items()}
            W = layer.form.weight(layer.W0, p, layer.full_s)
            h = nn.functional.linear(h, W, layer.bias)
            h = h.tanh() if i == 0 else h
        return (h - y).square().mean()

    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))  # type: ignore[arg-type]
    assert math.isclose(found.value, values[-1].item(), rel_tol=1e-6)
    assert math.isclose(found.least, values[0].item(), rel_tol=1e-6)


def test_first_steps_against_the_full_gradient() -> None:
    """LoRA's at B = 0 is -s^2 G A^T A; full tuning's is -G itself, with a cosine of one; sums of
    loss and gradient norms as autograd has them."""
    x, y = drawn(9, 6), drawn(9, 3, seed=1)
    plain = net()
    (plain(x) - y).square().mean().backward()
    G = {k: plain[int(k)].weight.grad for k in ("0", "2")}  # type: ignore[union-attr]
    for preset in ("lora", "full"):
        model = net()
        adapter = variants.attach(
            model, preset, rank=2 if preset == "lora" else None, targets="0,2"
        )
        A = {
            k: v.params["A"].detach().clone() for k, v in adapter.layers.items() if "A" in v.params
        }
        s = [layer.full_s for layer in adapter.layers.values()]
        found = start(adapter, lambda model=model: (model(x) - y).square().mean(), G, 1e-3)
        assert math.isclose(found["loss"], found["base"], rel_tol=1e-6)
        for i, (name, row) in enumerate(found["layers"].items()):
            assert math.isclose(row["full"], G[name].norm().item(), rel_tol=1e-5)
            move = -(s[i] ** 2) * G[name] @ A[name].T @ A[name] if A else -G[name]
            assert math.isclose(row["gradient"], cosine(move, -G[name]), rel_tol=1e-4)
            assert 0 < row["optimizer"] <= row["gradient"] + 1e-6
            if A:
                gB = s[i] * G[name] @ A[name].T
                assert math.isclose(row["norms"]["B"], gB.norm().item(), rel_tol=1e-4)
                assert row["norms"]["A"] == 0


def test_the_equivalent_gradient_is_lora_pro_s() -> None:
    """s (B dA + dB A), dA = -g_A and dB = -g_B, where B is not zero: to 1e-5."""
    model, x = net(), drawn(9, 6)
    layer = variants.attach(model, "lora", rank=2, targets=["0"]).layers["0"]
    A, B = layer.params["A"], layer.params["B"]
    B.data += drawn(*B.shape)
    model(x).square().mean().backward()
    assert A.grad is not None and B.grad is not None
    expected = -layer.full_s * (B @ A.grad + B.grad @ A)
    torch.testing.assert_close(first_order(layer), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", ["lora", "dora", "pissa", "milora", "adalora", "loha", "full"])
def test_the_change_is_the_weight_less_the_original(preset: str) -> None:
    """By factors where the form has them, what an init moved included: to 1e-5 of W0."""
    adapter = variants.attach(net(), preset, rank=None if preset == "full" else 2, targets="0,2")
    for i, t in enumerate(adapter.parameters()):
        t.data += 0.1 * drawn(*t.shape, seed=i)
    for layer in adapter.layers.values():
        found = change(layer)
        assert isinstance(found, Tensor) == (preset in ("dora", "loha", "full"))
        expected = (layer.weight - layer.original).detach()
        torch.testing.assert_close(dense(found).to(expected), expected, rtol=0, atol=1e-5)


def test_forgetting_is_against_the_true_base() -> None:
    """PiSSA moves the base; the untouched model's own logits are what KL is against."""
    model, plain = seeded(llama), seeded(llama)
    adapter = variants.attach(model, "pissa", rank=4)
    for t in adapter.parameters():
        t.data *= 3
    ids = IDS["input_ids"]
    labels = ids.clone()
    labels[:, :4] = -100
    batch = {"ids": ids, "mask": torch.ones_like(ids), "labels": labels}
    found = forgetting(adapter, [batch, batch])
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits[:, 3:-1].double().log_softmax(-1) for m in (plain, model))
    picked = [-t.gather(-1, ids[:, 4:, None]).mean().item() for t in (p, q)]
    assert found["tokens"] == 2 * ids[:, 4:].numel()
    assert math.isclose(found["base"], picked[0], rel_tol=1e-4)
    assert math.isclose(found["tuned"], picked[1], rel_tol=1e-4)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert kl > 1e-3 and math.isclose(found["kl"], kl, rel_tol=1e-3)
