"""Packed: whatever a slice is packed with, it goes the way that it goes alone."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import gpt2, llama, made, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import variants
from variants._adapter import choose
from variants._layer import replace
from variants._packed import Pack, mixing, refusal, twin
from variants._registry import find_preset
from variants._slices import Layer

EXACT = 1e-8  # of losses and weights, in float64
ROUNDED = 1e-4  # in fp32
# every way in which a slice takes part: two factors (even ranks and odd, a moved base, a rank that
# changes), a form that reads the base's product, one that has its own, layers left out, dropout
MIXED: tuple[dict[str, Any], ...] = (
    {"preset": "lora", "rank": 3},
    {"preset": "lora_fa", "rank": 5, "alpha": 40},
    {"preset": "pissa", "rank": 2},
    {"preset": "dylora", "rank": 4},
    {"preset": "dora", "rank": 3, "dropout": 0.2},
    {"preset": "loha", "rank": 2},
    {"preset": "lora", "rank": 2, "targets": "q,v"},
)
FEWER: tuple[dict[str, Any], ...] = (
    {"preset": "adalora", "rank": 4},
    {"preset": "pissa", "rank": 4, "dropout": 0.1},
    {"preset": "dora", "rank": 2},
)


def base(dtype: torch.dtype = torch.float64) -> Any:
    """A Llama of one layer whose norm computes in its dtype."""
    model = seeded(llama, num_hidden_layers=1)
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon)
            norm.weight = module.weight
            replace(model, path, norm)
    return model.to(dtype)


def items(seed: int, step: int) -> dict[str, Tensor]:
    """Two rows of other lengths, one of three batches; the longer depends on seed and step."""
    generator = torch.Generator().manual_seed(1000 * seed + step % 3)
    length = 6 + (seed + step) % 3
    ids = torch.randint(1, 64, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def loss_of(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    known = batch["attention_mask"][:, 1:] == 1
    return F.cross_entropy(logits[:, :-1][known], batch["input_ids"][:, 1:][known])


class Alone:
    """An adapter in a twin of the model, its optimizer, its stream of dropout, its losses."""

    def __init__(
        self, model: Any, steps: int, preset: str, seed: int, lr: float = 5e-3, **more: Any
    ) -> None:
        self.model, self.seed, self.steps, self.losses = twin(model), seed, steps, []
        batches = [items(99, i) for i in range(4)]
        more |= {"seed": seed, "calibration": [b | {"labels": b["input_ids"]} for b in batches]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # calibration that a preset has no use for
            self.adapter = variants.attach(self.model, preset, **more)
        self.optimizer = self.adapter.optimizer(lr, steps=steps)
        self.rates = [lr * (1 - i / steps) for i in range(steps)]
        self.stream = torch.Generator().manual_seed(seed).get_state()

    def train(self) -> "Alone":
        torch.set_rng_state(self.stream)
        self.model.train()
        for step in range(self.steps):
            batch = items(self.seed, step)
            loss = loss_of(self.model(**batch).logits, batch)
            loss.backward()
            self.learn(loss)
        return self

    def learn(self, loss: Tensor) -> None:
        penalty = self.adapter.penalty()
        if penalty is not None:
            penalty.backward()
        torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * self.rates[len(self.losses)] / self.rates[0]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def same(self, other: "Alone", tolerance: float) -> None:
        """Whether losses and adapted weights are the other's, to a relative tolerance."""
        assert len(self.losses) == len(other.losses)
        assert self.losses == pytest.approx(other.losses, rel=tolerance, abs=tolerance)
        for name, layer in self.adapter.layers.items():
            own, theirs = layer.weight, other.adapter.layers[name].weight
            scale = max(1.0, own.abs().max().item())
            assert (own - theirs).abs().max().item() <= 10 * tolerance * scale, name


def together(model: Any, slices: Sequence[Alone], steps: int) -> Pack:
    """Trains them side by side."""
    pack = Pack(model)
    for one in slices:
        pack.rows.streams[pack.add(one.adapter)] = one.stream
    for step in range(steps):
        batches = [items(one.seed, step) for one in slices]
        out = pack.outputs(range(len(slices)), batches)
        losses = [loss_of(y, b) for y, b in zip(out, batches, strict=True)]
        torch.stack(losses).sum().backward()
        for one, loss in zip(slices, losses, strict=True):
            one.learn(loss)
    return pack


def ways(pack: Pack, k: int) -> set[str]:
    """How a slice took part in the layers of a pack."""
    return {m.ways[k] for m in pack.model().modules() if isinstance(m, Layer) and k in m.ways}


@pytest.mark.parametrize(("dtype", "mixed"), [(torch.float64, MIXED), (torch.float32, FEWER)],
                         ids=["float64", "fp32"])  # fmt: skip
