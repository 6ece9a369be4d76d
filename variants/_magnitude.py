"""Outputs under a magnitude: c (W + s B A) x, row by row.

A c near 1 acts as 1 + (c - 1), so that bf16, whose steps there are 2^-7, does not round it away.

Legend: as in `_product.py`; c [m].
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._dropout import Seed, drop, places
from ._product import Decoded, lent, linear, plus_back

if TYPE_CHECKING:
    from ._api import Stored


def rescale(t: Tensor, c: Tensor) -> Tensor:
    """c t as t + (c - 1) t."""
    return torch.addcmul(t, t, (c - 1).to(t.dtype))


class _Rescaled(torch.autograd.Function):
    """See `rescale`."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(t, c)
        return rescale(t, c)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (t, c), g = ctx.saved_tensors, grads[0]
        gt = rescale(g, c) if ctx.needs_input_grad[0] else None
        gc = None
        if ctx.needs_input_grad[1]:
            gc = (g * t).reshape(-1, t.shape[-1]).sum(0, dtype=c.dtype)
        return gt, gc


def rescaled(t: Tensor, c: Tensor) -> Tensor:
    """c t of t [..., m] by a c [m] near 1, whose change is kept when t is in fewer bits than c."""
    return _Rescaled.apply(t, c)  # type: ignore[return-value]


class _Corrected(torch.autograd.Function):
    """W x + bias + (c (W + s B A) - W) D x = W x + bias + s B A D x + (c - 1) (W + s B A) D x.

    Keeps x and (W + s B A) D x, which the gradient of c takes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, c: Tensor, given: Tensor | None,
        W: Tensor | None, decoded: Decoded | None, bias: Tensor | None, s: float, p: float,
        seed: Seed,
    ) -> Tensor:  # fmt: skip
        flat, change = x.reshape(-1, x.shape[-1]), (c - 1).to(x.dtype)
        dropped = drop(flat, places(x.numel(), p, seed, x.device), p)
        down, up = F.linear(dropped, A.to(x.dtype)).mul_(s), B.to(x.dtype).mT
        with lent(W, decoded, x.dtype) as own:
            t = F.linear(dropped, own)
            if given is None:
                y = linear(x, own, bias)
            else:
                y = given.clone(memory_format=torch.contiguous_format)
        t.addmm_(down, up)
        y.view(t.shape).addmm_(down, up).addcmul_(t, change)
        ctx.save_for_backward(x, A, B, c, t, W)
        ctx.settings = decoded, given is None, s, p, seed, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, A, B, c, t, W = ctx.saved_tensors
        decoded, whole, s, p, seed, bias = ctx.settings
        gx = gA = gB = gc = gb = None
        g, dtype, scaled = grads[0].reshape(-1, len(c)), grads[0].dtype, (s * c)[:, None]
        up = g @ (scaled * B).to(dtype)
        flat = x.reshape(-1, x.shape[-1])
        at = places(x.numel(), p, seed, x.device)
        if ctx.needs_input_grad[0]:
            gx = plus_back(up @ A.to(dtype), g * (c - 1).to(dtype), W, decoded)
            gx = drop(gx, at, p)
            gx = (plus_back(gx, g, W, decoded) if whole else gx).view(x.shape)
        again = ctx.needs_input_grad[3] and torch.is_grad_enabled()  # for a second derivative
        if any(ctx.needs_input_grad[1:3]) or again:
            dropped = drop(flat, at, p)
            gA = (up.mT @ dropped).to(A.dtype)
            gB = (scaled * (g.mT @ (dropped @ A.to(dtype).mT))).to(B.dtype)
        if again:
            t = plus_back(
                s * (dropped @ A.to(dtype).mT) @ B.to(dtype).mT, dropped, W, decoded, True
            )
        if ctx.needs_input_grad[3]:
            gc = (g * t).sum(0, dtype=c.dtype)
        if ctx.needs_input_grad[7]:
            gb = g.sum(0).to(bias)
        return (gx, gA, gB, gc, None if whole else grads[0], None, None, gb, None, None, None)


def corrected(
    x: Tensor, base: "Stored", bias: Tensor | None, A: Tensor, B: Tensor, c: Tensor, s: float,
    p: float, seed: Seed,
) -> Tensor:  # fmt: skip
    """x [..., n] -> W x + bias + (c (W + s B A) - W) dropout(x) [..., m], W = `base`, c [m]."""
    W = base.resident(x.dtype)
    decoded = base.decoded if W is None else None
    given = base.given(x, bias)
    return _Corrected.apply(x, A, B, c, given, W, decoded, bias, s, p, seed)  # type: ignore[return-value]
