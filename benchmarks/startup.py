"""How long each start takes, and what it imports: whole processes, in turns.

    python -m benchmarks.startup [--rounds N] [--clock process] [--json FILE]

`first step` is a run of LoRA on the embedded model until the first line of its training is
written, the untouched model having been scored; it is killed then. `import torch`, and `the model's
class` of transformers, which brings scipy and torch.compile along, are the floors of what needs
them. Where the time goes: the seconds of the imports themselves by package, in a process more (`-X
importtime`); `own` is this project's. The modules are those that there are when the start ends, or
the run after one step: exact, and the suite holds what may be among them.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from .clock import ratio, rounds
from .sheet import Sheet, marked

ROOT = Path(__file__).parents[1]
RUN = ["run.py", "variant=lora", "rank=4", "track.mode=disabled"]
FIRST_STEP = "first step"
STARTS: dict[str, list[str]] = {
    "python": ["-c", "pass"],
    "import variants": ["-c", "import variants"],
    "python -m variants": ["-m", "variants"],
    "run.py --help": ["run.py", "--help"],
    "import torch": ["-c", "import torch"],
    "variants.attach": ["-c", "import variants; variants.attach"],
    "run.py dry=true": [*RUN, "dry=true"],
    "the model's class": ["-c", "import transformers; transformers.LlamaForCausalLM"],
    FIRST_STEP: RUN,
}
# what no start needs; scipy is transformers' own affair
LATE = ("wandb", "pandas", "matplotlib", "peft", "bitsandbytes", "sklearn", "datasets")
OWN = ("variants", "experiments", "hydra_plugins", "analysis")
IMPORTED = re.compile(r"^import time: +(\d+) \| +\d+ \| *([\w.]+)$", re.MULTILINE)


def start(name: str, *options: str) -> str:
    """One start from its beginning to its end; what it wrote to stderr."""
    words = STARTS[name]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        if words[:1] == RUN[:1] and "--help" not in words:
            words = [*words, f"out_dir={folder}"]
        command = [sys.executable, *options, *words]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
        if name == FIRST_STEP:
            while not (stepped := _stepped(Path(folder))) and process.poll() is None:
                time.sleep(0.01)
            process.kill()
        fine = process.wait() == 0 or (name == FIRST_STEP and stepped)
        errors.seek(0)
        said = errors.read()
    if not fine:
        raise SystemExit(f"{name}: {said}")
    return said


def _stepped(out: Path) -> bool:
    return any('"grad_norm"' in file.read_text() for file in out.glob("single/*/metrics.jsonl"))


def modules(name: str) -> list[str]:
    """All that were imported by the end; a run ends after one step."""
    with tempfile.TemporaryDirectory() as folder:
        words = STARTS[name]
        if words[0] == "run.py" and "--help" not in words:
            words = [*words, "train.steps=1", "eval.limit=8", f"out_dir={folder}"]
        done = subprocess.run(
            [sys.executable, "-c", COUNTED, *words], cwd=ROOT, capture_output=True, text=True
        )
    found = re.findall(r"^modules: (.*)$", done.stderr, re.MULTILINE)
    if done.returncode or not found:
        raise SystemExit(f"{name}: {done.stderr}")
    return found[-1].split()


# runs what follows it as the interpreter would, and says what was imported
COUNTED = """
import atexit, runpy, sys
atexit.register(lambda: print("modules:", *sorted(sys.modules), file=sys.stderr))
sys.path[0], sys.argv = ".", sys.argv[1:]
if sys.argv[0] == "-c":
    exec(sys.argv[1])
elif sys.argv[0] == "-m":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def package(module: str) -> str:
    """Its package: `own` for this project's, `python` for the standard library."""
    name = module.partition(".")[0]
    return "own" if name in OWN else "python" if name in sys.stdlib_module_names else name


def spent(name: str) -> dict[str, float]:
    """The seconds of a start's imports by package, most first; each module's by itself."""
    found: Counter[str] = Counter()
    for us, module in IMPORTED.findall(start(name, "-X", "importtime")):
        found[package(module)] += int(us)
    return {name: us / 1e6 for name, us in found.most_common()}


def main() -> None:
    """The command."""
    sheet = Sheet("startup", __doc__, rounds=11)
    given = sheet.begin()
    seconds = rounds({name: partial(start, name) for name in STARTS}, given.rounds, given.clock)
    found: list[dict[str, Any]] = []
    for name in STARTS:
        middle, low, high = ratio(seconds[name], seconds["import torch"])
        found.append({
            "start": name, "s": median(seconds[name]), "ratio": middle, "interval": [low, high],
            "modules": len(modules(name)), "importing": spent(name),
        })  # fmt: skip
    sheet.table(
        f"whole processes, {given.rounds} rounds, {given.clock} clock",
        ("<start", "s", "time / import torch", "modules", "<of it, importing"),
        (
            (row["start"], f"{row['s']:.2f}", marked(row["ratio"], None, row["interval"]),
             str(row["modules"]),
             ", ".join(f"{k} {v:.2f}" for k, v in list(row["importing"].items())[:6] if v >= 0.01))
            for row in found
        ),
    )  # fmt: skip
    sheet.write(found)


if __name__ == "__main__":
    main()
