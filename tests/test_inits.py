"""Inits against the authors' formulas and PEFT, calibration, and ranks that an allocation gives.

Formulas are written here again from the official code, in float64 numpy, apart from the package.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import variants
from variants import _calibrate, _svd
from variants._adapter import choose, plan
from variants._registry import find_part

peft = pytest.importorskip("peft", reason="the extra `dev` brings peft")
transformers = pytest.importorskip("transformers")

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
SHAPES = [(96, 96), (256, 96), (96, 256), (32, 64), (172, 64), (64, 172), (21, 17), (17, 23)]


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(dtype)
    for p in model.parameters():
        if p.ndim == 2:  # larger than transformers' 0.02, so that layers differ
            p.data = torch.randn(p.shape, dtype=torch.float64).to(dtype) * 0.3
    return model


def text(size: int = 4, length: int = 12, seed: int = 1, padded: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (size, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(size):
            mask[row, length - row :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


BATCHES = [text(seed=seed) for seed in (1, 2, 3)]


class One(nn.Module):
    """One matrix and a loss."""

    def __init__(self, m: int, n: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(m + n)
        self.layer = nn.Linear(n, m)
        self.layer.weight.data = torch.randn(m, n, generator=generator)
        self.layer.bias.data = torch.randn(m, generator=generator)
        self.to(dtype)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        out = self.layer(x)
        return out if y is None else {"loss": F.mse_loss(out.tanh(), y)}


def one_batch(m: int, n: int, dtype: torch.dtype = torch.float32, rows: int = 300) -> Any:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(rows, n, generator=generator) * torch.arange(1, n + 1) ** -0.5 + 0.3
    return {"x": x.to(dtype), "y": torch.randn(rows, m, generator=generator).to(dtype)}


def started(name: str, W0: Tensor, r: int, s: float, found: dict[str, Tensor], **settings: Any):
    """(A, B, init) of an init on one matrix, from unreduced statistics."""
    init = find_part("init", name).load(**settings)
    kept = init.reduce(W0, found, r) if found else {}
    start = init.start(W0, r, s, torch.Generator().manual_seed(4), kept)
    return start, init


def example(m: int = 20, n: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a gradient and inputs [500, n], in float64."""
    generator = torch.Generator().manual_seed(2)
    W, G, X = (torch.randn(*shape, generator=generator, dtype=torch.float64)
               for shape in ((m, n), (m, n), (500, n)))  # fmt: skip
    return W, G, X * torch.arange(1, n + 1) ** -1.0 + 0.5


def same(a: Any, b: Any, tolerance: float = 1e-9) -> None:
    a, b = (t.detach().numpy() if isinstance(t, Tensor) else np.asarray(t) for t in (a, b))
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), np.abs(a - b).max()


# the decompositions


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
@pytest.mark.parametrize(("which", "first"), [("top", 0), ("middle", 8), ("last", 16)])
def test_a_slice_is_that_of_the_full_decomposition(
    shape: tuple[int, int], which: str, first: int
) -> None:
    """Against numpy, float64: the part of M and the singular values, 1e-10."""
    M = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, S, Vh = np.linalg.svd(M.numpy(), full_matrices=False)
    cut = slice(first, first + 4)
    found = _svd.sliced(M, 4, which, "exact", torch.Generator())
    same(found[1], S[cut], 1e-10)
    A, B = _svd.balanced(*found, 0.5)
    same(0.5 * B @ A, (U[:, cut] * S[cut]) @ Vh[cut], 1e-10)
    same(A.norm(dim=1), B.norm(dim=0), 1e-10)


def test_random_slices_hang_on_the_seed_and_slices_do_not_share_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(_svd, "CACHED_FROM", 1)
    M = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    g = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    for which in _svd.SLICES:
        _svd.sliced(M, 4, which, "exact", g[0])
    assert len(list((tmp_path / "factors").iterdir())) == 4
    S = [_svd.sliced(M, 4, "random", "exact", own)[1] for own in g]
    assert torch.equal(S[0], S[1])
    assert not torch.equal(S[0], S[2])
    assert torch.equal(S[0], S[0].sort(descending=True).values)
    with pytest.raises(ValueError, match="slice"):
        _svd.sliced(M, 4, "first", "exact", g[0])


# where a model starts

