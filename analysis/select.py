"""Chooses each variant's learning rate without looking at what is then reported.

Where there are runs on validation and runs on test, the rate is that of the lowest mean validation
loss, and test runs at that rate are the scores (`confirmed`). Where there is one kind of score
alone, the rate of each seed is chosen on the other seeds (`left one out`): the best mean of all
rates would be a maximum over noise, which is the naive figure beside it.

>>> import numpy as np
>>> scores = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])     # [seeds, rates], one method twice
>>> found = left_one_out(-scores, scores)
>>> found.tolist(), float(np.nanmax(scores.mean(axis=0)))       # naive: .33
([0.0, 0.0, 0.0], 0.3333333333333333)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .load import Table, lower_is_better
from .stats import t_quantile

Array = NDArray[Any]


@dataclass(frozen=True)
class Curve:
    """One variant at one rank on one task: everything that was tried."""

    lrs: Array  # [L] ascending
    seeds: list[int]  # [S]
    criterion: Array  # [S, L] what is minimised to choose a rate; inf: diverged; nan: not run
    scores: Array  # [S, L] the primary metric of the same runs


@dataclass(frozen=True)
class Selected:
    """What stands for a variant in a comparison."""

    lr: float
    scores: dict[int, float]  # by seed: confirmed on test, or left one out
    sources: dict[int, str]  # of those runs
    rule: str  # confirmed, left one out, single rate
    naive: float  # the best mean score of all rates that were tried, as papers report it
    bracket: str  # inside, low or high edge, the same `within noise`, one rate, all diverged
    trials: int  # runs that the choice has seen
    rates: int
    diverged: int  # among all of them
    curve: Curve
    notes: list[str] = field(default_factory=list)

    @property
    def corrected(self) -> float:
        """The mean of the reported scores."""
        return float(np.mean(list(self.scores.values()))) if self.scores else math.nan


def curve(rows: Table, by: str, lower: bool) -> Curve:
    """The table of one variant's runs: rates by seeds; `by` is `loss` or `score`, of which less is
    better where `lower`."""
    sign = 1.0 if by == "loss" or lower else -1.0
    seeds, lrs = sorted(rows["seed"].unique()), np.array(sorted(rows["lr"].unique()), dtype=float)
    criterion = np.full((len(seeds), len(lrs)), np.nan)
    scores = np.full_like(criterion, np.nan)
    where = {seed: i for i, seed in enumerate(seeds)}, {lr: j for j, lr in enumerate(lrs)}
    for row in rows.itertuples(index=False):
        i, j = where[0][row.seed], where[1][row.lr]
        value, score = sign * getattr(row, by), row.score
        criterion[i, j] = value if row.status == "done" and math.isfinite(value) else math.inf
        scores[i, j] = score
    return Curve(lrs, [int(s) for s in seeds], criterion, scores)


def means(values: Array) -> Array:
    """The mean of each rate over its seeds; infinite where one diverged, or where another rate has
    more seeds: the lowest of many means over few is a lucky one."""
    ran = ~np.isnan(values)
    count = ran.sum(axis=0)
    total = np.where(ran, values, 0.0).sum(axis=0)
    whole = (count == count.max()) & (count > 0)
    return np.where(whole, total / np.maximum(count, 1), np.inf)


def left_one_out(criterion: Array, scores: Array) -> Array:
    """[S] the score of each seed at the rate that is best on the other seeds; nan: not run."""
    found = np.full(len(scores), np.nan)
    for s in range(len(scores)):
        others = means(np.delete(criterion, s, axis=0))
        others = np.where(np.isnan(criterion[s]), np.inf, others)
        if np.isfinite(others).any():
            found[s] = scores[s, int(np.argmin(others))]
    return found


def redrawn(found: Curve, seeds: Sequence[int], signs: Array) -> Array | None:
    """[R] means of `left_one_out` in studies that might as well have been, less their own mean.

    What is left out of one choice is in all the others, so that scores chosen in this way are not
    independent and Student's interval of them is too short (it covers 85 % where ten seeds choose
    among seven equal rates). Here the whole choice is made again: each seed's residuals from the
    curve keep or turn their sign (the wild bootstrap; `signs` [R, S] are the same for a variant
    and its baseline, whose seeds are paired). The curve is drawn towards its mean by the share of
    its variance that noise explains, since a curve of noise would choose too surely.

    Rates that some seed did not run, or where one diverged, are no part of it; None: none is left.
    """
    rows = [found.seeds.index(s) for s in seeds]
    criterion, scores = found.criterion[rows], found.scores[rows]
    whole = (np.isfinite(criterion) & np.isfinite(scores)).all(axis=0)
    if len(rows) < 2 or not whole.any():
        return None
    criterion, scores = criterion[:, whole], scores[:, whole]
    grow = math.sqrt(len(rows) / (len(rows) - 1))
    made = []
    for values in (criterion, scores):
        mean = values.mean(axis=0)
        made.append(_shrunk(values, mean) + grow * signs[:, :, None] * (values - mean))
    criteria, reported = made
    others = (criteria.sum(axis=1, keepdims=True) - criteria) / (len(rows) - 1)
    chosen = others.argmin(axis=2)[..., None]
    drawn = np.take_along_axis(reported, chosen, axis=2)[..., 0].mean(axis=1)
    return drawn - drawn.mean()


def _shrunk(values: Array, mean: Array) -> Array:
    """The means of the rates [L], drawn to their mean as James and Stein would."""
    away = mean - mean.mean()
    if len(mean) == 1 or not away.any():
        return mean
    kept = max(0.0, 1 - noise(values) / (float((away**2).sum()) / (len(mean) - 1)))
    return mean.mean() + kept * away


def bracket(criterion: Array) -> str:
    """Whether the best rate lies inside the grid, or on an edge that the grid should go beyond.

    An edge that does not beat its neighbour by more than noise explains is `within noise`, and no
    edge to a verdict: the curve is flat there, and a next step would gain less than the last one
    did. One seed tells no noise.
    """
    if criterion.shape[1] == 1:
        return "one rate"
    values = means(criterion)
    if not np.isfinite(values).any():
        return "all diverged"
    best, last = int(np.argmin(values)), criterion.shape[1] - 1
    if 0 < best < last:
        return "inside"
    beside = criterion[:, 1 if best == 0 else last - 1]
    gain = float(np.nanmean(beside)) - values[best] if not np.isnan(beside).all() else np.inf
    side = "low edge" if best == 0 else "high edge"
    whole = criterion[:, np.isfinite(criterion).all(axis=0)]
    free = (whole.shape[0] - 1) * (whole.shape[1] - 1)
    if free > 0 and gain <= t_quantile(0.975, free) * math.sqrt(2 * noise(whole)):
        return f"{side}, within noise"
    return side


def noise(values: Array) -> float:
    """The variance of a rate's mean over seeds [S, L], what a seed does to all rates aside."""
    seeds, rates = values.shape
    rest = values - values.mean(axis=0)
    rest = rest - rest.mean(axis=1, keepdims=True)
    return float((rest**2).sum()) / ((seeds - 1) * (rates - 1)) / seeds


