"""Inits that see how the base stores: LoftQ, QPiSSA, QERA.

What is stored comes back bit for bit from the model's own weights, whatever the init did to choose
it. Formulas are written here again from the official code, with bitsandbytes' own quantization.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import variants
from variants._contract import Toy, forked_rng
from variants._registry import find_part

G = torch.Generator()
TARGETS = ["first", "second"]


def decaying(size: int, power: float, seed: int) -> Tensor:
    """[size, size] with singular values k^-power between random orthogonal factors."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for _ in range(2))
    return U * torch.arange(1, size + 1) ** -power @ V


def nuclear(M: Tensor) -> float:
    return torch.linalg.matrix_norm(M, "nuc").item()


def started(name: str, W0: Tensor, r: int, s: float, base: str = "nf4", **settings: Any):
    """(Q, A, B, what was taken out, s) of an init on one matrix."""
    stored = find_part("base", base).load().storing(W0.dtype)
    start = find_part("init", name).load(**settings).start_on(stored, W0, r, s, G, {})
    W = W0 if start.subtract is None else W0 - s * start.subtract[1] @ start.subtract[0]
    return stored(W), start.A, start.B


def calibrated(preset: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    batch = {"x": torch.randn(64, 24, generator=generator)}
    return {"calibration": [batch]} if preset == "qera" else {}


# what is made up for


def test_qpissa_s_error_is_under_loftq_s_and_turns_lower_it() -> None:
    """Nuclear norms of W - (Q + s B A), 512 x 512, spectrum k^-0.5, rank 32, of plain NF4's.

    Measured with seeds 0, 1, 2: LoftQ .860, .860, .859 and QPiSSA .640, .641, .642 with T = 1;
    .753, .753, .755 and .528, .527, .530 with T = 5. The paper's Table 4 has the same order.
    """
    W0 = decaying(512, 0.5, 0)
    plain = nuclear(W0 - find_part("base", "nf4").load().storing(W0.dtype)(W0))
    left = {}
    for name in ("loftq", "pissa"):
        for T in (1, 5):
            Q, A, B = started(name, W0, 32, 0.5, iterations=T)
            left[name, T] = nuclear(W0 - Q - 0.5 * B @ A) / plain
    assert left["pissa", 1] < 0.9 * left["loftq", 1] < 0.9
    assert left["pissa", 5] < 0.9 * left["pissa", 1] and left["loftq", 5] < 0.9 * left["loftq", 1]


def bnb_nf4(W: Tensor) -> Tensor:
    """For rows of a multiple of 64: its 0.50.2 decodes others wrongly on the CPU."""
    functional = pytest.importorskip("bitsandbytes", reason="extra `dev`").functional
    codes, state = functional.quantize_4bit(
        W, blocksize=64, compress_statistics=False, quant_type="nf4"
    )
    return functional.dequantize_4bit(codes, state)


def low_rank(M: Tensor, r: int) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return torch.sqrt(torch.diag(S)[:r, :]) @ Vh, U @ torch.sqrt(torch.diag(S)[:, :r])


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("s", [1.0, 0.25])
def test_loftq_is_the_authors(T: int, s: float) -> None:
    """Against PEFT's `loftq_init`, which needs a GPU: its loop, bitsandbytes' codes, fp32, 1e-5.

    `scaled` differs from it in the factors' sizes alone: codes and s B A are those of s = 1.
    """
    W0 = decaying(128, 0.5, 0)
    residual = W0
    for _ in range(T):
        quantized = bnb_nf4(residual)
        R, L = low_rank(W0 - quantized, 8)
        residual = W0 - L @ R
    Q, A, B = started("loftq", W0, 8, s, iterations=T, rule="code")
    assert torch.equal(Q, quantized)
    torch.testing.assert_close(B @ A, L @ R, rtol=0, atol=1e-5 * W0.abs().max().item())
    torch.testing.assert_close(A.norm(dim=1), R.norm(dim=1), rtol=1e-4, atol=0)
    Q, A, B = started("loftq", W0, 8, s, iterations=T)
    assert torch.equal(Q, quantized)
    torch.testing.assert_close(s * B @ A, L @ R, rtol=0, atol=1e-5 * W0.abs().max().item())


@pytest.mark.parametrize("T", [1, 3])
def test_qpissa_is_the_authors(T: int) -> None:
    """Against GraphPKU/PiSSA's `pissa_quant`, bitsandbytes' codes, s = 1, fp32, 1e-5."""
    W0 = decaying(128, 0.5, 0)
    residual = W0
    for _ in range(T):
        R, L = low_rank(residual, 8)
        quantized = bnb_nf4(W0 - L @ R)
        residual = W0 - quantized
    Q, A, B = started("pissa", W0, 8, 1.0, iterations=T, method="exact")
    apart = (quantized != Q).float().mean()  # where a product is, in its last bit, a code may be
    assert apart < 0.002
    torch.testing.assert_close(B @ A, L @ R, rtol=0, atol=1e-3 * W0.abs().max().item())
    torch.testing.assert_close(A.norm(dim=1), R.norm(dim=1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("mode", ["exact", "approx"])
def test_qera_is_the_authors(mode: str) -> None:
    """Against `init_lora_qera_4bit` with scipy's root of C, float64, 1e-7; s = 1/2 as there."""
    linalg = pytest.importorskip("scipy.linalg")
    W0 = decaying(48, 0.5, 0).double()
    X = torch.randn(300, 48, generator=torch.Generator().manual_seed(2)).double()
    X = X * torch.arange(1, 49) ** -0.5 + 0.2
    C, stored = X.T @ X / 300, find_part("base", "nf4").load().storing(W0.dtype)
    root = torch.from_numpy(linalg.sqrtm(C.numpy()).real.copy())
    root = root if mode == "exact" else C.diag().sqrt().diag()
    U, S, Vh = torch.linalg.svd((W0 - stored(W0)) @ root, full_matrices=False)
    L, R = U[:, :8] * S[:8], torch.linalg.solve(root, Vh[:8].T).T
    init = find_part("init", "qera").load(mode=mode)
    found = init.reduce_on(stored, W0, {"covariance": C}, 8)
    start = init.start_on(stored, W0, 8, 0.5, G, found)
    for own, theirs in ((start.A.abs(), R.abs()), (start.B.abs(), (L / 0.5).abs()),
                        (0.5 * start.B @ start.A, L @ R)):  # fmt: skip
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-7 * theirs.abs().max().item())


# in a model

JOINT = ["loftq", "qpissa", "qera"]


def attached(model: nn.Module, preset: str, **settings: Any) -> variants.Adapter:
    return variants.attach(model, preset, rank=4, targets=TARGETS, **calibrated(preset), **settings)


def disturbed(adapter: variants.Adapter) -> variants.Adapter:
    for t in adapter.parameters():
        t.data += 0.05
    return adapter


@pytest.mark.parametrize("preset", JOINT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_and_restored_is_what_the_init_chose(
    preset: str, dtype: torch.dtype
) -> None:
    """Bit for bit, in the model's dtype: Q = nf4(W0 - B' A'), disabled Q + B0 A0; the same after
    saving, loading under another seed, and through a state_dict."""
    model, x = Toy().to(dtype), torch.randn(5, 24).to(dtype)
    W0 = {name: getattr(model, name).weight.detach().clone() for name in TARGETS}
    extra = calibrated(preset)
    for batch in extra.get("calibration", []):
        batch["x"] = batch["x"].to(dtype)
    adapter = variants.attach(model, preset, rank=4, targets=TARGETS, **extra)
    start = model(x)
    disturbed(adapter)
    for name, layer in adapter.layers.items():
        W = W0[name]
        if layer.subtracted is not None:
            A0, B0 = layer.subtracted
            W = (W.float() - B0 @ A0).to(dtype)
        assert (layer.subtracted is None) == (preset == "qera")
        assert torch.equal(layer.W0, adapter.choice.base.store(W).dense())
        A0, B0 = layer.restoring  # type: ignore[misc]
        assert torch.equal(layer.original, (layer.W0 + B0 @ A0).to(dtype))
        error = (layer.original - W0[name]).float().norm()
        assert error < 0.9 * (adapter.choice.base.store(W0[name]).dense() - W0[name]).norm()
    with adapter.disabled():
        off = model(x)
    torch.testing.assert_close(off, start, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("preset", JOINT)
def test_a_loaded_adapter_has_the_very_same_base(preset: str, tmp_path: Path) -> None:
    model, x = Toy(), torch.randn(5, 24)
    adapter = disturbed(attached(model, preset))
    adapter.save(tmp_path)
    with forked_rng(7):
        loaded = variants.load(Toy(), tmp_path)
    states = model.state_dict(), loaded.model.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
    assert torch.equal(model(x), loaded.model(x))
    other = attached(Toy(), preset, seed=5)
    other.model.load_state_dict(states[0])
    with adapter.disabled(), other.disabled():
        assert torch.equal(model(x), other.model(x))
        off = model(x)
    W = adapter.layers["first"].weight.detach()
    assert torch.equal(loaded.merge().first.weight, W)
    torch.testing.assert_close(other.detach()(x), off)


def test_restoring_bytes_are_those_of_both_pairs() -> None:
    """T = 1 keeps the factors of its start, T = 2 those before it as well."""
    kept = []
    for T in (1, 2):
        layer = attached(Toy(), "loftq", init={"name": "loftq", "iterations": T}).layers["first"]
        kept.append([t.numel() for t in (*(layer.subtracted or ()), *(layer.own_restoring or ()))])
    assert kept == [[4 * 24, 20 * 4], [4 * 24, 20 * 4] * 2]
    layer = attached(Toy(), "qpissa").layers["first"]
    assert layer.own_restoring is None
    assert all(a is b for a, b in zip(layer.restoring, layer.subtracted, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", JOINT)
def test_a_head_that_stays_dense_starts_as_lora_does(preset: str) -> None:
    """No error to make up for, and A = B = 0 would never learn. PiSSA moves the head as ever."""
    model, x = Toy(), torch.randn(5, 24)
    before = model.lm_head(x)
    adapter = variants.attach(
        model, preset, rank=4, targets=["first", "lm_head"], **calibrated(preset)
    )
    head = adapter.layers["lm_head"]
    torch.testing.assert_close(model.lm_head(x), before)
    assert all(t.norm(dim=-1).max() > 0 for t in head.trained[:1])
    model(x).square().sum().backward()
    assert sum(t.grad.abs().max().item() > 0 for t in head.trained) >= 1  # type: ignore[union-attr]
    assert (head.subtracted is None) == (preset != "qpissa")


def test_peft_s_format_says_what_it_can(tmp_path: Path) -> None:
    """A base that was not moved before it was stored is PEFT's own; one that was is refused."""
    peft = pytest.importorskip("peft", reason="the extra `dev` brings peft")
    for preset, settings in (("loftq", {"init": {"name": "loftq", "iterations": 1}}), ("qera", {})):
        adapter, x = disturbed(attached(Toy(), preset, **settings)), torch.randn(5, 24)
        with pytest.warns(UserWarning, match=f"trained on base {adapter.choice.base.name}"):
            adapter.save_peft(tmp_path / preset)
        stored = Toy()
        for name in ("first", "second", "third"):
            W = getattr(stored, name).weight
            W.data = adapter.choice.base.store(W.data).dense()
        theirs = peft.PeftModel.from_pretrained(stored, tmp_path / preset)
        torch.testing.assert_close(theirs(x), adapter.model(x))
    for preset in ("loftq", "qpissa"):
        with pytest.raises(variants.Incompatible, match="moved the weight before base nf4"):
            attached(Toy(), preset).save_peft(tmp_path / "none")


# said where it is built


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: attached(Toy(), "lora", init="loftq"), "init loftq needs a lossy base"),
        (lambda: attached(Toy(), "qera", base="fp32"), "init qera needs a lossy base"),
        (lambda: attached(Toy(), "qpissa", base="dense"), "lossy base for iterations=5, not dense"),
        (
            lambda: attached(Toy(), "loftq", form="hira", scale="none"),
            "loftq needs a low-rank form",
        ),
        (lambda: attached(Toy(), "loftq", allocation="dylora"), "an init that leaves the base"),
        (lambda: attached(Toy(), "loftq", init={"name": "loftq", "iterations": 0}), "iterations=0"),
        (lambda: attached(Toy(), "loftq", init={"name": "loftq", "rule": "no"}), "rule=no; choice"),
        (lambda: attached(Toy(), "qera", init={"name": "qera", "mode": "no"}), "mode=no; choices"),
        (lambda: attached(Toy(), "lora", init={"name": "pissa", "iterations": 0}), "iterations=0"),
    ],
)
def test_what_cannot_be_is_said(build: Callable[[], Any], said: str) -> None:
    with pytest.raises(variants.Incompatible, match=said):
        build()


def test_too_few_inputs_for_the_rank_are_said() -> None:
    few, init = [{"x": torch.randn(3, 24)}], {"name": "qera", "mode": "exact"}
    with pytest.raises(variants.Incompatible, match="fewer than rank=4 directions"):
        variants.attach(Toy(), "qera", rank=4, targets=TARGETS, calibration=few, init=init)


def test_the_cache_of_statistics_tells_bases_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What QERA keeps of a layer is made from its stored weight."""
    from variants import _calibrate

    monkeypatch.setenv("LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(_calibrate, "CACHED_FROM", 1)
    starts = [attached(Toy(), "qera", base=base).layers["first"].params["B"]
              for base in ("nf4", "nf4_dq", "nf4")]  # fmt: skip
    assert len(list((tmp_path / "statistics").iterdir())) == 2
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])
