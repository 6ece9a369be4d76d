"""A sweep that is killed: python -m benchmarks.survival [--runs 200] [--kills 20] [--workers]

The driver of a sweep of RUNS tiny runs is killed with SIGKILL at KILLS random moments, and started
again each time; with --workers it is a random worker of joblib's two that is killed, and the driver
has to go on by itself. Then every run must have one result, no result may have been made again, and
the results, files and adapters must be those of a sweep that nobody disturbed (a sample of 20).
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .sheet import Sheet
from .sweep import ROOT, TINY, text

SAMPLE, STEPS = 20, 6
SETTINGS = [*TINY, f"train.steps={STEPS}", "train.checkpoint_every=1"]


class Sweep:
    """The sweep, its driver and what there is of it."""

    def __init__(self, home: Path, runs: int, workers: bool) -> None:
        home.mkdir(exist_ok=True)
        self.out, self.home, self.runs = home / "runs", home, runs
        engine = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"] if workers else []
        swept = ["variant=lora,dora", "rank=1,2", f"seed=range({runs // 4})"]
        self.words = [*engine, *swept, *SETTINGS, text(home)]
        self.log = (home / "log.txt").open("w")

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "run.py", "-m", *(words or self.words), f"out_dir={self.out}"]
        return subprocess.Popen(command, cwd=ROOT, stdout=self.log, stderr=self.log)

    def results(self) -> dict[str, int]:
        """The time of each result that there is."""
        found = self.out.glob("single/*/result.json")
        return {file.parent.name: file.stat().st_mtime_ns for file in found}


def main() -> int:
    """The command."""
    sheet = Sheet("survival", __doc__)
    sheet.flag("--runs", type=int, default=200, help="a multiple of 4")
    sheet.flag("--kills", type=int, default=20)
    sheet.flag("--workers", action="store_true", help="kill joblib's, not the driver")
    sheet.flag("--seed", type=int, default=0)
    given = sheet.begin()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        found = survive(Path(folder), given.runs, given.kills, given.workers, given.seed)
    whom = "a worker" if given.workers else "the driver"
    counts = ", ".join(f"{value} {name}" for name, value in found.items())
    sheet.say(f"{given.runs} runs, {given.kills} kills of {whom}: {counts}")
    sheet.write(found)
    return int(
        found["results"] != given.runs or any(found[k] for k in ("twice", "lost", "corrupt"))
    )


def survive(home: Path, runs: int, kills: int, workers: bool, seed: int) -> dict[str, Any]:
    """The counts, by what they are of."""
    sweep, chance, began = Sweep(home, runs, workers), random.Random(seed), time.monotonic()
    moments = sorted(chance.uniform(0, runs - 1) for _ in range(kills))
    first: dict[str, int] = {}
    driver = sweep.start()
    for moment in moments:
        while len(sweep.results()) < moment and driver.poll() is None:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 1.5))
        driver = _kill(driver, sweep, workers, chance)
        print(f"a kill at {len(sweep.results())} results", file=sys.stderr, flush=True)
        for name, made in sweep.results().items():
            first.setdefault(name, made)
    code = driver.wait()
    ends = sweep.results()
    planned = [job["path"] for file in (sweep.out / ".sweeps").glob("sweep-*.json")
               for job in json.loads(file.read_text())["jobs"]]  # fmt: skip
    flaws = [flaw for path in planned for flaw in _flaws(Path(path))] + _differences(sweep, runs)
    print("\n".join(flaws), file=sys.stderr)
    return {
        "results": len(ends),
        "twice": sum(ends.get(name) != made for name, made in first.items())
        + len(list(sweep.out.glob("single/*.old*"))),
        "lost": sum(Path(path).name not in ends for path in planned),
        "corrupt": len(flaws),
        "resumed": sum("resumed after step" in (Path(p) / "run.log").read_text() for p in planned),
        "as the last exit code": code,
        "seconds": round(time.monotonic() - began),
    }


def _kill(
    driver: subprocess.Popen[bytes], sweep: Sweep, workers: bool, chance: random.Random
) -> subprocess.Popen[bytes]:
    """SIGKILL for the driver, which is then started again, or for one of its workers."""
    if not workers:
        driver.kill()
        driver.wait()
        return sweep.start()
    while driver.poll() is None:
        found = _workers(driver.pid)
        if found:
            os.kill(chance.choice(found), signal.SIGKILL)
            break
        time.sleep(0.05)
    return driver


def _workers(driver: int) -> list[int]:
    """The processes that joblib has started from this driver."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "cmdline").read_text()
        except OSError:
            continue  # gone meanwhile
        if parent == driver and "popen_loky" in words:
            found.append(int(folder.name))
    return found


def _flaws(folder: Path) -> list[str]:
    """What is wrong with a run: every file can be read, and each step stands in it once."""
    from safetensors.torch import load_file

    try:
        result = json.loads((folder / "result.json").read_text())
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        status = json.loads((folder / "status.json").read_text())["status"]
        load_file(folder / "adapter" / "adapter.safetensors")
        steps = [row["step"] for row in rows if "loss" in row]
    except (OSError, ValueError, KeyError) as error:
        return [f"{folder.name}: {type(error).__name__}: {error}"]
    facts = {
        f"result {result['status']}": result["status"] == "done",
        f"status {status}": status == "done",
        f"steps {steps}": steps == list(range(1, STEPS + 1)),
        "a file half written": not list(folder.rglob("*.part")),
    }
    return [f"{folder.name}: {fact}" for fact, holds in facts.items() if not holds]


def _differences(sweep: Sweep, runs: int) -> list[str]:
    """Which of a sample differ from runs that nobody disturbed."""
    calm = Sweep(sweep.home / "calm", runs, False)
    seeds = random.Random(1).sample(range(runs // 4), min(SAMPLE // 4, runs // 4))
    swept = ["variant=lora,dora", "rank=1,2", f"seed={','.join(map(str, seeds))}"]
    assert calm.start(*swept, *SETTINGS, text(sweep.home)).wait() == 0
    keys = ("metrics", "config", "learning", "tokens", "ranks")
    found = []
    for name in calm.results():
        a, b = (
            json.loads((s.out / "single" / name / "result.json").read_text()) for s in (calm, sweep)
        )
        found += [f"{name}: other {key}" for key in keys if a[key] != b[key]]
    return found


if __name__ == "__main__":
    sys.exit(main())
