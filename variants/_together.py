"""Projections of one input, adapted together: q, k and v, or gate and up.

The first of them to be called answers for all: the products by their A are one, [T, r1 + r2 + ..],
and so are those of backward by and for them, and the gradient of x is gathered in one place. The
others find their answer waiting, if they are given that very x; a group of which one was given
another input (as in cross-attention) is a group no more, and each answers for itself. So it does
for few tokens, where one product more or less is less than the looking.

>>> import variants
>>> class Block(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, m) for m in (6, 3, 3))
...     def forward(self, x, other=None):
...         return self.q_proj(x), self.k_proj(x if other is None else other), self.v_proj(x)
>>> net, x = nn.Sequential(Block()).double(), torch.randn(TOKENS, 4, dtype=torch.float64)
>>> layers = variants.attach(net, "lora", rank=2).layers
>>> for layer in layers.values():
...     _ = nn.init.normal_(layer.params["B"])
>>> group = layers["0.q_proj"].together
>>> [torch.allclose(y, x @ la.weight.T + la.bias) for y, la in zip(net(x), layers.values())]
[True, True, True]
>>> len(group.layers), len(group.waiting)
(3, 0)
>>> y = net[0](x, 2 * x)
>>> torch.allclose(y[1], 2 * x @ layers["0.k_proj"].weight.T + layers["0.k_proj"].bias)
True
>>> group.layers
[]
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._kinds import Conv1DKind, Kind
from ._product import of_base, plus_back
from ._targets import Site, role_of

if TYPE_CHECKING:
    from ._layer import Adapted

TOKENS = 256  # from here on it is quicker (a step at width 512: as quick with 128)
ROLES = (("q", "k", "v"), ("gate", "up"))
OTHER_INPUTS = {"key_value_states", "encoder_hidden_states", "key", "context"}  # of an attention


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
        ctx.settings = scales, decoded, [t is None for t in given], biases
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        scales, decoded, whole, biases = ctx.settings
        x, *rest = ctx.saved_tensors
        k, dtype = len(scales), grads[0].dtype
        A, B, W = rest[:k], rest[k : 2 * k], rest[2 * k :]
        needs = _columns(ctx.needs_input_grad[3:])
        gs, flat = [g.reshape(-1, g.shape[-1]) for g in grads], x.reshape(-1, x.shape[-1])
        stacked, ranks = _stacked(A, dtype), [len(a) for a in A]
        ups = [g @ (s * b).to(dtype) for g, s, b in zip(gs, scales, B, strict=True)]
        up = torch.cat(ups, dim=1)
        gx, gA, gB = None, [None] * k, [None] * k
        if ctx.needs_input_grad[0]:
            gx = up @ stacked
            for i, g in enumerate(gs):
                gx = plus_back(gx, g, W[i], decoded[i]) if whole[i] else gx
            gx = gx.view(x.shape)
        if any(needs[0]):
            gA = [t.to(a.dtype) for t, a in zip((up.mT @ flat).split(ranks), A, strict=True)]
        if any(needs[1]):
            downs = F.linear(flat, stacked).split(ranks, dim=1)
            gB = [(s * (g.mT @ down)).to(b.dtype)
                  for s, g, down, b in zip(scales, gs, downs, B, strict=True)]  # fmt: skip
        found: list[Any] = [gx, None, None]
        for i, g in enumerate(gs):
            gb = g.sum(0).to(biases[i].dtype) if needs[4][i] else None
            found += [gA[i], gB[i], None if whole[i] else grads[i], None, gb]
        return tuple(found)


def _columns(each: Sequence[Any]) -> list[Sequence[Any]]:
    return [each[i::5] for i in range(5)]


def _stacked(matrices: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([t.to(dtype) for t in matrices])


class Together:
    """Layers that are given one input, in the order of their calls."""

    def __init__(self, layers: Sequence["Adapted"]) -> None:
        self.layers = list(layers)
        self.waiting: dict[Any, tuple[Tensor, int, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:  # a copy waits for nothing
        return {"layers": self.layers, "waiting": {}}

    def output(self, layer: "Adapted", x: Tensor) -> Tensor | None:
        """The layer's output for x; None: it answers for itself."""
        version = 0 if x.is_inference() else x._version
        found = self.waiting.pop(layer, None)
        if found is not None and found[0] is x and found[1] == version:
            return found[2]
        first = bool(self.layers) and layer is self.layers[0]
        if found is not None or (first and self.waiting):
            self.layers, self.waiting = [], {}
        many = x.numel() >= TOKENS * x.shape[-1]
        if not (first and self.layers and many and all(_ready(own) for own in self.layers)):
            return None
        each: list[Tensor | None] = []
        for own in self.layers:
            stored, bias = own.frozen.stored, own.frozen.bias if not own.form.adds_bias else None
            A, B = own.form.asked(own.p)  # type: ignore[misc]
            each += [A, B, stored.given(x, bias), stored.resident(x.dtype), bias]
        decoded = [own.frozen.stored.decoded if W is None else None
                   for own, W in zip(self.layers, each[3::5], strict=True)]  # fmt: skip
        scales = [own.s for own in self.layers]
        y, *others = _Together.apply(x, scales, decoded, *each)  # type: ignore[misc]
        self.waiting = {own: (x, version, out)
                        for own, out in zip(self.layers[1:], others, strict=True)}  # fmt: skip
        return y


def _ready(layer: "Adapted") -> bool:
    """Whether it is on, and sees its input as the others do."""
    return layer.enabled and not layer.drops


def bring_together(
    model: nn.Module, layers: Mapping[str, "Adapted"], sites: Mapping[str, Site]
) -> None:
    """Groups the layers of each block that are likely to be given one input."""
    found: dict[Any, list[Adapted]] = {}
    for name, layer in layers.items():
        site = sites[name]
        block = site.path if site.role else site.path.rpartition(".")[0]
        role = site.role or role_of(site.path)
        roles = next((roles for roles in ROLES if role in roles), None)
        if roles is None or not _joins(layer) or (not site.role and _crosses(model, block)):
            continue
        found.setdefault((block, roles, layer.in_features), []).append(layer)
    for group in found.values():
        if len(group) > 1:
            together = Together(group)
            for layer in group:
                layer.together = together


def _joins(layer: "Adapted") -> bool:
    """Whether its form asks for the product with two factors of which A learns."""
    pair = layer.form.asked(layer.p) if type(layer.kind) in (Kind, Conv1DKind) else None
    return pair is not None and pair[0].requires_grad


def _crosses(model: nn.Module, block: str) -> bool:
    """Whether an attention may be given keys and values of another input than its queries'."""
    taken = inspect.signature(type(model.get_submodule(block)).forward).parameters
    return bool(OTHER_INPUTS & set(taken))
