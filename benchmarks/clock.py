"""Timing side by side: contenders run in turns in one process, and ratios are of one round.

>>> calls = {"once": lambda: sum(range(20_000)), "twice": lambda: sum(range(40_000))}
>>> seconds = rounds(calls, 9, "process")
>>> middle, low, high = ratio(seconds["twice"], seconds["once"])
>>> 1 < middle < 4, low <= middle <= high
(True, True)
"""

import math
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any


def processor() -> float:
    """Seconds of the processor, of this process and of those that it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


CLOCKS = {"wall": time.perf_counter, "process": processor}


def rounds(calls: dict[str, Callable[[], Any]], count: int, clock: str) -> dict[str, list[float]]:
    """Seconds of each call in each of `count` rounds, after one that does not count.

    Every round runs each contender once, in turns that begin elsewhere each time.
    """
    now, names = CLOCKS[clock], list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(count + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = now()
            calls[name]()
            if i:
                seconds[name].append(now() - start)
    return seconds


def ratio(these: list[float], those: list[float]) -> tuple[float, float, float]:
    """(median, lower, upper end of its 95 % interval) of the rounds' ratios (order statistics)."""
    ratios = sorted(a / b for a, b in zip(these, those, strict=True))
    n = len(ratios)
    chances = [math.comb(n, k) / 2**n for k in range(n + 1)]
    k = 0
    while sum(chances[: k + 1]) <= 0.025:
        k += 1
    low = max(k - 1, 0)
    return statistics.median(ratios), ratios[low], ratios[n - 1 - low]
