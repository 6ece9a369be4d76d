"""What benchmarks share: flags, tables, the JSON beside them, and the page that is made of it.

    python -m benchmarks.sheet FOLDER [--out docs/benchmarks.md]

reads every FOLDER/*.json that a benchmark wrote by `--json`, and writes the page: each one's
command, what it measures, its tables as they were shown, and machine, versions and commit.

>>> marked(0.84, 0.80, (0.81, 0.9)), marked(0.5, None), marked(0.123, 0.25, digits=3)
('0.84 [0.81, 0.90] of 0.80*', '0.50', '0.123 of 0.25')
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.provenance import revision
from experiments.record import write_json

from .clock import CLOCKS

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


class Sheet:
    """A benchmark's command: its flags, and what it shows, which is kept for the JSON."""

    def __init__(self, name: str, about: str | None, rounds: int | None = None) -> None:
        """`rounds`: of what is timed in turns, by default; None where nothing is."""
        self.name, self.about, self.shown = name, about or "", []
        self.parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks.{name}", description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        self.flag = self.parser.add_argument
        if rounds is not None:
            self.flag("--threads", type=int, help="of torch; all that it takes, by default")
            self.flag("--rounds", type=int, default=rounds)
            self.flag("--clock", choices=list(CLOCKS), default="wall")
        self.flag("--json", type=Path, help="write the rows there as well")

    def begin(self) -> argparse.Namespace:
        """What was asked for, once torch has its threads."""
        place = argparse.ArgumentParser(add_help=False)
        place.add_argument("--json")
        self.command = f"{self.parser.prog} {shlex.join(place.parse_known_args()[1])}".rstrip()
        self.given = given = self.parser.parse_args()
        if "threads" in given:
            import torch

            given.threads = given.threads or torch.get_num_threads()
            torch.set_num_threads(given.threads)
        return given

    @property
    def timed(self) -> str:
        """How, for a title."""
        given = self.given
        return f"{given.threads} threads, {given.rounds} rounds, {given.clock} clock"

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Shows a table of numbers; a column headed `<name` holds words."""
        from rich.console import Console
        from rich.table import Table

        kept = [list(row) for row in rows]
        table = Table(title=title)
        for name in columns:
            table.add_column(name.lstrip("<"), justify="left" if name[:1] == "<" else "right")
        for row in kept:
            table.add_row(*row)
        Console(width=240).print(table)
        self.shown.append({"title": title, "columns": list(columns), "rows": kept})

    def say(self, text: str) -> None:
        """Shows a sentence."""
        print(text, flush=True)
        self.shown.append(text)

    def write(self, rows: Any) -> None:
        """The figures in full, where `--json` asks for them."""
        if self.given.json is None:
            return
        write_json(self.given.json, {
            "benchmark": self.name, "about": self.about.split("\n\n")[0], "command": self.command,
            "machine": machine(), "shown": self.shown, "rows": rows,
        })  # fmt: skip


def machine() -> dict[str, Any]:
    """Processor, cores, versions and commit."""
    found = {"processor": processor(), "cores": os.cpu_count(), "system": platform.system(),
             "python": platform.python_version()}  # fmt: skip
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | revision()


def processor() -> str:
    """Its name, and what torch uses of it."""
    import torch

    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def marked(
    value: float, bound: float | None, interval: Sequence[float] = (), digits: int = 2
) -> str:
    """The value with its interval, and what it should not exceed: `*` where it does."""
    text = f"{value:.{digits}f}"
    if interval:
        text += f" [{', '.join(f'{end:.{digits}f}' for end in interval)}]"
    return text if bound is None else f"{text} of {bound:.2f}{'*' if value > bound else ''}"


def page(folder: Path) -> str:
    """The Markdown of every sheet in a folder."""
    sheets = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    if not sheets:
        raise SystemExit(f"{folder}: no *.json, which benchmarks write by --json")
    machines = [_machine(sheet["machine"]) for sheet in sheets]
    ((usual, _),) = Counter(machines).most_common(1)
    parts = ["# Benchmarks", INTRODUCTION, usual]
    for sheet, own in zip(sheets, machines, strict=True):
        parts += [f"## {sheet['benchmark']}", sheet["about"], f"    {sheet['command']}"]
        parts += [own] if own != usual else []
        parts += [_markdown(shown) for shown in sheet["shown"]]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """\
Written by `python -m benchmarks.sheet FOLDER` from what each command below left there by `--json`.
A ratio is the median of the rounds' own ratios, with its 95 % interval where there are several;
`of` stands before its bound, and \\* behind one that misses it."""


def _machine(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {found[k]}" for k in ("python", *PACKAGES) if found[k])
    commit = (found["commit"] or "no commit")[:10] + (" with changes" if found["dirty"] else "")
    return f"{found['processor']}, {found['cores']} cores, {found['system']}; {versions}; {commit}."


def _markdown(shown: str | dict[str, Any]) -> str:
    """A sentence, or a table under its title."""
    if isinstance(shown, str):
        return _escaped(shown)
    columns = shown["columns"]
    rule = [":--" if name[:1] == "<" else "--:" for name in columns]
    rows = [[name.lstrip("<") for name in columns], rule, *shown["rows"]]
    lines = [f"| {' | '.join(map(_escaped, row))} |" for row in rows]
    return "\n".join([f"**{_escaped(shown['title'])}**", "", *lines])


def _escaped(text: str) -> str:
    return re.sub(r"([|*])", r"\\\1", text)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sheet", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=PAGE)
    given = parser.parse_args()
    given.out.write_text(page(given.folder))


if __name__ == "__main__":
    main()
