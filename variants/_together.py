"""Projections of one input, adapted together: q, k and v, or gate and up.

While their block's forward runs, the first of them to be called answers for all: the products by
their A are one, [T, r1 + r2 + ..], and so are those of backward by and for them, and the gradient
of x is gathered in one place. The others find their answer waiting, if they are given that very x;
else each answers for itself. So it does for few tokens, where one product more or less is less than
the looking.

>>> import variants
>>> class Block(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.k_proj, self.q_proj, self.v_proj = (nn.Linear(4, m) for m in (3, 6, 3))
...     def forward(self, x, other=None):
...         return self.q_proj(x), self.k_proj(x if other is None else other), self.v_proj(x)
>>> net, x = nn.Sequential(Block()).double(), torch.randn(TOKENS, 4, dtype=torch.float64)
>>> layers = variants.attach(net, "lora", rank=2).layers
>>> for layer in layers.values():
...     _ = nn.init.normal_(layer.params["B"])
>>> wanted = {name[-6:]: (x @ la.weight.T + la.bias) for name, la in layers.items()}
>>> [torch.allclose(y, wanted[f"{k}_proj"]) for y, k in zip(net(x), "qkv")]
[True, True, True]
>>> other, k = torch.randn_like(x), layers["0.k_proj"]
>>> torch.allclose(net[0](x, other)[1], other @ k.weight.T + k.bias)
True
"""

import inspect
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._api import Form
from ._kept import End, Hooked, top_hooks
from ._kinds import Conv1DKind, Kind
from ._product import of_base, plus_back
from ._targets import Site, role_of

if TYPE_CHECKING:
    from ._layer import Adapted

TOKENS = 256  # below, the looking costs what a product saves
ROLES = (("q", "k", "v"), ("gate", "up"))
# of an attention whose q, k and v may have other inputs than one
OTHER_INPUTS = {
    "key_value_states", "encoder_hidden_states", "cross_attention_states", "key_hidden_states",
    "context_hidden_states", "global_hidden_states", "query_states", "key", "keys", "key_tensor",
    "value", "values", "value_tensor", "kv", "to_tensor", "context", "inputs", "object_queries",
    "spatial_position_embeddings", "k", "v", "height", "entity_hidden_states",
}  # fmt: skip


class _Together(torch.autograd.Function):
    """W_i x + bias_i + s_i B_i A_i x for all i, as `_product._Adapted` has it for one.

    `each`: A, B, W x + bias where it is at hand, W, bias of the first; of the second; ...
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: Sequence[float], decoded: Sequence[Any], *each: Tensor | None
    ) -> tuple[Tensor, ...]:
        A, B, given, W, biases = _columns(each)
        flat, ys = x.reshape(-1, x.shape[-1]), []
        downs = F.linear(flat, _stacked(A, x.dtype)).split([len(a) for a in A], dim=1)
        for i, down in enumerate(downs):
            y = of_base(x, given[i], W[i], decoded[i], biases[i])
            up = B[i].to(x.dtype).mT
            y.view(-1, up.shape[1]).addmm_(down, up, alpha=scales[i])
            ys.append(y)
        ctx.save_for_backward(x, *A, *B, *W)
        types = [None if t is None else t.dtype for t in biases]
        ctx.settings = scales, decoded, [t is None for t in given], types
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        scales, decoded, whole, biases = ctx.settings
        x, *rest = ctx.saved_tensors
        k, needs = len(scales), _columns(ctx.needs_input_grad[3:])
        A, B, W = rest[:k], rest[k : 2 * k], rest[2 * k :]
        g = {i: t.reshape(-1, t.shape[-1]) for i, t in enumerate(grads) if t is not None}
        found: list[list[Any]] = [[None] * 5 for _ in scales]  # of what was not used, nothing
        if not g:
            return (None, None, None, *(t for each in found for t in each))
        dtype, flat = next(iter(g.values())).dtype, x.reshape(-1, x.shape[-1])
        stacked, ranks = _stacked([A[i] for i in g], dtype), [len(A[i]) for i in g]
        up = torch.cat([own @ (scales[i] * B[i]).to(dtype) for i, own in g.items()], dim=1)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = up @ stacked
            for i, own in g.items():
                gx = plus_back(gx, own, W[i], decoded[i]) if whole[i] else gx
            gx = gx.view(x.shape)
        if any(needs[0]):
            for i, gA in zip(g, (up.mT @ flat).split(ranks), strict=True):
                found[i][0] = gA.to(A[i].dtype)
        if any(needs[1]):
            downs = F.linear(flat, stacked).split(ranks, dim=1)
            for (i, own), down in zip(g.items(), downs, strict=True):
                found[i][1] = (scales[i] * (own.mT @ down)).to(B[i].dtype)
        for i, own in g.items():
            found[i][2] = None if whole[i] else grads[i]
            found[i][4] = own.sum(0).to(biases[i]) if needs[4][i] else None
        return (gx, None, None, *(t for each in found for t in each))


def _columns(each: Sequence[Any]) -> list[Sequence[Any]]:
    return [each[i::5] for i in range(5)]


def _stacked(matrices: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([t.to(dtype) for t in matrices])


class Together:
    """Layers within one forward of their block."""

    def __init__(self, layers: Sequence["Adapted"]) -> None:
        self.layers, self.hooks = layers, top_hooks and top_hooks(True)
        self.given: tuple[Tensor, Any] | None = None
        self.waiting: dict[Any, tuple[Any, Tensor]] = {}

    def output(self, layer: "Adapted", x: Tensor) -> Tensor | None:
        """The layer's output for x; None: it answers for itself."""
        if x.is_inference() or layer.drops:  # the first has no version to know a change by
            return None
        seen = self._state(x)
        if seen is None:
            return None
        if self.given is None:
            self.given = x, seen
            if x.numel() >= TOKENS * x.shape[-1]:
                answers = _answers(self.layers, x)
                self.waiting = {own: (_versions(own), y)
                                for own, y in zip(self.layers, answers, strict=True)}  # fmt: skip
        versions, found = self.waiting.pop(layer, (None, None))
        given, state = self.given
        same = given is x and state == seen and versions == _versions(layer)
        return found if same else None

    def _state(self, x: Tensor) -> Any:
        """What an answer depends on beside the numbers; None: no group here. What is kept for
        backward goes through other hooks where a part of the block is recomputed, which would ask
        each layer by itself."""
        grad = torch.is_grad_enabled()
        if grad and (top_hooks is None or top_hooks(True) != self.hooks):
            return None
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        return (x._version, grad, x.requires_grad, torch.is_inference_mode_enabled(),
                threading.get_ident(), stream)  # fmt: skip


