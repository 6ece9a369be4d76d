"""The spectrum of a change dW [m, n], from its factors where it has any.

dW = s B A is never formed: with thin QRs B = Q R and A^T = P T, the singular values of dW are those
of the [r, r] matrix s R T^T, its vectors Q and P times that one's. Factors are taken to float64
first, which costs little and keeps the digits of small singular values.

Sums of two such changes are one of twice the rank; the change that holds a start apart
(W0 - s B0 A0 + s B A) is such a sum:

>>> g = torch.Generator().manual_seed(0)
>>> A, B, A0, B0 = (torch.randn(*s, generator=g) for s in ((2, 9), (7, 2), (2, 9), (7, 2)))
>>> both = Factors(A, B, 2.0).less(A0, B0)
>>> dense = 2 * B @ A - B0 @ A0
>>> torch.allclose(both.dense(), dense.double(), atol=1e-5)
True
>>> torch.allclose(triplets(both)[1], torch.linalg.svdvals(dense)[:4].double(), rtol=1e-5)
True

Four equal singular values have an effective and a stable rank of four; of 3, 1 the first one holds
nine tenths of the energy:

>>> flat = torch.ones(4)
>>> round(effective_rank(flat), 6), stable_rank(flat), rank_for(flat), rank_for(flat, 0.5)
(4.0, 4.0, 4, 2)
>>> round(stable_rank(torch.tensor([3.0, 1.0])), 4), rank_for(torch.tensor([3.0, 1.0]))
(1.1111, 1)
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from variants._api import wide

SPAN = 1e8  # of the eigenvalues of X X^T: half of float64's digits are left


class Triplets(NamedTuple):
    """A singular value decomposition U diag(S) Vh; a change that was decomposed once may go on as
    this."""

    U: Tensor  # [m, k]
    S: Tensor  # [k], descending
    Vh: Tensor  # [k, n]

    @property
    def shape(self) -> tuple[int, int]:
        return self.U.shape[0], self.Vh.shape[1]


@dataclass(frozen=True)
class Factors:
    """dW = s B A, with A [r, n] and B [m, r]."""

    A: Tensor
    B: Tensor
    s: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @cached_property
    def roots(self) -> tuple[Tensor, Tensor]:
        """(R_A, R_B) [r, r] in float64, with R_A^T R_A = A A^T and R_B^T R_B = B^T B: in the place
        of A^T and B they give the same lengths, ||s B A||_F = ||s R_B R_A^T||_F."""
        return root(self.A.detach().double()), root(self.B.detach().double().mT)

    def less(self, A0: Tensor, B0: Tensor) -> "Factors":
        """s B A - B0 A0, of the two ranks together."""
        A, A0, B, B0 = (t.detach().double() for t in (self.A, A0, self.B, B0))
        return Factors(torch.cat((A, A0)), torch.cat((self.s * B, -B0), dim=1))

    @cached_property
    def triplets(self) -> Triplets:
        """All r singular triplets of dW (min(m, n) of them at most), in float64; computed once."""
        left = torch.linalg.qr(self.B.detach().double())
        right = torch.linalg.qr(self.A.detach().double().mT)
        U, S, Vh = torch.linalg.svd(self.s * left.R @ right.R.mT, full_matrices=False)
        return Triplets(left.Q @ U, S, Vh @ right.Q.mT)

    def dense(self) -> Tensor:
        """The matrix [m, n] itself, for what cannot be had without it."""
        return self.s * self.B.detach() @ self.A.detach()


def root(X: Tensor) -> Tensor:
    """A square R with R^T R = X X^T, of X [r, d] in float64.

    By the eigenvalues of X X^T, which has half of the digits: where they span more than SPAN, as
    where s B A - B0 A0 nearly vanishes, by a QR.

    >>> X = torch.tensor([[3.0, 0.0, 4.0], [1.0, 2.0, 2.0]], dtype=torch.float64)
    >>> R, near = root(X), root(torch.stack((X[0], X[0] * (1 + 1e-9) + 1e-9)))
    >>> torch.allclose(R.mT @ R, X @ X.mT), round(near.det().abs().item() * 1e9, 4)
    (True, 5.099)
    """
    eigenvalues, V = torch.linalg.eigh(X @ X.mT)
    if eigenvalues[0] > eigenvalues[-1] / SPAN:
        return (V * eigenvalues.sqrt()).mT
    return torch.linalg.qr(X.mT, mode="r").R


Change = Tensor | Factors | Triplets


def dense(dW: Change) -> Tensor:
    """dW [m, n] as a matrix."""
    if isinstance(dW, Factors):
        return dW.dense()
    return (dW.U * dW.S) @ dW.Vh if isinstance(dW, Triplets) else dW.detach()


def triplets(dW: Change) -> Triplets:
    """All singular triplets of dW, min(m, n) or r of them; in float64 from factors."""
    if isinstance(dW, Triplets):
        return dW
    if isinstance(dW, Tensor):
        W = dW.detach().to(wide(dW.dtype))
        return Triplets(*torch.linalg.svd(W, full_matrices=False))
    return dW.triplets


def coordinates(dW: Factors | Triplets) -> Factors:
    """dW = B A with the rows of A orthonormal, in float64: the rows of dW are as long as B's."""
    if isinstance(dW, Triplets):
        return Factors(dW.Vh.double(), dW.U.double() * dW.S)
    right = torch.linalg.qr(dW.A.detach().double().mT)
    return Factors(right.Q.mT, dW.s * dW.B.detach().double() @ right.R.mT)


