"""A variant from a file of one's own works everywhere a built-in one does."""

import os
import sys
from pathlib import Path

import pytest
import torch
from test_run import lab, module

import variants
from variants.__main__ import main
from variants._contract import Toy
from variants._registry import OUTSIDE, index

HALF = '''"""HalfLoRA: half of what LoRA is, for a test of files from outside.

    W = W0 + s/2 B A

>>> 1 + 1
2
"""

from dataclasses import dataclass

from variants._api import LowRank
from variants._registry import preset


@dataclass(frozen=True)
class Half(LowRank, name="half"):
    """W0 + s/2 B A."""

    parameters = "r*(m + n)"

    def shapes(self, m, n, r):
        return {"A": (r, n), "B": (m, r)}

    def embed(self, W, A, B, s):
        return {"A": A, "B": 2 * B}

    def weight(self, W0, p, s):
        return W0 + s / 2 * p["B"] @ p["A"]


preset("half", form="half", rank=4, alpha=8, lr=2e-4, lr_origin="LoRA's")
'''


@pytest.fixture
def half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file; the registry is as before when the test is over."""
    file = tmp_path / "half.py"
    file.write_text(HALF)
    monkeypatch.setenv(OUTSIDE, "")
    index.cache_clear()
    yield file  # type: ignore[misc]
    os.environ[OUTSIDE] = ""
    index.cache_clear()


def test_in_python_saved_and_loaded(half: Path, tmp_path: Path) -> None:
    adapter = variants.attach(Toy(), str(half), rank=2, init="pissa", base="nf4")
    assert adapter.choice.preset == "half" and adapter.choice.form.name == "half"
    adapter.save(tmp_path / "saved")
    loaded = variants.load(Toy(), tmp_path / "saved")
    x = torch.randn(3, 24)
    assert torch.equal(loaded.model(x), adapter.model(x))
    assert variants.describe("half")["file"] == str(half)


def test_the_contract_is_one_command(
    half: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    half.write_text(HALF.replace("2 * B}", "B}"))
    monkeypatch.setattr(sys, "argv", ["variants", str(half), "--check"])
    assert main() == 1
    said = capsys.readouterr().out
    assert "BROKEN   takes_any_factors: embed" in said and "holds    keeps_dtypes" in said


def test_a_false_fact_and_a_clause_that_cannot_run_are_broken(
    half: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["variants", str(half), "--check"])
    half.write_text(HALF.replace("\n2\n", "\n3\n").replace("self, W0, p, s", "self, W0, p"))
    assert main() == 1
    said = capsys.readouterr().out
    assert "BROKEN   facts of the file: 0 of 1" in said
    assert "BROKEN   merged_equals_unmerged: TypeError" in said  # said, and the rest goes on


def test_on_the_command_line(half: Path, tmp_path: Path) -> None:
    words = ["train.steps=3", "task.items=200", "eval.limit=8", "track.mode=disabled"]
    done = lab(
        "-m", f"variant=lora,{half}", "rank=2", *words, "sweep.isolate=false", out=tmp_path / "runs"
    )
    assert "half-r2-" in done.stdout
    (found,) = (tmp_path / "runs").rglob("half-r2-*/env.json")
    assert str(half) in found.read_text()  # its hash is among the sources'
    done = lab(f"variant={tmp_path}/none.py", out=tmp_path / "runs", code=1)
    assert done.stderr.strip().endswith("none.py: no such file")
    twice = tmp_path / "twice.py"  # of the same name, and another variant
    twice.write_text(HALF.replace("W0 + s / 2", "W0 + s"))
    for file, state in ((half, "done"), (twice, "missing")):
        os.environ[OUTSIDE] = ""
        index.cache_clear()
        done = lab(f"variant={file}", "rank=2", *words, "dry=true", out=tmp_path / "runs")
        assert done.stdout.split()[0] == state
    with pytest.warns(UserWarning, match=f"trained with another half than that of {twice}"):
        module("experiments.evaluate", str(found.parent))
    os.environ[OUTSIDE] = ""
    half.write_text(HALF.replace("s / 2 *", "s / 4 *"))
    done = lab(f"variant={half}", "rank=2", *words, "dry=true", out=tmp_path / "runs")
    assert done.stdout.split()[0] == "missing"


def test_a_file_of_several_is_asked_by_name(half: Path) -> None:
    half.write_text(HALF + HALF[HALF.index("preset(") :].replace('"half", form', '"hal", form'))
    with pytest.raises(variants.Incompatible, match="2 variants in this file; name one of them"):
        variants.describe(str(half))
    assert variants.describe(f"{half}:hal")["name"] == "hal"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "from dataclasses",
            "import torchh\nfrom dataclasses",
            "line 9: ModuleNotFoundError: No mod",
        ),
        ("lr=2e-4", "rnak=16, lr=2e-4", "has no argument 'rnak'; its arguments: form, init"),
        ("rank=4, ", "", "preset lacks 'rank'"),
        ("rank=4, ", "rank='4', ", "preset rank='4': a whole number, or None is needed"),
        ("lr=2e-4", "lr='2e-4'", "preset lr='2e-4': a number is needed"),
        (
            "(LowRank, name",
            "(LowRnk, name",
            "line 16: class Half .* from LowRnk: choices: .*LowRank",
        ),
        ("def shapes", "def sizes", "class Half has no `shapes`"),
        ("@dataclass(", "@dataclass((", "half.py, line [0-9]+: "),
    ],
)
def test_a_mistake_in_a_file_is_one_line_and_nothing_is_left(
    half: Path, old: str, new: str, said: str
) -> None:
    assert old in HALF
    half.write_text(HALF.replace(old, new, 1))
    with pytest.raises(variants.Incompatible, match=said):
        variants.attach(Toy(), str(half), rank=2)
    variants.attach(Toy(), "lora", rank=2)


def test_a_file_that_was_edited_is_read_again(half: Path) -> None:
    seen = []
    for factor in ("s / 2", "s * 5"):
        half.write_text(HALF.replace("s / 2 *", f"{factor} *"))
        layer = next(iter(variants.attach(Toy(), str(half), rank=2).layers.values()))
        for tensor in layer.params.values():
            torch.nn.init.ones_(tensor)
        seen.append((layer.weight - layer.W0)[0, 0].item())
    assert seen[1] == pytest.approx(10 * seen[0], rel=1e-4)


def test_a_model_that_is_one_layer_is_refused() -> None:
    with pytest.raises(variants.Incompatible, match="wrap it"):
        variants.attach(torch.nn.Linear(8, 6), "lora", rank=2)


def test_a_variant_may_extend_another(half: Path) -> None:
    """Settings, traits and methods are the parent's, so a change of one line is a file of one."""
    half.write_text(
        '"""Doubled: DoRA of twice the weight, for a test."""\n'
        "from dataclasses import dataclass\n\n"
        "from variants._registry import preset\n"
        "from variants.dora import DoRA\n\n\n"
        "@dataclass(frozen=True)\n"
        'class Doubled(DoRA, name="half"):\n'
        "    def weight(self, W0, p, s):\n"
        "        return 2 * super().weight(W0, p, s)\n\n\n"
        'preset("half", form="half", rank=4, alpha=8, lr=2e-4, lr_origin="LoRA\'s")\n'
    )
    adapter = variants.attach(Toy(), str(half), rank=2, form={"name": "half", "detach_norm": False})
    layer = next(iter(adapter.layers.values()))
    assert torch.allclose(layer.weight, 2 * layer.W0, atol=1e-6)
    assert variants.describe("half")["parameters"] == "r*(m + n) + m"
    with pytest.raises(variants.Incompatible, match="its settings: detach_norm"):
        variants.attach(Toy(), "half", form={"name": "half", "wrong": 1})
