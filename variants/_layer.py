"""The layers that stand in a model in place of its own: frozen, adapted, fused of both.

What kind of layer it was is `_kinds.py`'s to know; here a layer is a matrix W [m, n] and a bias.

Rows of a fused layer keep their places, an embedding has its scale, and a head that trains in full
leaves the original alone, in fp32 or wider:

>>> import variants
>>> class Net(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.embed, self.qkv_proj = nn.Embedding(5, 4), nn.Linear(4, 6)
...     def forward(self, x):
...         return self.qkv_proj(self.embed(x))
>>> net, x = Net(), torch.tensor([1, 4])
>>> before, W0 = net(x), net.qkv_proj.weight.detach().clone()
>>> layers = variants.attach(net, "lora", rank=2, alpha=6, targets=["q", "v", "embeddings"]).layers
>>> torch.allclose(net(x), before), torch.equal(layers["qkv_proj.v"].W0, W0[4:])
(True, True)
>>> embedding = layers["embed"]
>>> _ = nn.init.normal_(embedding.params["B"])
>>> torch.allclose(embedding(x), embedding.weight.T[x], atol=1e-5)
True
>>> embedding.enabled = False
>>> torch.equal(effective(embedding), embedding.original)  # as a model of experts asks
True
>>> copied = Copied(nn.Linear(2, 2, dtype=torch.bfloat16))
>>> copied.copy.weight is copied.original.weight, copied.copy.weight.dtype
(False, torch.float32)

Under dropout a convolution keeps W0 x whole, and drops from what its change sees:

>>> net = nn.Sequential(nn.Conv2d(2, 3, 2))
>>> layer = variants.attach(net, "lora", rank=2, targets="convolutions", dropout=0.5).layers["0"]
>>> _, x = nn.init.normal_(layer.params["B"]), torch.randn(1, 2, 5, 5)
>>> _ = torch.manual_seed(1)
>>> y = layer.train()(x)
>>> _ = torch.manual_seed(1)
>>> change = layer.kind.product(layer.dropout(x), layer.weight - layer.W0, None)
>>> torch.allclose(y, layer.frozen(x) + change, atol=1e-5)
True
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ._api import Base, Form, Stored, Tensors, wide
from ._dropout import Seed, draw_seed, dropout
from ._kinds import Keeper, Kind, kind_of
from ._product import adapted, made_product
from ._registry import Incompatible
from ._together import Together


class Frozen(Keeper):
    """A layer of the model whose weight is stored by the base axis, with its own bias.

    `attach` puts it there, or finds it: in a model whose files have codes for weights.
    """

    bias: Tensor | None

    def __init__(self, stored: Stored, bias: Tensor | None, kind: Kind, base: Base) -> None:
        super().__init__()
        self.stored, self.kind, self.base = stored, kind, base
        self.register_parameter("bias", bias)  # type: ignore[arg-type]
        self.out_features, self.in_features = stored.shape

    @property
    def weight(self) -> Tensor:
        """The dense matrix [m, n]: code of a model that asks for its dtype or device finds it."""
        return self.stored.dense()

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and self.stored.group:
            from ._compiled import apart

            return apart(self, x)
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """The layer's outputs."""
        if self.kind.linear:
            return self.stored.product(x, self.bias)
        return self.kind.product(x, self.stored.dense(), self.bias)


