"""Dropout that keeps the seed of its mask, not the mask.

Zeros at random, the rest scaled so that the mean stays; backward drops where forward did:

>>> x = torch.ones(40, 50, requires_grad=True)
>>> y = dropout(x, 0.2, seed=3)
>>> sorted(set(y.flatten().tolist())), round((y == 0).float().mean().item(), 1)
([0.0, 1.25], 0.2)
>>> y.sum().backward()
>>> torch.equal(x.grad, y)
True

Every number is dropped with the same chance, whatever happens to its neighbours:

>>> hits = torch.stack([dropout(torch.ones(6), 0.5, seed=k) == 0 for k in range(4000)]).double()
>>> float((hits.mT @ hits / 4000 - torch.eye(6) / 4 - 0.25).abs().max()) < 0.03
True
"""

import math
from typing import Any

import torch
from torch import Tensor

Seed = int | Tensor


class _Dropout(torch.autograd.Function):
    """Its derivative is itself, so any order of them keeps the seed alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Seed) -> Tensor:
        ctx.settings = p, seed
        return drop(x, places(x.numel(), p, seed, x.device), p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return dropout(grads[0], *ctx.settings), None, None


def dropout(x: Tensor, p: float, seed: Seed) -> Tensor:
    """x with a share p set to zero and the rest scaled by 1 / (1 - p)."""
    return _Dropout.apply(x, p, seed)  # type: ignore[return-value]


def places(count: int, p: float, seed: Seed, device: torch.device) -> Tensor | None:
    """Which of `count` numbers are dropped, in order; where there are fewer than that, `count`.

    From one to the next it is a geometric number of steps, so there are p draws for a number where
    a mask takes one. There are six deviations more of them than the mean, so that the last is
    reached, and as many whatever was drawn: no device is waited for. None: nothing is dropped.
    """
    if p == 0:
        return None
    most = min(count, math.ceil(count * p + 6 * math.sqrt(count * p) + 16))
    if torch.compiler.is_compiling():
        from . import _compiled

        return _compiled.places(count, most, p, seed, device)
    return drawn(count, most, p, seed, device)


def drawn(count: int, most: int, p: float, seed: Seed, device: torch.device) -> Tensor:
    """`places`, `most` of them."""
    generator = torch.Generator(device).manual_seed(int(seed))
    u = torch.empty(most, device=device).uniform_(generator=generator)
    steps = u.neg_().add_(1).log_().mul_(1 / math.log1p(-p)).long()
    return steps.add_(1).cumsum_(0).sub_(1).clamp_(max=count)


class _Drop(torch.autograd.Function):
    """x / (1 - p) in memory of its own, with zeros at some `places`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor, p: float) -> Tensor:
        ctx.settings = at, p
        return _drop(x, at, p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return drop(grads[0], *ctx.settings), None, None


def _drop(x: Tensor, at: Tensor, p: float) -> Tensor:
    count = x.numel()
    room = x.new_empty(count + 1)  # the last is for places that are none
    found = room[:count].view(x.shape)
    torch.mul(x, 1 / (1 - p), out=found)
    room.index_fill_(0, at, 0)
    return found


def drop(x: Tensor, at: Tensor | None, p: float) -> Tensor:
    """x / (1 - p) with zeros at some `places`."""
    if at is None:
        return x
    return _Drop.apply(x, at, p) if torch.is_grad_enabled() else _drop(x, at, p)  # type: ignore[return-value]


def draw_seed() -> Seed:
    """A seed from torch's global CPU generator, which checkpoints and recomputation restore.

    A tensor under torch.compile, whose graph would else be another for each number.
    """
    seed = torch.randint(2**62, ())
    return seed if torch.compiler.is_compiling() else int(seed.item())
