"""Several processes of one run: real ones, of torchrun with gloo, against one process."""

import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_run import FORKS, lab, rows_of

import variants

ROOT = Path(__file__).parents[1]
QUICK = ["train.steps=6", "train.batch_size=8", "eval.limit=5", "eval.limit_during=4",
         "eval.batch_size=32", "track.mode=disabled", "task.items=200", "train.log_every=1",
         "train.checkpoint_every=3"]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
MEMBERS = str(ROOT / "tests" / "members.py")


def together(runs: Sequence[Sequence[str]], processes: int = 2) -> str:
    """The runs, one after another, by as many processes as torchrun would start; what was said."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as said:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
        team = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        several = team if processes > 1 else {}
        started = [
            FORKS.Process(target=_member, args=(runs, f"{said}/{rank}", several, rank))
            for rank in range(processes)
        ]
        free.close()
        for process in started:
            process.start()
        for process in started:
            process.join()
        text = "".join(Path(f"{said}/{rank}").read_text() for rank in range(processes))
    assert [process.exitcode for process in started] == [0] * processes, text
    return text


def _member(runs: Sequence[Sequence[str]], said: str, team: dict[str, str], rank: int) -> None:
    environ = environment(**(team | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if team else {}))
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = [MEMBERS, json.dumps(runs)]
    with (
        open(said, "w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        runpy.run_path(MEMBERS, run_name="__main__")


def environment(**more: str) -> dict[str, str]:
    """Without what a command run in this process has left in it."""
    own = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def folder(out: Path) -> Path:
    (found,) = (out / "single").iterdir()
    return found


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def unfinished(run: Path, copy: Path) -> Path:
    """A copy of a finished run as it was after its last checkpoint but one."""
    shutil.copytree(run, copy / "single" / run.name)
    (copy / "single" / run.name / "result.json").unlink()
    shutil.rmtree(copy / "single" / run.name / "checkpoint" / "last")
    return copy


def assert_same_run(one: Path, other: Path) -> None:
    """The same files with the same numbers, to the rounding of sums: losses to 1e-5."""
    assert one.name == other.name
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
    rows = [rows_of(run / "metrics.jsonl") for run in (one, other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for a, b in zip(*rows, strict=True):
        for key in a.keys() & {"loss", "validation/loss", "penalty"}:
            assert b[key] == pytest.approx(a[key], abs=1e-5), (a["step"], key)
        assert a.get("ranks") == b.get("ranks")
    results = result(one), result(other)
    for key in ("status", "config", "params", "tokens", "ranks", "notes"):
        assert results[0][key] == results[1][key], key
    assert results[0]["metrics"]["base"] == results[1]["metrics"]["base"]
    tuned = [r["metrics"]["tuned"] for r in results]
    assert tuned[0] == pytest.approx(tuned[1], rel=1e-6, abs=1e-5)
    assert results[0]["memory"]["stored_bits"] == results[1]["memory"]["stored_bits"]
    for a, b in zip(*(rows_of(run / "predictions.jsonl") for run in (one, other)), strict=True):
        assert a.keys() == b.keys()
        for key in a:  # an answer to the letter, a loss to its rounding
            assert a[key] == (b[key] if isinstance(b[key], str) else pytest.approx(b[key])), key
    for name in ("adapter/adapter.safetensors", "checkpoint/last/tensors.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert {k: (t.shape, t.dtype) for k, t in a.items()} == {
            k: (t.shape, t.dtype) for k, t in b.items()
        }
    settings = [json.loads((run / "adapter" / "adapter.json").read_text()) for run in (one, other)]
    assert settings[0] == settings[1]


def test_two_processes_are_one_run(tmp_path: Path) -> None:
    """An allocation that reads gradients, a quantized base in shards; begun by one process and
    ended by two, and the other way; more processes than items."""
    text = [word for word in QUICK if not word.startswith("task.")]  # its scores need one pass
    text += ["task=lm", f"task.path={ROOT / 'README.md'}"]
    runs = {"ddp": ["variant=adalora", "rank=4", "train.accumulate=2", *QUICK],
            "fsdp": ["variant=qlora", "rank=4", "train.parallel=fsdp", *text]}  # fmt: skip
    for key, words in runs.items():
        lab(*words, out=tmp_path / key)
    begun = unfinished(folder(tmp_path / "ddp"), tmp_path / "begun")
    said = together([
        *([*words, f"out_dir={tmp_path}/two-{key}"] for key, words in runs.items()),
        [*runs["ddp"], f"out_dir={begun}"],
        ["variant=lora", *QUICK, "train.batch_size=1", f"out_dir={tmp_path}/none"],
    ])  # fmt: skip
    for key in runs:
        assert_same_run(folder(tmp_path / key), folder(tmp_path / f"two-{key}"))
        env = json.loads((folder(tmp_path / f"two-{key}") / "env.json").read_text())
        assert env["processes"] == 2
    whole, sharded, again = re.findall(r"held: (\d+) (\d+)", said)
    assert whole[0] == whole[1] and again[0] == again[1]
    assert int(sharded[1]) < 0.52 * int(sharded[0])
    assert said.count("resumed after step 3 of 6") == 1
    assert_same_run(folder(tmp_path / "ddp"), folder(begun))
    assert (
        "refused: variant=lora: train.batch_size=1: in 1 portion(s) it has 1 items at once, fewer "
        "than the 2 processes"
    ) in said
    assert not (tmp_path / "none").exists()
    back = unfinished(folder(tmp_path / "two-fsdp"), tmp_path / "back")
    done = lab(*runs["fsdp"], out=back)
    assert "resumed after step 3 of 6" in done.stdout
    assert "train.parallel=fsdp has no meaning for one process" in done.stdout
    assert_same_run(folder(tmp_path / "fsdp"), folder(back))


def test_a_sweep_under_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):  # the first process says it, the other is silent
        monkeypatch.setenv("RANK", rank)
        done = lab("-m", "rank=2,4", *QUICK, out=tmp_path / "runs", code=lines)
        assert done.stderr.count("\n") == lines
        assert done.stderr.startswith("error: -m: torchrun's 2 processes share one run" * lines)
        done = lab("varient=lora", out=tmp_path / "runs", code=lines)
        assert done.stderr.count("\n") == lines
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_twenty_steps_of_the_command(parallel: str, tmp_path: Path) -> None:
    """The loss curve to 1e-5, of the commands that people type."""
    for words in (["lora", "train.activation_checkpointing=true"], ["dora"], ["adalora"], ["qlora"],
                  ["vera", "rank=64"], ["pissa"], ["increlora"]):  # fmt: skip
        own = [f"variant={words[0]}", *words[1:], *QUICK, "train.steps=20"]
        out = tmp_path / words[0]
        lab(*own, out=out / "one")
        command = [*TORCHRUN, "run.py", *own, f"train.parallel={parallel}", f"out_dir={out}/two"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("step 20 of 20") == 1  # said once
        assert_same_run(folder(out / "one"), folder(out / "two"))


@pytest.mark.slow
def test_every_variant_has_the_gradients_of_one_process(tmp_path: Path) -> None:
    """Of three processes the first gradient and loss to 1e-5; or a reason why not."""
    words = [w for w in QUICK if not w.startswith("train.steps")]
    words += ["train.steps=8", "eval.limit=8", "train.eval_every=0"]

    def runs(**settings: str) -> list[list[str]]:
        more = [f"{k.replace('_dir', '_DIR').replace('_', '.').replace('.DIR', '_dir')}={v}"
                for k, v in settings.items()]  # fmt: skip
        return [[f"variant={name}", *words, *more] for name in variants.names()]

    together(runs(out_dir=f"{tmp_path}/one"), processes=1)
    for parallel in ("ddp", "fsdp"):
        said = together(runs(train_parallel=parallel, out_dir=f"{tmp_path}/{parallel}"))
        refused = re.findall(r"refused: variant=(\w+): (.*)", said)
        for name, why in refused:
            assert name == "bitfit" or "moves the base" in why, why
        for one in (tmp_path / "one" / "single").iterdir():
            if one.name.partition("-")[0] in dict(refused):
                continue
            rows = [rows_of(run / "metrics.jsonl")[0]
                    for run in (one, tmp_path / parallel / "single" / one.name)]  # fmt: skip
            for key in ("loss", "grad_norm"):
                assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-5), (one.name, key)


LONG = ["variant=lora", "rank=4", "dropout=0.1", "train.steps=120", "train.checkpoint_every=115",
        "train.eval_every=0", *QUICK[1:-1]]  # fmt: skip


class Started:
    """A run of two processes, with its output in files."""

    def __init__(self, out: Path, *words: str, **env: str) -> None:
        self.out, self.said = out, out.parent / f"{out.name}.said"
        command = [*TORCHRUN, "run.py", *words, f"out_dir={out}"]
        with self.said.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT,
                                            env=environment(**env))  # fmt: skip

    def after(self, step: int) -> list[int]:
        """Waits for that step; the ids of the two workers, the first one's first."""
        while self.process.poll() is None:
            rows = [p.read_text().count('"grad_norm"')
                    for p in self.out.glob("single/*/metrics.jsonl")]  # fmt: skip
            if rows and rows[0] >= step:
                break
            time.sleep(0.05)
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        workers = [int(pid) for pid in children.read_text().split()]
        ranks = {}
        for pid in workers:
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                ranks |= {int(w[5:]): pid for w in words if w.startswith(b"RANK=")}
        return [ranks[0], ranks[1]]

    def ended(self) -> str:
        self.process.wait(timeout=400)
        return self.said.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whom", ["torchrun", "one worker"])