class Adapted(nn.Module):
    """A frozen layer and what learns beside it.

    `params` holds the form's tensors (those that several layers share are the same objects), in
    fp32 or wider whatever the model's dtype; products run in the dtype of x. `subtracted` is the
    pair of factors that an init took out before the base stored the matrix, `restoring` the pair
    that gives the original back, `kept` the original where the base moves.
    """

    subtracted_A: Tensor | None
    subtracted_B: Tensor | None
    restoring_A: Tensor | None
    restoring_B: Tensor | None
    kept: Tensor | None
    _row_squares: Tensor | None

    def __init__(
        self,
        frozen: Frozen,
        form: Form,
        p: Mapping[str, Tensor],
        *,
        untrained: tuple[str, ...],
        rank: int,
        s: float,
        dropout: float,
        subtracted: tuple[Tensor, Tensor] | None,
        restoring: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.frozen, self.form, self.untrained = frozen, form, untrained
        self.params = nn.ParameterDict(
            {
                k: v if isinstance(v, nn.Parameter)
                else nn.Parameter(v, requires_grad=k not in untrained)
                for k, v in p.items()
            }
        )  # fmt: skip
        self.rank, self.full_s, self.p_drop = rank, s, dropout
        self.out_features, self.in_features = frozen.out_features, frozen.in_features
        self.enabled = True
        self.together: Together | None = None  # with what its block gives the same input, now
        # an allocation's (p as it is seen, factor of s) in training, such as the first b directions
        self.seen: tuple[Callable[[Tensors], Tensors], float] | None = None
        for what, pair in (("subtracted", subtracted), ("restoring", restoring)):
            for name, factor in zip("AB", pair or (None, None), strict=True):
                self.register_buffer(f"{what}_{name}", factor)
        self.register_buffer("kept", None)
        self.register_buffer("_row_squares", None, persistent=False)

    @property
    def p(self) -> Tensors:
        """The tensors of the equation now."""
        p: Tensors = self.params  # type: ignore[assignment]
        return self.seen[0](p) if self.seen is not None and self.training else p

    @property
    def s(self) -> float:
        """The scale of the equation now."""
        return self.full_s * (self.seen[1] if self.seen is not None and self.training else 1.0)

    @property
    def acting_s(self) -> float:
        """What the scale comes to in the equation, whatever is `seen`."""
        return self.form.acting_s(self.params, self.full_s)  # type: ignore[arg-type]

    @property
    def kind(self) -> Kind:
        return self.frozen.kind

    @property
    def W0(self) -> Tensor:
        """The frozen matrix [m, n] that the form sees (where an init moved it: the moved one)."""
        return self.frozen.stored.dense()

    @property
    def weight(self) -> Tensor:
        """The adapted matrix [m, n], dense, by the form's equation, whatever is `seen` of it."""
        return self.form.weight(self.W0, self.params, self.full_s)  # type: ignore[arg-type]

    @property
    def trained(self) -> list[Tensor]:
        """The tensors of the form that learn, shared ones included."""
        return [t for k, t in self.params.items() if k not in self.untrained]

    @property
    def bias(self) -> Tensor | None:
        """The bias [m], as the form has it."""
        return self.form.bias(self.frozen.bias, self.p)

    def move(self, change: Tensor) -> None:
        """Adds `change` [m, n] to the frozen weight for good; the original is kept."""
        self.move_to(self.W0 + change.to(self.W0.dtype))

    def move_to(self, W: Tensor) -> None:
        """Puts W [m, n] in place of the frozen weight; the original is kept."""
        if self.kept is None:
            self.kept = self.original.clone()
        self.frozen.stored.set(W)
        self._row_squares = None

    def move_back(self) -> None:
        """Takes back every `move`."""
        if self.kept is None:
            return
        W = self.kept
        if self.restoring is not None:
            A0, B0 = self.restoring
            W = (W - B0 @ A0).to(W.dtype)
        self.kept, self._row_squares = None, None
        self.frozen.stored.set(W)

    def bias_like(self, x: Tensor) -> Tensor | None:
        """The bias in the dtype of x."""
        return None if self.bias is None else self.bias.to(x.dtype)

    @property
    def subtracted(self) -> tuple[Tensor, Tensor] | None:
        """(A0, B0), B0 with the scale of its day in it: the base stored the original - B0 A0."""
        if self.subtracted_A is None or self.subtracted_B is None:
            return None
        return self.subtracted_A, self.subtracted_B

    @property
    def own_restoring(self) -> tuple[Tensor, Tensor] | None:
        """`restoring`, where it is not what was subtracted."""
        if self.restoring_A is None or self.restoring_B is None:
            return None
        return self.restoring_A, self.restoring_B

    @property
    def restoring(self) -> tuple[Tensor, Tensor] | None:
        """(A0, B0), B0 with the scale of its day in it: the original matrix is W0 + B0 A0."""
        return self.own_restoring or self.subtracted

    @property
    def original(self) -> Tensor:
        """The matrix [m, n] before the variant came (as stored, where storage is lossy).

        Where an init made up for what the storage loses, with that: Q + B0 A0.
        """
        if self.kept is not None:
            return self.kept
        if self.restoring is None:
            return self.W0
        A0, B0 = self.restoring
        return (self.W0 + B0 @ A0).to(self.W0.dtype)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._row_squares = None  # of another W0

    @property
    def row_squares(self) -> Tensor:
        """||W0||^2 of each row [m], in fp32 or wider, computed once: W0 does not change."""
        if self._row_squares is None:
            W0 = self.W0
            self._row_squares = W0.to(wide(W0.dtype)).square().sum(1)
        return self._row_squares

    @property
    def drops(self) -> bool:
        """Whether dropout acts now."""
        return self.training and self.p_drop > 0

    def draw_dropout(self) -> tuple[float, Seed]:
        """(probability, seed of the mask, from torch's global generator) of this forward."""
        return (self.p_drop, draw_seed()) if self.drops else (0.0, 0)

    def dropout(self, x: Tensor) -> Tensor:
        """The adapter's own dropout on its input."""
        return dropout(x, *self.draw_dropout()) if self.drops else x

    def product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """W0 x + bias + s B A dropout(x), keeping x alone for backward."""
        frozen = self.frozen
        # which another thread may end; a compiler sees through a block, and is told nothing
        together = None if torch.compiler.is_compiling() else self.together
        if together is not None:
            y = together.output(self, x)
            if y is not None:
                return y
        return adapted(x, frozen.stored, frozen.bias, A, B, self.s, *self.draw_dropout())

    def made_product(self, x: Tensor, p: Tensors, made: Callable[[Tensors], Any]) -> Tensor:
        """M dropout(x) for M [m, n] = made(p), or B A dropout(x) for (A, B) = made(p), keeping x
        alone for backward."""
        return made_product(x, p, made, None, self.draw_dropout())

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and self.frozen.stored.group:
            from ._compiled import apart

            return apart(self, x)
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """The layer's outputs, under autocast or not."""
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return self._forward(x)
        if x.is_floating_point() and x.dtype != torch.float64:  # as autocast itself has it
            x = x.to(torch.get_autocast_dtype(device))
        self.together = None  # that x is no other layer's
        with torch.autocast(device, enabled=False):  # norms and the like keep their own precision
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if self.enabled:
            return self.form.forward(x, self) if self.kind.linear else self._other(x)
        if self.restoring is None and self.kept is None:
            return self.frozen(x)
        return self.kind.product(x, self.original, self.frozen.bias)

    def _other(self, x: Tensor) -> Tensor:
        """A layer that is not linear over the last axis of x: by the factors or the dense W."""
        factors, W0 = self.form.factors(self.p), self.W0
        if factors is not None:
            short = self.kind.low_rank(x, *factors)
            if short is not None:
                y = self.frozen(x)
                return y + (self.s * short).to(y.dtype)
        W = self.form.weight(W0, self.p, self.s)
        if not self.drops:
            return self.kind.product(x, W, self.bias)
        base = self.kind.product(x, W0, self.bias)
        return base + self.kind.product(self.dropout(x), W - W0, None)

    def extra_repr(self) -> str:
        return f"{self.form.name}, rank={self.rank}, s={self.s:g}, dropout={self.p_drop:g}"


class Fused(nn.Module):
    """A layer whose output is that of several matrices side by side (GPT-2's q, k and v)."""

    def __init__(self, slices: dict[str, nn.Module], kind: Kind) -> None:
        super().__init__()
        self.slices, self.kind = nn.ModuleDict(slices), kind

    @property
    def weight(self) -> Tensor:
        return torch.cat([part.weight for part in self.slices.values()])  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.slices.values()], dim=-1)


