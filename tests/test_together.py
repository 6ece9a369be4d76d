"""Projections of one input, adapted together: the numbers are those of each by itself."""

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import made
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import variants
from variants import _together
from variants._adapter import Adapter

PRESETS = ["lora", "pissa", "adalora", "moslora", "qlora", "dylora"]


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
    for end in adapter._ends:
        end()
    return adapter


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 4), nn.Linear(4, 4)


def dense(layer: Any) -> Callable[[Tensor], Tensor]:
    """What it computes, by its own dense matrix."""
    W, bias = layer.weight.detach(), layer.bias
    return lambda x: torch.nn.functional.linear(x, W, bias)


def groups(model: nn.Module) -> set[tuple[str, ...]]:
    """The names of the layers of each group."""
    hooks = [h for module in model.modules() for h in module._forward_pre_hooks.values()]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return {tuple(own.names) for own in owners if isinstance(own, _together.Within)}


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers were answered for, each time."""
    counts, answers = [], _together._answers

    def noted(layers: Any, x: Tensor) -> Any:
        counts.append(len(layers))
        return answers(layers, x)

    monkeypatch.setattr(_together, "_answers", noted)
    return counts


class Attention(nn.Module):
    """Declared in another order than called."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        return torch.softmax(self.q_proj(x) @ self.k_proj(y).mT, -1) @ self.v_proj(y)


def gradients(adapter: Adapter, y: Tensor, *more: Tensor) -> list[Tensor]:
    """Of the sum of squares of y, by what trains and by `more`; none stays behind."""
    y.square().sum().backward()
    tensors = [*more, *adapter.parameters()]
    found = [t.grad for t in tensors if t.grad is not None]
    for t in tensors:
        t.grad = None
    return found


def step(adapter: Adapter, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    y = adapter.model(**inputs)[0]
    return [y.detach(), *gradients(adapter, y)]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_is_that_of_each_alone(preset: str) -> None:
    """In float64, to 1e-10; for DyLoRA by the same draw of the directions."""
    model, inputs = made("llama")
    both = [attached(preset, copy.deepcopy(model).double()) for _ in range(2)]
    assert groups(both[0].model) == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}
    for adapter in both:
        adapter.model.train()
    one, other = (step(adapter, inputs) for adapter in (both[0], alone(both[1])))
    assert len(one) == len(other) == 1 + len(list(both[0].parameters()))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("preset", ["lora", "adalora"])
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


def test_what_is_given_another_input_answers_for_itself(answered: list[int]) -> None:
    net, x, y = nn.Sequential(Attention()), torch.randn(3, 4), torch.randn(3, 4)
    layers = {k[2]: la for k, la in attached("lora", net).layers.items()}
    q, k, v = (dense(layers[name]) for name in "qkv")
    for _ in range(2):
        torch.testing.assert_close(net[0](x, y), torch.softmax(q(x) @ k(y).mT, -1) @ v(y))
        torch.testing.assert_close(net(x), torch.softmax(q(x) @ k(x).mT, -1) @ v(x))
    assert answered == [3] * 4
    assert all(layer.together is None for layer in layers.values())


def test_no_answer_outlives_its_forward(answered: list[int]) -> None:
    """Other numbers, another mode, a layer by itself, a forward that was cut short."""
    net, x = nn.Sequential(Attention()), torch.randn(3, 4)
    adapter = attached("lora", net)
    with torch.no_grad():
        net(x)
        for t in adapter.parameters():
            t.mul_(3)
    layers = {k[2]: la for k, la in adapter.layers.items()}
    q, k, v = (dense(layers[name]) for name in "qkv")
    torch.testing.assert_close(net(x), torch.softmax(q(x) @ k(x).mT, -1) @ v(x))
    assert answered == [3, 3]
    torch.testing.assert_close(layers["k"](x), k(x))
    with pytest.raises(RuntimeError):
        net[0](x, torch.randn(3, 5))
    assert answered == [3, 3, 3] and layers["v"].together is None
    x = nn.Parameter(x)
    for _ in range(3):
        net(x).square().sum().backward()
    layers["q"](x).sum().backward()
    del q, k, v
    found, gone = [weakref.ref(t) for t in (net, layers["q"])], gc.isenabled()
    gc.disable()
    del net, adapter, layers
    assert all(ref() is None for ref in found)  # no cycle keeps a model
    gc.enable() if gone else None


