"""Planted bugs: does the contract bite, and do the facts in the files?

    python -m benchmarks.planted [--only WORD] [--jobs N]

Each mistake of `bugs.py` is made, alone, in a copy of the package. A process of its own then runs
the facts (doctests) of the file, and the contract for the presets concerned, until something
fails. What nothing catches is a fact or a clause that is missing. Tests, which compare with PEFT
and the authors' formulas, are not run: the figure is that of what a variant's file brings along.
The copies without a mistake go first, and must pass. Exit code 1 below 95 %.
"""

import argparse
import doctest
import importlib
import io
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .bugs import BUGS, Bug

PACKAGE = Path(__file__).parents[1] / "variants"
ENOUGH = 0.95
LIMIT = 120  # seconds for one mistake
LIKELY = ("forward_equals_weight", "starts_at_base", "gradients_agree_with_float64",
          "disabled_is_the_original", "counts_the_papers_parameters")  # fmt: skip
MISSED, BROKEN = "MISSED", "cannot run"


def planted(folder: Path, bug: Bug) -> None:
    """A copy of the package in `folder` with the mistake in it."""
    path = folder / PACKAGE.name / f"{bug.file}.py"
    shutil.copytree(PACKAGE, path.parent)
    text = path.read_text()
    count = text.count(bug.old)
    if count != 1:
        raise SystemExit(f"{bug.file}.py has {count} times, not once: {bug.old!r} ({bug.mistake})")
    path.write_text(text.replace(bug.old, bug.new))
    for stale in (path.parent / "__pycache__").glob(f"{bug.file}.*"):
        stale.unlink()  # its time stamp has seconds, and may not tell the two apart


def cases(file: str, presets: str) -> Iterator[Any]:
    """What is put to the contract: "c3a form={name: c3a, kernel: kaiming}; abba rank=5"."""
    import yaml

    from variants._contract import Case
    from variants._registry import index

    own = [name for name, info in index()[1].items() if info.module == f"variants.{file}"]
    for spec in presets.split(";") if presets else own:
        name, *_ = spec.split()
        axes = {k: yaml.safe_load(v) for k, v in re.findall(r"(\w+)=(\{[^}]*\}|\S+)", spec)}
        yield Case(name, axes.pop("rank", 4), axes)


def catcher(file: str, presets: str) -> str:
    """The first fact or clause that fails, or MISSED."""
    import torch

    torch.set_num_threads(1)
    module = importlib.import_module(f"variants.{file}")
    contract = importlib.import_module("variants._contract")
    for test in doctest.DocTestFinder().find(module):
        said: list[str] = []
        runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
        if runner.run(test, out=said.append).failed:
            line = re.findall(r"Failed example:\n +(.*)", "".join(said))
            return f"fact: {line[0]}"
    clauses = contract.CLAUSES
    order = [*LIKELY, *(name for name in clauses if name not in LIKELY)]
    for case in cases(file, presets):
        for name in order:
            try:
                clauses[name](case)
            except NameError:
                raise  # no one's mistake but the list's
            except Exception as error:
                reason = "" if isinstance(error, AssertionError) else f" ({type(error).__name__})"
                return f"{name}{reason}"
    return MISSED


def child(folder: str, file: str, presets: str) -> None:
    """Runs `catcher` on the package in `folder`; leaves the answer, or `broken`, there."""
    sys.path.insert(0, folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE.name]:
        del sys.modules[name]  # a fork of a process that has it
    sys.stdout = sys.stderr = io.StringIO()
    warnings.simplefilter("ignore")
    found, broken = "", ""
    try:
        import variants

        assert str(variants.__file__).startswith(folder), variants.__file__
        found = catcher(file, presets)
    except BaseException:
        broken = traceback.format_exc()
    (Path(folder) / ("broken" if broken else "found")).write_text(broken or found)


def caught_by(bug: Bug) -> str:
    """The fact or clause that catches the mistake, or MISSED."""
    with tempfile.TemporaryDirectory() as folder:
        planted(Path(folder), bug)
        process = _context().Process(target=child, args=(folder, bug.file, bug.presets))
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
            return "does not end"
        broken, found = Path(folder) / "broken", Path(folder) / "found"
        if broken.exists():
            return f"{BROKEN}: {broken.read_text().strip().splitlines()[-1]}"
        return found.read_text() if found.exists() else f"dies ({process.exitcode})"


def _context() -> Any:
    """Processes that find torch imported already, and nothing of this project."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "safetensors.torch", "yaml"])
    return context


def controls(bugs: Sequence[Bug]) -> list[Bug]:
    """One for each file, without a mistake and with all that its mistakes are put to."""
    found: dict[str, str] = {}
    own = {bug.file for bug in bugs if not bug.presets}
    for bug in bugs:
        known = found.get(bug.file, "")
        new = [s.strip() for s in bug.presets.split(";") if s.strip() and s.strip() not in known]
        found[bug.file] = "; ".join([*filter(None, [known]), *new])
    first = {file: (PACKAGE / f"{file}.py").read_text().splitlines()[0] for file in found}
    rows = [(file, presets) for file, presets in found.items() if presets]
    rows += [(file, "") for file in sorted(own)]
    return [Bug(file, first[file], first[file], "none", presets) for file, presets in rows]


def trial(bugs: Sequence[Bug], jobs: int) -> list[str]:
    """What catches each of the mistakes."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(caught_by, bugs))


def main() -> None:
    """The command."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.planted", description=__doc__)
    parser.add_argument("--only", default="", help="a word of the file or of the mistake")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    given = parser.parse_args()
    bugs = [bug for bug in BUGS if given.only in f"{bug.file}.py {bug.mistake}"]
    if not bugs:
        raise SystemExit(f"--only {given.only}: no such mistake")
    clean = controls(bugs)
    for control, found in zip(clean, trial(clean, given.jobs), strict=True):
        if found != MISSED:
            raise SystemExit(f"{control.file}.py as it is, {control.presets}: {found}")
    table = Table(title="Planted bugs")
    for name in ("file", "mistake", "caught by"):
        table.add_column(name)
    answers = trial(bugs, given.jobs)
    for bug, answer in zip(bugs, answers, strict=True):
        style = "bold red" if answer == MISSED else ""
        table.add_row(bug.file, bug.mistake, answer.replace("[", r"\["), style=style)
    Console(width=140).print(table)
    caught = sum(answer != MISSED for answer in answers)
    if any(answer.startswith(BROKEN) for answer in answers):
        raise SystemExit("a mistake that cannot run at all is none that anyone makes")
    print(f"{caught} of {len(bugs)} caught, {caught / len(bugs):.1%}")
    sys.exit(caught < ENOUGH * len(bugs))


if __name__ == "__main__":
    main()