def values(dW: Change) -> Tensor:
    """The singular values of dW, descending; of factors alone they need no vectors."""
    if isinstance(dW, Factors):
        R_A, R_B = dW.roots
        return torch.linalg.svdvals(dW.s * R_B @ R_A.mT)
    return (
        dW.S if isinstance(dW, Triplets) else torch.linalg.svdvals(dW.detach().to(wide(dW.dtype)))
    )


def row_norms(W: Tensor) -> Tensor:
    """||w|| of each row [m], in float64, of sums in the dtype of W."""
    return torch.linalg.vector_norm(W, dim=1).double()


def frobenius(dW: Change) -> float:
    """||dW||_F."""
    if isinstance(dW, Factors):
        R_A, R_B = dW.roots
        return torch.linalg.vector_norm(dW.s * R_B @ R_A.mT).item()
    t = dW.S if isinstance(dW, Triplets) else dW.detach()
    return torch.linalg.vector_norm(t, dtype=torch.float64).item()


def effective_rank(S: Tensor) -> float:
    """exp of the entropy of S / sum(S) (Roy & Vetterli, 2007), S the singular values; 0 of none."""
    S = S.double()
    if S.sum() == 0:
        return 0.0
    shares = S / S.sum()
    return torch.special.entr(shares).sum().exp().item()


def stable_rank(S: Tensor) -> float:
    """||dW||_F^2 / ||dW||_2^2, at most the rank and not moved by small singular values."""
    S = S.double()
    return (S.square().sum() / S.max().square()).item() if S.max() > 0 else 0.0


def rank_for(S: Tensor, share: float = 0.9) -> int:
    """The fewest singular values, largest first, that hold `share` of the sum of squares (the 90 %
    rank of Biderman et al., 2024, arXiv:2405.09673)."""
    energy = S.double().square().sort(descending=True).values.cumsum(0)
    if energy[-1] == 0:
        return 0
    # the last one always does, whatever its rounding
    return int((energy[:-1] < share * energy[-1] * (1 - 1e-12)).sum()) + 1


def spectrum(dW: Change) -> dict[str, Any]:
    """Norms, ranks and singular values of dW."""
    S = values(dW)
    return {
        "frobenius": torch.linalg.vector_norm(S).item(),
        "spectral": S.max().item(),
        "nuclear": S.sum().item(),
        "effective_rank": effective_rank(S),
        "stable_rank": stable_rank(S),
        "rank_90": rank_for(S),
        "values": S.tolist(),
    }
