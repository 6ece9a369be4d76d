"""The rules of the house: imports, who may name a variant, pages in step, speed of help."""

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import variants
from variants.__main__ import renewed

ROOT = Path(__file__).parents[1]


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("file", modules("variants"), ids=lambda f: f.name)
def test_variants_stand_alone(file: Path) -> None:
    """torch and the standard library, numpy or scipy; libraries for files where files are read;
    bitsandbytes, an extra, where a part says that it requires it."""
    allowed = {"torch", "numpy", "scipy", "variants", *sys.stdlib_module_names}
    if re.search(r'requires = ".*bitsandbytes', file.read_text()):
        allowed.add("bitsandbytes")
    if file.name.startswith("_"):
        allowed |= {"safetensors", "rich", "transformers", "bitsandbytes"}
    assert imported(file) <= allowed, imported(file) - allowed


def test_analysis_never_trains() -> None:
    for file in modules("analysis"):
        assert not re.search(r"experiments\.(train|job)", file.read_text())


@pytest.mark.parametrize(
    "file", [*modules("experiments"), *modules("analysis")], ids=lambda f: f.name
)
def test_code_names_no_variant(file: Path) -> None:
    """Data such as the default comes from conf/ or the command line."""
    names = set(variants.names()) | {n for found in variants.parts().values() for n in found}
    names -= {"default", "none", "full", "bf16", "fp32", "standard", "uniform", "dense"}
    names -= {"constant"}  # a schedule of the learning rate has that name too
    strings = {
        node.value
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not strings & names


def test_no_pickle_and_no_remote_code() -> None:
    for folder in ("variants", "experiments", "analysis"):
        for file in modules(folder):
            text = file.read_text()
            assert not re.search(r"\bimport pickle\b|torch\.load\(|torch\.save\(", text), file
            assert "trust_remote_code=True" not in text, file


def test_the_readme_has_the_registry_s_table() -> None:
    text = (ROOT / "README.md").read_text()
    assert renewed(text) == text, "run `make readme`"


def test_the_readme_names_what_there_is() -> None:
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m ((?:experiments|analysis|benchmarks)\.\w+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


@pytest.mark.parametrize(
    "words", [["run.py", "--help"], ["-m", "variants"], ["run.py", "-sc", "query=bash"]]
)
def test_names_and_help_need_no_torch(words: list[str]) -> None:
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try:\n"
        "    if sys.argv[0] == '-m':\n"
        "        sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__')\n"
        "    else:\n"
        "        runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'wandb'} & set(sys.modules)\n"
    )
    env = {"COMP_LINE": "python run.py variant=", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    if words[-1] == "--help":
        (inits,) = re.findall(r"variant/init: (.*)", done.stdout)
        assert {"default", "pissa"} <= set(inits.split(", "))
    elif "query=bash" in words:
        assert "variant=dora" in done.stdout


def test_help_is_quick() -> None:
    """About a second of the processor at best; other work on the machine makes it more."""
    taken: list[float] = []
    while len(taken) < 3 and min(taken, default=2) >= 1.5:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = [sys.executable, "run.py", "--help"]
        subprocess.run(run, cwd=ROOT, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) < 1.5


def test_variant_files_are_short() -> None:
    """A paper in one file: code of a hundred lines or so beside its text."""
    for file in (ROOT / "variants").glob("[!_]*.py"):
        tree = ast.parse(file.read_text())
        doc = len((ast.get_docstring(tree) or "").splitlines())
        assert len(file.read_text().splitlines()) - doc < 200, file.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("syntax error here(", "variants/broken.py, line 1: "),
        ('preset("lora", rank=1, alpha=1, lr=1.0, lr_origin="x")', "'lora' is named twice"),
        ('preset("new", rank=1 + 1, alpha=1, lr=1.0, lr_origin="x")', "are literals"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from variants import _registry

    for file in (ROOT / "variants").glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.setattr(_registry, "PACKAGE", tmp_path)
    found = _registry.index.__wrapped__
    with pytest.raises(variants.Incompatible) as caught:
        found()
    assert message.replace("variants/", f"{tmp_path.name}/") in str(caught.value)