def test_what_was_not_used_has_no_gradient() -> None:
    class Part(Attention):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.q_proj(x)

    adapter = attached("lora", nn.Sequential(Part()))
    adapter.model(torch.randn(3, 4)).sum().backward()
    for name, layer in adapter.layers.items():
        assert (layer.params["B"].grad is None) == ("q_proj" not in name)


def test_an_input_that_was_changed_in_place_is_another() -> None:
    class Changed(Gated):
        def forward(self, x: Tensor) -> Tensor:
            y = self.gate_proj(x)
            return y + self.up_proj(x.mul_(2))

    for mode in (torch.no_grad, torch.inference_mode):
        net = nn.Sequential(Changed())
        gate, up = map(dense, attached("lora", net).layers.values())
        with mode():
            x = torch.randn(3, 4)
            wanted = gate(x) + up(2 * x)
            torch.testing.assert_close(net(x), wanted)


class Between(Gated):
    """Something happens between the two."""

    def __init__(self, what: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate_proj(x)
        with self.what(self, x) or contextlib.nullcontext():
            return y + self.up_proj(x)


def _learn_more(net: Any, x: Tensor) -> None:
    with torch.no_grad():
        net.up_proj.params["B"].mul_(2)


@pytest.mark.parametrize(
    "what",
    [_learn_more,
     lambda net, x: net.train() and None,
     lambda net, x: torch.enable_grad(),
     lambda net, x: torch.inference_mode()],
    ids=["parameters", "dropout", "grad mode", "inference mode"],
)  # fmt: skip
def test_what_changes_between_two_layers_ends_their_group(
    what: Callable[[Any, Tensor], Any], answered: list[int]
) -> None:
    net, x = Between(what), torch.randn(3, 4)
    found = []
    for change in (lambda adapter: adapter, alone):
        adapter = change(attached("lora", copy.deepcopy(net), dropout=0.5))
        torch.manual_seed(3)
        with torch.no_grad():
            y = adapter.model.eval()(x)
        found.append((y, y.requires_grad))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] and answered == [2]


def test_an_input_that_begins_to_need_a_gradient(answered: list[int]) -> None:
    net = Between(lambda net, x: (x.requires_grad_(), None)[1])
    adapter, x = attached("lora", net), torch.randn(3, 4)
    net(x).sum().backward()
    up = dense(adapter.layers["up_proj"])
    torch.testing.assert_close(x.grad, torch.autograd.grad(up(x).sum(), x)[0])
    assert answered == [2]


