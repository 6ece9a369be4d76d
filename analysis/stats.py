"""Statistics of paired comparisons, in numpy, each draw from a generator of its own.

Legend: a block is one seed of one task; d [n] are a task's differences, variant minus baseline of
the same block; an effect is the mean over tasks of the mean over a task's blocks. `blocks` is a
list of such arrays, one a task. Items [n, m] are the same differences item by item.

The exact test flips signs: with n blocks it cannot go below p = 2^(1-n), so that five seeds of one
task never reach .05 (fair-comparison protocols: Dror et al. 2018; Bouthillier et al. 2021):

>>> import numpy as np
>>> round(sign_flip([np.array([1.0, 2.0, 3.0, 2.5, 1.5])]), 4), least_p(5)
(0.0625, 0.0625)
>>> holm([0.01, 0.04, 0.03]).tolist()
[0.03, 0.06, 0.06]

The interval is Student's, of strata; with one task and no items the textbook's:

>>> found = interval([np.array([1.0, 2.0, 3.0])])
>>> [round(v, 3) for v in (found.effect, found.low, found.high)]     # 2 -+ 4.303 / sqrt(3)
[2.0, -0.484, 4.484]
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Blocks = Sequence[Array]
EXACT_UP_TO = 16  # blocks: 2^15 flips; above, drawn ones
DRAWN = 20_000  # flips, and the p-value counts the observed one among them
TIE = 1e-9  # relative: sums of the same numbers in another order
AGREE = 4  # blocks of a task, from which on equal differences say that there is little spread


@dataclass(frozen=True)
class Interval:
    """An effect, its standard error with degrees of freedom, and its interval."""

    effect: float
    se: float
    df: float
    low: float
    high: float


def flat(blocks: Blocks) -> Array:
    """Every block's share of the effect [N]: they add up to it, and signs flip block by block."""
    return np.concatenate([d / (len(d) * len(blocks)) for d in blocks])


def effect(blocks: Blocks) -> float:
    """The mean over tasks of the mean over blocks."""
    return float(np.mean([d.mean() for d in blocks]))


def least_p(n: int) -> float:
    """The smallest two-sided p of an exact sign-flip test of n blocks."""
    return 2.0 ** (1 - n)


@cache
def _flips(n: int) -> Array:
    """Sign patterns [F, n], the first all plus: all of them up to a global sign, or drawn ones."""
    if n <= EXACT_UP_TO:
        codes = np.arange(2 ** (n - 1))[:, None] >> np.arange(n)[None]
        return 1.0 - 2.0 * (codes & 1)
    drawn = np.random.default_rng(n).integers(0, 2, (DRAWN, n))
    return np.concatenate([np.ones((1, n)), 1.0 - 2.0 * drawn])


def sign_flip(blocks: Blocks) -> float:
    """Two-sided p of the null that each block's difference is as likely with either sign.

    Exact up to 16 blocks; above, of 20,000 drawn flips and the observed one.
    """
    shares = flat(blocks)
    sums = np.abs(_flips(len(shares)) @ shares)
    return float(np.mean(sums >= sums[0] * (1 - TIE)))


def sign_flip_above(blocks: Blocks) -> float:
    """One-sided p of the null that the differences lie at zero or below."""
    shares = flat(blocks)
    flips = _flips(len(shares))
    sums = flips @ shares
    if len(shares) <= EXACT_UP_TO:
        sums = np.concatenate([sums, -sums])  # the patterns that start with a minus
    return float(np.mean(sums >= sums[0] - TIE * abs(sums[0])))


def equivalence(blocks: Blocks, margin: float) -> float:
    """p of two one-sided sign-flip tests that the effect lies within -margin..margin."""
    return max(
        sign_flip_above([d + margin for d in blocks]),
        sign_flip_above([margin - d for d in blocks]),
    )


def holm(p: Sequence[float]) -> Array:
    """Adjusted p-values (Holm 1979): all of them hold together at the level asked for."""
    values = np.asarray(p, dtype=float)
    order = np.argsort(values, kind="stable")
    steps = (len(values) - np.arange(len(values))) * values[order]
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def t_quantile(q: float, df: float) -> float:
    """Student's quantile; the normal one for infinitely many degrees of freedom."""
    from scipy.special import ndtri, stdtrit

    return float(ndtri(q) if math.isinf(df) else stdtrit(df, q))


