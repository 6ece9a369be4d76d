"""What the benchmarks say: their sheets and the page of them, and what a start imports."""

import functools
import json
from pathlib import Path

import pytest

from benchmarks.analysis import NEAR, measured
from benchmarks.sheet import Sheet, page
from benchmarks.startup import FIRST_STEP, LATE, modules, package


def shown(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict:
    """What a sheet of two tables wrote."""
    file = folder / f"{words[-1] if words else 'plain'}.json"
    monkeypatch.setattr("sys.argv", ["sheet", *words[:-1], "--json", str(file), *words[-1:]])
    sheet = Sheet("step", "Forward beside PEFT's.\n\nMore of it.", rounds=5)
    sheet.flag("only", nargs="?")
    sheet.begin()
    sheet.table(f"width 8, {sheet.timed}", ("<method", "here | PEFT"), [("lora", "1.20 of 1.00*")])
    sheet.say("and a sentence")
    sheet.write([{"time": 1.2}])
    return json.loads(file.read_text())


def test_a_sheet_says_what_it_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    found = shown(tmp_path, monkeypatch, "--threads", "1", "bf16 lora")
    assert found["command"] == "python -m benchmarks.step --threads 1 'bf16 lora'"
    assert found["rows"] == [{"time": 1.2}] and found["about"] == "Forward beside PEFT's."
    assert found["shown"][0]["title"] == "width 8, 1 threads, 5 rounds, wall clock"
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["processor"]


def test_the_page_of_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine and versions once; beside a sheet where they are others."""
    for word in ("first", "other", "third"):
        found = shown(tmp_path, monkeypatch, word)
        if word == "other":
            found["machine"] |= {"processor": "another", "torch": "9.9"}
            (tmp_path / "other.json").write_text(json.dumps(found))
    text = page(tmp_path)
    table = (
        "| method | here \\| PEFT |\n| :-- | --: |\n| lora | 1.20 of 1.00\\* |\n\nand a sentence"
    )
    assert text.count(table) == 3 and text.count("torch") == 2 and "More of it" not in text
    before, after = text.split("python -m benchmarks.step other")
    assert "torch 9.9" not in before and "another, " in after and "torch 9.9" in after
    with pytest.raises(SystemExit, match=r"no \*\.json"):
        page(tmp_path / "none")


def test_both_ways_of_an_analysis_answer_its_definition() -> None:
    """From factors and from the dense matrix, to 1e-5 of the definition in float64."""
    decompositions, rows = [], []
    for row in measured(160, 8, 2, "process"):
        (rows if "difference" in row else decompositions).append(row)
    assert len(decompositions) == 2 and len(rows) == 7
    for row in rows:
        assert max(row["difference"].values()) < NEAR, row
        assert all(ms >= 0 for ms in row["ms"].values()) and row["ratio"] > 0


# modules of this project, and the packages that are others', at most
HYDRA = {"hydra", "omegaconf", "yaml", "antlr4", "attr", "packaging"}
BOUNDS: dict[str, tuple[int, set[str]]] = {
    "import variants": (2, set()),
    "python -m variants": (3, {"rich"}),
    "run.py --help": (30, HYDRA),
}


BARE = functools.cache(lambda: modules("python"))


@pytest.mark.parametrize("name", [*BOUNDS, "variants.attach", "run.py dry=true", FIRST_STEP])
def test_a_start_imports_what_it_needs(name: str) -> None:
    """No package before it is used: what there is at the start's end, in a process of its own."""
    every = modules(name)
    bare = {package(module) for module in BARE()}
    found = {package(module) for module in every} - bare - {"own", "python"}
    found = {name for name in found if not name.startswith(("_", "cython"))}  # parts of others
    assert not found & set(LATE)
    if name != FIRST_STEP:
        assert not found & {"transformers", "scipy", "sympy", "tokenizers", "safetensors"}
    if name in BOUNDS:
        most, others = BOUNDS[name]
        assert sum(package(module) == "own" for module in every) <= most
        assert found <= others, found - others
