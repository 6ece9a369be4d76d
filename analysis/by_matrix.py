"""Analyses of one adapted matrix after the other, from weights alone.

Each is a function of a `Matrix`; what several of them need of it is computed once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from variants import Incompatible
from variants._api import wide

from .errors import norms
from .intruders import counts, newcomers
from .opened import Asked, Opened, change
from .spectra import Change, Triplets, rank_for, spectrum, triplets
from .subspaces import (
    alignment,
    amplification,
    chance,
    directions,
    energies,
    random_directions,
    similarity,
)

ROUNDING = 1e-6  # of the largest singular value
SHOWN = 32  # directions in a table of phi
PERCENT = tuple(range(5, 101, 5))  # of W0's directions, in a profile of energy


@dataclass(frozen=True)
class Matrix:
    """One adapted matrix; what several analyses need of it is computed once."""

    o: Opened
    name: str

    @cached_property
    def layer(self) -> Any:
        return self.o.adapter.layers[self.name]

    @cached_property
    def W0(self) -> Tensor:
        W0 = self.layer.original.detach()
        return W0.to(wide(W0.dtype))

    @cached_property
    def dW(self) -> Change:
        return change(self.layer)

    @cached_property
    def svd(self) -> Triplets:
        """dW's."""
        return triplets(self.dW)

    @cached_property
    def base(self) -> Triplets:
        """W0's: the dearest part of an analysis."""
        return triplets(self.W0)

    @cached_property
    def rank(self) -> int:
        """The directions that are asked about: those of the adapter in which dW is more than
        rounding; of a form without a rank, those that hold 90 % of dW."""
        S = self.svd.S
        ranked = self.layer.form.rank_means is not None
        asked = self.layer.rank if ranked else rank_for(S)
        return min(asked, int((ROUNDING * S.max() < S).sum()))


def of_spectrum(x: Matrix, asked: Asked) -> dict[str, Any]:
    """Singular values of dW, their norms, effective rank, stable rank, rank for 90 %."""
    return spectrum(x.svd)


def of_similarity(x: Matrix, asked: Asked) -> dict[str, Any]:
    """phi(i, j) of dW's right singular vectors with those of another adapter, else of W0; with that
    of random ones."""
    if asked.against is None:
        there, V = x, x.base[2].mT
    elif x.name in asked.against.adapter.layers:
        there = Matrix(asked.against, x.name)
        V = directions(there.svd).to(x.W0.device)
    else:
        raise Incompatible(f"--against: no layer {x.name} there")
    U, n = directions(x.svd)[:, : min(SHOWN, x.rank)], x.dW.shape[1]
    V = V[:, : min(SHOWN, there.rank)]
    if len(V) != n:
        raise Incompatible(f"--against: {x.name} has {len(V)} inputs there, {n} here")
    if 0 in (U.shape[1], V.shape[1]):  # no change, so no direction
        nothing = dict.fromkeys(("first", "all", "random_all", "chance"))
        return {"phi": [], "random": []} | nothing
    phi = similarity(U, V)
    random = similarity(random_directions(n, U.shape[1], 1), random_directions(n, V.shape[1], 2))
    return {
        "phi": phi.tolist(), "first": phi[0, 0].item(), "all": phi[-1, -1].item(),
        "random": random.tolist(), "random_all": random[-1, -1].item(),
        "chance": chance(n, *phi.shape),
    }  # fmt: skip


def of_amplification(x: Matrix, asked: Asked) -> dict[str, Any]:
    """||dW|| / ||U^T W0 V||, U and V the singular vectors of dW; random ones beside."""
    return amplification(x.W0, x.svd, x.rank)


def of_alignment(x: Matrix, asked: Asked) -> dict[str, Any]:
    """The share of dW's energy in the top and the bottom singular subspaces of W0."""
    m, n = x.W0.shape
    profile = energies(x.base, x.svd, "left" if m <= n else "right").cumsum(0)  # which span all
    at = [max(0, round(len(profile) * p / 100) - 1) for p in PERCENT]
    k = max(1, x.rank)
    cumulative = profile[at].tolist() if x.rank else []
    return alignment(x.base, x.svd, k) | {"k": k, "cumulative": cumulative}


def of_intruders(x: Matrix, asked: Asked) -> dict[str, Any]:
    """How many of the top singular vectors of W are none of W0's, by eps."""
    found = newcomers(x.base[0], x.layer.weight, asked.k)
    swept = {str(eps): n for eps, n in counts(found.cosines).items()}
    return {"k": len(found.S), "cosines": found.cosines.tolist(), "counts": swept,
            "intruders": int(found.under(asked.eps).sum())}  # fmt: skip


def of_quantization(x: Matrix, asked: Asked) -> dict[str, Any]:
    """||W - Q|| of the stored base, and of what the adapter started from (Q + s B0 A0)."""
    W = x.o.file_matrix(x.name)
    W = W.to(wide(W.dtype))
    stored = x.layer.frozen.base.store(W).dense().to(W)
    plain, start, own = (norms(E, None) for E in (W - stored, W - x.W0.to(W), W))
    found: dict[str, Any] = {}
    for key in ("frobenius", "nuclear"):
        error, left, size = (float(t[key] or 0.0) for t in (plain, start, own))
        found |= {key: error, f"{key}_relative": error / size if size else None,
                  f"{key}_start": left,
                  f"{key}_reduction": 100 * (1 - left / error) if error else None}  # fmt: skip
    return found


MATRICES: dict[str, Callable[[Matrix, Asked], dict[str, Any]]] = {
    "spectrum": of_spectrum,
    "amplification": of_amplification,
    "similarity": of_similarity,
    "alignment": of_alignment,
    "intruders": of_intruders,
    "quantization": of_quantization,
}