SUBTRACTED = ["pissa", "milora", "olora", "init_ab", "lora_ga", "corda"]
UNTOUCHED = ["orthogonal", "gaussian", "mica", "eva"]
ELSEWHERE = ["lora_one", "gora", "kasa"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("preset", [*SUBTRACTED, *UNTOUCHED, *ELSEWHERE])
def test_starts_at_the_base_and_gives_it_back(preset: str, shape: tuple[int, int]) -> None:
    """Rank 8 on any shape: the base's outputs at the start and disabled, 1e-5 in fp32."""
    m, n = shape
    model, batch = One(m, n), one_batch(m, n)
    before = model(batch["x"]).detach()
    adapter = variants.attach(
        model, preset, rank=8, targets=["layer"],
        calibration=[batch] if needs(preset) else None,
    )  # fmt: skip
    at_start = model(batch["x"]).detach()
    moved = (at_start - before).abs().max() / before.abs().max()
    assert (moved > 1e-6) if preset in ELSEWHERE else (moved < 1e-5), moved
    with adapter.disabled():
        same(model(batch["x"]), before, 1e-5)
    layer = adapter.layers["layer"]
    assert (layer.subtracted is not None) == (preset in (*SUBTRACTED, "kasa"))
    assert layer.rank == 8


def needs(preset: str) -> bool:
    parts = choose(preset)
    return bool(parts.init.needs or parts.allocation.needs)


# inits from the weight


@pytest.mark.parametrize("shape", [(20, 24), (24, 20)])
def test_milora_is_the_last_r_triplets(shape: tuple[int, int]) -> None:
    """Against sufenlp/MiLoRA's `initialize_lora_layer`, mode min, float64, 1e-9."""
    W, s = example(*shape)[0], 0.5
    U, S, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    B = U[:, -4:] @ np.diag(np.sqrt(S[-4:] / s))
    A = np.diag(np.sqrt(S[-4:] / s)) @ Vh[-4:]
    start, _ = started("milora", W, 4, s, {})
    same(start.A.abs(), np.abs(A))
    same(start.B.abs(), np.abs(B))
    same(s * start.B @ start.A, s * B @ A)


@pytest.mark.parametrize("shape", [(20, 24), (24, 20)])
def test_olora_is_peft_s(shape: tuple[int, int]) -> None:
    """Against PEFT's `olora_init` (the author's), s = 2, fp32: factors and base, 1e-5."""
    model = One(*shape)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="olora", target_modules=["layer"])
    their = peft.get_peft_model(One(*shape), config).base_model.model.layer
    adapter = variants.attach(model, "olora", rank=4, alpha=8, targets=["layer"])
    layer = adapter.layers["layer"]
    same(layer.params["A"], their.lora_A["default"].weight, 1e-5)
    same(layer.params["B"], their.lora_B["default"].weight, 1e-5)
    same(layer.W0, their.base_layer.weight, 1e-5)


def test_mica_is_peft_s() -> None:
    """Against PEFT's `mica`, fp32: B, forward and the gradient of A, 1e-5; B is frozen in both."""
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="mica", target_modules=["layer"])
    their = peft.get_peft_model(One(20, 24), config)
    model, x = One(20, 24), one_batch(20, 24)["x"]
    adapter = variants.attach(model, "mica", rank=4, alpha=8, targets=["layer"])
    p, other = adapter.layers["layer"].params, their.base_model.model.layer
    same(p["B"].abs(), other.lora_B["default"].weight.abs(), 1e-5)
    assert not p["B"].requires_grad and not other.lora_B["default"].weight.requires_grad
    assert adapter.num_trainable == 4 * 24
    other.lora_A["default"].weight.data = torch.randn(4, 24)
    p["A"].data.copy_(other.lora_A["default"].weight)
    p["B"].data.copy_(other.lora_B["default"].weight)
    outs = [model(x), their(x)]
    same(*outs, 1e-5)
    for out in outs:
        out.square().sum().backward()
    same(p["A"].grad, other.lora_A["default"].weight.grad, 1e-5)


def test_init_ab_draws_both_within_the_width_s_bound() -> None:
    """Against lr-matters-lora's init_AB_util: both uniform, both bounds 1/sqrt(in_features)."""
    W = torch.zeros(500, 400)
    start, _ = started("init_ab", W, 50, 1.0, {}, a=2.0)
    for factor, bound in ((start.A, 2 / 20), (start.B, 1 / 20)):
        assert 0.99 * bound < factor.abs().max() <= bound
        assert abs(factor.std() / (bound / 3**0.5) - 1) < 0.02
        assert abs(factor.mean()) < 0.02 * bound


@pytest.mark.parametrize("r", [1, 4, 5])
def test_orthogonal_multiplies_to_zero(r: int) -> None:
    """PEFT's `orthogonal_init` for an even rank: B A = 0, and its deviations, 5 % of them."""
    start, _ = started("orthogonal", torch.zeros(300, 200, dtype=torch.float64), r, 1.0, {})
    assert (start.B @ start.A).abs().max() < 1e-7
    if r == 4:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, init_lora_weights="orthogonal", target_modules=["layer"])
        their = peft.get_peft_model(One(300, 200), config).base_model.model.layer
        assert (their.lora_B["default"].weight @ their.lora_A["default"].weight).abs().max() < 1e-5
        for key, mine in (("lora_A", start.A), ("lora_B", start.B)):
            other = getattr(their, key)["default"].weight
            assert abs(mine.norm() / other.norm() - 1) < 0.1


