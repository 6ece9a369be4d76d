"""Shared, spectral and multiplicative forms: equal to PEFT's layers from the same tensors.

Outputs and all gradients, relative to the largest entry, within 1e-5 in fp32.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import variants

torch.set_num_threads(1)
peft = pytest.importorskip("peft", reason="the extra `dev` brings peft")
LAYERS = ["first", "second"]


class Net(nn.Module):
    """Two linear layers of different shapes, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.first, self.second = nn.Linear(24, 16), nn.Linear(16, 24, bias=False)
        for p in self.parameters():
            p.data = 0.3 * torch.randn(p.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(x)))


# (our tensor's name, their tensor, theirs as ours, the gradient of theirs as that of ours)
Pair = tuple[str, Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def same(t: Tensor) -> Tensor:
    return t


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def ours_and_theirs(config: Any, preset: str, **settings: Any) -> tuple[variants.Adapter, Any]:
    torch.manual_seed(1)
    their = peft.get_peft_model(Net(), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for t in their.parameters():
            if t.requires_grad:
                t += 0.1 * torch.randn_like(t)
    own: dict[str, Any] = {"targets": LAYERS} | settings
    return variants.attach(Net(), preset, **own), their


def compare(
    ours: variants.Adapter, their: Any, pairs: Callable[[Any], list[Pair]], tolerance: float = 1e-5
) -> None:
    found = []
    for name, layer in ours.layers.items():
        for key, t, value, gradient in pairs(their.base_model.model.get_submodule(name)):
            layer.params[key].data = value(t.detach()).clone().reshape(layer.params[key].shape)
            found.append((layer.params[key], t, gradient, f"{name}.{key}"))
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    outputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    up = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
    y = [model(x) for model, x in zip((ours.model, their), outputs, strict=True)]
    for out in y:
        out.backward(up)
    assert error(y[0], y[1]) <= tolerance
    assert error(y[0].detach(), Net()(x)) > 1e-3  # away from the base
    assert error(outputs[0].grad, outputs[1].grad) <= tolerance  # type: ignore[arg-type]
    for own, t, gradient, what in found:
        if own.requires_grad:
            assert t.grad is not None and own.grad is not None, what
            wanted = gradient(t.grad).reshape(own.shape)
            assert error(own.grad, wanted) <= tolerance, what


def test_vera_is_peft_s() -> None:
    config = peft.VeraConfig(r=30, target_modules=LAYERS)
    ours, their = ours_and_theirs(
        config, "vera", rank=30, form={"name": "vera", "share": "largest"}
    )
    assert [tuple(t.shape) for t in next(iter(ours.shared.values())).values()] == [
        (30, 24), (24, 30)
    ]  # fmt: skip

    def pairs(layer: Any) -> list[Pair]:
        shared = {"A": layer.vera_A["default"], "B": layer.vera_B["default"]}
        own = {"d": layer.vera_lambda_d["default"], "b": layer.vera_lambda_b["default"]}
        return [(k, t, same, same) for k, t in (own | shared).items()]

    compare(ours, their, pairs)


def test_vera_shares_and_redraws() -> None:
    """Layers of one shape hold one pair; a saved adapter has none, another seed another one."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6))
    first = variants.attach(net, "vera", rank=4, targets=["0", "1", "2"])
    assert first.layers["0"].params["A"] is first.layers["1"].params["A"]
    assert first.layers["0"].params["A"] is not first.layers["2"].params["A"]
    assert set(first.tensors()) == {f"{i}.{k}" for i in range(3) for k in "bd"}
    assert first.num_trainable == 3 * 4 + 8 + 8 + 6
    pair = first.layers["0"].params["A"].clone()
    other = variants.attach(first.detach(), "vera", rank=4, targets=["0", "1", "2"], seed=1)
    assert not torch.equal(other.layers["0"].params["A"], pair)


def test_randlora_is_peft_s() -> None:
    """PEFT pairs column (k, j) of the scaled A with column (j, k) of B: an order of its own."""
    config = peft.RandLoraConfig(r=6, randlora_alpha=12, target_modules=LAYERS)
    form = {"name": "randlora", "rule": "peft"}
    ours, their = ours_and_theirs(config, "randlora", rank=6, alpha=12, form=form)

    def pairs(layer: Any) -> list[Pair]:
        def reordered(B: Tensor) -> Tensor:
            used = B[:, :3].flatten(1).view(24, 6, 3).mT  # both layers have ceil(16 / 6) bases
            return torch.cat([used, B[:, 3:]], 1)

        return [
            ("A", layer.randlora_A["default"].float(), lambda A: A[:, 0], same),
            ("B", layer.randlora_B["default"].float(), reordered, same),
            ("l", layer.randlora_lambda["default"], lambda t: t.T, lambda t: t.T),
            ("g", layer.randlora_gamma["default"], same, same),
        ]

    for layer in their.modules():
        if hasattr(layer, "randlora_A") and hasattr(layer, "base_layer"):
            for name in ("randlora_A", "randlora_B"):
                bases = getattr(layer, name)
                bases["default"] = bases["default"].float()
    compare(ours, their, pairs)


@pytest.mark.parametrize("basis", ["uniform", "sparse", "very_sparse"])
def test_randlora_s_start_is_peft_s(basis: str) -> None:
    flags = {"sparse": basis == "sparse", "very_sparse": basis == "very_sparse"}
    config = peft.RandLoraConfig(r=20, target_modules=["0"], **flags)
    net = nn.Sequential(nn.Linear(80, 90))
    their: Any = peft.get_peft_model(net, config).base_model.model[0]
    ours = variants.attach(
        nn.Sequential(nn.Linear(80, 90)), "randlora", rank=20, targets="0",
        form={"name": "randlora", "basis": basis},
    ).layers["0"].params  # fmt: skip
    for own, theirs in ((ours["A"], their.randlora_A), (ours["B"], their.randlora_B)):
        wanted = theirs["default"].float()
        assert own.numel() == wanted.numel()
        shares = [(t != 0).float().mean().item() for t in (own, wanted)]
        assert shares[0] == pytest.approx(shares[1], abs=0.03)
        assert own.std().item() == pytest.approx(wanted.std().item(), abs=0.02)
    gamma = their.randlora_gamma["default"]
    assert torch.equal(ours["g"], gamma) and gamma[0, 0].item() == pytest.approx(1 / 80)
    assert not ours["l"].any() and not their.randlora_lambda["default"].any()


def test_vblora_is_peft_s() -> None:
    config = peft.VBLoRAConfig(
        r=3, num_vectors=11, vector_length=4, topk=2, target_modules=LAYERS, vblora_dropout=0.0
    )
    form = {"name": "vblora", "vectors": 11, "length": 4}
    ours, their = ours_and_theirs(config, "vblora", rank=3, form=form)

    def pairs(layer: Any) -> list[Pair]:
        return [
            ("bank", layer.vblora_vector_bank["default"], same, same),
            ("logits_A", layer.vblora_logits_A["default"], same, same),
            ("logits_B", layer.vblora_logits_B["default"], same, same),
        ]

    compare(ours, their, pairs)


def test_vblora_s_logits_learn_faster() -> None:
    adapter = variants.attach(Net(), "vblora", targets=LAYERS)
    groups = adapter.optimizer(lr=1e-3, steps=10).param_groups
    assert [(len(g["params"]), g["lr"]) for g in groups] == [(1, 1e-3), (4, 1e-2)]
    assert adapter.num_trainable == 2048 * 256 + 2 * 2 * 4 * 2048
    with pytest.raises(variants.Incompatible, match=r"vblora.*not lora"):
        variants.attach(Net(), "lora", rank=2, targets=LAYERS, update="vblora")


def test_fourierft_is_peft_s() -> None:
    config = peft.FourierFTConfig(
        n_frequency=50, scaling=150.0, random_loc_seed=777, target_modules=LAYERS
    )
    form = {"name": "fourierft", "zero": True, "entries": 777}
    ours, their = ours_and_theirs(config, "fourierft", rank=50, alpha="150r", form=form)
    for layer in ours.layers.values():
        assert layer.s == 150 and not layer.params["c"].any()

    def pairs(layer: Any) -> list[Pair]:
        return [("c", layer.fourierft_spectrum["default"], same, same)]

    compare(ours, their, pairs)


def upper(b: int) -> tuple[int, Tensor, Tensor]:
    rows, columns = torch.triu_indices(b, b, 1)
    return b, rows, columns


@pytest.mark.parametrize("neumann", [0, 5])
def test_oft_is_peft_s(neumann: int) -> None:
    """PEFT's exact transform turns the other way than its series: there Q is -Q."""
    config = peft.OFTConfig(
        oft_block_size=8, r=0, target_modules=LAYERS, use_cayley_neumann=neumann > 0,
        num_cayley_neumann_terms=5,
    )  # fmt: skip
    form = {"name": "oft", "neumann": neumann}
    ours, their = ours_and_theirs(config, "oft", rank=8, form=form)
    sign = 1 if neumann else -1

    def pairs(layer: Any) -> list[Pair]:
        return [("Q", layer.oft_R["default"].weight, lambda t: sign * t, lambda t: sign * t)]

    compare(ours, their, pairs)


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_boft_is_peft_s(factors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT trains all of Q, takes its skew half, and turns the other way."""
    from peft.tuners.boft import layer as module

    class Blocks:  # in place of the CUDA extension, without which PEFT falls to one factor
        @staticmethod
        def apply(R: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*blocks) for blocks in R])

    monkeypatch.setattr(module, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(module, "FastBlockDiag", Blocks)
    config = peft.BOFTConfig(
        boft_block_size=2, boft_n_butterfly_factor=factors, target_modules=LAYERS
    )
    form = {"name": "boft", "depth": factors}
    ours, their = ours_and_theirs(config, "boft", rank=2, form=form)
    _, i, j = upper(2)

    def pairs(layer: Any) -> list[Pair]:
        return [
            ("Q", layer.boft_R["default"], lambda t: (0.5 * (t.mT - t))[..., i, j],
             lambda g: -2 * g[..., i, j]),
            ("g", layer.boft_s["default"], same, same),
        ]  # fmt: skip

    compare(ours, their, pairs)


def test_boft_has_larger_blocks_as_peft_has_them() -> None:
    """The permutations of blocks of 4, three factors of 16 and more."""
    from peft.tuners.boft.layer import BOFTLayer

    from variants.boft import permutation

    permuted: Any = BOFTLayer.block_butterfly_perm
    for n, b in ((64, 4), (48, 6), (16, 2)):
        for i in range(3):
            theirs = permuted(None, n, n // b // 2**i, b // 2, 2)
            assert torch.equal(permutation(n, b, i, torch.device("cpu")), theirs)


def test_hra_is_peft_s() -> None:
    config = peft.HRAConfig(r=4, target_modules=LAYERS)
    ours, their = ours_and_theirs(config, "hra", rank=4)

    def pairs(layer: Any) -> list[Pair]:
        return [("u", layer.hra_u["default"], same, same)]

    compare(ours, their, pairs)
    with pytest.raises(variants.Incompatible, match=r"rank=3.*even"):
        variants.attach(Net(), "hra", rank=3, targets=LAYERS)


def test_blocks_take_a_divisor_or_are_refused() -> None:
    net = nn.Sequential(nn.Linear(172, 8), nn.Linear(8, 20), nn.Linear(20, 7), nn.Linear(7, 4))
    places = ["0", "1", "2"]
    for preset, sizes in (("oft", [4, 8, 5]), ("boft", [2, 4, 2])):
        adapter = variants.attach(net, preset, rank=8, targets=places)
        assert [layer.rank for layer in adapter.layers.values()] == sizes
        net = adapter.detach()
    with pytest.raises(variants.Incompatible, match=r"7 inputs of 3 fall into no blocks of 2 to 4"):
        variants.attach(net, "oft", rank=4, targets="3")
    with pytest.raises(variants.Incompatible, match=r"1 has 8 inputs"):
        variants.attach(net, "oft", rank=16, targets="1")


def test_ia3_is_peft_s() -> None:
    """Outputs, bias included, of the first layer; inputs of the second."""
    config = peft.IA3Config(target_modules=LAYERS, feedforward_modules=["second"])
    ours, their = ours_and_theirs(config, "ia3", form={"name": "ia3", "inputs": "second"})

    def pairs(layer: Any) -> list[Pair]:
        key = "columns" if layer.is_feedforward else "rows"
        return [(key, layer.ia3_l["default"], same, same)]

    compare(ours, their, pairs)
    x = torch.randn(4, 24)
    assert error(ours.merge()(x), their.merge_and_unload()(x)) <= 1e-5


def test_ia3_scales_what_the_paper_names() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    adapter = variants.attach(model, "ia3")
    shapes = {name.rpartition(".")[2]: dict(layer.params) for name, layer in adapter.layers.items()}
    assert {n: {k: tuple(t.shape) for k, t in p.items()} for n, p in shapes.items()} == {
        "k_proj": {"rows": (16,)}, "v_proj": {"rows": (16,)}, "down_proj": {"columns": (48,)}
    }  # fmt: skip
    adapter.detach()
    assert len(variants.attach(model, "ln_tuning").layers) == 3


class Normed(Net):
    """A norm with a bias, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(24), nn.RMSNorm(24)
        for norm in (self.before, self.after):
            norm.weight.data += 0.3 * torch.randn(24, generator=torch.Generator().manual_seed(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(super().forward(self.before(x)))


def test_ln_tuning_is_peft_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "Net", Normed)
    config = peft.LNTuningConfig(target_modules=["before", "after"])
    ours, their = ours_and_theirs(config, "ln_tuning", targets="norms")
    assert ours.num_trainable == 3 * 24

    def pairs(layer: Any) -> list[Pair]:
        norm = layer.ln_tuning_layers["default"]
        found: list[Pair] = [("gain", norm.weight, same, same)]
        if getattr(norm, "bias", None) is not None:
            found.append(("b", norm.bias, lambda t: t - layer.base_layer.bias.detach(), same))
        return found

    compare(ours, their, pairs)


def test_bitfit_trains_as_the_model_s_own_biases_do() -> None:
    """30 steps of AdamW in float64, every bias of the plain model trained: within 1e-12."""
    plain = Normed().double().requires_grad_(False)
    biases = [p.requires_grad_() for name, p in plain.named_parameters() if name.endswith("bias")]
    adapter = variants.attach(Normed().double(), "bitfit")
    assert list(adapter.layers) == ["first", "before"] and len(biases) == 2
    optimizers = [
        torch.optim.AdamW(biases, lr=1e-2, weight_decay=0.0), adapter.optimizer(lr=1e-2, steps=30)
    ]  # fmt: skip
    x = torch.randn(16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for _ in range(30):
        for model, optimizer in zip((plain, adapter.model), optimizers, strict=True):
            (model(x) - x.flip(0)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert error(adapter.model(x), plain(x)) <= 1e-12
    merged = adapter.merge()
    assert error(merged(x), plain(x)) <= 1e-12


def test_bitfit_needs_a_bias() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.RMSNorm(4))
    with pytest.raises(
        variants.Incompatible,
        match=r"form bitfit: no layer .*trains biases, of the layers that .* that can: none",
    ):
        variants.attach(net, "bitfit")
    with pytest.raises(
        variants.Incompatible, match=r"form ln_tuning.*targets=norms.* that can: 1$"
    ):
        variants.attach(net, "ln_tuning", targets="0")


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_road_is_peft_s(variant: int) -> None:
    config = peft.RoadConfig(variant=f"road_{variant}", group_size=8, target_modules=LAYERS)
    form = {"name": "road", "variant": variant, "group": 8}
    ours, their = ours_and_theirs(config, "road", form=form)
    assert ours.num_trainable == variant * (24 + 16)

    def pairs(layer: Any) -> list[Pair]:
        return [
            ("a", layer.road_alpha["default"], same, same),
            ("t", layer.road_theta["default"], same, same),
        ]

    compare(ours, their, pairs)
    x = torch.randn(4, 24)
    assert error(ours.merge()(x), their(x)) <= 1e-5


@pytest.mark.parametrize("preset", ["vera", "dora", "ia3", "road"])
def test_a_convolution_drops_what_the_adapter_sees_alone(preset: str) -> None:
    """W0 x + (W - W0) dropout(x) and the form's own bias, once; within 1e-6 of torch's conv2d."""
    rank = 4 if variants.describe(preset)["rank"] else None
    adapter = variants.attach(
        nn.Sequential(nn.Conv2d(4, 8, 3)), preset, targets="0", dropout=0.3, rank=rank
    )
    layer, generator = adapter.layers["0"].train(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for t in adapter.parameters():
            t += 0.1 * torch.randn(t.shape, generator=generator)
        x = torch.randn(2, 4, 6, 6, generator=generator)
        torch.manual_seed(6)
        y = layer(x)
        torch.manual_seed(6)
        dropped = layer.dropout(x)
        W0, W = (t.view(8, 4, 3, 3) for t in (layer.W0, layer.weight))
        assert not torch.equal(dropped, x)
        assert error(y, F.conv2d(x, W0, layer.bias) + F.conv2d(dropped, W - W0)) <= 1e-6
