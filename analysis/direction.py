"""How far magnitudes and directions of a matrix's rows move (DoRA, Section 3.2).

Row n of W [m, n] is the weight of output feature n (the paper's columns); its magnitude is its
norm, its direction what is left of it when that is divided out.

A change along the rows moves magnitudes alone, one that turns them directions alone:

>>> W0 = torch.eye(3, 4)
>>> magnitude_direction(W0, 0.5 * W0)
(0.5, 0.0)
>>> turned = torch.roll(W0, 1, dims=1) - W0
>>> magnitude_direction(W0, turned)
(0.0, 1.0)
>>> slope([(0.1, 0.3), (0.2, 0.2), (0.3, 0.1)])
(-1.0, -1.0)
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from variants._api import wide

from .spectra import Change, Factors, Triplets, coordinates, row_norms

NEAR = 1e-6  # of either mean: what rounding may add to it
ROWS = 32  # at once, where rows are formed


def magnitude_direction(W0: Tensor, dW: Change) -> tuple[float, float]:
    """(dM, dD) of W = W0 + dW: the means over rows of | ||w|| - ||w0|| | and of 1 - cos(w, w0).

    Of factors both come from ||w0||, ||dw|| and <w0, dw>, for which W0 is read twice and no row of
    dW is formed:
    ||w|| - ||w0|| = (2 <w0, dw> + ||dw||^2) / (||w|| + ||w0||), and
    1 - cos = (||dw||^2 - (||w|| - ||w0||)^2) / (2 ||w|| ||w0||). Rows in which these cancel (dw is
    nearly -w0, along w0, or across it and small) are formed in float64. A row of zeros does not
    count.
    """
    W0 = W0.detach().to(wide(W0.dtype))
    if isinstance(dW, Tensor):
        parts = zip(W0.split(ROWS), dW.detach().split(ROWS), strict=True)
        moved, turned = map(torch.cat, zip(*(_formed(w0, dw) for w0, dw in parts), strict=True))
    else:
        moved, turned = _thin(W0, dW)
    counted = ~turned.isnan()
    if not counted.any():
        return math.nan, math.nan
    return moved[counted].abs().mean().item(), turned[counted].mean().item()


def _formed(W0: Tensor, dW: Tensor) -> tuple[Tensor, Tensor]:
    """(||w|| - ||w0||, 1 - cos(w, w0)) of each row, in float64; nan for a row of zeros."""
    w0, dw = W0.double(), dW.double()
    w = w0 + dw
    before, after = (torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in (w0, w))
    moved = ((w + w0) * dw).sum(1) / (before + after)[:, 0]
    return moved, (w / after - w0 / before).square().sum(1) / 2


def _thin(W0: Tensor, dW: Factors | Triplets) -> tuple[Tensor, Tensor]:
    """The same without dW: its rows are those of B in an orthonormal basis, the rows of A."""
    A, own = (dW := coordinates(dW)).A, dW.B
    before, change = row_norms(W0), own.square().sum(1)
    cross = ((W0 @ A.mT.to(W0)).double() * own).sum(1)
    after = (before.square() + 2 * cross + change).clamp_min(0).sqrt()
    moved = (2 * cross + change) / (before + after)
    turned = (change - moved.square()).clamp_min(0) / (2 * before * after)
    turned[(before == 0) | (after == 0)] = math.nan  # formed below, where `after` is only near 0

    # what rounding in W0's dtype adds to each row; over m rows it adds up as their root
    eps = 2 * torch.finfo(W0.dtype).eps
    cross_off = eps * before * change.sqrt()
    after_off = (eps * before.square() + cross_off) / after
    moved_off = 2 * cross_off / (before + after)
    moved_off += moved.abs() * (eps + after_off / (before + after))
    turned_off = moved.abs() * moved_off / (before * after) + turned * (eps + after_off / after)
    share = NEAR * math.sqrt(len(before))
    near = (moved_off <= share * moved.abs().nanmean()) & (turned_off <= share * turned.nanmean())
    for rows in (~near).nonzero()[:, 0].split(ROWS):
        moved[rows], turned[rows] = _formed(W0[rows], own[rows] @ A)
    return moved, turned


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
