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

from .spectra import Change, Factors, Triplets, row_norms

CANCELLED = 1e-2  # of a row's norm: what is left after less would have no digits


def magnitude_direction(W0: Tensor, dW: Change) -> tuple[float, float]:
    """(dM, dD) of W = W0 + dW: the means over rows of | ||w|| - ||w0|| | and of 1 - cos(w, w0).

    Both come from ||dw||^2 and <w0, dw>, so that a small change keeps its digits:
    ||w|| - ||w0|| = (2 <w0, dw> + ||dw||^2) / (||w|| + ||w0||), and
    1 - cos = (||dw||^2 - (||w|| - ||w0||)^2) / (2 ||w|| ||w0||). A row of zeros does not count.
    """
    W0 = W0.detach().to(wide(W0.dtype))
    if isinstance(dW, Triplets):
        dW = Factors(dW.Vh, dW.U * dW.S)
    before = row_norms(W0)
    if isinstance(dW, Factors):  # dW's rows are those of s B in the metric A A^T
        A, B = dW.A.detach().double(), dW.s * dW.B.detach().double()
        cross = ((W0 @ A.mT.to(W0)).double() * B).sum(1)
        change = ((B @ (A @ A.mT)) * B).sum(1).clamp_min(0)
    else:
        own = dW.detach().to(W0)
        cross = (W0 * own).sum(1, dtype=torch.float64)
        change = own.square().sum(1, dtype=torch.float64)
    after = (before.square() + 2 * cross + change).clamp_min(0).sqrt()
    near = after < CANCELLED * before
    if near.any():  # little is left of the row: those sums are rounding, the row itself is not
        w0 = W0[near].double()
        dw = B[near] @ A if isinstance(dW, Factors) else dW.detach()[near].double()
        before[near], after[near] = w0.norm(dim=1), (w0 + dw).norm(dim=1)
        cross[near], change[near] = (w0 * dw).sum(1), dw.square().sum(1)
    moved = (2 * cross + change) / (before + after)
    turned = (change - moved.square()).clamp_min(0) / (2 * before * after)
    rows = (before > 0) & (after > 0)
    if not rows.any():
        return math.nan, math.nan
    return moved[rows].abs().mean().item(), turned[rows].mean().item()


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