# inits from the gradient


def test_lora_ga_by_the_authors_rule() -> None:
    """Against Outsider565/LoRA-GA's `lora_ga_init` (ArB2r, stable), float64, 1e-9."""
    W, G, _ = example()
    m, r, gamma, s = len(W), 4, 16, 0.7
    U, _, V = np.linalg.svd(G.numpy(), full_matrices=False)
    B = U[:, r : 2 * r] * m**0.25 / gamma**0.5
    A = V[:r, :] * m**0.25 / gamma**0.5
    start, _ = started("lora_ga", W, r, s, {"gradient": G})
    same(start.A.abs(), np.abs(A))
    same(start.B.abs(), np.abs(B))
    same(start.subtract[1], start.B, 0)
    flipped, _ = started("lora_ga", W, r, s, {"gradient": G}, direction="A2rBr", scale="gd")
    same(flipped.A.abs(), np.abs(V[r : 2 * r]) / s)
    mixed, _ = started("lora_ga", W, r, s, {"gradient": G}, direction="ArBr", scale="unit")
    same(mixed.B.abs(), np.abs(U[:, 0 : 2 * r : 2]))
    same(mixed.A.abs(), np.abs(V[1 : 2 * r : 2]))


@pytest.mark.parametrize("scale", ["stable", "gd"])
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_by_peft_s_rule(direction: str, scale: str) -> None:
    """Against PEFT's `lora_ga_init` from the same gradient, fp32: both factors, 1e-4.

    At rank 5 its `svd_lowrank` sees all 20 directions, so that it is exact.
    """
    config = peft.LoraConfig(
        r=5, lora_alpha=10, init_lora_weights="lora_ga", target_modules=["layer"],
        lora_ga_config=peft.LoraGAConfig(
            direction=direction, scale={"gd": "gd_scale"}.get(scale, scale), stable_gamma=16
        ),
    )  # fmt: skip
    base, G = One(20, 24), example()[1].float()
    base.layer._peft_loraga_grad = G.clone()
    their = peft.get_peft_model(base, config).base_model.model.layer
    start, _ = started("lora_ga", base.layer.weight.data, 5, 2.0, {"gradient": G},
                       rule="peft", direction=direction, scale=scale)  # fmt: skip
    same(start.A.abs(), their.lora_A["default"].weight.abs(), 1e-4)
    same(start.B.abs(), their.lora_B["default"].weight.abs(), 1e-4)


def test_lora_one_is_a_step_down_the_gradient() -> None:
    """Against YuanheZ/LoRA-One's `reinit_lora_modules` (stable), float64, 1e-9."""
    W, G, _ = example()
    r, gamma = 4, 128
    U, S, V = np.linalg.svd(-G.numpy(), full_matrices=False)
    B = U[:, :r] @ np.diag(np.sqrt(S[:r])) / np.sqrt(S[0]) / gamma**0.5
    A = np.diag(np.sqrt(S[:r])) @ V[:r, :] / np.sqrt(S[0]) / gamma**0.5
    start, _ = started("lora_one", W, r, 5.0, {"gradient": G})
    same(start.A.abs(), np.abs(A))
    same(start.B @ start.A, B @ A)
    assert start.subtract is None


def test_gora_compresses_the_gradient() -> None:
    """Against hhnqqq/MyTransformers' `grad_compress_init` (scaling_by_lr), float64, 1e-6."""
    W, G, _ = example()
    r, n, alpha, lr = 4, W.shape[1], 16, 5e-2
    scale_rank = r**0.5
    found = {"gradient": G}
    start, _ = started("gora", W, r, alpha / scale_rank, found, sign="code", gamma=lr)
    A = start.A.numpy()
    B = G.numpy() @ (A.T @ np.linalg.pinv(A @ A.T + 1e-8 * np.eye(r)))
    B *= (lr / np.sqrt(r / n)) * scale_rank / alpha
    same(start.B, B, 1e-6)
    descent, _ = started("gora", W, r, alpha / scale_rank, found, gamma=lr)
    assert torch.equal(descent.B, -start.B) and torch.equal(descent.A, start.A)


