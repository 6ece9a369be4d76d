"""Notebooks: in step with their sources, opened with a claim, closed with a verdict, quick."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest

from notebooks import _room, claims

SOURCES = _room.sources()
LIMIT = 100  # seconds each, on two idle cores
names = pytest.mark.parametrize("source", SOURCES, ids=lambda f: f.stem)


def opened(source: Path) -> Any:
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


@names
def test_pairs_are_in_step(source: Path) -> None:
    assert _room.out_of_step(source) is None, "run `python -m notebooks`"


def test_no_notebook_is_without_a_source() -> None:
    assert {f.stem for f in _room.HERE.glob("*.ipynb")} == {f.stem for f in SOURCES}


def test_a_changed_source_is_out_of_step(tmp_path: Path) -> None:
    source = tmp_path / SOURCES[0].name
    beside = SOURCES[0].with_suffix(".ipynb")
    (tmp_path / beside.name).write_text(beside.read_text())
    source.write_text(SOURCES[0].read_text() + "\n# %%\n1\n")
    assert "has not the cells" in str(_room.out_of_step(source))
    source.write_text(SOURCES[0].read_text().replace("**Claim.**", "**Claims.**"))
    assert "in cell-0" in str(_room.out_of_step(source))


@names
def test_it_opens_with_a_claim_and_says_what_the_full_run_is(source: Path) -> None:
    notebook = opened(source)
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "**Claim.**" in first.source
    (published,) = re.findall(r"\*\*Published\.\*\*(.*)", first.source, re.S)
    assert re.search(r"\d", published)
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    (experiment,) = re.findall(r"\*\*Full run\.\*\*[^`]*`[^`]*experiment=(\w+)", text)
    assert (_room.ROOT / "conf" / "experiment" / f"{experiment}.yaml").is_file()
    assert re.search(r"\*\*Full run\.\*\*.*GPU hour", text, re.S)


def outputs(notebook: Any) -> Iterator[Any]:
    for cell in notebook.cells:
        yield from cell.get("outputs", ())


@names
def test_outputs_are_whole(source: Path) -> None:
    """Every cell ran, in order; a figure; no error, no path of a machine."""
    notebook = opened(source)
    counts = [c.execution_count for c in notebook.cells if c.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    found = list(outputs(notebook))
    assert not [o for o in found if o.output_type == "error" or o.get("name") == "stderr"]
    figures = [o.data["image/png"] for o in found if "image/png" in o.get("data", {})]
    assert figures and all(len(png) > 5000 for png in figures)
    shown = "\n".join(o.get("text", "") + str(o.get("data", {}).get("text/plain")) for o in found)
    assert not re.search(r"(?<![\w.])/(home|tmp|root|work|Users|var)/", shown)


@names
def test_it_closes_with_verdicts(source: Path) -> None:
    rows = [row for row in claims.kept() if row["where"] == source.stem]
    assert rows and all(set(claims.KEYS) <= set(row) for row in rows)
    assert all(row["verdict"] in claims.VERDICTS for row in rows)
    for row in rows:  # what was run says on what; what is not comparable says why
        if row["how"].startswith("run"):
            assert re.match(
                r"run: .+; .+; (\d+ steps|no training); (seeds? \d|no seed)", row["how"]
            )
        assert (row["verdict"] == claims.UNLIKE) == (f"; {claims.UNLIKE}: " in row["how"])
    last = [c for c in opened(source).cells if c.cell_type == "code"][-1]
    assert "claims.keep" in last.source
    code = "\n".join(c.source for c in opened(source).cells if c.cell_type == "code")
    assert re.search(r"^\s*assert ", code, re.M)


def test_a_best_rate_at_an_edge_decides_nothing() -> None:
    scores = {0.1: 3.0, 0.2: 2.0, 0.4: 1.0}
    assert _room.undecided({"LoRA": (scores, 0.2)}) is None
    told = _room.undecided({"LoRA": (scores, 0.2), "PiSSA": (scores, 0.4), "DoRA": (scores, 0.1)})
    largest, least = (f"its best rate, {lr}, is the {end} tried" for lr, end in
                      ((0.4, "largest"), (0.1, "least")))  # fmt: skip
    assert told == f"PiSSA: {largest}; DoRA: {least}"
    assert _room.at_edge(pd.Series(scores), 0.4) == largest  # whose iterator is over values
    assert _room.at_edge(pd.Series(scores), 0.2) is None
    with pytest.raises(LookupError, match=r"0\.3: no such rate; rates: 0\.1, 0\.2, 0\.4"):
        _room.at_edge(scores, 0.3)


def test_a_row_says_on_what_it_was_run_and_why_it_is_not_comparable() -> None:
    rows = claims.Claims("a paper")
    with pytest.raises(ValueError, match="Run"):
        rows.add("a claim", published="1", found="2", holds=True, how="run: notebook 01")
    told = claims.Run("a model", "a task", 40, (0, 1))
    rows.add("a claim", published="1", found="2", holds=True, how=told, unlike="40 steps are few")
    (row,) = rows.rows
    assert row["verdict"] == "not comparable"
    assert (
        row["how"] == "run: a model; a task; 40 steps; seeds 0, 1; not comparable: 40 steps are few"
    )


def test_the_ledger_is_in_step() -> None:
    page = _room.ROOT / "docs" / "claims.md"
    assert page.read_text() == claims.page(), "run `make claims`"


@pytest.mark.notebooks
@pytest.mark.timeout(1800)
def test_every_notebook_runs_quickly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUICK", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    took = {}
    for source in SOURCES:
        folder = tmp_path / source.stem
        folder.mkdir()
        _, took[source.stem] = _room.execute(source, folder)
        assert (folder / "results" / f"{source.stem}.json").is_file()
    with capsys.disabled():
        print("\n" + "\n".join(f"{name:<32}{seconds:7.1f} s" for name, seconds in took.items()))
        print(f"{'together':<32}{sum(took.values()):7.1f} s")
    assert max(took.values()) < LIMIT, took
