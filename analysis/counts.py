"""Published numbers of trained parameters beside what the shapes give.

analysis/published/counts.csv has a row a number that a paper prints: `trained` is the number that
the formula gives, `printed` what the paper has (rounded or cut; with % of base and adapter), `off`
why the two differ where they do, and `beside` how many numbers the paper counts that are not the
method's (biases, gains of norms). Where `of` says `budget` it is the number of directions that the
allocation leaves at the end of a run.
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import variants
from variants._registry import overrides

from .params import count, meta_model

FILE = Path(__file__).parent / "published" / "counts.csv"
UNITS = {"M": 1e6, "K": 1e3, "%": 1e-2}


@dataclass(frozen=True)
class Published:
    """A row of the file."""

    paper: str
    table: str
    model: str
    variant: str
    rank: int | None
    targets: str | None
    settings: str
    of: str  # parameters, budget
    trained: int
    printed: str
    beside: int
    off: str


def published() -> list[Published]:
    """All rows, in the file's order."""
    found = []
    with FILE.open() as file:
        for row in csv.DictReader(file):
            rank = int(row["rank"]) if row["rank"] else None
            own: Any = row | {"rank": rank, "trained": int(row["trained"]),
                              "beside": int(row["beside"] or 0),
                              "targets": row["targets"] or None}  # fmt: skip
            found.append(Published(**own))
    return found


model_of = cache(meta_model)  # counting leaves it as it is


def counted(row: Published) -> tuple[int, float]:
    """(the number, what the print is to be held against: the number, or its share)."""
    axes: Any = overrides(row.variant, row.settings.split())
    model = model_of(row.model)
    if row.of == "budget":
        choice = variants.choose(row.variant, row.rank, **axes)
        planned = variants.plan(model, choice, row.targets)
        rule: Any = choice.allocation
        start = sum(item.rank for item in planned)
        total = int(rule.budget(10_000, 10_000, start, len(planned))[0])
        return total, total
    found = count(model, row.variant, row.rank, row.targets, **axes)
    share = row.printed.endswith("%")
    return found["trainable"], found["fraction"] if share else found["trainable"]


def fits(printed: str, value: float) -> bool:
    """The print is the number, rounded or cut to its digits.

    >>> fits("0.02%", 0.000236), fits("18M", 18.9e6), fits("0.35M", 393_216), fits("4.8K", 4_800)
    (True, True, False, True)
    """
    digits = len(printed.rstrip("MK%").partition(".")[2])
    off = float(printed.rstrip("MK%")) - value / UNITS.get(printed[-1], 1.0)
    return -(10**-digits) < off <= 0.5 * 10**-digits + 1e-9
