"""Projections of one input, adapted together: the numbers are those of each by itself."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from models import made
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import variants
from variants import _together
from variants._adapter import Adapter

PRESETS = ["lora", "pissa", "dora", "adalora", "moslora", "qlora", "dylora"]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a handful of tokens will do."""
    monkeypatch.setattr(_together, "TOKENS", 1)


def attached(preset: str, model: Any, **settings: Any) -> Adapter:
    adapter = variants.attach(model, preset, rank=2, **settings)
    generator = torch.Generator().manual_seed(1)
    for t in adapter.parameters():
        t.data += 0.1 * torch.randn(t.shape, generator=generator, dtype=t.dtype)
    return adapter


def alone(adapter: Adapter) -> Adapter:
    for layer in adapter.layers.values():
        layer.together = None
    return adapter


def dense(layer: Any) -> Callable[[Tensor], Tensor]:
    """What it computes, by its own dense matrix."""
    W, bias = layer.weight.detach(), layer.bias
    return lambda x: torch.nn.functional.linear(x, W, bias)


def groups(adapter: Adapter) -> set[tuple[str, ...]]:
    """The last names of the layers of each group."""
    found = {id(la.together): la.together for la in adapter.layers.values() if la.together}
    names = {id(layer): name.rpartition(".")[2] for name, layer in adapter.layers.items()}
    return {tuple(names[id(layer)] for layer in group.layers) for group in found.values()}


def step(adapter: Adapter, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    y = adapter.model(**inputs)[0]
    y.square().sum().backward()
    found = [y.detach(), *(t.grad for t in adapter.parameters() if t.grad is not None)]
    for t in adapter.parameters():
        t.grad = None
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_is_that_of_each_alone(preset: str) -> None:
    """In float64, to 1e-10; for DyLoRA by the same draw of the directions."""
    model, inputs = made("llama")
    both = [attached(preset, copy.deepcopy(model).double()) for _ in range(2)]
    assert groups(both[0]) == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}
    for adapter in both:
        adapter.model.train()
    one, other = (step(adapter, inputs) for adapter in (both[0], alone(both[1])))
    assert len(one) == len(other) == 1 + len(list(both[0].parameters()))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert all(len(g) > 1 for g in groups(both[0]))


@pytest.mark.parametrize("preset", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fewer_products_and_no_more_bytes(preset: str, dtype: torch.dtype) -> None:
    """Of a block's q, k and v: two products by all A where there were six, and x kept once."""
    counts = {}
    for together in (True, False):
        model, inputs = made("llama")
        adapter = attached(preset, model.to(dtype))
        if not together:
            alone(adapter)
        kept: dict[int, int] = {}

        def pack(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = adapter.model(**inputs)[0]
        with torch.profiler.profile() as seen:
            y.square().sum().backward()
        products = sum(e.count for e in seen.key_averages() if e.key in ("aten::mm", "aten::addmm"))
        counts[together] = products, sum(kept.values())
    assert counts[True][0] < counts[False][0]
    assert counts[True][1] <= counts[False][1]


def test_what_is_given_another_input_answers_for_itself() -> None:
    """The first pass is right, and after it there is no group."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.q_proj(x) @ self.k_proj(y).mT

    net, x, y = nn.Sequential(Cross()), torch.randn(3, 4), torch.randn(3, 4)
    adapter = attached("lora", net)
    q, k = map(dense, adapter.layers.values())
    assert groups(adapter) == {("q_proj", "k_proj")}
    wanted = q(x) @ k(y).mT
    for _ in range(2):
        torch.testing.assert_close(net[0](x, y), wanted)
        assert groups(adapter) == {()}


def test_an_input_that_was_changed_in_place_is_another() -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.gate_proj(x)
            return y + self.up_proj(x.mul_(2))

    with torch.no_grad():
        net, x = nn.Sequential(Changed()), torch.randn(3, 4)
        gate, up = map(dense, attached("lora", net).layers.values())
        wanted = gate(x) + up(2 * x)
        torch.testing.assert_close(net(x), wanted)


def test_attention_that_may_look_elsewhere_is_no_group() -> None:
    adapter = attached("lora", made("t5")[0])
    assert not any({"q", "k", "v"} & set(group) for group in groups(adapter))


def test_off_dropped_copied_and_inferred() -> None:
    """Each with the numbers that it has without groups."""
    model, inputs = made("llama")
    both = [attached("lora", copy.deepcopy(model)) for _ in range(2)]
    alone(both[1])
    with torch.inference_mode():
        one, other = (adapter.model(**inputs)[0] for adapter in both)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    with both[0].disabled(), both[1].disabled():
        assert torch.equal(both[0].model(**inputs)[0], both[1].model(**inputs)[0])
    twin = copy.deepcopy(both[0].model)
    for t in both[0].parameters():
        t.data.zero_()
    torch.testing.assert_close(twin(**inputs)[0], other, rtol=1e-5, atol=1e-6)  # its own layers
    mine, theirs = (attached("lora", copy.deepcopy(model), dropout=0.5) for _ in range(2))
    alone(theirs)
    for adapter in (mine, theirs):
        adapter.model.train()
    torch.manual_seed(0)
    one = step(mine, inputs)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(one, step(theirs, inputs), strict=True))


def test_a_recomputed_block_has_the_same_gradients() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(self.q_proj(x) @ self.k_proj(x).mT, -1) @ self.v_proj(x)

    block = nn.Sequential(Block())
    adapter, x = attached("lora", block), torch.randn(3, 4, requires_grad=True)
    found = []
    for way in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        way(x).square().sum().backward()  # type: ignore[union-attr]
        found.append([x.grad, *(t.grad for t in adapter.parameters())])
        x.grad = None
        for t in adapter.parameters():
            t.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert groups(adapter) == {("q_proj", "k_proj", "v_proj")}
