"""A sweep's jobs as lines and as a table."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from variants._registry import AXES

from .plan import Job
from .record import NOT_AGAIN, some


def show(jobs: list[Job], states: list[str]) -> None:
    """For dry=true: the state of each job, its folder and its words."""
    for job, state in zip(jobs, states, strict=True):
        why = f"  ({job.why})" if state in ("failed", "refused") else ""
        print(f"{state:<12} {job.path or '-'}  {job.name}{why}")
    print(count(states))


def count(states: Sequence[str]) -> str:
    """How many there are of each."""
    counts = ", ".join(f"{n} {state}" for state, n in Counter(states).most_common())
    return f"{runs(len(states))}: {counts}"


def runs(number: int) -> str:
    """So many.

    >>> runs(1), runs(2)
    ('1 run', '2 runs')
    """
    return f"{number} run{'' if number == 1 else 's'}"


def table(jobs: list[Job], ends: list[str]) -> None:
    """What each job came to; those that have no result, with the first line of why."""
    from rich.console import Console
    from rich.table import Table

    results = [job.folder.result if job.path is not None else None for job in jobs]
    more = _varying([result for result in results if result is not None])
    shown = Table(title=runs(len(jobs)))
    for name in ("variant", "rank", "seed", "lr", *more, "status", "metric", "base", "tuned",
                 "trained", "seconds", "folder"):  # fmt: skip
        shown.add_column(name, overflow="fold")
    for job, end, result in zip(jobs, ends, results, strict=True):
        if result is None:
            config = job.config
            given = [config["rank"], config["seed"], config["optim"]["lr"]]
            words = ["" if value is None else str(value) for value in given]
            shown.add_row(config["variant"]["name"], *words, *("" for _ in more), end, *[""] * 5,
                          Path(job.path or "-").name)  # fmt: skip
            continue
        config, metrics = result["config"], result["metrics"]
        primary = metrics["primary"]
        numbers = [metrics[when][primary] for when in ("base", "tuned")]
        shown.add_row(
            config["variant"],
            str(config["rank"] or "-"),
            str(config["seed"]),
            f"{config['lr']:.2g}",
            *(value(result) for value in more.values()),
            end,
            primary,
            *("-" if n is None else f"{n:.4f}" for n in numbers),
            f"{result['params']['trainable']:,}",
            f"{result['time']['train_s']:.1f}",
            Path(str(job.path)).name,
        )
    Console(width=None if sys.stdout.isatty() else 160).print(shown)
    notes: dict[str, list[str]] = {}
    for job, result in zip(jobs, results, strict=True):
        for note in (result or {}).get("notes", []):
            notes.setdefault(note, []).append(job.name)
    for note, names in notes.items():
        print(f"note: {note}: {some(names, '; ')}")
    failures = [(job, end) for job, end in zip(jobs, ends, strict=True) if end in NOT_AGAIN]
    for job, end in failures:
        print(f"{end}: {job.name}: {job.why}")
    again = sorted({job.folder.state for job, _ in failures if job.path is not None})
    again = [state for state in again if state in NOT_AGAIN]  # kept by a folder
    if again:
        print(f"They run again when the code they use changes, or with sweep.retry="
              f"{again[0] if len(again) == 1 else '[' + ','.join(again) + ']'}")  # fmt: skip


def _varying(results: list[dict[str, Any]]) -> dict[str, Callable[[dict[str, Any]], str]]:
    """Columns for what differs: parts of an axis where runs of one variant have several (with
    their settings where the names are equal), bits of a base number, and the most memory."""

    def part(axis: str, settings: bool) -> Callable[[dict[str, Any]], str]:
        def value(result: dict[str, Any]) -> str:
            chosen = dict(result["config"]["axes"][axis])
            name = chosen.pop("name")
            return " ".join([name, *(f"{k}={v}" for k, v in chosen.items() if settings)])

        return value

    def count(value: Callable[[dict[str, Any]], str]) -> int:
        return len({(result["config"]["variant"], value(result)) for result in results})

    found = {}
    for axis in AXES:
        names, full = part(axis, False), part(axis, True)
        if count(full) > count(lambda result: ""):
            found[f"variant/{axis}"] = full if count(full) > count(names) else names
    for name, value in {"bits": _bits, "peak MiB": _peak}.items():
        if len({value(result) for result in results}) > 1:
            found[name] = value
    return found


def _bits(result: dict[str, Any]) -> str:
    return f"{result['memory']['stored_bits']:.7g}"


def _peak(result: dict[str, Any]) -> str:
    """GPU: what all tensors took at most. CPU: what they took in one backward, by exact count, as
    the peak of the process has all its imports in it."""
    memory = result["memory"]
    on_cpu = memory.get("peak_of", "the process") == "the process"
    most = memory.get("step_peak_bytes") if on_cpu else memory["peak_bytes"]
    return "-" if most is None else f"{most / 2**20:,.2f}"