def _variance(d: Array, items: Array | None) -> tuple[float, float]:
    """(variance of a task's mean, its square over the degrees of freedom).

    Seeds alone: s^2 / n. With items, seeds and items are crossed and both are drawn: the variance
    of the items' means, less what the residual puts into it, comes on top.
    """
    n = len(d)
    own = float(d.var(ddof=1)) / n
    spread = own**2 / (n - 1)
    if items is None or items.shape[1] < 2:
        return own, spread
    m = items.shape[1]
    by_item = items.mean(axis=0)
    rest = items - by_item - items.mean(axis=1, keepdims=True) + items.mean()
    residual = float((rest**2).sum()) / ((n - 1) * (m - 1))
    more = max(0.0, float(by_item.var(ddof=1)) / m - residual / (n * m))
    return own + more, spread + more**2 / (m - 1)


def standard_error(
    blocks: Blocks, items: Sequence[Array | None] | None = None
) -> tuple[float, float]:
    """(standard error of the effect, degrees of freedom by Satterthwaite's rule)."""
    parts = [_variance(d, i) for d, i in zip(blocks, items or [None] * len(blocks), strict=True)]
    variance = sum(v for v, _ in parts)
    spread = sum(s for _, s in parts)
    df = variance**2 / spread if spread > 0 else math.inf
    return math.sqrt(variance) / len(blocks), df


def agree(blocks: Blocks) -> bool:
    """Whether the differences of two or three blocks a task are the same: by chance, as those of
    few items may be, so that their spread is not zero but unknown.

    >>> agree([np.array([0.5, 0.5])]), agree([np.array([0.5, 0.5, 0.5, 0.5])])
    (True, False)
    """
    fewest = min(len(d) for d in blocks)
    return 1 < fewest < AGREE and all(np.ptp(d) <= TIE * max(1.0, np.abs(d).max()) for d in blocks)


def interval(
    blocks: Blocks, items: Sequence[Array | None] | None = None, level: float = 0.95
) -> Interval | None:
    """Student's interval of the effect; None where a task has one block, or where they `agree`.

    With items it is never narrower than that of seeds alone: their variance comes with many
    degrees of freedom, so that Satterthwaite's rule may take more from the quantile than it adds.

    >>> d = np.array([0.030, 0.032])
    >>> crossed = interval([d], [d[:, None] + np.linspace(-0.01, 0.01, 200)])
    >>> crossed.high - crossed.low == interval([d]).high - interval([d]).low
    True
    """
    if min(len(d) for d in blocks) < 2 or agree(blocks):
        return None
    mean, q = effect(blocks), 0.5 + level / 2
    alone, (se, df) = standard_error(blocks), standard_error(blocks, items)
    half = max(t_quantile(q, df) * se, t_quantile(q, alone[1]) * alone[0])
    return Interval(mean, se, df, mean - half, mean + half)


