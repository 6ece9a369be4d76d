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
    return variants.attach(Net(), preset, **{"targets": LAYERS} | settings), their


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