# inits from the inputs


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_corda_by_the_authors_formula(mode: str) -> None:
    """Against iboing/CorDA's `calib_cov_distribution` and `decompose_to_adapter`: 1e-7."""
    W, _, X = example()
    samples = [X[:200].numpy(), X[200:].numpy()]
    C = sum((x / abs(x.max())).T @ (x / abs(x.max())) for x in samples) / len(samples)
    fixed = C + np.eye(24) * C.diagonal().mean() * 0.01
    U, S, Vh = np.linalg.svd(W.numpy() @ fixed, full_matrices=False)
    V = Vh @ np.linalg.inv(fixed)
    cut = slice(0, 4) if mode == "instruction" else slice(-4, None)
    A, B = V[cut] * np.sqrt(S[cut])[:, None], U[:, cut] * np.sqrt(S[cut])
    start, _ = started("corda", W, 4, 1.0, {"scaled_covariance": torch.tensor(C)}, mode=mode)
    same(start.A.abs(), np.abs(A), 1e-7)
    same(start.B.abs(), np.abs(B), 1e-7)
    same(start.B @ start.A, B @ A, 1e-7)


@pytest.mark.parametrize(("mode", "method"), [("instruction", "ipm"), ("knowledge", "kpm")])
def test_corda_is_peft_s(mode: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way against PEFT's `preprocess_corda`, samples one by one: B A and A, 1e-4."""
    # peft 0.21 takes `dataclass` from attrs, which it does not list among its requirements
    monkeypatch.setitem(sys.modules, "attr", dataclasses)
    from peft.tuners.lora.corda import preprocess_corda

    batches = [text(size=1, length=40, seed=seed) for seed in (1, 2, 3)]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, init_lora_weights="corda", target_modules=TARGETS,
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=method),
    )  # fmt: skip
    model = llama()
    preprocess_corda(model, config, run_model=lambda: [model(**b) for b in batches])
    their = peft.get_peft_model(model, config).base_model.model
    init = {"name": "corda", "mode": mode}
    adapter = variants.attach(
        llama(), "corda", rank=4, alpha=8, targets=TARGETS, init=init, calibration=batches
    )
    for name, layer in adapter.layers.items():
        other = their.get_submodule(name)
        A, B = (getattr(other, f"lora_{k}")["default"].weight for k in "AB")
        same(layer.params["B"] @ layer.params["A"], B @ A, 1e-4)
        same(layer.params["A"].abs(), A.abs(), 1e-4)


def test_eva_is_a_principal_component_analysis_of_the_inputs() -> None:
    """Against a float64 SVD of the centred inputs and PEFT's IncrementalPCA: 1e-6."""
    from peft.utils.incremental_pca import IncrementalPCA

    X = example()[2]
    found = {"covariance": X.mT @ X / len(X), "mean": X.mean(0)}
    _, S, Vh = np.linalg.svd((X - X.mean(0)).numpy(), full_matrices=False)
    start, _ = started("eva", torch.zeros(20, 24).double(), 4, 1.0, found)
    same(start.A.abs(), np.abs(Vh[:4]), 1e-6)
    assert start.B.abs().max() == 0
    rule = find_part("allocation", "eva").load(rho=2.0)
    ratios = rule.reduce(torch.zeros(20, 24), found, 3)["ratios"]
    same(ratios, (S**2 / (S**2).sum())[:6], 1e-6)
    their = IncrementalPCA(n_components=24)
    for part in X.clone().split(100):
        their.partial_fit(part)
    same(ratios, their.explained_variance_ratio_[:6], 1e-6)
    same(start.A.abs(), their.components_[:4].abs(), 1e-5)
    plain, _ = started("eva", torch.zeros(20, 24).double(), 2, 1.0, found, centered=False)
    same(plain.A.abs(), np.abs(np.linalg.svd(X.numpy(), full_matrices=False)[2][:2]), 1e-6)


@pytest.mark.parametrize("name", ["corda", "eva", "lora_ga", "lora_one", "gora"])
def test_what_is_kept_for_more_directions_holds_those_of_fewer(name: str) -> None:
    """An allocation may give any rank up to its `most`: the start is that of the rank itself."""
    W, G, X = example()
    moments = {"covariance": X.mT @ X / len(X), "mean": X.mean(0), "gradient": G}
    moments["scaled_covariance"] = moments["covariance"]
    for mode in ("instruction", "knowledge") if name == "corda" else (None,):
        init = find_part("init", name).load(**({"mode": mode} if mode else {}))
        own = {k: moments[k] for k in init.needs}
        few, many = (
            init.start(W, 3, 1.0, torch.Generator().manual_seed(4), init.reduce(W, own, r))
            for r in (3, 9)
        )
        same(many.A.abs(), few.A.abs(), 1e-7)
        if few.B.any():
            same(many.B.abs(), few.B.abs(), 1e-7)


# KaSA


