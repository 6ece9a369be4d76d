"""Aggregates over runs, beside the verdicts: robust means, profiles, budgets, fronts.

Interquartile mean, probability of improvement, optimality gap and performance profile are those of
Agarwal et al. 2021 (arXiv:2108.13264, rliable); the expected best of k trials is that of Dodge et
al. 2019 (arXiv:1909.03004); time to a target with misses at infinity, and its profile up to four
times the fastest, that of AlgoPerf (Dahl et al. 2023, arXiv:2306.07179).

>>> import numpy as np
>>> iqm(np.arange(8.0)), expected_best(np.array([1.0, 2.0, 3.0])).round(3).tolist()
(3.5, [2.0, 2.444, 2.667])
>>> front([(1.0, 5.0), (2.0, 6.0), (3.0, 4.0)])      # cost less, quality more
[0, 1]
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
DRAWS = 2000


def iqm(values: Array) -> float:
    """The mean of the middle half; the outer quarters are cut, whole values and fractions."""
    ordered = np.sort(values.ravel())
    cut = len(ordered) / 4
    places = np.arange(len(ordered))
    weights = np.clip(np.minimum(places + 1, len(ordered) - cut) - np.maximum(places, cut), 0, 1)
    return float((ordered * weights).sum() / weights.sum())


def stratified(
    strata: Sequence[Array], of: Callable[[Sequence[Array]], float], seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of `of`, runs drawn anew within each task."""
    generator = np.random.default_rng(seed)
    drawn = [
        of([s[generator.integers(0, len(s), len(s))] for s in strata]) for _ in range(DRAWS // 4)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def improvement(first: Array, second: Array) -> float:
    """The probability that a run of `first` beats one of `second`; ties count half."""
    wins = (first[:, None] > second[None]) + 0.5 * (first[:, None] == second[None])
    return float(wins.mean())


def optimality_gap(values: Array, best: float) -> float:
    """The mean of what is lacking to `best`."""
    return float(np.maximum(0.0, best - values).mean())


def profile(values: Array, grid: Array) -> Array:
    """The share of runs above each value of the grid."""
    return (values.ravel()[None] > grid[:, None]).mean(axis=1)


def expected_best(trials: Array) -> Array:
    """[K] the expected best of 1, 2, ..., K trials drawn from those that were made."""
    ordered = np.sort(trials)
    share = np.arange(1, len(ordered) + 1) / len(ordered)
    before = np.concatenate([[0.0], share[:-1]])
    k = np.arange(1, len(ordered) + 1)[:, None]
    return ((share**k - before**k) * ordered).sum(axis=1)


def friedman(scores: Array) -> tuple[float, Array]:
    """(p, mean ranks) of methods [M] over tasks [T, M], 1 the best; Demsar 2006."""
    from scipy.special import chdtrc

    tasks, methods = scores.shape
    ranks = np.array([mean_ranks(-row) for row in scores])
    mean = ranks.mean(axis=0)
    ties = sum(_ties(row) for row in scores)
    spread = methods * (methods + 1) * tasks - ties / (methods - 1)
    chi = 12 * tasks**2 * float(((mean - (methods + 1) / 2) ** 2).sum()) / spread if spread else 0.0
    return float(chdtrc(methods - 1, chi)), mean


def _ties(row: Array) -> float:
    counts = np.unique(row, return_counts=True)[1]
    return float((counts**3 - counts).sum())


def mean_ranks(values: Array) -> Array:
    """Ranks from 1, equal values sharing their mean rank."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + 1 + ends) / 2)[where]


def critical_difference(methods: int, tasks: int) -> float:
    """The difference of mean ranks that Nemenyi's test finds at .05, with 5 tasks or more."""
    from scipy.stats import studentized_range

    q = float(studentized_range.ppf(0.95, methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * tasks))


def time_to(target: float, curve: Sequence[tuple[float, float]], before: float = 0.0) -> float:
    """The time at which a falling curve of (time, loss) first reaches the target, after `before`
    (initialisation); infinite where it never does."""
    for when, loss in curve:
        if loss <= target:
            return before + when
    return math.inf


def usable_width(lrs: Array, scores: Array, margin: float) -> float:
    """Decades of learning rate within `margin` of the best, by straight lines between the rates."""
    known = np.isfinite(scores)
    x, y = np.log10(lrs[known]), scores[known]
    if len(x) < 2:
        return 0.0
    fine = np.linspace(x[0], x[-1], 1001)
    return float((np.interp(fine, x, y) >= y.max() - margin).mean() * (x[-1] - x[0]))


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points (cost, quality) that no other beats on both."""
    found = []
    for i, (cost, quality) in enumerate(points):
        beaten = any(
            c <= cost and q >= quality and (c < cost or q > quality)
            for j, (c, q) in enumerate(points)
            if j != i
        )
        if not beaten:
            found.append(i)
    return found