def test_fifty_steps_of_all_ways_together_are_those_alone(
    dtype: torch.dtype, mixed: Sequence[dict[str, Any]]
) -> None:
    model, steps = base(dtype), 50
    alone = [Alone(model, steps, seed=i, **own).train() for i, own in enumerate(mixed)]
    packed = [Alone(model, steps, seed=i, **own) for i, own in enumerate(mixed)]
    pack = together(model, packed, steps)
    for one, other in zip(alone, packed, strict=True):
        one.same(other, EXACT if dtype == torch.float64 else ROUNDED)
        assert one.losses[-1] < one.losses[0]
    if mixed is MIXED:
        found = set.union(*(ways(pack, k) for k in range(len(MIXED))))
        assert found == {"factors", "asks", "own", "base"}
        assert ways(pack, 2) == {"factors"} and ways(pack, 4) == {"asks"}


def packable(preset: str, dropout: float) -> dict[str, Any] | str:
    """What `Alone` takes for a preset in the small model, or why there is nothing to train."""
    own: dict[str, Any] = {"preset": preset, "dropout": dropout}
    if find_preset(preset).rank is not None:
        own["rank"] = 4
    if preset == "bitfit":
        return "the small model has no biases"
    try:
        why = refusal(Alone(base(), 50, seed=0, **own).adapter.choice)
    except variants.Incompatible as error:
        if not dropout:
            raise
        return str(error)  # a form without dropout
    return own if why is None else why


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("preset", variants.names())
def test_every_preset_that_shares_goes_its_own_way_beside_others(
    preset: str, dropout: float
) -> None:
    own = packable(preset, dropout)
    if isinstance(own, str):
        pytest.skip(f"{preset} shares no base: {own}")
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, ROUNDED)):
        model, steps, lr = base(dtype), 50, 1e-3
        alone = Alone(model, steps, seed=1, lr=lr, **own).train()
        stored = alone.adapter.choice.base
        one = Alone(model, steps, seed=1, lr=lr, **own)
        beside = [Alone(model, steps, seed=2, preset=other, rank=3, base=stored)
                  for other in ("lora", "dora")]  # fmt: skip
        together(model, [beside[0], one, beside[1]], steps)
        alone.same(one, tolerance)


