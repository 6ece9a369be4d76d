"""From a source in percent format to an executed notebook beside it.

A notebook runs with a fresh folder as its working directory, so that it writes runs/ and
results/ by relative paths, which are the same on every machine.
"""

import contextlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jupytext
import nbformat

HERE = Path(__file__).parent
ROOT = HERE.parent
TIMEOUT = 3600  # seconds for one cell


class Sweep(Protocol):
    """Scores by learning rate: a dict or a Series."""

    def keys(self) -> Any:
        """The rates."""
        ...


def at_edge(scores: Sweep, best: float) -> str | None:
    """Why the best learning rate of a sweep decides nothing; None: rates lie on both sides of it.

    A sweep whose best is its least or largest rate did not find a best: the score may be better
    still beyond it.

    >>> at_edge({0.1: 3.0, 0.2: 2.0, 0.4: 2.5}, best=0.2)
    >>> at_edge({0.1: 3.0, 0.2: 2.0}, best=0.2)
    'its best rate, 0.2, is the largest tried'
    """
    rates = [float(lr) for lr in scores.keys()]  # noqa: SIM118, as a Series iterates over values
    if best not in rates:
        raise LookupError(f"{best:g}: no such rate; rates: {', '.join(f'{lr:g}' for lr in rates)}")
    ends = {min(rates): "least", max(rates): "largest"}
    return f"its best rate, {best:g}, is the {ends[best]} tried" if best in ends else None


def undecided(sweeps: Mapping[str, tuple[Sweep, float]]) -> str | None:
    """`at_edge` of several sweeps, {name: (scores by rate, the best rate)}, in one sentence."""
    found = {name: at_edge(*sweep) for name, sweep in sweeps.items()}
    return "; ".join(f"{name}: {why}" for name, why in found.items() if why) or None


def sources(names: Iterable[str] = ()) -> list[Path]:
    """The notebooks' sources, all or those named; a name that does not exist is an error."""
    found = {file.stem: file for file in sorted(HERE.glob("[0-9]*.py"))}
    names = [name.removesuffix(".py").removesuffix(".ipynb") for name in names] or list(found)
    for name in names:
        if name not in found:
            raise LookupError(f"{name}: no such notebook; choices: {', '.join(found)}")
    return [found[name] for name in names]


def read(source: Path) -> Any:
    """The notebook of a source, without outputs; the same bytes from the same source."""
    notebook = jupytext.reads(source.read_text(), fmt="py:percent")
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"  # else drawn at random
    notebook.metadata = nbformat.NotebookNode(
        kernelspec={"name": "python3", "display_name": "Python 3", "language": "python"},
        language_info={"name": "python"},
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def execute(source: Path, folder: Path) -> tuple[Any, float]:
    """The executed notebook, and its seconds; what it wrote lies in `folder`.

    QUICK is 1 and OMP_NUM_THREADS 1 unless they are set: the products are small, and one thread
    gives the same digits on every machine. Raises nbclient's CellExecutionError at the first cell
    that fails.
    """
    from nbclient import NotebookClient

    notebook = read(source)
    told = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "QUICK": os.environ.get("QUICK", "1"), "WANDB_MODE": "disabled",
            "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm, where there are no widgets
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # fmt: skip
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=40"],  # else a warning of its transport
        resources={"metadata": {"path": str(folder)}},
    )
    began = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # of the client's own threads
        client.execute(env={**os.environ, **told})
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # without the version
    return notebook, time.perf_counter() - began


@contextlib.contextmanager
def fresh() -> Iterator[Path]:
    """A folder for one execution, gone after it."""
    with tempfile.TemporaryDirectory(prefix="notebook-") as name:
        yield Path(name)


def made(source: Path) -> float:
    """Executes a source; keeps the notebook beside it and its rows of the ledger; its seconds."""
    with fresh() as folder:
        notebook, seconds = execute(source, folder)
        (HERE / "results").mkdir(exist_ok=True)
        for file in sorted((folder / "results").glob("*.json")):
            shutil.copy(file, HERE / "results" / file.name)
    part = source.with_suffix(".part")
    part.write_text(nbformat.writes(notebook) + "\n")
    part.replace(source.with_suffix(".ipynb"))
    return seconds


def out_of_step(source: Path) -> str | None:
    """Why the notebook is not that of its source; None: it is."""
    beside = source.with_suffix(".ipynb")
    if not beside.is_file():
        return f"{beside.name}: not there"
    kept: Any = nbformat.read(beside, as_version=4)
    for old, new in zip(kept.cells, read(source).cells):
        if (old.cell_type, old.source) != (new.cell_type, new.source):
            return f"{beside.name}: differs from {source.name} in {old.id}"
    if len(kept.cells) != len(read(source).cells):
        return f"{beside.name}: has not the cells of {source.name}"
    return None
