"""How far magnitudes and directions of a matrix's rows move (DoRA, Section 3.2).

Row n of W [m, n] is the weight of output feature n (the paper's columns); its magnitude is its
norm, its direction what is left of it when that is divided out.

A change along the rows moves magnitudes alone, one that turns them directions alone:

>>> from analysis.spectra import Factors
>>> W0 = torch.eye(3, 4)
>>> magnitude_direction(W0, 0.5 * W0)
(0.5, 0.0)
>>> turned = torch.roll(W0, 1, dims=1) - W0
>>> magnitude_direction(W0, turned)
(0.0, 1.0)
>>> slope([(0.1, 0.3), (0.2, 0.2), (0.3, 0.1)])
(-1.0, -1.0)

What is left of a row that nearly vanishes keeps its direction:

>>> w = torch.randn(1, 60, generator=torch.Generator().manual_seed(0))
>>> moved, turned = magnitude_direction(w, Factors(w, torch.tensor([[-1 + 2.0**-20]])))
>>> round(moved / w.double().norm().item() * 2**20), round(abs(turned), 6)
(1048575, 0.0)
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from variants._api import wide

from .spectra import Change, coordinates, row_norms

CANCELLED = 0.1  # what is left of lengths: of less, sums in fp32 keep no five digits
ACROSS = 1e-3  # the same of <w0, dw>, over ||w0|| ||dw||
BLOCK = 32  # rows: what fits a cache takes half the time


def magnitude_direction(W0: Tensor, dW: Change) -> tuple[float, float]:
    """(dM, dD) of W = W0 + dW: the means over rows of | ||w|| - ||w0|| | and of 1 - cos(w, w0).

    Both come from ||dw||^2 and <w0, dw>, so that a small change keeps its digits:
    ||w|| - ||w0|| = (2 <w0, dw> + ||dw||^2) / (||w|| + ||w0||), and
    1 - cos = (||dw||^2 - (||w|| - ||w0||)^2) / (2 ||w|| ||w0||). Rows in which these cancel, as
    where dw is nearly -w0, along it, or only turns it, are summed in float64. A row of zeros does
    not count.
    """
    W0 = W0.detach().to(wide(W0.dtype))
    before = row_norms(W0)
    if isinstance(dW, Tensor):
        dW = dW.detach().to(W0)
        cross, change = (W0 * dW).sum(1, dtype=torch.float64), row_norms(dW).square()
    else:  # rows in an orthonormal basis of dW's, so that nothing cancels between factors
        dW = coordinates(dW)
        cross = ((W0 @ dW.A.mT.to(W0)).double() * dW.B).sum(1)
        change = dW.B.square().sum(1)
    after = (before.square() + 2 * cross + change).clamp_min(0).sqrt()
    longer = 2 * cross + change
    moved = longer / (before + after)
    aside = (change - moved.square()).clamp_min(0)
    turned = aside / (2 * before * after)
    sure = (
        (after >= CANCELLED * before)
        & (aside >= CANCELLED * change)
        & (longer.abs() >= ACROSS * before * change.sqrt())
    )
    for rows in (~sure).nonzero()[:, 0].split(BLOCK):
        moved[rows], turned[rows] = _summed(
            W0[rows].double(),
            dW[rows].double() if isinstance(dW, Tensor) else dW.B[rows] @ dW.A,
        )
    counted = turned.isfinite()
    if not counted.any():
        return math.nan, math.nan
    return moved[counted].abs().mean().item(), turned[counted].mean().item()


def _summed(w0: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
    """(||w|| - ||w0||, 1 - cos) of rows in float64, the second as half the squared distance of the
    two directions; not finite where w0 or w is zero."""
    w = w0 + dw
    before, after = (t.norm(dim=1, keepdim=True) for t in (w0, w))
    moved = ((w + w0) * dw).sum(1) / (before + after)[:, 0]
    return moved, (w / after - w0 / before).square().sum(1) / 2


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(slope of the least-squares line, correlation) of dM on dD over `points` (dD, dM); of
    matrices, checkpoints or both. nan where there are fewer than two different dD.

    The paper's figure has the correlations -0.62 (full fine-tuning), 0.83 (LoRA), -0.31 (DoRA).
    """
    x, y = torch.tensor(points, dtype=torch.float64).T if points else torch.zeros(2, 0)
    x, y = x - x.mean(), y - y.mean()
    xx, xy, yy = (x @ x).item(), (x @ y).item(), (y @ y).item()
    if len(points) < 2 or not xx > 0:
        return math.nan, math.nan
    return round(xy / xx, 12), round(xy / math.sqrt(xx * yy), 12) if yy > 0 else math.nan
