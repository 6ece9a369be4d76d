"""A sweep's jobs as lines and as a table."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .plan import Job
from .record import NOT_AGAIN


def show(jobs: list[Job], states: list[str]) -> None:
    """For dry=true: the state of each job, its folder and its words."""
    for job, state in zip(jobs, states, strict=True):
        why = f"  ({job.why})" if state in ("failed", "refused") else ""
        print(f"{state:<12} {job.path or '-'}  {job.name}{why}")
    print(count(states))


def count(states: Sequence[str]) -> str:
    """How many there are of each."""
    counts = ", ".join(f"{n} {state}" for state, n in Counter(states).most_common())
    return f"{len(states)} runs: {counts}"


def table(jobs: list[Job], ends: list[str]) -> None:
    """What each job came to; those that have no result, with the first line of why."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"{len(jobs)} runs")
    for name in ("variant", "rank", "seed", "lr", "status", "metric", "base", "tuned", "trained",
                 "seconds", "folder"):  # fmt: skip
        shown.add_column(name, overflow="fold")
    for job, end in zip(jobs, ends, strict=True):
        result = job.folder.result if job.path is not None else None
        if result is None:
            config = job.config
            rank, lr = config["rank"], config["optim"]["lr"]
            shown.add_row(config["variant"]["name"], "" if rank is None else str(rank),
                          str(config["seed"]), "" if lr is None else f"{lr:.2g}", end, *[""] * 5,
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
            end,
            primary,
            *("-" if n is None else f"{n:.4f}" for n in numbers),
            f"{result['params']['trainable']:,}",
            f"{result['time']['train_s']:.1f}",
            Path(str(job.path)).name,
        )
    Console(width=None if sys.stdout.isatty() else 160).print(shown)
    failures = [(job, end) for job, end in zip(jobs, ends, strict=True) if end in NOT_AGAIN]
    for job, end in failures:
        print(f"{end}: {job.name}: {job.why}")
    if failures:
        again = sorted({end for _, end in failures})
        print(f"They run again when the code they use changes, or with sweep.retry="
              f"{again[0] if len(again) == 1 else '[' + ','.join(again) + ']'}")  # fmt: skip
