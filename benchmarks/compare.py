"""Ten thousand runs, read, judged and drawn: the time and memory of `analysis.compare`.

    python -m benchmarks.compare [--runs 10000] [--json FILE]

One real run (two steps of LoRA on the embedded model) is copied under other names, rates, ranks,
tasks and seeds, with scores around a parabola over the rate's logarithm: ten variants, ten rates,
two ranks, five tasks, and as many seeds as make the count. Bounds for 10,000: 60 s, 2 GiB.
"""

import copy
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from variants._registry import find_preset

from .sheet import Sheet

NAMES = ("lora", "dora", "pissa", "adalora", "rslora", "olora", "milora", "eva", "hira", "vera")
RATES = tuple(1e-4 * 2**k for k in range(10))
RANKS = (8, 16)
TASKS = tuple(f"task{k}" for k in range(5))
ROOT = Path(__file__).parents[1]
SECONDS, BYTES = 60.0, 2 * 2**30


def template(top: Path) -> Path:
    """The folder of one real run."""
    subprocess.run(
        [sys.executable, "run.py", "variant=lora", "rank=8", "train.steps=2", f"out_dir={top}",
         "track.mode=disabled"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return next(top.glob("single/*"))


def results(one: dict[str, Any], seeds: int) -> Iterator[dict[str, Any]]:
    """What result.json of every run says."""
    generator = np.random.default_rng(0)
    for place, name in enumerate(NAMES):
        axes = {axis: dict(part) for axis, part in find_preset(name).axes.items()}
        for rank in RANKS:
            for task in TASKS:
                for k, rate in enumerate(RATES):
                    for seed in range(seeds):
                        run = copy.deepcopy(one)
                        loss = 2 + 0.05 * (k - 4 - place % 3) ** 2 + 0.05 * generator.normal()
                        run["config"] |= {"variant": name, "axes": axes, "rank": rank, "lr": rate,
                                          "task": task, "seed": seed}  # fmt: skip
                        run["metrics"]["tuned"] = {
                            "loss": loss, run["metrics"]["primary"]: math.exp(-loss / 2)
                        }  # fmt: skip
                        yield run


def make(folder: Path, like: Path, count: int) -> int:
    """Writes about `count` run folders; how many."""
    one = json.loads((like / "result.json").read_text())
    seeds = max(1, round(count / (len(NAMES) * len(RATES) * len(RANKS) * len(TASKS))))
    number = 0
    for number, run in enumerate(results(one, seeds), 1):
        path = folder / f"{run['config']['variant']}-r{run['config']['rank']}-{number:010x}"
        path.mkdir(parents=True)
        run["run_id"] = f"{number:010x}"
        (path / "result.json").write_text(json.dumps(run))
        (path / "status.json").write_text('{"status": "done"}')
        for name in ("env.json", "predictions.jsonl"):
            os.link(like / name, path / name)
    return number


def main() -> None:
    """The command."""
    sheet = Sheet("compare", __doc__)
    sheet.flag("--runs", type=int, default=10_000)
    given = sheet.begin()
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        count = make(top / "runs", template(top / "one"), given.runs)
        command = ["-m", "analysis.compare", str(top / "runs"), "--out", str(top / "out")]
        began = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        page = (top / "out" / "index.html").stat().st_size
    sheet.say(
        f"{count:,} runs: {seconds:.1f} s (bound {SECONDS:g}), {peak / 2**30:.2f} GiB at most "
        f"(bound {BYTES / 2**30:g}), a page of {page / 2**20:.1f} MiB"
    )
    sheet.write({"runs": count, "seconds": seconds, "peak_bytes": peak, "page_bytes": page})


if __name__ == "__main__":
    main()