def test_what_diverges_changes_no_other() -> None:
    """To the bit while it is there; to 1e-12 against a training without it."""
    model, steps = base(), 8
    kinds: Any = [("lora", 5e-3), ("dora", 5e-3), ("lora", 1e200)]

    def made_of(rates: Sequence[tuple[str, float]]) -> list[Alone]:
        return [Alone(model, steps, preset, i, lr, rank=2) for i, (preset, lr) in enumerate(rates)]

    bad, good = made_of(kinds), made_of([*kinds[:2], ("lora", 5e-3)])
    together(model, bad, steps)
    together(model, good, steps)
    assert not all(torch.isfinite(t).all() for t in bad[2].adapter.parameters())
    for one, other in zip(bad[:2], good[:2], strict=True):
        assert one.losses == other.losses
        pairs = zip(one.adapter.parameters(), other.adapter.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    for i, (preset, lr) in enumerate(kinds[:2]):
        Alone(model, steps, preset, i, lr, rank=2).train().same(bad[i], 1e-12)


def test_a_slice_that_left_is_not_missed() -> None:
    model, steps = base(), 6
    slices = [Alone(model, steps, "lora", i, rank=2 + i) for i in range(3)]
    pack = Pack(model)
    for one in slices:
        pack.add(one.adapter)
    for step in range(steps):
        live = [0, 1, 2] if step < 3 else [2, 0]  # in any order
        batches = [items(slices[k].seed, step) for k in live]
        losses = [loss_of(y, b) for y, b in zip(pack.outputs(live, batches), batches, strict=True)]
        torch.stack(losses).sum().backward()
        for k, loss in zip(live, losses, strict=True):
            slices[k].learn(loss)
    for k in (0, 2):
        Alone(model, steps, "lora", k, rank=2 + k).train().same(slices[k], 1e-12)


def test_there_is_one_base_and_it_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base(torch.float32)
    slices = [Alone(model, 1, "lora", i, rank=2, base="nf4") for i in range(4)]
    stores = {id(s) for one in slices for s in stored(one)}
    together(model, slices, 0)
    count = len(stores) // 4
    wholes = {id(s.whole) for one in slices for s in stored(one)}
    assert len(wholes) == count
    seen: list[int] = []
    block = type(next(s.whole for s in stored(slices[0])))
    decoded = block.decoded

    def counted(self: Any, dtype: torch.dtype) -> Any:
        seen.append(id(self))
        return decoded(self, dtype)

    monkeypatch.setattr(block, "decoded", counted)
    together(model, [Alone(model, 1, "lora", i, rank=2, base="nf4") for i in range(4)], 1)
    backward = count - 3  # the input of q, k and v needs no gradient: nothing trains before it
    assert len(seen) == count + backward


def stored(one: Alone) -> list[Any]:
    return [layer.frozen.stored for layer in one.adapter.layers.values()]


def test_an_init_that_moves_the_base_needs_no_second_one() -> None:
    model = base()
    slices = [Alone(model, 1, preset, 0, rank=2) for preset in ("pissa", "olora", "lora")]
    together(model, slices, 0)
    for one in slices:
        for name, layer in one.adapter.layers.items():
            own = list(layer.frozen.stored.parameters())
            W = model.get_submodule(name).weight
            assert [t.data_ptr() for t in own] == [W.data_ptr()]
            assert torch.allclose(layer.original, W, atol=1e-12)


@pytest.mark.parametrize(
    ("preset", "axes", "why"),
    [
        ("relora", {}, "allocation relora moves the base"),
        ("full", {}, "form full trains in place of the base"),
        ("pissa", {"base": "nf4"}, "init pissa moves the base, which base nf4 stores anew"),
        ("loftq", {}, "init loftq moves the base"),
    ],
)
def test_what_cannot_share_says_why(preset: str, axes: dict[str, Any], why: str) -> None:
    found = refusal(choose(preset, **axes))
    assert found is not None and found.startswith(why)


def test_a_base_that_was_rounded_after_it_moved_is_refused_and_left_alone() -> None:
    model = base(torch.float32).bfloat16()
    pack, one = Pack(model), Alone(model, 1, "pissa", 0, rank=2)
    before = stored(one)
    with pytest.raises(variants.Incompatible, match="which is rounded after it"):
        pack.add(one.adapter)
    assert stored(one) == before and not pack.adapters
    with pytest.raises(variants.Incompatible, match="not the one that the others have"):
        pack.add(Alone(seeded(llama, num_hidden_layers=1).half(), 1, "lora", 0).adapter)


def test_models_that_mix_rows_are_named() -> None:
    assert mixing(base()) is None
    assert "experts" in str(mixing(made("mixtral")[0]))
    assert "dropout of its own" in str(mixing(gpt2()))
    assert "over all rows" in str(mixing(nn.Sequential(nn.BatchNorm1d(3))))


@pytest.mark.parametrize("kind", ["gpt2", "bert", "phi3", "picture"])
def test_other_kinds_of_layers(kind: str) -> None:
    """Fused, transposed, convolutions, embeddings, a head of its own, attention to both sides."""
    model, inputs = made(kind)
    model = model.double()
    roles: Any = {"gpt2": ["q", "v", "mlp", "wte"], "picture": ["convolutions"]}.get(kind, "q,v")
    heads = {"bert": ("classifier",)}.get(kind, ())
    slices = []
    for seed, preset in enumerate(("lora", "dora", "lora")):
        targets = roles if seed < 2 or kind != "phi3" else "mlp"
        adapter = variants.attach(twin(model), preset, rank=2 + seed, seed=seed, targets=targets,
                                  modules_to_save=heads)  # fmt: skip
        for layer in adapter.layers.values():
            nn.init.normal_(layer.params["B"], std=0.1)
        slices.append(adapter)
    alone, packed = [], Pack(model)
    for k, adapter in enumerate(slices):
        out = adapter.model.eval()(**own_inputs(inputs, k))
        out = out if isinstance(out, Tensor) else out.logits
        grads = torch.autograd.grad(out.square().sum(), adapter.parameters())
        alone.append((out, grads))
        packed.add(adapter)
    packed.model().eval()
    outs = packed.outputs([0, 1, 2], [own_inputs(inputs, k) for k in range(3)])
    sum(out.square().sum() for out in outs).backward()  # type: ignore[union-attr]
    for adapter, out, (y, grads) in zip(slices, outs, alone, strict=True):
        assert torch.allclose(out, y, atol=1e-5)  # rotary embeddings and the like are in fp32
        for tensor, grad in zip(adapter.parameters(), grads, strict=True):
            assert tensor.grad is not None
            assert torch.allclose(tensor.grad, grad, atol=1e-5 * max(1, grad.abs().max().item()))


def own_inputs(inputs: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Of slice k: its tokens are its own, and shorter; pictures are the same for all."""
    if "input_ids" not in inputs:
        return {"x": inputs["x"].double() * (k + 1)}
    ids = (inputs["input_ids"] + k) % 63 + 1
    ids = ids[:, : ids.shape[1] - 2 * k]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