def _versions(layer: "Adapted") -> list[int]:
    return [t._version for t in layer.params.values()]


def _answers(layers: Sequence["Adapted"], x: Tensor) -> tuple[Tensor, ...]:
    each: list[Tensor | None] = []
    for own in layers:
        stored, bias = own.frozen.stored, own.frozen.bias
        A, B = own.form.factors(own.p)  # type: ignore[misc]
        each += [A, B, stored.given(x, bias), stored.resident(x.dtype), bias]
    decoded = [own.frozen.stored.decoded if W is None else None
               for own, W in zip(layers, each[3::5], strict=True)]  # fmt: skip
    return _Together.apply(x, [own.s for own in layers], decoded, *each)  # type: ignore[return-value]


class Within(Hooked):
    """The hooks of a block: its layers of these names are together while its forward runs."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def begin(self, block: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():  # a compiler sees through it anyway
            return
        layers = self._layers(block)
        if len(layers) == len(self.names) and all(map(_answers_early, layers)):
            together = Together(layers)
            for own in layers:
                own.together = together

    def end(self, block: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for own in self._layers(block):
            own.together = None

    def _layers(self, block: nn.Module) -> list[Any]:
        """Those of them that are still there, and still adapted."""
        found: list[Any] = []
        for name in self.names:
            with suppress(AttributeError):
                found.append(block.get_submodule(name))
        return [own for own in found if hasattr(own, "together")]


def _answers_early(layer: Any) -> bool:
    """Whether its numbers are there before it is called, and have versions: whatever shards or
    offloads a layer by itself brings them in a hook of the layer's own, or in another forward."""
    own = not layer._forward_pre_hooks and "forward" not in vars(layer)
    known = own and not any(t.is_inference() for t in layer.params.values())
    return known and layer.enabled and not layer.drops


def bring_together(
    model: nn.Module, layers: Mapping[str, "Adapted"], sites: Mapping[str, Site]
) -> list[End]:
    """Groups the layers of each block that are given one input; what ends each group."""
    found: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        site = sites[name]
        block, _, leaf = site.path.rpartition(".")
        role = site.role or role_of(site.path)
        if site.role:  # a part of a fused layer, which gives all its parts its own input
            block, leaf = site.path, f"slices.{site.role}"
        roles = next((roles for roles in ROLES if role in roles), None)
        if roles and _joins(layer) and (site.role or not _crosses(model, block)):
            found.setdefault((block, roles, layer.in_features), []).append(leaf)
    return [Within(names).install(model.get_submodule(block))
            for (block, *_), names in found.items() if len(names) > 1]  # fmt: skip


def _joins(layer: "Adapted") -> bool:
    """Whether its form is two factors, of which A learns, with the products of every such form."""
    plain = type(layer.kind) in (Kind, Conv1DKind) and type(layer.form).forward is Form.forward
    with torch.enable_grad():  # wherever it is asked from: factors that are made learn too
        factors = layer.form.factors(layer.p) if plain else None
    return factors is not None and factors[0].requires_grad


def _crosses(model: nn.Module, block: str) -> bool:
    """Whether an attention may be given keys and values of another input than its queries'."""
    taken = inspect.signature(type(model.get_submodule(block)).forward).parameters
    first, *others = [*taken][1:]
    return first == "key_value_states" or bool(OTHER_INPUTS & set(others))