def kasa_pair() -> tuple[Any, Any, variants.Adapter]:
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["layer"],
        kasa_config=peft.tuners.lora.config.KasaConfig(beta=0.1, gamma=0.2),
    )  # fmt: skip
    their, model = peft.get_peft_model(One(20, 24), config), One(20, 24)
    adapter = variants.attach(
        model, "kasa", rank=4, alpha=8, targets=["layer"],
        allocation={"name": "kasa", "beta": 0.1, "gamma": 0.2, "rule": "peft"},
    )  # fmt: skip
    other, p = their.base_model.model.layer, adapter.layers["layer"].params
    other.lora_B["default"].weight.data = torch.randn(20, 4)
    with torch.no_grad():
        for key, t in (("A", other.lora_A["default"].weight), ("d", other.lora_diag["default"]),
                       ("B", other.lora_B["default"].weight)):  # fmt: skip
            p[key].copy_(t)
    return model, their, adapter


def test_kasa_is_peft_s() -> None:
    """Truncated base, forward, gradients and regularization against PEFT's, fp32, 1e-5."""
    model, their, adapter = kasa_pair()
    layer, other = adapter.layers["layer"], their.base_model.model.layer
    same(layer.W0, other.base_layer.weight, 1e-5)
    x = one_batch(20, 24)["x"]
    outs = [model(x), their(x)]
    same(*outs, 1e-5)
    penalties = [adapter.penalty(), their.base_model._get_kasa_loss()]
    same(*penalties, 1e-5)
    for out, penalty in zip(outs, penalties, strict=True):
        (out.square().mean() + penalty).backward()
    for key, t in (("A", other.lora_A["default"].weight), ("d", other.lora_diag["default"]),
                   ("B", other.lora_B["default"].weight)):  # fmt: skip
        same(layer.params[key].grad, t.grad, 1e-5)


def test_kasa_s_penalty_and_truncation_as_the_authors_code_has_them() -> None:
    """Against juyongjiang/KaSA's main.py `loss_fn`: mean over matrices, wide Gram, 1e-6."""
    adapter = variants.attach(llama(), "kasa", rank=4, targets=TARGETS)
    l2 = l3 = 0.0
    for layer in adapter.layers.values():
        layer.params["B"].data.normal_(generator=torch.Generator().manual_seed(1))
        A, B, d = (layer.params[k].detach().double().numpy() for k in "ABd")
        l2 += (d**2).sum()
        l3 += np.linalg.norm(A.T @ A - np.eye(A.shape[1]))
        l3 += np.linalg.norm(B @ B.T - np.eye(len(B)))
    same(adapter.penalty(), np.float32((1e-4 * l2 + 1e-3 * l3) / len(adapter.layers)), 1e-6)
    for m, n, dropped in ((20, 24, 0), (20, 22, 2), (24, 20, 4)):
        init = find_part("init", "kasa").load(rule="code")
        start = init.start(example(m, n)[0], 4, 1.0, torch.Generator(), {})
        assert dropped == (0 if start is None else len(start.subtract[0]))


# calibration


def statistics(
    model: Any, batches: Any, wanted: tuple[str, ...], targets: Any = "all-linear"
) -> dict[str, dict[str, Tensor]]:
    """The unreduced statistics of each layer."""
    planned = plan(model, choose("lora", 2), targets)
    groups = _calibrate._groups(planned, wanted)
    return {
        item.site.name: own
        for group in groups
        for item, own in _calibrate._measure(model, group, batches, wanted)
    }


def naive(model: Any, batches: Any, path: str) -> dict[str, Tensor]:
    """The same of one layer, from its inputs as a hook sees them and from a plain backward."""
    module, inputs, grads = model.get_submodule(path), [], []
    hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        grads.append(module.weight.grad.clone())
    hook.remove()
    model.zero_grad()
    samples = [
        x[row][batch["attention_mask"][row] == 1]
        for x, batch in zip(inputs, batches, strict=True)
        for row in range(len(x))
        if batch["attention_mask"][row].any()
    ]
    X = torch.cat(samples)
    scaled = [x / x.max().abs() for x in samples]
    return {
        "covariance": X.mT @ X / len(X),
        "mean": X.mean(0),
        "scaled_covariance": sum(x.mT @ x for x in scaled) / len(scaled),  # type: ignore[dict-item]
        "gradient": sum(grads) / len(grads),  # type: ignore[dict-item]
    }


@pytest.mark.parametrize("padded", [False, True])
def test_statistics_are_those_of_a_plain_pass(padded: bool) -> None:
    """Inputs without padding and mean gradients, against hooks and autograd, float64, 1e-10."""
    model = llama(torch.float64).eval()
    batches = [text(seed=seed, padded=padded) for seed in (1, 2)]
    found = statistics(model, batches, _calibrate.STATISTICS)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        for key, wanted in naive(model, batches, path).items():
            same(found[path][key], wanted, 1e-10)