@pytest.mark.parametrize("which", ["all", "up_proj", "tokens"])
def test_a_part_of_a_block_may_be_recomputed(which: str) -> None:
    """By a checkpoint that begins once the block's hooks have run, as a patched forward's does."""

    def again(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: checkpoint(own, x, use_reentrant=False)  # type: ignore[return-value]

    class Net(Gated):
        def __init__(self) -> None:
            super().__init__()
            self.own: Any = lambda own: own

        def both(self, x: Tensor) -> Tensor:
            up = self.own(self.up_proj) if which == "up_proj" else self.up_proj
            return self.gate_proj(x).sin() * up(x)

        def forward(self, x: Tensor) -> Tensor:
            both = self.both if which == "up_proj" else self.own(self.both)
            return torch.cat([both(part) for part in (x.split(2) if which == "tokens" else [x])])

    net, found = Net(), []
    adapter, x = attached("lora", net), torch.randn(4, 4, requires_grad=True)
    for own in (net.own, again):
        net.own = own
        found.append(gradients(adapter, net(x), x))
    assert len(found[0]) == 5
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_layer_that_brings_its_own_numbers_is_asked_itself(answered: list[int]) -> None:
    """What shards or offloads a layer by itself does so in a hook of it, or in another forward."""
    adapter = attached("lora", nn.Sequential(Gated()))
    net: Any = adapter.model
    up = adapter.layers["0.up_proj"]
    handle = up.register_forward_pre_hook(lambda *_: None)
    net[0].forward = lambda x: (net[0].gate_proj(x), net[0].up_proj(x))
    net(torch.randn(3, 4))
    handle.remove()
    up.forward = up.forward
    net(torch.randn(3, 4))
    assert answered == []
    del up.forward
    net(torch.randn(3, 4))
    assert answered == [2]
    del net[0].up_proj
    net[0].forward = lambda x: net[0].gate_proj(x)
    net(torch.randn(3, 4))
    assert answered == [2]


def test_what_was_made_in_inference_mode_has_no_group(answered: list[int]) -> None:
    with torch.inference_mode():
        net = nn.Sequential(Attention())
        layers = attached("lora", net).layers
        q, k, v = (dense(layers[f"0.{name}_proj"]) for name in "qkv")
    with torch.no_grad():
        y = torch.ones(3, 4)
        torch.testing.assert_close(net(y), torch.softmax(q(y) @ k(y).mT, -1) @ v(y))
    assert answered == []


@pytest.mark.parametrize("preset", ["lora", "tied_lora", "abba"])
def test_attached_and_loaded_without_gradients_are_grouped_all_the_same(
    preset: str, tmp_path: Path
) -> None:
    """Where A is made from what trains, too; so a loaded model's bits are the saved one's."""
    models = [made("llama")[0] for _ in range(3)]
    variants.attach(models[0], preset, rank=2).save(tmp_path)
    with torch.no_grad():
        variants.attach(models[1], preset, rank=2)
        variants.load(models[2], tmp_path)
    first, *others = map(groups, models)
    assert first
    assert others == [first] * 2


def test_a_copy_s_end_is_its_own() -> None:
    adapter = attached("lora", nn.Sequential(Attention()))
    other = copy.deepcopy(adapter)
    other.merge()
    models: list[Any] = [adapter.model, other.model]
    hooks = [(model, model[0]) for model in models]
    assert [[len(m._forward_pre_hooks), len(m._forward_hooks)] for m in hooks[0]] == [[1, 1]] * 2
    assert [[len(m._forward_pre_hooks), len(m._forward_hooks)] for m in hooks[1]] == [[0, 0]] * 2


def test_a_layer_that_is_compiled_by_itself_answers_for_itself() -> None:
    """In one graph, while its block has a group."""
    net = Attention()
    adapter = attached("lora", net)
    x = torch.randn(3, 4)
    wanted = net(x)
    for layer in adapter.layers.values():
        layer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(net(x), wanted)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("preset", ["lora", "qlora", "hira", "dora"])
def test_an_output_may_be_changed_in_place(preset: str, together: bool) -> None:
    """As that of a linear layer, with a bias and over more than one axis."""
    net: Any = nn.Sequential(Between(lambda net, x: None))
    x, adapter = torch.randn(2, 3, 4), attached(preset, net)
    if not together:
        alone(adapter)
    net[0].forward = lambda x: net[0].gate_proj(x).mul_(2).sin_() + net[0].up_proj(x).add_(1)
    gate, up = map(dense, adapter.layers.values())
    torch.testing.assert_close(net(x), (2 * gate(x)).sin() + up(x) + 1)
    net(x).sum().backward()


def test_attention_that_may_look_elsewhere_is_no_group() -> None:
    adapter = attached("lora", made("t5")[0])
    assert not any({"q", "k", "v"} & set(group) for group in groups(adapter.model))


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


@pytest.mark.parametrize("name", ["llama", "vit", "gpt2"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_model_has_the_same_gradients(
    name: str, autocast: bool, reentrant: bool, answered: list[int]
) -> None:
    model, inputs = made(name)
    targets = "q,v" if name == "gpt2" else None
    adapter = attached("lora", model, targets=targets)
    model.enable_input_require_grads()
    assert groups(model)
    found = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        torch.manual_seed(0)  # GPT-2 has dropout of its own
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(step(adapter, inputs))
    assert bool(answered) != autocast, "under autocast nothing is computed in vain"
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_recomputation_that_ends_early() -> None:
    class Sum(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return self.gate_proj(x).sin() + self.up_proj(x)

    net, x = nn.Sequential(Sum()), torch.randn(3, 4, requires_grad=True)
    adapter = attached("lora", net)
    found = []
    for way in (net, lambda x: checkpoint(net, x, use_reentrant=False)):
        found.append(gradients(adapter, way(way(x)), x))  # type: ignore[arg-type]
    assert len(found[0]) == 5
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_cross_attention_may_be_recomputed() -> None:
    """Keys and values of a source that nothing in the signature gives away."""
    net, y = nn.Sequential(Attention()), torch.randn(3, 4)
    x = torch.randn(3, 4, requires_grad=True)
    adapter = attached("lora", net)
    found = []
    for way in (net[0], lambda x, y: checkpoint(net[0], x, y, use_reentrant=False)):
        found.append(gradients(adapter, way(x, y), x))  # type: ignore[arg-type]
    assert len(found[0]) == 7
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
