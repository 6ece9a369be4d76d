"""PiSSA's start of one matrix: here, by the exact decomposition, and by PEFT's `pissa_niter_4`.

    python -m benchmarks.init [--threads N] [--rounds N] [--clock process] [--size N] [--decay X]
                              [--json FILE]

Singular values k^-decay. Each contender decomposes and makes A, B and the residual. A ratio is to
the exact one's time, the median of the rounds' own; `*` marks one over its bound. Errors are of the
largest r singular values, relative and worst, and of their right vectors: the smallest cosine to
the exact ones. Then twelve runs of a sweep over ranks, with the cache: how many factorizations each
of its matrices takes, counted.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from variants import _svd, attach

from .clock import ratio, rounds
from .sheet import Sheet

BOUNDS = {16: 1 / 50, 128: 1 / 8}  # of the exact one's time
ERROR = 1e-5  # of the singular values
SWEPT = [4, 8, 16, 32]  # ranks, with three seeds each


def spectrum(size: int, decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, its singular values, and its right singular vectors [k, n]."""
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=g)).Q for _ in range(2))
    S = torch.arange(1, size + 1) ** -decay
    return U * S @ V.mT, S, V.mT


def exact(W: Tensor, r: int) -> _svd.Triplets:
    return _svd.exact(W, r)


def krylov(W: Tensor, r: int) -> _svd.Triplets:
    return _svd.krylov(W, r, torch.Generator().manual_seed(0))


def niter_4(W: Tensor, r: int) -> _svd.Triplets:
    """As PEFT's `pissa_init` calls it."""
    U, S, V = torch.svd_lowrank(W, r, niter=4)
    return U, S, V.mT


CONTENDERS: dict[str, Callable[[Tensor, int], _svd.Triplets]] = {
    "exact": exact, "here": krylov, "pissa_niter_4": niter_4,
}  # fmt: skip


def start(W: Tensor, r: int, name: str) -> _svd.Triplets:
    """The triplets, once A, B and W - B A are made of them."""
    found = CONTENDERS[name](W, r)
    A, B = _svd.balanced(*found)
    _ = W - B @ A
    return found


def compare(
    W: Tensor, S: Tensor, V: Tensor, r: int, given: argparse.Namespace, seconds: list[float]
) -> list[dict[str, Any]]:
    """One row a contender; the exact one's time is the same for every rank."""
    others = {n: lambda n=n: start(W, r, n) for n in CONTENDERS if n != "exact"}
    taken = rounds(others, given.rounds, given.clock) | {"exact": seconds}
    found = []
    for name in CONTENDERS:
        _, values, Vh = start(W, r, name) if name != "exact" else (None, S[:r], V[:r])
        middle, low, high = ratio(taken[name], seconds)
        found.append({
            "r": r, "method": name, "s": statistics.median(taken[name]), "time": middle,
            "interval": [low, high], "time_bound": BOUNDS[r] if name == "here" else None,
            "error": ((values - S[:r]) / S[:r]).abs().max().item(),
            "cosine": (Vh * V[:r]).sum(1).abs().min().item(),
        })  # fmt: skip
    return found


def sweep(size: int) -> dict[str, Any]:
    """Twelve PiSSA runs over ranks and seeds: seconds of each start, and factorizations made."""
    from experiments.plan import Job
    from experiments.sweep import largest_rank

    made, compute = [], _svd._compute
    runs = [(r, seed) for r in SWEPT for seed in range(3)]
    jobs = [Job([], {"rank": r, "variant": {"init": {"name": "pissa"}}}, None) for r, _ in runs]
    torch.manual_seed(0)
    weights = [spectrum(size, 0.5)[0] for _ in range(2)]

    def counted(M: Tensor, r: int, *rest: Any) -> _svd.Triplets:
        made.append(r)
        return compute(M, r, *rest)

    before, seconds = dict(os.environ), []
    _svd._compute = counted
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ |= {"LORA_CACHE": folder, _svd.FACTORS: str(largest_rank(jobs))}
            for r, seed in runs:
                model = torch.nn.Sequential(*(torch.nn.Linear(size, size, False) for _ in weights))
                for i, W in enumerate(weights):
                    model[i].weight.data = W * (i + 1)  # two matrices
                began = time.perf_counter()
                attach(model, "pissa", rank=r, seed=seed, targets=["0", "1"])
                seconds.append(time.perf_counter() - began)
    finally:
        _svd._compute = compute
        os.environ.clear()
        os.environ.update(before)
    return {"runs": len(runs), "matrices": len(weights), "factorizations": len(made),
            "first_s": seconds[0], "others_s": statistics.median(seconds[1:])}  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """The row as it is shown: how many times faster than the exact one."""
    bound = row["time_bound"]
    late, wrong = bound and row["time"] > bound, row["error"] > ERROR
    return [
        str(row["r"]), row["method"], f"{row['s']:.3f}",
        f"{1 / row['time']:.1f}" + (f" of {1 / bound:.0f}{'*' * late}" if bound else ""),
        f"{row['error']:.1e}{'*' * wrong}", f"{row['cosine']:.4f}",
    ]  # fmt: skip


def main() -> None:
    """The command."""
    sheet = Sheet("init", __doc__, rounds=3)
    sheet.flag("--size", type=int, default=4096)
    sheet.flag("--decay", type=float, default=0.5)
    given = sheet.begin()
    W, S, V = spectrum(given.size, given.decay)
    seconds = rounds({"exact": lambda: start(W, 16, "exact")}, given.rounds, given.clock)["exact"]
    found = [row for r in BOUNDS for row in compare(W, S, V, r, given, seconds)]
    sheet.table(
        f"{given.size} x {given.size}, spectrum k^-{given.decay:g}, fp32, {sheet.timed}",
        ("r", "method", "s", "exact / time", "error of the values", "worst cosine"),
        map(cells, found),
    )
    swept = sweep(1024)
    sheet.say(
        f"{swept['runs']} runs, ranks {SWEPT} with three seeds: {swept['factorizations']} "
        f"factorizations of {swept['matrices']} matrices, 1024 x 1024; the first run starts in "
        f"{swept['first_s']:.2f} s, the others in {swept['others_s']:.2f} s"
    )
    sheet.write({"rows": found, "sweep": swept})


if __name__ == "__main__":
    main()
