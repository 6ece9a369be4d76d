"""Analyses of a change dW = s B A from its factors beside the same from the dense matrix.

    python -m benchmarks.analysis [--size N] [--rank R] [--rounds N] [--threads N] [--json FILE]

A 4096 x 4096 layer in fp32 at rank 64, the change's singular values falling from 1 to 0.1. Dense:
dW is formed and the definition applied to it; factors: the same question to analysis/, given A and
B. W0's own decomposition, on which the rows marked + stand and which any number of changes share,
is given to both and timed apart.

Every round runs both, in turns; a ratio is the median of the rounds' own ratios, with its interval.
A full decomposition takes a minute and is made once: dW's by its vectors counts in both rows that
stand on it. Floor: the thin products of W0 (or its singular vectors) with r columns that the
definition needs, of whatever change; where it reads W0, the ratio can be no more than the dense
way's time over it. The differences are relative, to the dense way in float64: of a list of numbers
by norms, and of several results the largest. The json is written after each analysis.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from analysis.direction import magnitude_direction
from analysis.intruders import newcomers
from analysis.spectra import (
    Change,
    Factors,
    Triplets,
    dense,
    effective_rank,
    rank_for,
    stable_rank,
    triplets,
    values,
)
from analysis.subspaces import (
    alignment,
    amplification,
    directions,
    energies,
    random_directions,
    similarity,
)

from .clock import CLOCKS, ratio, rounds
from .sheet import Sheet

ASKED = 20.0  # times faster, in fp32
NEAR = 1e-5
INTRUDERS = "intruder dimensions +"
COUNT = 10  # vectors of W that are looked at for them


def factors(size: int, rank: int, seed: int) -> Factors:
    """A change whose singular values fall from 1 to 0.1, held as LoRA holds it."""
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, rank, generator=g)).Q for _ in range(2))
    root = torch.linspace(1.0, 0.1, rank).sqrt()
    mix = torch.linalg.qr(torch.randn(rank, rank, generator=g)).Q
    return Factors(mix @ (V * root).mT / 2, U * root @ mix.mT, 2.0)


def weight(size: int, seed: int) -> Tensor:
    """A W0 [size, size] with singular values k^-0.5."""
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=g)).Q for _ in range(2))
    return (U * torch.arange(1, size + 1).float().pow(-0.5)) @ V.mT


Analysis = Callable[[Change], list[Tensor]]


@dataclass(frozen=True)
class Asked:
    """One question, and the two ways to its answer."""

    dense: Analysis
    factors: Analysis
    products: int = 0  # thin ones with all of W0, or with its singular vectors
    vectors: bool = False  # dense, stands on dW's singular vectors
    once: bool = False  # dense, takes a minute


def numbers(found: Iterable[Any]) -> list[Tensor]:
    return [torch.tensor(v, dtype=torch.float64) for v in found if v is not None]


def moves(W0: Tensor, dW: Tensor) -> tuple[float, float]:
    """(dM, dD) as DoRA defines them."""
    W = W0 + dW
    turned = 1 - torch.cosine_similarity(W0, W, dim=1)
    return (W.norm(dim=1) - W0.norm(dim=1)).abs().mean().item(), turned.mean().item()


def questions(W0: Tensor, base: Triplets, r: int) -> dict[str, Asked]:
    """All of them; of a spectrum the first r values."""

    def spectrum(dW: Change) -> list[Tensor]:
        S = values(dW)[:r]
        return [S, *numbers((effective_rank(S), stable_rank(S), rank_for(S)))]

    def aligned(dW: Change) -> list[Tensor]:
        return numbers(alignment(base, dW, r).values())

    def profile(dW: Change) -> list[Tensor]:
        return [energies(base, dW).cumsum(0)]

    def amplified(dW: Change) -> list[Tensor]:
        return numbers(amplification(W0, dW, r).values())

    def alike(dW: Change) -> list[Tensor]:
        return [similarity(directions(dW)[:, :r], directions(base)[:, :r])]

    def decomposed(dW: Change) -> list[Tensor]:
        U = triplets(W0 + dense(dW)).U[:, :COUNT]
        return [(base.U.mT @ U).abs().amax(0)]

    return {
        "spectrum and ranks": Asked(spectrum, spectrum, once=True),
        "amplification": Asked(amplified, amplified, 2, vectors=True),  # of U, V; of random ones
        "subspace similarity +": Asked(alike, alike, vectors=True),
        INTRUDERS: Asked(
            decomposed,
            lambda dW: [newcomers(base.U, W0 + dense(dW), COUNT).cosines],
            once=True,
        ),
        "ends of W0's spectrum +": Asked(aligned, aligned),
        "all of W0's spectrum +": Asked(profile, profile, 1),
        "magnitude, direction": Asked(
            lambda dW: numbers(moves(W0, dense(dW))),
            lambda dW: numbers(magnitude_direction(W0, dW)),
            1,
        ),
    }


def exact(W: Tensor, r: int) -> Triplets:
    """The first r triplets of W in float64, by subspace iteration until W^T U = V S to 1e-12."""
    V = random_directions(W.shape[1], min(2 * r + 100, *W.shape))
    for _ in range(100):
        U, S, Yh = torch.linalg.svd(W @ V, full_matrices=False)
        found, back = Triplets(U[:, :r], S[:r], Yh[:r] @ V.mT), W.mT @ U
        if torch.dist(back[:, :r], found.Vh.mT * found.S) <= 1e-12 * torch.linalg.vector_norm(W):
            return found
        V = torch.linalg.qr(back).Q
    raise ArithmeticError("no gap below the first r singular values")


def difference(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """The largest ||found - true|| / ||true||."""
    return max((torch.dist(a.double(), b.double()) / torch.linalg.vector_norm(b.double())).item()
               for a, b in zip(found, true, strict=True))  # fmt: skip


def truths(W0: Tensor, base: Triplets, given: Factors, r: int) -> dict[str, list[Tensor]]:
    """The dense answers in float64."""
    W0, base = W0.double(), Triplets(*(t.double() for t in base))
    dW = Factors(given.A.double(), given.B.double(), given.s).dense()
    change, tuned = exact(dW, r), exact(W0 + dW, COUNT)
    return {
        name: [(base.U.mT @ tuned.U).abs().amax(0)] if name == INTRUDERS else asked.dense(change)
        for name, asked in questions(W0, base, r).items()
    }


def measured(size: int, rank: int, count: int, clock: str) -> Iterator[dict[str, Any]]:
    """A row for each decomposition that others stand on, and one for each analysis."""
    given, W0 = factors(size, rank, 1), weight(size, 3)
    made: dict[str, Triplets] = {}
    alone: dict[str, float] = {}
    for key, of in {"W0": lambda: W0, "dW": given.dense}.items():
        start = CLOCKS[clock]()
        made[key] = triplets(of())
        alone[key] = CLOCKS[clock]() - start
        yield {"analysis": f"decomposition of {key}", "size": size, "ms": 1000 * alone[key]}
    true = truths(W0, made["W0"], given, rank)
    thin = rounds({"thin": lambda: W0 @ given.A.mT}, count, clock)["thin"]
    for name, asked in questions(W0, made["W0"], rank).items():
        kept: dict[str, list[Tensor]] = {}

        def by_dense(asked: Asked = asked, kept: dict[str, list[Tensor]] = kept) -> None:
            kept["dense"] = asked.dense(made["dW"] if asked.vectors else given.dense())

        def by_factors(asked: Asked = asked, kept: dict[str, list[Tensor]] = kept) -> None:
            kept["factors"] = asked.factors(replace(given))  # which remembers nothing

        if asked.once:
            seconds = rounds({"factors": by_factors}, count, clock)
            start = CLOCKS[clock]()
            by_dense()
            seconds["dense"] = [CLOCKS[clock]() - start] * count
        else:
            seconds = rounds({"dense": by_dense, "factors": by_factors}, count, clock)
            if asked.vectors:
                seconds["dense"] = [s + alone["dW"] for s in seconds["dense"]]
        middle, low, high = ratio(seconds["dense"], seconds["factors"])
        yield {
            "analysis": name, "size": size, "rank": rank,
            "ms": {k: 1000 * statistics.median(v) for k, v in seconds.items()},
            "floor_ms": 1000 * asked.products * statistics.median(thin),
            "ratio": middle, "interval": [low, high], "asked": ASKED,
            "difference": {k: difference(v, true[name]) for k, v in kept.items()},
        }  # fmt: skip


def mark(least: float | None, found: float) -> str:
    """A star where less was found than was asked."""
    return "" if least is None or found >= least else " *"


def cells(row: dict[str, Any]) -> list[str]:
    """The row as it is shown."""
    low, high = row["interval"]
    off = row["difference"]
    return [
        row["analysis"],
        *(f"{row['ms'][k]:.1f}" for k in ("dense", "factors")),
        f"{row['floor_ms']:.1f}" if row["floor_ms"] else "",
        f"{row['ratio']:.0f} [{low:.0f}, {high:.0f}]{mark(row['asked'], row['ratio'])}",
        f"{off['factors']:.1e}{mark(-NEAR, -off['factors'])}",
        f"{off['dense']:.1e}",
    ]


def main() -> None:
    """The command."""
    sheet = Sheet("analysis", __doc__, rounds=7)
    sheet.flag("--size", type=int, default=4096)
    sheet.flag("--rank", type=int, default=64)
    given = sheet.begin()
    rows = []
    for row in measured(given.size, given.rank, given.rounds, given.clock):
        rows.append(row)
        sheet.write(rows)
    alone, _, *others = rows
    sheet.table(
        f"{given.size} x {given.size}, rank {given.rank}, fp32, {sheet.timed}; "
        f"+ beside W0's own decomposition, once a layer: {alone['ms'] / 1000:.1f} s",
        ("<analysis", "dense ms", "factors ms", "floor ms", "times faster", "factors off by",
         "dense off by"),
        map(cells, others),
    )  # fmt: skip
    sheet.write(rows)


if __name__ == "__main__":
    main()
