"""hydra/launcher=packed: what jobs leave behind is what they leave alone, whatever happens."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_run import lab, rows_of
from test_sweep import bad

from benchmarks.sweep import TINY, text
from experiments import packed, train

__all__ = ["bad"]  # a fixture
PACKED = ("hydra/launcher=packed", "sweep.isolate=false")
CLOSE = 1e-4  # of numbers in fp32


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    given = [w for w in TINY if not w.startswith("train.steps")]
    return [*given, text(tmp_path), "rank=2", "train.steps=6", "train.checkpoint_every=2",
            "train.eval_every=3", "train.log_every=1"]  # fmt: skip


def folders(out: Path) -> dict[str, Path]:
    return {p.name: p for p in sorted(out.glob("single/*"))}


def same(one: Path, other: Path) -> None:
    """Whether two folders hold the same run, to rounding."""
    files = [sorted(str(p.relative_to(x)) for p in x.rglob("*") if p.is_file())
             for x in (one, other)]  # fmt: skip
    assert files[0] == files[1]
    rows = [rows_of(x / "metrics.jsonl") for x in (one, other)]
    assert [list(row) for row in rows[0]] == [list(row) for row in rows[1]]
    for a, b in zip(*rows, strict=True):
        assert a.get("ranks") == b.get("ranks")
        own, theirs = ({k: v for k, v in row.items() if k not in ("seconds", "ranks")}
                       for row in (a, b))  # fmt: skip
        assert own == pytest.approx(theirs, rel=CLOSE, abs=CLOSE)
    results: list[Any] = [json.loads((x / "result.json").read_text()) for x in (one, other)]
    assert list(results[0]) == list(results[1])
    for key in ("run_id", "status", "config", "diverged", "params", "ranks", "tokens", "flops",
                "notes"):  # fmt: skip
        assert results[0][key] == results[1][key], key
    for key in ("base", "tuned") if results[0]["status"] == "done" else ("base",):
        found = [result["metrics"][key] for result in results]
        assert found[0] == pytest.approx(found[1], rel=CLOSE)
    tensors = [load_file(x / "adapter" / "adapter.safetensors") for x in (one, other)]
    assert list(tensors[0]) == list(tensors[1])
    for name, tensor in tensors[0].items():
        if results[0]["status"] == "done":
            assert (tensor - tensors[1][name]).abs().max() <= CLOSE * max(1, tensor.abs().max())


def test_a_packed_sweep_leaves_what_a_solo_one_leaves(words: list[str], tmp_path: Path) -> None:
    """Other forms, seeds, rates, one that diverges, one that cannot be packed."""
    swept = ["-m", "variant=pissa,dora,relora", "optim.lr=1e-3,1e30", "dropout=0.1", *words]
    solo = lab(*swept, "sweep.isolate=false", out=tmp_path / "solo")
    done = lab(*swept, *PACKED, out=tmp_path / "packed")
    alone, together = folders(tmp_path / "solo"), folders(tmp_path / "packed")
    assert list(alone) == list(together) and len(alone) == 6
    for name, folder in alone.items():
        same(folder, together[name])
        result = json.loads((together[name] / "result.json").read_text())
        assert result["provenance"].get("packed") == (None if "relora" in name else 4)
    assert solo.stdout.count("diverged") == done.stdout.count("diverged") > 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("solo: ")]
    assert len(lines) == 2
    assert all("relora" in line and "moves the base, which others share" in line for line in lines)
    again = lab(*swept, *PACKED, out=tmp_path / "packed")
    assert "nothing to run" in again.stdout


def test_an_interrupted_pack_goes_on_packed_or_alone(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = ["-m", "variant=lora", "seed=0,1,2", "dropout=0.1", *words]
    follow = train.Trainer.follow

    def interrupted(self: train.Trainer, *args: Any) -> None:
        follow(self, *args)
        if self.step == 3 and self.run.settings.seed == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "follow", interrupted)
        patch.setattr(packed, "stopping", lambda patient: train.stopping(True))
        lab(*swept, *PACKED, out=tmp_path / "packed", code=130)
    left = folders(tmp_path / "packed")
    states = [json.loads((p / "status.json").read_text()) for p in left.values()]
    assert [s["status"] for s in states] == ["interrupted"] * 3
    assert all("after step 3 of 6" in s["error"] for s in states)
    lab("-m", "variant=lora", "seed=0", "dropout=0.1", *words, "sweep.isolate=false",
        out=tmp_path / "packed")  # fmt: skip
    done = lab(*swept, *PACKED, out=tmp_path / "packed")
    assert "2 interrupted, 1 done; 2 to run" in done.stdout
    lab(*swept, "sweep.isolate=false", out=tmp_path / "solo")
    for name, folder in folders(tmp_path / "solo").items():
        same(folder, left[name])


def test_a_new_head_is_its_job_s_own(tmp_path: Path) -> None:
    """Drawn from the seed, trained in full, and read by the model in its own way."""
    # letters that differ: among equal ones attention has no gradient, and Adam makes steps of noise
    rows = [f"{'ab'[i % 2]}{'cdefghk'[i % 7 :]}{i}\t{i % 2}" for i in range(60)]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    words = [w for w in TINY if not w.startswith(("task", "train.steps"))]
    words += ["variant=lora,dora", "rank=2", "seed=0,1", "task=classify",
              f"task.path={tmp_path}", "train.steps=4"]  # fmt: skip
    lab("-m", *words, "sweep.isolate=false", out=tmp_path / "solo")
    lab("-m", *words, *PACKED, out=tmp_path / "packed")
    for name, folder in folders(tmp_path / "solo").items():
        same(folder, tmp_path / "packed" / "single" / name)
        result = json.loads((tmp_path / "packed/single" / name / "result.json").read_text())
        assert result["provenance"]["packed"] == 2 and result["params"]["head"] > 0


def test_what_fits_nothing_runs_alone_and_says_why(words: list[str], tmp_path: Path) -> None:
    done = lab("-m", "variant=lora", "seed=0,1", *words, *PACKED, "hydra.launcher.rows=100",
               out=tmp_path / "a")  # fmt: skip
    assert done.stderr.count("128 tokens in a step, with which packing gains nothing") == 2
    other = [word for word in words if not word.startswith("train.seq_len")]
    done = lab("-m", "variant=lora", "train.seq_len=16,32", *other, *PACKED, out=tmp_path / "b")
    assert done.stderr.count("no other job has its model, base, task and portions") == 2
    done = lab("-m", "variant=lora", "seed=0,1", *words, *PACKED, "hydra.launcher.rows=0",
               out=tmp_path / "c", code=1)  # fmt: skip
    assert "hydra.launcher: rows=0" in done.stderr


@pytest.mark.slow
def test_a_pack_whose_process_dies_costs_its_jobs_an_attempt(
    bad: Path, words: list[str], tmp_path: Path
) -> None:
    done = lab("-m", f"variant=lora,{bad}:exits,dora", *words, PACKED[0], out=tmp_path / "runs",
               code=1)  # fmt: skip
    assert "solo: the 3 jobs of a pack, as its process exited with code 3" in done.stderr
    found = [p.parent.name.partition("-")[0] for p in tmp_path.glob("runs/single/*/result.json")]
    assert sorted(found) == ["dora", "lora"]
