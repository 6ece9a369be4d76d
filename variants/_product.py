"""Products that keep nothing for backward which backward can compute again.

Each is an autograd function over plain torch operations, so a second derivative works as well.

Dropout has the mean of its input, and backward the mask of forward:

>>> import torch
>>> x = torch.ones(40, 50, requires_grad=True)
>>> y = dropout(x, 0.5, seed=3)
>>> sorted(set(y.flatten().tolist())), round((y == 0).float().mean().item(), 1)
([0.0, 2.0], 0.5)
>>> y = dropout(x, 0.2, seed=3)
>>> round((y == 0).float().mean().item(), 1), round(y.max().item(), 4)
(0.2, 1.25)
>>> y.sum().backward()
>>> torch.equal(x.grad, y)
True

Second derivatives are whole where A is frozen, or where a magnitude c rescales:

>>> x, A, B, c = (torch.randn(*s, dtype=torch.float64, requires_grad=True)
...               for s in ((3, 4), (2, 4), (5, 2), (5,)))
>>> torch.autograd.gradgradcheck(lambda x, A, B: low_rank(x, A, B, 2.0), (x, A, B))
True
>>> torch.autograd.gradgradcheck(lambda x, B: low_rank(x, A.detach(), B, 2.0), (x, B))
True
>>> torch.autograd.gradgradcheck(rescaled, (x @ A.T @ B.T, c))
True
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
        return F.linear(x, W, None if bias is None else bias.to(x.dtype))


def frozen_product(x: Tensor, decoded: Decoded, bias: Tensor | None) -> Tensor:
    """x [..., n] -> x W^T + bias [..., m] in the dtype of x, W [m, n] as `decoded` lends it."""
    return _Frozen.apply(x, decoded, bias, False)  # type: ignore[return-value]


class _LowRank(torch.autograd.Function):
    """s x A^T B^T: keeps x (which projections share) and the factors, not x A^T nor their casts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, s: float, p: float, seed: int) -> Tensor:
        down = F.linear(drop(x, p, seed), A.to(x.dtype))
        ctx.save_for_backward(x, A, B)
        ctx.settings = s, p, seed, x.dtype
        return F.linear(down, B.to(x.dtype)) * s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        s, p, seed, dtype = ctx.settings
        g = grads[0].reshape(-1, B.shape[0]) * s
        up = g @ B.to(dtype)  # [T, r]
        gx = gA = gB = None
        shape = (*grads[0].shape[:-1], A.shape[1])
        seen = mask(shape, grads[0], p, seed) if any(ctx.needs_input_grad[:2]) else None
        if ctx.needs_input_grad[0]:
            gx = masked((up @ A.to(dtype)).view(shape), p, seen)
        if ctx.needs_input_grad[1]:
            xd = masked(x, p, seen).reshape(-1, A.shape[1])
            gA = (up.mT @ xd).to(A.dtype)
            if ctx.needs_input_grad[2]:
                gB = (g.mT @ (xd @ A.to(dtype).mT)).to(B.dtype)
        return gx, gA, gB, None, None, None


def low_rank(x: Tensor, A: Tensor, B: Tensor, s: float, p: float = 0.0, seed: int = 0) -> Tensor:
    """x [..., n] -> s B A dropout(x) [..., m]; A [r, n] and B [m, r] in their own dtype.

    Where A is frozen nothing needs x: then x A^T [tokens, r] is kept in its place.
    """
    if not A.requires_grad:
        down = F.linear(dropout(x, p, seed) if p else x, A.to(x.dtype))
        return F.linear(down, B.to(x.dtype)) * s
    return _LowRank.apply(x, A, B, s, p, seed)  # type: ignore[return-value]


class _Rescaled(torch.autograd.Function):
    """c t as t + (c - 1) t."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(t, c)
        return torch.addcmul(t, t, (c - 1).to(t.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (t, c), g = ctx.saved_tensors, grads[0]
        gt = torch.addcmul(g, g, (c - 1).to(g.dtype)) if ctx.needs_input_grad[0] else None
        gc = None
        if ctx.needs_input_grad[1]:
            gc = (g * t).reshape(-1, t.shape[-1]).sum(0, dtype=c.dtype)
        return gt, gc


def rescaled(t: Tensor, c: Tensor) -> Tensor:
    """c t of t [..., m] by a c [m] near 1, whose change is kept when t is in fewer bits than c."""
    return _Rescaled.apply(t, c)  # type: ignore[return-value]


class _Dropout(torch.autograd.Function):
    """Dropout that keeps the seed of its mask, not the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.settings = p, seed
        return drop(x, p, seed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return drop(grads[0], *ctx.settings), None, None


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """x with a share p set to zero and the rest scaled by 1 / (1 - p)."""
    return _Dropout.apply(x, p, seed)  # type: ignore[return-value]


def drop(x: Tensor, p: float, seed: int) -> Tensor:
    """x times the mask of `seed`; linear in x, so backward is the same call."""
    return masked(x, p, mask(x.shape, x, p, seed))


def mask(shape: Sequence[int], like: Tensor, p: float, seed: int) -> Tensor | None:
    """1 where a number is kept, 0 where it is dropped, in the dtype of `like`; None: all is kept.

    Of the 2^16 values of 16 random bits the nearest share to p drops: four numbers a draw, where a
    draw for each costs as much as the products that it is for.
    """
    if p == 0:
        return None
    generator, count = torch.Generator(like.device).manual_seed(seed), math.prod(shape)
    draws = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device)
    draws.random_(-(2**63), None, generator=generator)
    kept = draws.view(torch.int16)[:count] >= _dropped(p) - 2**15
    return kept.view(shape).to(like.dtype)


def masked(x: Tensor, p: float, kept: Tensor | None) -> Tensor:
    """x where the mask has 1, over the share that is kept."""
    return x if kept is None else (x * kept).mul_(2**16 / (2**16 - _dropped(p)))


def _dropped(p: float) -> int:
    return min(round(p * 2**16), 2**16 - 1)


def draw_seed() -> int:
    """A seed from torch's global CPU generator, which checkpoints and recomputation restore."""
    return int(torch.randint(2**62, ()).item())
