"""Products that keep nothing for backward which backward can compute again.

Each is an autograd function over plain torch operations, so a second derivative works as well.

Legend: x [..., n] (T numbers of n), W [m, n], A [r, n], B [m, r]; D x is x after dropout.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from ._dropout import Seed, drop, dropout, places

if TYPE_CHECKING:
    from ._api import Stored

Made = Callable[..., tuple[Tensor, ...]]
Decoded = Callable[[torch.dtype], AbstractContextManager[Tensor]]


class _Frozen(torch.autograd.Function):
    """x W^T + bias, or x W (`back`), for a frozen W that is decoded here and again in backward.

    Its own derivative is the other of the two, so that no derivative of any order keeps a W.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, decoded: Decoded, bias: Tensor | None, back: bool) -> Tensor:
        ctx.decoded, ctx.back, ctx.bias = decoded, back, bias if bias is None else bias.dtype
        return _times(x, decoded, bias, back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        g, gx, gb = grads[0], None, None
        if ctx.needs_input_grad[0]:
            times = _Frozen.apply if torch.is_grad_enabled() else _times
            gx = times(g, ctx.decoded, None, not ctx.back)
        if ctx.needs_input_grad[2]:
            gb = g.reshape(-1, g.shape[-1]).sum(0).to(ctx.bias)
        return gx, None, gb, None  # type: ignore[return-value]


def _times(x: Tensor, decoded: Decoded, bias: Tensor | None, back: bool) -> Tensor:
    with decoded(x.dtype) as W:
        if back:
            return x @ W
        return linear(x, W, bias)


def linear(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """W x + bias, no view: what a function of autograd gives away may be changed in place then."""
    if bias is None:
        return F.linear(x, W)
    flat = F.linear(x.reshape(-1, x.shape[-1]), W, bias.to(x.dtype))
    return torch.ops.aten._unsafe_view(flat, (*x.shape[:-1], len(W)))


def frozen_product(x: Tensor, decoded: Decoded, bias: Tensor | None) -> Tensor:
    """x [..., n] -> x W^T + bias [..., m] in the dtype of x, W [m, n] as `decoded` lends it."""
    return _Frozen.apply(x, decoded, bias, False)  # type: ignore[return-value]


def lent(W: Tensor | None, decoded: Decoded | None, dtype: torch.dtype) -> Any:
    """W, or what `decoded` lends in its place."""
    return nullcontext(W) if decoded is None else decoded(dtype)


def of_base(
    x: Tensor, given: Tensor | None, W: Tensor | None, decoded: Decoded | None, bias: Tensor | None
) -> Tensor:
    """W x + bias in memory of its own, which may be changed; `given`: where it is at hand."""
    if given is not None:
        return given.clone(memory_format=torch.contiguous_format)
    with lent(W, decoded, x.dtype) as own:
        return linear(x, own, bias)


def _plus(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + a b, in the memory of y unless a derivative of this is asked for."""
    return torch.addmm(y, a, b) if torch.is_grad_enabled() else y.addmm_(a, b)


def plus_back(
    y: Tensor, g: Tensor, W: Tensor | None, decoded: Decoded | None, forward: bool = False
) -> Tensor:
    """y + g W, or y + g W^T (`forward`), which keeps no W that is only lent."""
    if decoded is not None and torch.is_grad_enabled():
        return y + _Frozen.apply(g, decoded, None, not forward)
    with lent(W, decoded, g.dtype) as own:
        return _plus(y, g, own.mT if forward else own)


class _Adapted(torch.autograd.Function):
    """W x + bias + s B A D x, whose sum is made by the product with B itself, and so in backward.

    Keeps x (which projections share) and no A D x, no casts. `given`: W x + bias, where it is at
    hand.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, given: Tensor | None, W: Tensor | None,
        decoded: Decoded | None, bias: Tensor | None, s: float, p: float, seed: Seed,
    ) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        down = F.linear(drop(flat, places(x.numel(), p, seed, x.device), p), A.to(x.dtype)).mul_(s)
        y = of_base(x, given, W, decoded, bias)
        y.view(-1, B.shape[0]).addmm_(down, B.to(x.dtype).mT)
        ctx.save_for_backward(x, A, B, W)
        ctx.settings = decoded, given is None, s, p, seed, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, A, B, W = ctx.saved_tensors
        decoded, whole, s, p, seed, bias = ctx.settings
        gx = gA = gB = gb = None
        g, dtype = grads[0].reshape(-1, B.shape[0]), grads[0].dtype
        up, shape = (g @ B.to(dtype)).mul(s), (*grads[0].shape[:-1], A.shape[1])
        at = places(x.numel(), p, seed, g.device)
        if ctx.needs_input_grad[0]:
            gx = drop(up @ A.to(dtype), at, p)
            gx = (plus_back(gx, g, W, decoded) if whole else gx).view(shape)
        if any(ctx.needs_input_grad[1:3]):
            dropped = drop(x.reshape(-1, shape[-1]), at, p)
            if ctx.needs_input_grad[1]:
                gA = (up.mT @ dropped).to(A.dtype)
            if ctx.needs_input_grad[2]:
                gB = (g.mT @ (dropped @ A.to(dtype).mT).mul(s)).to(B.dtype)
        if ctx.needs_input_grad[6]:
            gb = g.sum(0).to(bias)
        return gx, gA, gB, None if whole else grads[0], None, None, gb, None, None, None


def adapted(
    x: Tensor, base: "Stored", bias: Tensor | None, A: Tensor, B: Tensor, s: float,
    p: float = 0.0, seed: Seed = 0,
) -> Tensor:  # fmt: skip
    """x [..., n] -> W x + bias + s B A dropout(x) [..., m], W = `base`, in the dtype of x.

    Where A is frozen nothing needs x in backward: A D x [T, r] is kept in its place.
    """
    if not A.requires_grad:
        down = F.linear(dropout(x, p, seed) if p else x, A.to(x.dtype))
        return base.product(x, bias) + F.linear(down, B.to(x.dtype)) * s
    W = base.resident(x.dtype)
    decoded = base.decoded if W is None else None
    given = base.given(x, bias)
    return _Adapted.apply(x, A, B, given, W, decoded, bias, s, p, seed)  # type: ignore[return-value]


def plus_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """y + s B A x."""
    return _Adapted.apply(x, A, B, y, None, None, None, s, 0.0, 0)  # type: ignore[return-value]


def _chain(x: Tensor, matrices: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    *before, last = matrices
    for M in before:
        x = F.linear(x, M.to(x.dtype))
    return linear(x, last.to(x.dtype), bias)


class _Made(torch.autograd.Function):
    """M_k ... M_1 D x + bias; D x and the M, of p, are made here and again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, made: Made, drops: tuple[float, Seed], *p: Tensor
    ) -> Tensor:
        ctx.made, ctx.drops, ctx.bias = made, drops, None if bias is None else bias.dtype
        ctx.save_for_backward(x, *p)
        at = places(x.numel(), *drops, x.device)
        return _chain(drop(x, at, drops[0]), made(*p), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *p = ctx.saved_tensors
        g, again = grads[0].reshape(-1, grads[0].shape[-1]), torch.is_grad_enabled()
        learn = [i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        dropped, seed = ctx.drops
        at = places(x.numel(), dropped, seed, x.device)
        gb = g.sum(0).to(ctx.bias) if ctx.needs_input_grad[1] else None
        if not again:  # what is made here is gone before the next layer: no hook need know it
            p = [t.detach().requires_grad_(i in learn) for i, t in enumerate(p)]
        with nullcontext() if again else saved_tensors_hooks(_same, _same), torch.enable_grad():
            made = ctx.made(*p)
        own, seen = (
            [M.to(g.dtype) if again else M.detach().to(g.dtype) for M in made],
            [drop(x, at, ctx.drops[0])],
        )
        learned = [i for i, M in enumerate(made) if M.requires_grad and learn]
        for M in own[: max(learned, default=0)]:
            seen.append(F.linear(seen[-1], M))
        gM: dict[int, Tensor] = {}
        for i in reversed(range(len(own))):
            if i in learned:
                gM[i] = (g.mT @ seen[i].reshape(-1, seen[i].shape[-1])).to(made[i].dtype)
            if i > min(learned, default=0) or ctx.needs_input_grad[0]:
                g = g @ own[i]
        gp: list[Tensor | None] = [None] * len(p)
        if learned:
            asked, outputs = [p[i] for i in learn], [made[i] for i in learned]
            found = torch.autograd.grad(
                outputs, asked, [gM[i] for i in learned], create_graph=again, allow_unused=True
            )
            for i, t in zip(learn, found, strict=True):
                gp[i] = t
        gx = drop(g.view(x.shape), at, dropped) if ctx.needs_input_grad[0] else None
        return gx, gb, None, None, *gp


def _same(t: Tensor) -> Tensor:
    return t


def made_product(
    x: Tensor, p: Mapping[str, Tensor], made: Callable[[dict[str, Tensor]], Any],
    bias: Tensor | None = None, drops: tuple[float, Seed] = (0.0, 0),
) -> Tensor:  # fmt: skip
    """x [..., n] -> M D x + bias [..., m] in the dtype of x, for M [m, n] = made(p) of the tensors
    p, or B A D x + bias for (A, B) = made(p); D x is x after dropout, by `drops` = (probability,
    seed). None of them is kept."""

    def matrices(*own: Tensor) -> tuple[Tensor, ...]:
        found = made(dict(zip(p, own, strict=True)))
        return found if isinstance(found, tuple) else (found,)

    if torch.compiler.is_compiling():  # a compiler decides itself what it makes again
        return _chain(dropout(x, *drops) if drops[0] else x, matrices(*p.values()), bias)
    return _Made.apply(x, bias, matrices, drops, *p.values())  # type: ignore[return-value]
