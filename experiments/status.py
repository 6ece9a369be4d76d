"""A sweep in the terminal: python -m experiments.status DIR [--once | --json] [--every 2]

DIR is an out_dir, a folder of runs in one, or a sweep's plan (OUT_DIR/.sweeps/sweep-*.json). Runs
that a sweep has planned and nobody has begun are shown too. Nothing but the folders is read, so it
shows what is going on from any machine that sees them.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .overview import runs
from .record import FINISHED, Folder, read_json

COLORS = {"running": "cyan", "done": "green", "failed": "red", "refused": "red",
          "diverged": "yellow", "stale": "yellow", "interrupted": "magenta"}  # fmt: skip
ORDER = ("running", "failed", "refused", "interrupted", "missing", "diverged", "stale", "done")


@dataclass(frozen=True)
class Row:
    """A run, as its folder shows it."""

    run: str
    state: str
    step: int = 0
    steps: int | None = None
    loss: float | None = None  # of training, latest
    validation: float | None = None  # loss, latest
    steps_per_s: float | None = None  # since the run began, validation aside
    seconds: float | None = None  # of training
    left_s: float | None = None  # training that is left, at this rate
    error: str = ""


def row(folder: Folder) -> Row:
    """One run's."""
    state = folder.state
    if state == "missing":
        return Row(folder.path.name, state)
    rows = _tail(folder.path / "metrics.jsonl")
    training = next((r for r in reversed(rows) if "loss" in r), {})
    validated = next((r for r in reversed(rows) if "validation/loss" in r), {})
    step, seconds = training.get("step", 0), training.get("seconds", 0.0)
    steps = _steps(folder.path / "config.yaml")
    rate = step / seconds if seconds else None
    running = state == "running" and rate is not None and steps is not None
    bad = state in ("failed", "refused", "interrupted")
    return Row(
        run=folder.path.name,
        state=state,
        step=step,
        steps=steps,
        loss=training.get("loss"),
        validation=validated.get("validation/loss"),
        steps_per_s=rate,
        seconds=seconds,
        left_s=(steps - step) / rate if running else None,
        error=folder.status.get("error", "").strip().partition("\n")[0] if bad else "",
    )


def _tail(file: Path, size: int = 8192) -> list[dict[str, Any]]:
    """The last rows of a file of metrics; the first and the last may be cut."""
    try:
        with file.open("rb") as handle:
            handle.seek(max(0, file.stat().st_size - size))
            lines = handle.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [r for r in found if isinstance(r, dict)]


def _steps(file: Path) -> int | None:
    """train.steps of a run's config.yaml, which is too slow to parse a thousand times."""
    try:
        text = file.read_text()
    except OSError:
        return None
    train = text.partition("\ntrain:\n")[2]
    for line in train.splitlines():
        if line.startswith("  steps: ") and line[9:].isdigit():
            return int(line[9:])
    return None


def folders(place: Path) -> list[Folder]:
    """Every run of a plan, or of a folder and its plans."""
    if place.is_file():
        return _planned([place])
    plans = [*place.glob(".sweeps/sweep-*.json"), *place.parent.glob(".sweeps/sweep-*.json")]
    planned = [f for f in _planned(plans) if f.path.resolve().is_relative_to(place.resolve())]
    begun = {
        file.parent for depth in ("", "*/", "*/*/") for file in place.glob(f"{depth}status.json")
    }
    known = {f.path.resolve() for f in planned}
    return planned + [Folder(p) for p in sorted(begun)
                      if p.resolve() not in known and ".old" not in p.suffix]  # fmt: skip


def _planned(plans: Iterable[Path]) -> list[Folder]:
    """In the plans' order; a path there is seen from where the sweep was started."""
    found: dict[Path, Folder] = {}
    for plan in sorted(plans, key=lambda p: p.stat().st_mtime):
        for job in (read_json(plan) or {}).get("jobs", []):
            if job["path"] is not None:
                path = Path(job["path"])
                if (
                    not path.is_absolute()
                ):  # OUT_DIR/<study>/<run>, the plan being in OUT_DIR/.sweeps
                    path = plan.parents[1] / path.parent.name / path.name
                found[path.resolve()] = Folder(path)
    return list(found.values())


class Watched:
    """The rows of a place; what is finished is read once."""

    def __init__(self, place: Path) -> None:
        self.place, self.finished = place, dict[Path, Row]()

    def rows(self) -> list[Row]:
        found = []
        for folder in folders(self.place):
            kept = self.finished.get(folder.path)
            if kept is None:
                kept = row(folder)
                if kept.state in FINISHED:
                    self.finished[folder.path] = kept
            found.append(kept)
        return sorted(found, key=lambda r: ORDER.index(r.state))


def shown(rows: list[Row], limit: int | None) -> Group:
    """The table, what is running and what went wrong first; and the sum."""
    table = Table(expand=False)
    for name, justify in (("run", "left"), ("state", "left"), ("step", "right"), ("loss", "right"),
                          ("validation", "right"), ("steps/s", "right"), ("left", "right"),
                          ("error", "left")):  # fmt: skip
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name != "error")  # type: ignore[arg-type]
    for r in rows[:limit]:
        step = f"{r.step}/{r.steps}" if r.steps is not None else ""
        numbers = [_number(value) for value in (r.loss, r.validation, r.steps_per_s)]
        state = Text(r.state, COLORS.get(r.state, ""))
        table.add_row(r.run, state, step, *numbers, _time(r.left_s), r.error)
    states = Counter(r.state for r in rows)
    counts = ", ".join(f"{states[s]} {s}" for s in ORDER if states[s])
    more = (
        f"; {len(rows) - limit} more not shown" if limit is not None and len(rows) > limit else ""
    )
    return Group(table, Text(f"{runs(len(rows))}: {counts}{more}{_rest(rows)}"))


def _rest(rows: list[Row]) -> str:
    """The training that is left, shared by those that run now, at the pace of what is done."""
    done = [r.seconds for r in rows if r.state in FINISHED and r.seconds]
    running = [r.left_s for r in rows if r.state == "running"]
    waiting = sum(r.state in ("missing", "interrupted") for r in rows)
    if not running or not (done or not waiting) or None in running:
        return ""
    each = sum(done) / len(done) if done else 0.0
    return f"; about {_time((sum(filter(None, running)) + waiting * each) / len(running))} left"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("place", type=Path, metavar="DIR")
    parser.add_argument("--once", action="store_true", help="print it and end")
    parser.add_argument("--json", action="store_true", help="the same for scripts: a list of runs")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between looks")
    given = parser.parse_args()
    watched = Watched(given.place)
    if not given.place.exists() or not (rows := watched.rows()):
        print(f"error: {given.place}: no run there, and no plan of a sweep", file=sys.stderr)
        return 1
    if given.json:
        print(json.dumps([asdict(r) for r in rows], indent=1))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 160)
    if given.once or not sys.stdout.isatty():
        console.print(shown(rows, None))
        return 0
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                limit = max(3, os.get_terminal_size().lines - 6)
                live.update(shown(watched.rows(), limit), refresh=True)
                time.sleep(given.every)
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
