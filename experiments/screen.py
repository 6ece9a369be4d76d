"""What a person sees: a progress bar with loss, rate and time left; a table at the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

MEMORY = {  # the rows of the table, by key of result.json's `memory`
    "resident_bytes": "model and adapter at rest",
    "decoded_bytes": "largest decoded layer",
    "optimizer_bytes": "optimizer's state",
    "saved_activation_bytes": "kept for backward",
    "step_peak_bytes": "most at once, one backward",
}


class Screen:
    """The terminal of one run. Off a terminal, lines in place of a bar.

    `brief`, for a sweep: a line at the end, the rest in run.log; `bar`: where no other run has one;
    `quiet`: nothing at all.
    """

    def __init__(self, brief: bool = False, bar: bool = True, quiet: bool = False) -> None:
        self.brief, self.bar = brief, bar
        self.console = Console(stderr=False, highlight=False, quiet=quiet)
        self.log: Callable[[str], None] = lambda text: None
        self.progress: Progress | None = None
        self._task: Any = None
        self._total = self._said = 0
        self._note = ""

    def say(self, text: str) -> None:
        """A line on the terminal and in run.log."""
        self.log(text)
        if not self.brief:
            self.console.print(text, markup=False, soft_wrap=True)

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """The next piece of work begins."""
        self.close()
        self.log(name)
        self._total, self._said, self._note = total, 0, ""
        if not (self.console.is_terminal and self.bar):
            return
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self.progress.start()
        self._task = self.progress.add_task(
            name, total=total, completed=done, loss="", note="", speed=""
        )

    def tick(self) -> None:
        """One portion of the phase is done; texts to generate are not in its total before."""
        if self.progress is not None and self._total and not self._note:
            task = self.progress.tasks[0]
            self.progress.update(
                self._task, advance=1, total=max(task.total or 0, task.completed + 1)
            )

    def step(self, step: int, loss: float) -> None:
        """A training step is done."""
        if self.progress is not None:
            speed = self.progress.tasks[0].speed
            self.progress.update(
                self._task,
                completed=step,
                loss=f"loss {loss:.4f}",
                speed=f"{speed:.1f}/s" if speed else "",
            )
        elif not self.console.is_terminal and step * 10 // self._total > self._said:
            self._said = step * 10 // self._total
            self.say(f"step {step} of {self._total}, loss {loss:.4f}")

    def note(self, step: int, text: str) -> None:
        """The validation after `step`."""
        self._note = f"validation at {step}: {text}"
        if self.progress is not None:
            self.progress.update(self._task, note=self._note)
        if self.console.is_terminal:
            self.log(self._note)
        else:
            self.say(self._note)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def finished(self, result: dict[str, Any], path: Path) -> None:
        """The table of a finished run."""
        self.close()
        config, metrics = result["config"], result["metrics"]
        if self.brief:
            key = metrics["primary"]
            scores = f"{_number(metrics['base'][key])} -> {_number(metrics['tuned'][key])}"
            text = f"{result['status']:<9} {path.name}: {key} {scores}, "
            text += f"{sum(result['time'][k] for k in ('init_s', 'train_s', 'eval_s')):.1f} s"
            self.console.print(text, markup=False, soft_wrap=True)
            return
        rank = "" if config["rank"] is None else f", rank {config['rank']}"
        table = Table(title=f"{config['variant']}{rank}: {config['task']} on {config['model']} "
                            f"({config['split']}, {result['status']})")  # fmt: skip
        for name, justify in (("", "left"), ("base", "right"), ("tuned", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for key, value in metrics["base"].items():
            mark = " *" if key == metrics["primary"] else ""
            table.add_row(f"{key}{mark}", _number(value), _number(metrics["tuned"][key]))
        for key, value in ((result["forgetting"] or {}).get("base") or {}).items():
            table.add_row(f"old: {key}", _number(value),
                          _number(result["forgetting"]["tuned"][key]))  # fmt: skip
        table.add_section()
        params, times, memory = result["params"], result["time"], result["memory"]
        table.add_row("trained numbers", "", f"{params['trainable']:,} ({params['fraction']:.3%})")
        if params["head"]:
            table.add_row("head, trained in full", "", f"{params['head']:,}")
        table.add_row("bits a base number", "", _bits(memory))
        for key, name in MEMORY.items():
            if memory.get(key):  # a run of older code has fewer
                table.add_row(name, "", f"{memory[key] / 2**20:,.2f} MiB")
        peak = f"peak memory of {memory.get('peak_of', 'the process')}"
        table.add_row(peak, "", f"{memory['peak_bytes'] / 2**20:,.0f} MiB")
        table.add_row("start, train, score", "", " + ".join(
            f"{times[k]:.1f}" for k in ("init_s", "train_s", "eval_s")) + " s")  # fmt: skip
        if times["step_ms"] is not None:
            table.add_row("a step", "", f"{times['step_ms']:.1f} ms")
        self.console.print(table)
        if result["fresh_head"]:
            self.say("base: the frozen model with its untrained head")
        self.say(str(path))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _bits(memory: dict[str, Any]) -> str:
    """All base numbers together; by format where there are several."""
    formats = memory.get("formats", {})
    each = (f"{name} {f['bits'] / f['numbers']:.7g}" for name, f in formats.items())
    return f"{memory['stored_bits']:.7g}" + (f" ({', '.join(each)})" if len(formats) > 1 else "")
