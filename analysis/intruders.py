"""Intruder dimensions (Shuttleworth et al., arXiv:2410.21228, Algorithm 1).

Of the top k left singular vectors of W' = W0 + dW, those whose largest |cosine| with any left
singular vector of W0 is under eps; absolute cosines, as the official code has them.

A direction of its own and above all others is one; the rest are W0's:

>>> import torch
>>> W0 = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5]))[:, :5]
>>> turned = torch.ones(6, 1) / 6**0.5
>>> found = newcomers(torch.linalg.svd(W0)[0], W0 + 90 * turned @ torch.eye(1, 5), k=1)
>>> round(found.cosines[0].item(), 2), counts(found.cosines, [0.3, 0.5])
(0.45, {0.3: 0, 0.5: 1})
>>> W = rescaled(W0 + 90 * turned @ torch.eye(1, 5), found, eps=0.5, factor=0.0)
>>> bool(torch.linalg.svdvals(W)[0] < 6)
True
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from variants._api import wide
from variants._svd import CACHED_FROM, exact, leading

EPS = tuple(round(0.1 * i, 1) for i in range(1, 10))


@dataclass(frozen=True)
class Newcomers:
    """The top k triplets of W', and how near each left vector is to the nearest one of W0."""

    U: Tensor  # [m, k]
    S: Tensor  # [k]
    Vh: Tensor  # [k, n]
    cosines: Tensor  # [k]: max over i of |cos(u'_j, u_i)|

    def under(self, eps: float) -> Tensor:
        """Which of the k are intruders [k]."""
        return self.cosines < eps


def newcomers(U0: Tensor, W: Tensor, k: int = 10) -> Newcomers:
    """The top k of W [m, n] (W0 + dW) against the left singular vectors U0 [m, min(m, n)] of W0.

    From a million numbers up by block Krylov iteration, exact to fp32 (variants/_svd.py).
    """
    W = W.detach().to(wide(W.dtype))
    k = min(k, *W.shape)
    U, S, Vh = exact(W, k) if W.numel() < CACHED_FROM else leading(W, k)
    return Newcomers(U, S, Vh, (U0.to(U).mT @ U).abs().amax(0))


def counts(cosines: Tensor, eps: Sequence[float] = EPS) -> dict[float, int]:
    """How many intruders there are at each eps."""
    return {e: int((cosines < e).sum()) for e in eps}


def rescaled(W: Tensor, found: Newcomers, eps: float, factor: float) -> Tensor:
    """W with the singular values of its intruders multiplied by `factor` (0: taken out, 1: W
    itself): W + (factor - 1) sum_j s_j u_j v_j^T. The causal test of the paper's Section 5."""
    own = found.under(eps)
    part = (found.U[:, own] * found.S[own]) @ found.Vh[own]
    return W + (factor - 1) * part.to(W.dtype)
