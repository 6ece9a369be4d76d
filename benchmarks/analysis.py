"""Analyses of a change dW = s B A from its factors beside the same from the dense matrix.

    python -m benchmarks.analysis [--size N] [--rank R] [--rounds N] [--threads N] [--json FILE]

A 4096 x 4096 layer in fp32 at rank 64, the change's singular values falling from 1 to 0.1. Dense:
dW is formed and the definition applied to it (a full decomposition where singular vectors or values
are asked for); factors: the same function of analysis/, given A and B. W0's decomposition, on which
`alignment` stands and which any number of changes share, is given to both.

Every round runs both, in turns; a ratio is the median of the rounds' own ratios, with its interval.
The differences are relative, to the dense way in float64: of a list of numbers by norms, and of
several results the largest. The json is written after each analysis.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from analysis.direction import magnitude_direction
from analysis.spectra import (
    Change,
    Factors,
    Triplets,
    effective_rank,
    rank_for,
    stable_rank,
    triplets,
    values,
)
from analysis.subspaces import alignment, amplification, directions, similarity

from .clock import ratio, rounds
from .sheet import Sheet

ASKED = 20.0  # times faster, in fp32
NEAR = 1e-5


def factors(size: int, rank: int, seed: int) -> Factors:
    """A change whose singular values fall from 1 to 0.1, held as LoRA holds it."""
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, rank, generator=g)).Q for _ in range(2))
    root = torch.linspace(1.0, 0.1, rank).sqrt()
    mix = torch.linalg.qr(torch.randn(rank, rank, generator=g)).Q
    return Factors(mix @ (V * root).mT / 2, U * root @ mix.mT, 2.0)


def weight(size: int, seed: int) -> tuple[Tensor, Triplets]:
    """A W0 [size, size] with singular values k^-0.5, and its triplets."""
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=g)).Q for _ in range(2))
    S = torch.arange(1, size + 1).float().pow(-0.5)
    return (U * S) @ V.mT, Triplets(U, S, V.mT.contiguous())


Analysis = Callable[[Change, Change], list[Tensor]]


def analyses(W0: Tensor, base: Triplets, r: int) -> dict[str, Analysis]:
    """Each as a function of one change, or of two; of a spectrum the first r values."""

    def numbers(found: Iterable[Any]) -> list[Tensor]:
        return [torch.tensor(v, dtype=torch.float64) for v in found if v is not None]

    def spectrum(dW: Change, _: Change) -> list[Tensor]:
        S = values(dW)[:r]
        return [S, *numbers((effective_rank(S), stable_rank(S), rank_for(S)))]

    return {
        "alignment with W0": lambda dW, _: numbers(alignment(base, dW, r).values()),
        "magnitude, direction": lambda dW, _: numbers(magnitude_direction(W0, dW)),
        "spectrum and ranks": spectrum,
        "amplification": lambda dW, _: numbers(amplification(W0, dW, r).values()),
        "subspace similarity": lambda dW, other: [
            similarity(directions(dW)[:, :r], directions(other)[:, :r])
        ],
    }


def difference(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest ||found - exact|| / ||exact||."""
    return max((torch.dist(a.double(), b.double()) / torch.linalg.vector_norm(b.double())).item()
               for a, b in zip(found, exact, strict=True))  # fmt: skip


def measured(size: int, rank: int, count: int, clock: str) -> Iterator[dict[str, Any]]:
    """A row for each analysis."""
    first, second = factors(size, rank, 1), factors(size, rank, 2)
    W0, base = weight(size, 3)
    wide = [Factors(f.A.double(), f.B.double(), f.s).dense() for f in (first, second)]
    exact_change = [triplets(W) for W in wide]  # in float64, by the definition
    exact = analyses(W0.double(), Triplets(*(t.double() for t in base)), rank)
    for name, analysis in analyses(W0, base, rank).items():
        kept: dict[str, list[Tensor]] = {}
        two = (first, second) if name == "subspace similarity" else (first, first)
        calls = {
            "dense": called(analysis, two, Factors.dense, kept, "dense"),
            "factors": called(analysis, two, replace, kept, "factors"),
        }
        seconds = rounds(calls, count, clock)
        middle, low, high = ratio(seconds["dense"], seconds["factors"])
        truth = exact[name](*exact_change)
        yield {
            "analysis": name, "size": size, "rank": rank,
            "ms": {k: 1000 * statistics.median(v) for k, v in seconds.items()},
            "ratio": middle, "interval": [low, high],
            "asked": None if name == "magnitude, direction" else ASKED,  # reads all of W0
            "difference": {k: difference(v, truth) for k, v in kept.items()},
        }  # fmt: skip


def called(
    analysis: Analysis,
    two: tuple[Factors, Factors],
    made: Callable[[Factors], Change],
    kept: dict[str, list[Tensor]],
    key: str,
) -> Callable[[], None]:
    """The analysis of changes that are made anew, with nothing remembered; kept[key] is its last
    result."""

    def run() -> None:
        first = made(two[0])
        kept[key] = analysis(first, first if two[1] is two[0] else made(two[1]))

    return run


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
        f"{row['ratio']:.0f} [{low:.0f}, {high:.0f}]{mark(row['asked'], row['ratio'])}",
        f"{off['factors']:.1e}{mark(-NEAR, -off['factors'])}",
        f"{off['dense']:.1e}",
    ]


def main() -> None:
    """The command."""
    sheet = Sheet("analysis", __doc__, rounds=3)
    sheet.flag("--size", type=int, default=4096)
    sheet.flag("--rank", type=int, default=64)
    given = sheet.begin()
    rows = []
    for row in measured(given.size, given.rank, given.rounds, given.clock):
        rows.append(row)
        sheet.write(rows)
    sheet.table(
        f"{given.size} x {given.size}, rank {given.rank}, fp32, {sheet.timed}",
        ("<analysis", "dense ms", "factors ms", "times faster", "factors off by", "dense off by"),
        map(cells, rows),
    )
    sheet.write(rows)


if __name__ == "__main__":
    main()
