"""Several adapters on one frozen base, trained side by side: each sees its own rows of a batch.

Every slice has a model of its own in which all that is frozen is the one base's (`twin`), so that
it is built, scored and saved as if it were alone. `Pack` trains them together in one more twin:
the rows of all slices go through it, and where the slices differ it has (`_slices.py`)

    y_k = W x_k + s_k B_k A_k x_k       one product by W for all, one batched one for the factors

A form that is not two factors has its own forward on its own rows; where that asks for the product
of its very input by the base, it gets its rows of the shared one. An init that moved the base
(PiSSA: W - s B0 A0) needs no second one: what it took out is one more pair of factors.

Two slices, of which one moved the base: each has the outputs that it has alone, and there is one
base:

>>> import variants
>>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)).double()
>>> pack = Pack(net)
>>> for preset, rank in (("lora", 1), ("pissa", 2)):
...     adapter = variants.attach(twin(net), preset, rank=rank, targets="0,1")
...     _ = nn.init.normal_(adapter.layers["1"].params["B"])
...     _ = pack.add(adapter)
>>> x = [torch.randn(2, 8, dtype=torch.float64) for _ in range(2)]
>>> y = pack.outputs([0, 1], [{"input": own} for own in x])
>>> alone = [adapter.model(own) for adapter, own in zip(pack.adapters, x)]
>>> [torch.allclose(a, b, atol=1e-12) for a, b in zip(y, alone)]
[True, True]
>>> numbers = {t.data_ptr() for a in pack.adapters for t in (a.layers["0"].frozen.parameters())}
>>> len(numbers)  # of W and of its bias
2

What cannot share is refused, and why is said:

>>> net = nn.Sequential(nn.Linear(8, 8)).bfloat16()
>>> Pack(net).add(variants.attach(twin(net), "pissa", rank=2, targets="0"))
Traceback (most recent call last):
variants._registry.Incompatible: its init moves the base of 0, which is rounded after it
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._adapter import Adapter, Choice
from ._api import Stored
from ._experts import stacks
from ._layer import Adapted, Frozen, Fused, freeze, replace, stand_ins
from ._registry import Incompatible
from ._slices import Layer, Pair, Rows, Share, factored

ROUNDING = 8  # in units of the dtype's: what separates W - (B0 A0) from the W' that an init made


def twin(model: nn.Module) -> Any:
    """A model of modules of its own with the very tensors of `model`."""
    return deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def refusal(choice: Choice) -> str | None:
    """Why adapters of this choice cannot share a base; None: they can."""
    for part in (choice.allocation, choice.update):
        if part.moves_base:
            return f"{part} moves the base, which others share"
    if choice.form.replaces:
        return f"{choice.form} trains in place of the base, so there is none to share"
    if choice.init.moves_base and choice.base.lossy:
        return f"{choice.init} moves the base, which {choice.base} stores anew after it"
    return None


def mixing(model: nn.Module) -> str | None:
    """Why the rows of a batch are not apart in this model, as far as its modules show it."""
    config: Any = getattr(model, "config", None)
    settings = {} if config is None else config.to_dict()
    shares = {k: v for k, v in settings.items() if "drop" in k and isinstance(v, float)}
    shares |= {path: m.p for path, m in model.named_modules() if isinstance(m, nn.Dropout)}
    drawn = next((name for name, share in shares.items() if share > 0), None)
    if drawn is not None:
        return f"the model has dropout of its own ({drawn})"
    for path, module in model.named_modules():
        if stacks(module):
            return f"the experts of {path} take tokens of all rows together"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{path} takes statistics over all rows"
    return None


class Pack:
    """Adapters that share the base `model`, which stays as it is.

    `add` them one by one, each built in a `twin` of the model; then `outputs` runs any of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.base, self.adapters, self.rows = model, [], Rows()
        self.frozen: dict[Any, Frozen] = {}  # what slices share, by path and rows
        self._model: Any = None

    def add(self, adapter: Adapter) -> int:
        """One more slice; its number. Raises `Incompatible`, and changes nothing, where it cannot
        share."""
        why = refusal(adapter.choice)
        if why is not None:
            raise Incompatible(why)
        found = [(own, Share(*self._seen(own, place))) for own, place in _frozen(adapter.model)]
        for own, share in found:
            _store(own).stored = share
        self.adapters.append(adapter)
        self._model = None
        return len(self.adapters) - 1

    def by_factors(self, k: int) -> bool:
        """Whether all that a slice adds is a product of two factors: best at the front."""
        return all(factored(layer) for layer in self.adapters[k].layers.values())

    def _seen(self, own: Any, place: tuple[str, Any]) -> tuple[Stored, Pair | None]:
        """The shared matrix of a slice's layer, and what the slice takes from it."""
        stored: Any = _store(own).stored
        if place not in self.frozen:
            path, rows = place
            base = _store(own).base
            self.frozen[place] = freeze(self.base.get_submodule(path), base, rows)
        whole = self.frozen[place].stored
        if _equal(stored, whole):
            return whole, None
        shift = own.subtracted if isinstance(own, Adapted) else None
        if shift is None:
            raise Incompatible(f"the base of {place[0]} is not the one that the others have")
        W, moved = whole.dense(), stored.dense()
        error = (W - shift[1] @ shift[0] - moved).abs().max()
        if not error <= ROUNDING * torch.finfo(shift[0].dtype).eps * W.abs().max():
            raise Incompatible(f"its init moves the base of {place[0]}, which is rounded after it")
        return whole, shift

    def outputs(
        self,
        live: Sequence[int],
        inputs: Sequence[Mapping[str, Tensor]],
        fill: Mapping[str, float] | None = None,
    ) -> list[Tensor]:
        """The model's output (or its logits) for each of the slices `live`, in one pass.

        `inputs` of a slice are [rows, T], T its own; shorter ones are filled with `fill`, or 0.
        """
        model = self.model()
        rows, first = self.rows, [next(iter(own.values())) for own in inputs]
        rows.live, rows.counts = list(live), [t.shape[0] for t in first]
        rows.lengths = [t.shape[1] for t in first]
        rows.longest = max(rows.lengths)
        batch = {key: torch.cat([self._filled(own[key], (fill or {}).get(key, 0))
                                 for own in inputs]) for key in inputs[0]}  # fmt: skip
        for k in live:
            if self.adapters[k].model.training != model.training:
                self.adapters[k].model.train(model.training)
        out = model(**batch)
        out = out if isinstance(out, Tensor) else out.logits
        return [rows.cut(own, i) for i, own in enumerate(rows.split(out))]

    def _filled(self, x: Tensor, value: float) -> Tensor:
        return F.pad(x, (0, self.rows.longest - x.shape[1]), value=value)

    def model(self) -> Any:
        """The model of all rows, in the mode of which the slices' own are set before each pass."""
        if self._model is None:
            self._model = self._build()
        return self._model

    def _build(self) -> Any:
        model, paths = twin(self.base).train(), {}
        for adapter in self.adapters:
            paths |= dict.fromkeys(path for path, _ in stand_ins(adapter.model))
            paths |= dict.fromkeys(adapter.saved_modules)
        for path in paths:
            parts = [adapter.model.get_submodule(path) for adapter in self.adapters]
            replace(model, path, self._layer(path, parts))
        return model.requires_grad_(False)

    def _layer(self, path: str, parts: list[nn.Module]) -> nn.Module:
        fused = [part for part in parts if isinstance(part, Fused)]
        if len(fused) == len(parts) and len({tuple(p.slices) for p in fused}) == 1:
            places = dict(_places(path, fused[0]))
            return Fused({name: self._one(places[name], [p.slices[name] for p in fused])
                          for name in fused[0].slices}, fused[0].kind)  # fmt: skip
        return self._one((path, None), parts)

    def _one(self, place: tuple[str, Any], parts: Sequence[nn.Module]) -> nn.Module:
        whole = self.frozen.get(place)
        if whole is None or any(isinstance(part, Fused) for part in parts):
            return Layer(self.rows, parts, None)
        if not any(isinstance(part, Adapted) for part in parts):
            return whole
        return Layer(self.rows, parts, whole if whole.kind.linear else None)


def _store(layer: Any) -> Frozen:
    return layer.frozen if isinstance(layer, Adapted) else layer


def _frozen(model: nn.Module) -> Iterator[tuple[Any, tuple[str, Any]]]:
    """Each layer with a stored matrix, and its place: (path, its rows of a fused layer)."""
    for path, part in stand_ins(model):
        if isinstance(part, Fused):
            places = dict(_places(path, part))
            yield from ((own, places[name]) for name, own in part.slices.items())
        else:
            yield part, (path, None)


def _places(path: str, fused: Fused) -> Iterator[tuple[str, tuple[str, tuple[int, int]]]]:
    """(name, place) of the parts of a fused layer."""
    begin = 0
    parts: Any = fused.slices
    for name, part in parts.items():
        end = begin + part.out_features
        yield name, (path, (begin, end))
        begin = end


def _equal(a: Stored, b: Stored) -> bool:
    """Whether two stored matrices are the same to the bit."""
    own, other = a.state_dict(), b.state_dict()
    return type(a) is type(b) and all(
        t.data_ptr() == other[k].data_ptr() or torch.equal(t, other[k]) for k, t in own.items()
    )