def test_group_by_group_equals_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = statistics(llama(), BATCHES, _calibrate.STATISTICS)
    monkeypatch.setattr(_calibrate, "HELD", 1)
    assert len(list(_calibrate._groups(plan(llama(), choose("lora", 2)), ("gradient",)))) == 14
    pieces = statistics(llama(), BATCHES, _calibrate.STATISTICS)
    for name, own in whole.items():
        assert all(torch.equal(own[k], pieces[name][k]) for k in own), name


def test_flattened_tokens_lose_their_padding() -> None:
    """A layer that gets [batch x length, n] is read as the batch that it is."""
    layer, mask = nn.Linear(5, 3), torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    x = torch.randn(3, 3, 5)
    flat = _calibrate._samples(layer, x.view(9, 5), mask)
    deep = _calibrate._samples(layer, x, mask)
    assert [len(s) for s in flat] == [len(s) for s in deep] == [2, 1]
    assert all(torch.equal(a, b) for a, b in zip(flat, deep, strict=True))
    assert [len(s) for s in _calibrate._samples(layer, x[0], mask)] == [3]


def test_the_model_comes_back_as_it_was() -> None:
    """Mode, what asks for gradients, gradients themselves and hooks; after an error too."""
    for broken in (False, True):
        model = llama().train()
        model.model.layers[0].eval()
        model.lm_head.weight.requires_grad_(False)
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.grad = torch.ones_like(weight)
        modes = [m.training for m in model.modules()]
        batches = [BATCHES[0], {"input_ids": BATCHES[0]["input_ids"]}] if broken else BATCHES
        if broken:
            with pytest.raises(variants.Incompatible, match="gave no loss"):
                statistics(model, batches, _calibrate.STATISTICS)
        else:
            statistics(model, batches, _calibrate.STATISTICS)
        assert [m.training for m in model.modules()] == modes
        assert not model.lm_head.weight.requires_grad and weight.requires_grad
        assert torch.equal(weight.grad, torch.ones_like(weight))
        assert all(p.grad is None for p in model.parameters() if p is not weight)
        assert not any(m._forward_pre_hooks for m in model.modules())


def gpt2() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=24, n_layer=1, n_head=2)
    ).double()


def test_gpt2_s_transposed_and_fused_layers() -> None:
    """Conv1D's gradient is [out, in]; a slice of the fused layer has its own rows of it."""
    model, batches = gpt2().eval(), [text(seed=1)]
    found = statistics(model, batches, ("covariance", "gradient"), ["q", "v", "c_fc"])
    names = ("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc")
    fused, single = (naive(model, batches, name) for name in names)
    same(found[f"{names[0]}.q"]["gradient"], fused["gradient"].mT[:24], 1e-10)
    same(found[f"{names[0]}.v"]["gradient"], fused["gradient"].mT[48:], 1e-10)
    same(found[f"{names[0]}.v"]["covariance"], fused["covariance"], 1e-10)
    same(found[names[1]]["gradient"], single["gradient"].mT, 1e-10)
    for preset in ("corda", "lora_ga", "eva"):
        model = gpt2().eval()
        with torch.no_grad():
            before = model(**batches[0]).logits
            variants.attach(model, preset, rank=2, targets=["q", "v", "c_fc"], calibration=batches)
            same(model(**batches[0]).logits, before, 1e-9)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(_calibrate, "CACHED_FROM", 1)
    return tmp_path / "statistics"


@pytest.mark.parametrize("preset", ["corda", "eva", "gora", "lora_ga"])
def test_a_cache_hit_equals_measuring(
    preset: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = variants.attach(llama(), preset, rank=2, calibration=BATCHES).tensors()
    (file,) = cache.iterdir()
    monkeypatch.setattr(_calibrate, "_measure", None)  # a second measurement would fail
    again = variants.attach(llama(), preset, rank=2, calibration=BATCHES).tensors()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)
    monkeypatch.undo()
    monkeypatch.setenv("LORA_CACHE", str(cache.parent))
    monkeypatch.setattr(_calibrate, "CACHED_FROM", 1)
    file.write_bytes(file.read_bytes()[:50])  # cut short: measured again, and replaced
    healed = variants.attach(llama(), preset, rank=2, calibration=BATCHES).tensors()
    assert all(torch.equal(first[k], healed[k]) for k in first)
    assert [file.stat().st_size > 50 for file in cache.iterdir()] == [True]


