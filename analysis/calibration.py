"""Does the report say what it claims, as often as it claims? Simulated studies through its rules.

    python -m analysis.calibration [--studies 2000] [--out docs/calibration.md]

Every study goes through `analysis.verdicts.judge`, the code of the report. A/A: two names, one
method, so that every `better` and `worse` is wrong. Each figure stands with its own error, two
standard errors of the simulation.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import stats
from .select import Curve, Selected, from_curve
from .verdicts import Rules, Unit, Verdict, judge

BASE = "baseline"
NOISES: dict[str, Callable[..., Any]] = {
    "normal": lambda g, shape: g.standard_normal(shape),
    "t3": lambda g, shape: g.standard_t(3, shape) / math.sqrt(3),  # heavy tails, variance 1
}


@dataclass(frozen=True)
class Design:
    """One kind of study."""

    seeds: int
    tasks: int
    variants: int = 1
    noise: str = "normal"
    effect: float = 0.0  # of every variant, in standard deviations of a run
    margin: float = 1.0
    rates: int = 1  # learning rates, all equally good: the worst case of choosing
    items: int = 0  # of a task, each right or wrong

    @property
    def name(self) -> str:
        words = [f"{self.seeds} seeds, {self.tasks} task{'s' if self.tasks > 1 else ''}"]
        if self.variants > 1:
            words.append(f"{self.variants} variants")
        if self.noise != "normal":
            words.append(f"noise {self.noise}")
        if self.rates > 1:
            words.append(f"{self.rates} rates")
        if self.items:
            words.append(f"{self.items} items")
        return ", ".join(words)


def study(design: Design, generator: np.random.Generator) -> list[Verdict]:
    """The verdicts of one simulated study."""
    units = []
    names = [BASE, *(f"v{i}" for i in range(design.variants))]
    for name in names:
        shift = 0.0 if name == BASE else design.effect
        for task in range(design.tasks):
            shape = (design.seeds, design.rates)
            scores = 50 + shift + NOISES[design.noise](generator, shape)
            units.append(_unit(name, f"task{task}", scores))
    return judge(units, Rules(BASE, margin=design.margin))


def _unit(name: str, task: str, scores: Any) -> Unit:
    rates = np.logspace(-5, -3, scores.shape[1])
    found = Curve(rates, list(range(len(scores))), -scores, scores)
    return Unit(name, None, task, "", "score", math.nan, pd.DataFrame(), from_curve(found, False))


def with_items(design: Design, generator: np.random.Generator) -> stats.Interval | None:
    """The interval of an A/A study whose runs answer items: seeds differ, items are shared."""
    blocks, items = [], []
    for _ in range(design.tasks):
        ability = generator.normal(0, 1.2, design.items)
        both = []
        for _ in range(2):
            skill = generator.normal(0, 0.15, (design.seeds, 1))
            right = generator.random((design.seeds, design.items)) < 1 / (
                1 + np.exp(-(ability + skill))
            )
            both.append(right.astype(float))
        items.append(both[0] - both[1])
        blocks.append(items[-1].mean(axis=1))
    return stats.interval(blocks, items)


@dataclass(frozen=True)
class Line:
    """One figure: what is asked of it, and what was seen."""

    what: str
    design: str
    asked: str
    share: float
    studies: int
    holds: bool

    @property
    def error(self) -> float:
        """Of the simulation."""
        return _error(self.share, self.studies)


def at_most(what: str, design: Design, share: float, studies: int, limit: float = 0.05) -> Line:
    holds = share - _error(share, studies) <= limit
    return Line(what, design.name, f"at most {limit:.0%}", share, studies, holds)


def between(what: str, design: Design, share: float, studies: int, low: float, high: float) -> Line:
    error = _error(share, studies)
    holds = low - error <= share <= high + error
    return Line(what, design.name, f"{low:.0%} to {high:.0%}", share, studies, holds)


def _error(share: float, studies: int) -> float:
    """Two standard errors of a share."""
    return 2 * math.sqrt(max(share * (1 - share), 1e-9) / studies)


def said(rows: Sequence[Verdict], *words: str) -> bool:
    """Whether any row has one of these verdicts."""
    return any(row.verdict in words for row in rows)


def lines(studies: int, seed: int = 0) -> list[Line]:
    """Every figure of the table."""
    found = []
    generator = np.random.default_rng(seed)

    def share(design: Design, of: Callable[[list[Verdict]], bool | None]) -> float:
        seen = [of(study(design, generator)) for _ in range(studies)]
        return float(np.mean([s for s in seen if s is not None]))

    for seeds in (3, 6, 10):
        for tasks in (1, 4):
            for variants in (1, 8):
                for noise in ("normal", "t3") if variants == 1 else ("normal",):
                    design = Design(seeds, tasks, variants, noise, margin=0.5)
                    wrong = share(design, lambda rows: said(rows, "better", "worse"))
                    found.append(at_most("A/A: any better or worse", design, wrong, studies))
    for seeds, tasks in ((3, 4), (6, 1), (6, 4), (10, 1)):
        design = Design(seeds, tasks, rates=7, margin=0.5)
        wrong = share(design, lambda rows: said(rows, "better", "worse"))
        found.append(at_most("A/A, rate chosen: better or worse", design, wrong, studies))
        if seeds >= 6:
            covered = share(design, _covers)
            found.append(between("95 % interval covers", design, covered, studies, 0.93, 0.97))
    for seeds in (6, 10, 20):
        for tasks in (1, 4):
            for noise in NOISES:
                design = Design(seeds, tasks, noise=noise)
                covered = share(design, _covers)
                found.append(between("95 % interval covers", design, covered, studies, 0.93, 0.97))
        design = Design(seeds, 1, items=300)
        hits = [with_items(design, generator) for _ in range(studies)]
        covered = float(np.mean([i is not None and i.low <= 0 <= i.high for i in hits]))
        found.append(between("95 % interval covers", design, covered, studies, 0.93, 0.97))
    for seeds, tasks in ((6, 1), (10, 1), (6, 4)):
        # the margin is the true difference: three standard errors wide, so that it could be said
        margin = 3 * math.sqrt(2 / (seeds * tasks))
        design = Design(seeds, tasks, effect=margin, margin=margin)
        wrong = share(design, lambda rows: rows[0].verdict == "equivalent")
        found.append(at_most("equivalent, at a difference of the margin", design, wrong, studies))
    for seeds, tasks in ((6, 1), (10, 1), (3, 4), (6, 4)):
        size = stats.detectable(seeds * tasks, 0.05) * math.sqrt(2)
        design = Design(seeds, tasks, effect=size, margin=size)
        power = share(design, lambda rows: rows[0].verdict == "better")
        found.append(between("power at the detectable effect", design, power, studies, 0.75, 0.85))
    return found


def _covers(rows: list[Verdict]) -> bool | None:
    """Whether the interval holds the truth; None: there is none (a rate on the grid's edge)."""
    head = rows[0]
    return None if head.low is None or head.high is None else head.low <= 0 <= head.high


def curse(studies: int, seeds: int = 6, rates: int = 7, seed: int = 1) -> tuple[float, float]:
    """Mean error of the naive and of the corrected score, in standard deviations of a run, where
    all rates are equally good: what choosing on the reported runs adds."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(studies):
        own: Selected = _unit("x", "t", generator.standard_normal((seeds, rates))).selected
        found.append((own.naive, own.corrected))
    naive, corrected = np.mean(found, axis=0)
    return float(naive), float(corrected)


def page(found: Sequence[Line], studies: int, naive: float, corrected: float) -> str:
    """The table as a Markdown page."""
    rows = [
        "# Calibration of the report",
        "",
        f"Made by `python -m analysis.calibration --studies {studies}`: simulated studies through",
        "the code of `analysis.compare`. A share stands with two standard errors of the",
        "simulation, and holds where it agrees with what is asked within that.",
        "",
        "| figure | studies of | asked | seen | holds |",
        "|---|---|---|---|---|",
    ]
    for line in found:
        rows.append(
            f"| {line.what} | {line.design} | {line.asked} | {100 * line.share:.1f} +- "
            f"{100 * line.error:.1f} % | {'yes' if line.holds else '**no**'} |"
        )
    rows += [
        "",
        "Choosing the best of seven equally good learning rates over six seeds and reporting the",
        f"same runs adds {naive:.2f} standard deviations of a run to a score; choosing each seed's",
        f"rate on the others adds {corrected:+.2f}.",
    ]
    return "\n".join(rows) + "\n"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--studies", type=int, default=2000, help="of each kind (2000)")
    parser.add_argument("--out", help="a Markdown file to write the table into")
    given = parser.parse_args()
    if given.studies < 1:
        print(f"error: --studies {given.studies}: one or more", file=sys.stderr)
        return 1
    found = lines(given.studies)
    text = page(found, given.studies, *curse(given.studies))
    print(text)
    if given.out:
        Path(given.out).write_text(text)
    return int(not all(line.holds for line in found))


if __name__ == "__main__":
    sys.exit(main())