def select(rows: Table, lower: bool | None = None) -> Selected:
    """The choice for one variant at one rank on one task in one setting; `lower`: less of the
    score is better, by the metric's name where None."""
    lower = lower_is_better(rows["metric"].iloc[0]) if lower is None else lower
    tuning, test = rows[rows["split"] != "test"], rows[rows["split"] == "test"]
    if len(tuning) and len(test):
        return _confirmed(rows, tuning, test, lower)
    only = tuning if len(tuning) else test
    by_loss = len(tuning) > 0 and "loss" in only and bool(only["loss"].notna().any())
    return _left_out(only, "loss" if by_loss else "score", lower)


def _confirmed(rows: Table, tuning: Table, test: Table, lower: bool) -> Selected:
    found = curve(tuning, "loss", lower)
    lr, naive, notes = _best(found, lower)
    confirmed = test[np.isclose(test["lr"].astype(float), lr, rtol=1e-6)]
    elsewhere = sorted(set(test["lr"]) - set(confirmed["lr"]))
    if elsewhere:
        notes.append(f"{len(test) - len(confirmed)} test runs at other rates are left out")
    scores = {
        int(row.seed): float(row.score) if row.status == "done" else float(row.base)
        for row in confirmed.itertuples(index=False)
    }
    lost = int((confirmed["status"] != "done").sum())
    if lost:
        notes.append(f"{lost} confirmation runs diverged: scored as the untouched base")
    sources = {int(row.seed): str(row.source) for row in confirmed.itertuples(index=False)}
    return Selected(
        lr, scores, sources, "confirmed", naive, bracket(found.criterion), len(tuning),
        len(found.lrs), int((rows["status"] == "diverged").sum()), found, notes,
    )  # fmt: skip


def _left_out(rows: Table, by: str, lower: bool) -> Selected:
    found = curve(rows, by, lower)
    sources = {}
    if len(found.lrs) == 1:
        sources = {int(row.seed): str(row.source) for row in rows.itertuples(index=False)}
    return from_curve(found, lower, sources)


def from_curve(found: Curve, lower: bool, sources: dict[int, str] | None = None) -> Selected:
    """The choice where one kind of score is all there is."""
    lr, naive, notes = _best(found, lower)
    if len(found.lrs) == 1:
        reported, rule = found.scores[:, 0], "single rate"
    else:
        reported, rule = left_one_out(found.criterion, found.scores), "left one out"
    worst = math.nan
    if np.isfinite(found.scores).any():
        worst = np.nanmax(found.scores) if lower else np.nanmin(found.scores)
    ran = ~np.isnan(found.criterion)
    scores = {}
    for i, seed in enumerate(found.seeds):
        if np.isfinite(reported[i]):
            scores[seed] = float(reported[i])
        elif np.isinf(found.criterion[i]).any() and math.isfinite(worst):
            scores[seed] = float(worst)
            notes.append(f"seed {seed} diverged at its rate: scored as the worst of its runs")
    return Selected(
        lr, scores, sources or {}, rule, naive, bracket(found.criterion), int(ran.sum()),
        len(found.lrs), int(np.isinf(found.criterion).sum()), found, notes,
    )  # fmt: skip


def _best(found: Curve, lower: bool) -> tuple[float, float, list[str]]:
    """(the best rate, the best mean score of any rate at which no run diverged, notes).

    The two are of different rates where the loss that chooses and the score disagree.
    """
    values = means(found.criterion)
    if not np.isfinite(values).any():
        return float(found.lrs[0]), math.nan, ["every rate diverged"]
    whole = (~np.isinf(found.criterion) & np.isfinite(found.scores)).any(axis=0)
    whole &= ~np.isinf(found.criterion).any(axis=0)
    tried = [float(np.nanmean(column)) for column in found.scores[:, whole].T]
    naive = (min if lower else max)(tried, default=math.nan)
    return float(found.lrs[int(np.argmin(values))]), naive, []