def test_a_signal_ends_all_between_two_steps(tmp_path: Path, signum: int, whom: str) -> None:
    """With one checkpoint; the rest is that of an undisturbed run of two, to the bit."""
    out = tmp_path / "stopped"
    run = Started(out, *LONG)
    workers = run.after(20)
    os.kill(run.process.pid if whom == "torchrun" else workers[1], signum)
    said = run.ended()
    found = re.findall(r"interrupted after step (\d+) of 120: the same command goes on", said)
    assert len(found) == 1 and 20 <= int(found[0]) < 120, said
    assert result_of_checkpoint(out) == int(found[0])
    again = Started(out, *LONG)
    assert f"resumed after step {found[0]} of 120" in again.ended()
    whole = Started(tmp_path / "whole", *LONG)
    whole.ended()
    a, b = (load_file(folder(p) / "adapter" / "adapter.safetensors")
            for p in (out, tmp_path / "whole"))  # fmt: skip
    assert all(a[k].equal(b[k]) for k in a)


def result_of_checkpoint(out: Path) -> int:
    (state,) = out.glob("single/*/checkpoint/last/state.json")
    return json.loads(state.read_text())["step"]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "whom"), [(signal.SIGKILL, 1), (signal.SIGKILL, 0),
                                              (signal.SIGSTOP, 1)])  # fmt: skip
def test_a_lost_process_ends_the_run(tmp_path: Path, signum: int, whom: int) -> None:
    """Killed, or silent for longer than the others wait; the same command then goes on."""
    words = [w for w in LONG if "checkpoint" not in w] + ["train.checkpoint_every=10"]
    run = Started(tmp_path / "runs", *words, LORA_PATIENCE="20")
    workers = run.after(25)
    os.kill(workers[whom], signum)
    said = run.ended()
    assert run.process.returncode != 0
    if whom == 1:
        line = "error: another of the run's processes has ended or does not answer; the same"
        assert line in said
        status = json.loads((folder(tmp_path / "runs") / "status.json").read_text())
        assert status["status"] == "failed" and "does not answer" in status["error"]
    step = result_of_checkpoint(tmp_path / "runs")
    done = lab(*words, "train.log_every=100", out=tmp_path / "runs")
    assert f"resumed after step {step} of 120" in done.stdout