class Copied(nn.Module):
    """A module trained in full beside the adapter (a new head), with its original kept.

    The copy learns in fp32 or wider; what comes in is cast to that, what goes out is cast back.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original, self.copy = module, deepcopy(module)
        self.enabled = True
        for parameter in self.copy.parameters():
            parameter.data = parameter.data.to(wide(parameter.dtype))
            parameter.requires_grad_(True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.original(*args, **kwargs)
        inner, outer = (next(m.parameters()).dtype for m in (self.copy, self.original))
        return _cast(self.copy(*_cast(args, inner), **_cast(kwargs, inner)), outer)

    def narrowed(self) -> tuple[nn.Module, float]:
        """The copy in the original's dtypes, and the largest relative error of that rounding."""
        worst = 0.0
        own = zip(self.copy.parameters(), self.original.parameters(), strict=True)
        for tensor, like in own:
            rounded = tensor.data.to(like.dtype)
            size = torch.linalg.vector_norm(tensor.data)
            error = torch.linalg.vector_norm(rounded.to(tensor.dtype) - tensor.data)
            worst = max(worst, (error / size).item() if size > 0 else 0.0)
            tensor.data = rounded
        return self.copy, worst


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in `dtype`, wherever they stand in tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return type(value)({k: _cast(v, dtype) for k, v in value.items()})
    if type(value) in (tuple, list):
        return type(value)(_cast(v, dtype) for v in value)
    return value