def test_the_cache_tells_apart_what_differs(cache: Path) -> None:
    """Weights, batches and their shape, settings, rank, what an allocation may ask for."""

    def attach(model: Any = None, batches: Any = BATCHES, preset: str = "eva", **axes: Any) -> None:
        model = llama() if model is None else model
        variants.attach(model, preset, calibration=batches, **({"rank": 2} | axes))

    other = llama()
    other.model.norm.weight.data[3] += 1e-3
    flat = [{k: t.view(2, 24) for k, t in b.items()} for b in BATCHES]
    rope = llama()
    rope.config.rope_theta = 77.0
    attach()
    attach()
    assert len(list(cache.iterdir())) == 1
    for count, change in enumerate(
        (
            {"model": other}, {"model": rope}, {"batches": flat}, {"batches": BATCHES[:2]},
            {"rank": 3}, {"allocation": {"name": "eva", "rho": 1.0}}, {"allocation": "uniform"},
            {"init": {"name": "eva", "centered": False}}, {"targets": ["q"]},
        )
    ):  # fmt: skip
        attach(**change)
        assert len(list(cache.iterdir())) == count + 2, change


def test_slices_that_share_a_covariance_can_be_cached(cache: Path) -> None:
    """A part that keeps the statistics as they are gets one tensor for q, k and v."""
    kept = ({"a": {"covariance": torch.eye(3)}}, {})
    kept[0]["b"] = dict(kept[0]["a"])
    kept[0]["c"] = {"covariance": torch.ones(6, 3)[:3]}
    _calibrate._write(cache / "x.safetensors", kept)
    model = nn.ModuleDict({k: nn.Linear(3, 3) for k in "abc"})
    found = _calibrate._read(cache / "x.safetensors", model, plan(model, choose("lora", 1)))
    assert found is not None
    assert all(torch.equal(found[0][k]["covariance"], kept[0][k]["covariance"]) for k in "abc")


def test_small_models_and_large_statistics_leave_no_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_calibrate, "CACHED_TO", 10)
    variants.attach(llama(), "eva", rank=2, calibration=BATCHES)
    monkeypatch.setattr(_calibrate, "CACHED_FROM", 10**9)
    variants.attach(llama(), "eva", rank=2, calibration=BATCHES)
    assert not cache.exists() or not list(cache.iterdir())


def test_an_endless_stream_is_left_after_the_batches_asked_for() -> None:
    drawn = []

    def stream() -> Iterator[dict[str, Tensor]]:
        for seed in itertools.count(1):
            drawn.append(seed)
            yield text(seed=seed)

    init = {"name": "lora_ga", "batches": 3}
    variants.attach(llama(), "lora_ga", init=init, rank=2, calibration=stream())
    assert drawn == [1, 2, 3]
    parts = {axis: {"name": "eva", "batches": k} for axis, k in (("init", 2), ("allocation", 5))}
    variants.attach(llama(), "eva", rank=2, calibration=stream(), **parts)
    assert drawn == [1, 2, 3, 1, 2, 3, 4, 5]


def test_errors_are_said_in_the_user_s_words() -> None:
    nan = llama()
    nan.model.layers[0].self_attn.v_proj.weight.data[0, 0] = float("nan")
    none = [{k: b[k] for k in ("input_ids", "attention_mask")} for b in BATCHES]
    for model, preset, settings, message in (
        (llama(), "eva", {}, "init eva needs calibration batches, for the covariance and the mean"),
        (llama(), "eva", {"calibration": []}, "no batches"),
        (llama(), "lora_ga", {"calibration": none}, "gave no loss; put labels"),
        (nan, "eva", {"calibration": BATCHES}, "covariance of model.layers.0.self_attn.o_proj"),
        (llama(), "eva", {"calibration": BATCHES, "targets": "embeddings"}, "cannot be measured"),
        (llama(), "lora_ga", {"calibration": BATCHES, "rank": 9}, "takes 18 directions"),
        (llama(), "lora", {"init": {"name": "lora_ga", "direction": "up"}}, "ArB2r, A2rBr, ArBr"),
        (llama(), "lora", {"init": {"name": "corda", "mode": "kpm"}}, "instruction, knowledge"),
        (llama(), "lora", {"init": {"name": "milora", "slice": "min"}}, "last, middle"),
        (llama(), "lora", {"init": {"name": "gaussian", "rule": "x"}}, "fan_in, rank"),
        (llama(), "kasa", {"rank": 32, "targets": ["q_proj"]}, "would drop all"),
    ):
        trained = [p.requires_grad for p in model.parameters()]
        with pytest.raises(variants.Incompatible, match=message):
            variants.attach(model, preset, **({"rank": 2} | settings))
        assert [p.requires_grad for p in model.parameters()] == trained
        assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_patches_of_a_convolution_are_its_inputs() -> None:
    """Against the plain definition of a convolution; a grouped one is refused."""
    conv, x = nn.Conv2d(3, 4, 2, bias=False), torch.randn(2, 3, 5, 5)
    samples = _calibrate._samples(conv, x, None)
    assert [tuple(s.shape) for s in samples] == [(16, 12)] * 2
    same(samples[1] @ conv.weight.flatten(1).mT, conv(x)[1].flatten(1).mT, 1e-5)
    model = nn.Sequential(nn.Conv2d(4, 4, 2, groups=2))
    batches = [{"input": torch.randn(1, 4, 5, 5)}]
    with pytest.raises(variants.Incompatible, match="those of 0 cannot be measured"):
        variants.attach(model, "eva", rank=2, targets="0", calibration=batches)


