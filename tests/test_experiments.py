"""Ready-made experiments: each composes, and runs three steps on the embedded model."""

import json
from pathlib import Path

import pytest

from experiments.call import composed, run
from experiments.config import settings_of
from experiments.model import TINY
from notebooks import claims

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml"))
names = pytest.mark.parametrize("name", EXPERIMENTS)


def data_for(task: str, folder: Path) -> str:
    """A folder of 40 items in the task's layout; the task's own kind is kept."""
    rows = {"gsm8k": {"question": "abc", "answer": "x #### 3"},
            "jsonl": {"prompt": "<copy>abc=", "response": "abc"},
            "choice": {"instruction": "abc? Answer format: true/false",
                       "output": "the correct answer is true", "answer": "true"}}  # fmt: skip
    if task in rows:
        (folder / "train.jsonl").write_text("\n".join(json.dumps(rows[task]) for _ in range(40)))
    else:
        lines = [f"abc\t{i % 2}" for i in range(40)]
        (folder / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    return str(folder)


@names
def test_it_composes(name: str) -> None:
    settings = settings_of(composed(f"experiment={name}"))
    head = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    assert head.startswith("# @package _global_\n# ")  # and says what it is
    if settings.model.kind == "hf":  # its model is not here, so the ledger says what it needs
        assert settings.optim.lr and settings.train.steps and settings.model.path
        (row,) = [r for r in claims.waiting() if r["where"] == f"experiment={name}"]
        assert row["verdict"] == "not run" and "GPU hour" in row["how"]


@pytest.mark.slow
@names
def test_it_runs_three_steps(name: str, tmp_path: Path) -> None:
    """With its own variant, targets, schedule and task, on files of the task's layout; three steps
    are the fewest that a schedule of ranks fits in."""
    settings = settings_of(composed(f"experiment={name}"))
    words = [f"experiment={name}", "train.steps=3", "train.batch_size=4", "train.accumulate=1",
             "eval.limit=4", "train.eval_every=0", "track.mode=disabled",
             f"out_dir={tmp_path}/runs"]  # fmt: skip
    if settings.model.kind == "hf":
        words += [f"model.path={TINY}", f"task.path={data_for(settings.task.name, tmp_path)}"]
        words += ["rank=4", "train.seq_len=64", "train.activation_checkpointing=false"]
    found = run(*words)
    assert found["status"] == "done" and found["config"]["steps"] == 3
    assert found["config"]["variant"] == settings.variant["name"]