def freeze(
    module: Any, base: Base, rows: tuple[int, int] | None = None, W: Tensor | None = None
) -> Frozen:
    """A frozen stand-in for `module`, or for some of its output rows, stored by `base`.

    `W` takes the place of the module's own matrix (an init that moved it).
    """
    kind, bias = kind_of(module)(module), getattr(module, "bias", None)
    if isinstance(module, Frozen) and rows is None and W is None:
        stored = base.take(module.stored)
        return Frozen(stored, bias, kind, module.base if stored is module.stored else base)
    matrix = kind.matrix(module) if rows is None else kind.matrix(module)[slice(*rows)]
    if rows is not None and bias is not None:
        bias = nn.Parameter(bias[slice(*rows)], requires_grad=False)
    return Frozen(base.store(matrix if W is None else W), bias, kind, base)


def plain(layer: Any, matrix: Callable[[Any], Tensor], own_bias: bool) -> nn.Module:
    """The model's own kind of module again, with `matrix(part)` as weight of each part.

    `own_bias`: with the bias that the form made of the layer's, not the layer's.
    """
    if isinstance(layer, Fused):
        parts: list[Any] = list(layer.slices.values())
        biases: list[Any] = [_bias(part, own_bias) for part in parts]
        bias = None if biases[0] is None else torch.cat(biases)
        return layer.kind.plain(torch.cat([matrix(part) for part in parts]), bias)
    return layer.kind.plain(matrix(layer), _bias(layer, own_bias))


def _bias(part: Any, own: bool) -> Tensor | None:
    if not isinstance(part, Adapted):
        return part.bias
    return own_bias(part) if own else part.frozen.bias


def own_bias(layer: Adapted) -> Tensor | None:
    """The bias as the form has it, in the dtype of the layer's."""
    bias, before = layer.bias, layer.frozen.bias
    return bias if bias is None or before is None else bias.to(before.dtype)


def effective(part: Any) -> Tensor:
    """The matrix [m, n] by which a stand-in multiplies now, in the model's dtype."""
    if isinstance(part, Fused):
        return torch.cat([effective(p) for p in part.slices.values()])
    if isinstance(part, Frozen):
        return part.stored.dense()
    W0 = part.W0
    if not part.enabled:
        return part.original
    with torch.autocast(W0.device.type, enabled=False):
        return part.form.weight(W0, part.p, part.s).to(W0.dtype)


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` at `path` of `model`, on in the mode (train or eval) of what stood there."""
    parent, _, leaf = path.rpartition(".")
    module.train(model.get_submodule(path).training)
    setattr(model.get_submodule(parent), leaf, module)


def stand_ins(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost layers that this package put into the model, by path."""
    inside = ""
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        if isinstance(module, Frozen | Adapted | Fused):
            inside = path + "."
            yield path, module


def refuse_adapted(model: nn.Module) -> None:
    """One adapter a model: a second would train on the first one's frozen layers."""
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise Incompatible("the model has an adapter already: merge() or detach() it first")