# ranks that an allocation gives


def uneven(preset: str = "eva", **settings: Any) -> tuple[Any, variants.Adapter]:
    """A model whose layers' inputs and gradients differ much, so that their ranks do."""
    model = llama()
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[:3] *= 30
        model.model.layers[1].self_attn.v_proj.weight *= 5
    fresh = llama()
    fresh.load_state_dict(model.state_dict())
    adapter = variants.attach(
        model, preset, rank=4, targets=TARGETS, calibration=BATCHES, **settings
    )
    return fresh, adapter


def test_eva_keeps_the_budget_the_cap_and_the_scale() -> None:
    """Ranks as by the official `_get_rank_distribution` from float64 ratios."""
    fresh, adapter = uneven()
    ratios = {}
    for item in plan(fresh, choose("lora", 4), TARGETS):
        inputs = naive(fresh.eval(), BATCHES, item.site.path)
        C = (inputs["covariance"] - torch.outer(inputs["mean"], inputs["mean"])).double().numpy()
        ratios[item.site.name] = np.linalg.eigvalsh(C)[::-1][:8] / C.trace()
    pairs = [(v, name) for name, own in ratios.items() for v in own]
    pairs.sort(key=lambda pair: -pair[0])
    wanted = dict.fromkeys(ratios, 0)
    for _, name in pairs[: 4 * len(ratios)]:
        wanted[name] += 1
    ranks = adapter.ranks()
    assert ranks == {name: r for name, r in wanted.items() if r > 0}
    assert (
        sum(ranks.values()) == 4 * 8 and max(ranks.values()) <= 8 and len(set(ranks.values())) > 1
    )
    assert {layer.full_s for layer in adapter.layers.values()} == {1 / 4}
    for name, layer in adapter.layers.items():
        assert layer.params["A"].shape[0] == layer.rank == ranks[name]
    same_ranks = uneven(allocation={"name": "eva", "rho": 1.0})[1].ranks()
    assert set(same_ranks.values()) == {4}


def test_gora_s_ranks_share_the_trained_numbers() -> None:
    """Against `get_allocated_rank` (union_mean, moderate) between r/2 and 4r; s = alpha/sqrt(r)."""
    fresh, adapter = uneven("gora")
    importance, features = {}, {}
    for item in plan(fresh, choose("lora", 4), TARGETS):
        G = naive(fresh.eval(), BATCHES, item.site.path)["gradient"].double()
        W = fresh.get_submodule(item.site.path).weight.double()
        importance[item.site.name] = (W * G).abs().mean().item()
        features[item.site.name] = sum(item.shape)
    total, budget = sum(importance.values()), sum(f * 4 for f in features.values())
    for name, rank in adapter.ranks().items():
        wanted = round(budget * importance[name] / total) // features[name]
        assert rank == min(max(wanted, 2), 16)
        assert adapter.layers[name].full_s == pytest.approx(16 / rank**0.5)
    assert len(set(adapter.ranks().values())) > 1


@pytest.mark.parametrize("preset", ["eva", "gora"])
def test_unequal_ranks_come_back_from_both_formats(preset: str, tmp_path: Path) -> None:
    """Saved here and loaded, to the bit; saved as PEFT's and loaded here and by PEFT, 1e-5."""
    fresh, adapter = uneven(preset)
    for layer in adapter.layers.values():
        layer.params["B"].data.normal_(generator=torch.Generator().manual_seed(3))
    ids = BATCHES[0]["input_ids"]
    with torch.no_grad():
        wanted = adapter.model.eval()(ids).logits
        copies = [llama() for _ in range(3)]
        for copy in copies:
            copy.load_state_dict(fresh.state_dict())
        adapter.save(tmp_path / "own")
        loaded = variants.load(copies[0], tmp_path / "own")
        assert torch.equal(loaded.model.eval()(ids).logits, wanted)
        adapter.save_peft(tmp_path / "peft")
        from_peft = variants.load_peft(copies[1], tmp_path / "peft")
        same(from_peft.model.eval()(ids).logits, wanted, 1e-5)
        assert loaded.ranks() == from_peft.ranks() == adapter.ranks()
        their = peft.PeftModel.from_pretrained(copies[2], tmp_path / "peft")
        same(their.eval()(ids).logits, wanted, 1e-5)
    optimizer = loaded.optimizer(1e-3, steps=2)
    loaded.model(**BATCHES[0]).loss.backward()
    optimizer.step()