def bootstrap_interval(
    blocks: Blocks,
    items: Sequence[Array | None] | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Interval | None:
    """The studentised bootstrap of seeds and items within tasks (Hall 1988; Davison & Hinkley
    1997, section 5.2).

    A task's seeds are drawn with replacement and, where there are items, its items as well, the
    same ones for all seeds of a draw: they are crossed. Each draw is divided by its own standard
    error of seeds, so that few seeds do not make the interval too short.
    """
    if min(len(d) for d in blocks) < 2 or agree(blocks):
        return None
    generator = np.random.default_rng(seed)
    mean = effect(blocks)
    se, df = standard_error(blocks, items)
    own_se = standard_error(blocks)[0]
    if own_se == 0:
        return Interval(mean, se, df, mean, mean)
    means, variances = np.zeros(draws), np.zeros(draws)
    for d, of_items in zip(blocks, items or [None] * len(blocks), strict=True):
        n = len(d)
        chosen = generator.integers(0, n, (draws, n))
        values = np.broadcast_to(d, (draws, n))
        if of_items is not None and of_items.shape[1] > 1:
            m = of_items.shape[1]
            weights = generator.multinomial(m, np.full(m, 1 / m), size=draws) / m
            values = weights @ of_items.T  # each seed's mean over the draw's items
        drawn = np.take_along_axis(values, chosen, axis=1)
        means += drawn.mean(axis=1) / len(blocks)
        variances += drawn.var(axis=1, ddof=1) / n / len(blocks) ** 2
    kept = variances > (1e-3 * own_se) ** 2  # a draw of one seed alone has no spread to divide by
    t = (means[kept] - mean) / np.sqrt(variances[kept])
    low, high = np.quantile(t, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(mean, se, df, mean - float(high) * own_se, mean - float(low) * own_se)


def mcnemar(first_only: int, second_only: int) -> float:
    """Exact two-sided p over items that one of two models alone gets right."""
    from scipy.special import bdtr

    n, k = first_only + second_only, min(first_only, second_only)
    return min(1.0, 2 * float(bdtr(k, n, 0.5))) if n else 1.0


def spread(blocks: Blocks) -> float:
    """The standard deviation of a block's difference around its task's mean, pooled over tasks."""
    free = sum(len(d) - 1 for d in blocks)
    if free == 0:
        return math.nan
    return math.sqrt(sum(float(((d - d.mean()) ** 2).sum()) for d in blocks) / free)


def blocks_needed(level: float) -> int:
    """The fewest blocks whose exact test can reach `level`."""
    return math.ceil(1 - math.log2(level))


@cache
def detectable(n: int, level: float, power: float = 0.8, draws: int = 4000) -> float:
    """The smallest effect, in standard deviations of a block, that a sign-flip test of n blocks at
    `level` finds with `power`, for normal noise; infinite where no p reaches the level.

    Of simulated studies, each with the effect from which on its own test finds it: shifting all of
    a study's differences by e, the flip k stays as far out as what was seen, |s_k + e o_k| >=
    s_0 + e n with sums s and counts o of signs, until e > max((s_k - s_0) / (n - o_k),
    (-s_k - s_0) / (n + o_k)); a test allows so many such flips, and `power` of the studies do.

    >>> detectable(5, 0.05)
    inf
    >>> round(detectable(6, 0.05), 1), round(detectable(40, 0.05), 2)     # t tests: 1.44, .45
    (1.8, 0.45)
    """
    if least_p(n) > level:
        return math.inf
    seen, flips = _flips(n)[:1], _flips(n)[1:]
    generator = np.random.default_rng(n)
    most = max(4096, math.ceil(5 / level))  # enough to tell the level
    if len(flips) > most:
        flips = flips[generator.choice(len(flips), most, replace=False)]
    # flips of a test, the observed one among them
    allowed = math.floor(level * (1 + len(flips)) * (1 + TIE))
    if allowed < 1:
        return math.inf
    o = flips.sum(axis=1)
    always = np.abs(o) == n  # a drawn flip may be the observed one
    o[always] = 0
    less, more = 1 / (n - o), 1 / (n + o)
    found, last = [], len(flips) - allowed
    pieces = math.ceil(draws * len(flips) / 1e6)  # of 8 MB
    for noise in np.array_split(generator.standard_normal((draws, n)), pieces):
        s, s0 = noise @ flips.T, noise @ seen.T
        until = s - s0
        until *= less
        s += s0
        s *= -more
        np.maximum(until, s, out=until)
        until[:, always] = np.inf
        until.partition(last, axis=1)
        found.append(until[:, last].copy())
    return float(np.quantile(np.concatenate(found), power))


MOST_SEEDS = 200  # of a task: no one plans more


def seeds_needed(
    size: float, sd: float, tasks: int, level: float, most: int = MOST_SEEDS
) -> int | None:
    """Seeds a task, so that an effect of `size` is found with a power of .8; None: over `most`.

    >>> seeds_needed(1.0, 0.5, 1, 0.05), seeds_needed(1.0, 0.0, 1, 0.05)
    (6, 6)
    """
    least = -(-blocks_needed(level) // tasks)
    if not size > 0 or math.isnan(sd):
        return None
    exact = range(max(2, least), min(most, 30 // tasks) + 1)
    enough = bisect_left(exact, True, key=lambda n: detectable(n * tasks, level) * sd <= size)
    if enough < len(exact):
        return exact[enough]
    from scipy.special import ndtri  # from there on the t test is as good, and quick

    z = float(ndtri(1 - level / 2) + ndtri(0.8))
    n = max(2, least, 30 // tasks + 1, math.ceil((z * sd / size) ** 2 / tasks))
    return n if n <= most else None
