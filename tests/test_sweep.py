"""Sweeps: what is missing is finished, whatever happened; nothing is run or composed twice."""

import fcntl
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from test_run import Fork, Said, lab, module, typed

from benchmarks.sweep import TINY, text
from experiments import isolate, lock, plan, record
from experiments.config import seconds
from experiments.sweep import Sweep
from experiments.tasks import BadInput
from variants._registry import OUTSIDE, index

ROOT = Path(__file__).parents[1]
BAD = '''"""Bad: an init that does what none should (nobody, 2026), https://example.org.

    W = W0 + s B A

>>> 1 + 1
2
"""

import os
import signal
import time
from dataclasses import dataclass

from variants._api import Init
from variants._registry import preset


@dataclass(frozen=True)
class Bad(Init, name="bad"):
    """Raises, exits or hangs."""

    how: str = "raise"
    """raise, exit, hang"""

    def start(self, W0, r, s, generator, found):
        if self.how == "raise":
            raise RuntimeError("first line\\nand more")
        if self.how == "exit":
            os._exit(3)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)


preset("raises", init="bad", rank=4, alpha=8, lr=2e-4, lr_origin="LoRA's")
preset("exits", init={"name": "bad", "how": "exit"}, rank=4, alpha=8, lr=2e-4, lr_origin="LoRA's")
preset("hangs", init={"name": "bad", "how": "hang"}, rank=4, alpha=8, lr=2e-4, lr_origin="LoRA's")
'''


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    return [*TINY, text(tmp_path)]


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file with a variant that fails; the registry is as before when the test is over."""
    (tmp_path / "bad.py").write_text(BAD)
    monkeypatch.setenv(OUTSIDE, "")
    index.cache_clear()
    yield tmp_path / "bad.py"
    os.environ[OUTSIDE] = ""
    index.cache_clear()


def results(out: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in out.glob("single/*/result.json")}


def states(done: Said) -> list[str]:
    """Of a dry run."""
    return [line.split()[0] for line in done.stdout.splitlines()[:-1]]


def test_raising_exiting_and_hanging_cost_their_own_run(
    bad: Path, words: list[str], tmp_path: Path
) -> None:
    """The others are done; the three are named, kept, and run again when asked."""
    out, names = tmp_path / "runs", f"{bad}:raises,{bad}:exits,{bad}:hangs"
    sweep = ["-m", f"variant={names},lora", *words, "sweep.time_limit=3s", "sweep.grace=0.5"]
    done = lab(*sweep, out=out, code=1)
    assert "4 runs: 4 missing; 4 to run" in done.stdout
    assert "failed: variant=raises: RuntimeError: first line" in done.stdout
    assert "failed: variant=exits: its process exited with code 3" in done.stdout
    assert "failed: variant=hangs: time limit of 3 s reached" in done.stdout
    assert [name[:4] for name in results(out)] == ["lora"] and "sweep.retry=failed" in done.stdout
    failed = [json.loads(p.read_text()) for p in out.glob("single/*-r4-*/status.json")]
    assert len(failed) == 3
    assert all({"experiments/job.py", str(bad)} <= set(status["sources"]) for status in failed)
    logs = {p: p.stat().st_mtime_ns for p in out.glob("single/*-r4-*/run.log")}
    assert "4 runs: 3 failed, 1 done; nothing to run" in lab(*sweep, out=out, code=1).stdout
    assert {p: p.stat().st_mtime_ns for p in logs} == logs
    again = [f"variant={bad}:raises,{bad}:exits", *words, "sweep.retry=failed"]
    assert "2 runs: 2 failed; 2 to run" in lab("-m", *again, out=out, code=1).stdout
    assert sum(p.stat().st_mtime_ns != logs[p] for p in logs) == 2
    shown = lab(*sweep, "dry=true", out=out).stdout.splitlines()
    assert [line.split()[0] for line in shown[:4]] == ["failed", "failed", "failed", "done"]
    assert shown[0].endswith("variant=raises  (RuntimeError: first line)")


def test_a_failure_is_run_again_when_its_code_has_changed(tmp_path: Path) -> None:
    folder = record.Folder(tmp_path / "lora-r2-0123456789")
    folder.path.mkdir()
    folder.ended("failed", "its process died of SIGSEGV")
    status = folder.status
    assert "variants/dora.py" in status["sources"], "before env.json it may be any file"
    assert folder.state == "failed" and not folder.changed_sources()
    status["sources"]["variants/dora.py"] = "0" * 64
    record.write_json(folder.path / "status.json", status)
    assert folder.changed_sources() == ["variants/dora.py"]
    time.sleep(0.01)
    record.write_json(folder.path / "env.json", {"sources": {"variants/lora.py": "0"}})
    folder.ended("failed", "again, after env.json")
    assert folder.status["sources"] == {"variants/lora.py": "0"}


def test_values_are_added_and_nothing_is_done_twice(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a server as a user's sweep has it: a process that begins with its imports."""
    monkeypatch.setattr(isolate, "Server", Fork.__base__)
    monkeypatch.setattr(isolate, "_server", None)
    out = tmp_path / "runs"
    lab("-m", "rank=1,2", *words, out=out)
    before = results(out)
    done = lab("-m", "rank=2,4", "seed=range(0,2)", *words, "dry=true", out=out)
    assert states(done) == ["done", "missing", "missing", "missing"]
    done = lab("-m", "rank=2,4", "seed=range(0,2)", *words, out=out)
    after = results(out)
    assert "4 runs: 3 missing, 1 done; 3 to run" in done.stdout
    assert len(after) == 5 and before.items() <= after.items()
    file = out / ".sweeps" / "manifest.json"
    planned = file.stat().st_mtime_ns
    done = lab("-m", "seed=range(0,2)", "rank=4,2", *words, "sweep.retry=[failed]", out=out)
    assert "4 runs: 4 done; nothing to run" in done.stdout
    assert file.stat().st_mtime_ns == planned, "nothing was composed again"
    server = cast(Any, isolate._server)
    assert isinstance(server.process, subprocess.Popen)
    isolate.close()
    assert server.process.returncode == 0


def test_a_known_sweep_needs_neither_torch_nor_a_composition(
    words: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    lab("-m", "rank=1,2", *words, out=out)
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path('run.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'wandb'} & set(sys.modules)\n"
    )
    run = [sys.executable, "-c", code, "run.py", "-m", "rank=1,2", *words, f"out_dir={out}"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "2 runs: 2 done; nothing to run" in done.stdout, done.stderr


def test_other_data_are_another_run(words: list[str], tmp_path: Path) -> None:
    """A file that a known combination names, and that has changed."""
    out = tmp_path / "runs"
    assert states(lab("-m", "rank=1,2", *words, "dry=true", out=out)) == ["missing"] * 2
    known = json.loads((out / ".sweeps" / "manifest.json").read_text())["jobs"]
    paths = {job["path"] for job in known.values()}
    with (tmp_path / "text.txt").open("a") as file:
        file.write("one more line\n" * 50)
    done = lab("-m", "rank=1,2", *words, "dry=true", out=out)
    assert not any(path in done.stdout for path in paths)


def test_a_stale_run_is_kept_and_run_again_when_asked(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "runs"
    lab("-m", "rank=1,2", *words, out=out)
    before = results(out)
    name = min(before)
    env = json.loads((out / "single" / name / "env.json").read_text())
    env["sources"]["variants/lora.py"] = "0" * 64
    record.write_json(out / "single" / name / "env.json", env)
    done = lab("-m", "rank=1,2", *words, out=out)
    assert "1 stale" in done.stdout and "nothing to run" in done.stdout
    assert sum("│ stale" in line for line in done.stdout.splitlines()) == 1, "in the table as well"
    done = lab("-m", "rank=1,2", *words, "sweep.retry=stale", out=out)
    assert "1 to run" in done.stdout
    after = results(out)
    assert [n for n in before if after[n] != before[n]] == [name]
    aside = out / "single" / f"{name}.old1"
    assert (aside / "result.json").stat().st_mtime_ns == before[name]
    assert not (aside / "lock").exists() and (aside / "checkpoint").exists()


def test_an_interrupt_reaches_the_run_and_the_sweep_goes_on_later(
    words: list[str], tmp_path: Path
) -> None:
    """Ctrl-C in the driver: the run leaves a checkpoint, later ones are not begun."""
    long = [w for w in words if not w.startswith("train.steps")] + ["train.steps=3000"]
    driver, said = typed(["-m", "rank=1,2", *long], tmp_path / "runs")
    try:
        _wait_for(lambda: _trains(tmp_path))
        os.kill(driver.pid, signal.SIGINT)
        driver.join(timeout=120)
    finally:
        driver.kill()
    assert "interrupted: the same command goes on" in said.read_text() and driver.exitcode == 130
    shown = [line.split("│")[5].strip() for line in said.read_text().splitlines() if "│" in line]
    assert shown == ["interrupted", "missing"]
    (status,) = (json.loads(p.read_text()) for p in tmp_path.glob("runs/single/*/status.json"))
    assert status["status"] == "interrupted" and "after step" in status["error"]
    assert len(list(tmp_path.glob("runs/single/*/checkpoint/last/state.json"))) == 1
    assert not list(tmp_path.glob("runs/.sweeps/*.stop"))
    done = lab("-m", "rank=1,2", *long, "dry=true", out=tmp_path / "runs")
    assert states(done) == ["interrupted", "missing"]


@pytest.mark.slow
def test_the_driver_s_death_ends_its_run_with_a_checkpoint(
    words: list[str], tmp_path: Path
) -> None:
    long = [w for w in words if not w.startswith("train.steps")] + ["train.steps=3000"]
    command = [sys.executable, "run.py", "-m", "rank=1,2", *long, f"out_dir={tmp_path / 'runs'}"]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        _wait_for(lambda: _trains(tmp_path))
    finally:
        driver.kill()
        driver.wait()
    (folder,) = (record.Folder(p.parent) for p in tmp_path.glob("runs/single/*/metrics.jsonl"))
    _wait_for(lambda: folder.state == "interrupted")
    assert "after step" in folder.status["error"]


def _trains(path: Path) -> bool:
    """Whether a run has logged a step."""
    files = path.glob("runs/single/*/metrics.jsonl")
    return any('"grad_norm"' in file.read_text() for file in files)


def _wait_for(what: Any, limit: float = 120.0) -> None:
    end = time.monotonic() + limit
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_interrupt_in_a_run_s_last_lines_takes_nothing_from_it(
    words: list[str], tmp_path: Path
) -> None:
    """Its line says interrupted, its folder that it is done."""
    lab("rank=1", *words, out=tmp_path / "runs")
    (path,) = (tmp_path / "runs" / "single").iterdir()
    line = {"status": "interrupted", "run": str(path)}
    job: Any = SimpleNamespace(line=line, before=0, folder=record.Folder(path), path=str(path))
    assert Sweep._has_ended(None, job) and job.line["status"] == "done"  # type: ignore[arg-type]
    job.line, job.before = line, job.folder.changed_at  # as it was: this attempt did not end it
    assert not Sweep._has_ended(None, job)  # type: ignore[arg-type]


def test_what_another_driver_has_is_waited_for(words: list[str], tmp_path: Path) -> None:
    """Held while the sweep does the rest; let go, it falls to the sweep."""
    out = tmp_path / "runs"
    done = lab("-m", "rank=1,2", *words, "dry=true", out=out)
    held = Path(done.stdout.split()[1])
    code = ("import sys, time; from pathlib import Path; from experiments.record import Folder\n"
            "with Folder(Path(sys.argv[1])).locked():\n"
            "    print('held', flush=True); sys.stdin.read()\n")  # fmt: skip
    other = subprocess.Popen([sys.executable, "-c", code, str(held)], cwd=ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    states_then = states(lab("-m", "rank=1,2", *words, "dry=true", out=out))
    assert states_then == ["running", "missing"]
    driver, said = typed(["-m", "rank=1,2", *words, "sweep.isolate=false"], out)
    waits = "waiting for 1 run that other processes have"
    _wait_for(lambda: waits in said.read_text() or not driver.is_alive())
    assert re.search(rf"{waits} .*{other.pid}\)", said.read_text()) and len(results(out)) == 1
    other.kill()
    other.communicate()
    driver.join(timeout=120)
    assert driver.exitcode == 0 and len(results(out)) == 2


def test_a_lock_of_another_host_holds_while_its_pulse_is_fresh(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with lock.hold(file) as held:
        assert held and lock.is_held(file)
        assert lock.holder(file).endswith(f" {os.getpid()}")
    assert not lock.is_held(file) and lock.holder(file) == ""
    file.write_text("elsewhere 123\n")  # where flock is each host's own
    assert lock.is_held(file)
    with lock.hold(file) as held:
        assert not held
    old = time.time() - 5 * lock.PULSE
    os.utime(file, (old, old))
    assert not lock.is_held(file)
    with lock.hold(file) as held:
        assert held


def test_the_pulse_of_a_lock_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PULSE", 0.02)
    with lock.hold(tmp_path / "lock"):
        os.utime(tmp_path / "lock", (0, 0))
        _wait_for(lambda: (tmp_path / "lock").stat().st_mtime > 0)


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(BadInput, match="takes no locks"), lock.hold(tmp_path / "lock"):
        pass


def test_a_run_that_cannot_be_leaves_no_folder(tmp_path: Path) -> None:
    lab("rank=100000", "track.mode=disabled", out=tmp_path / "runs", code=1)
    assert not list((tmp_path / "runs").glob("*/*"))


@pytest.mark.slow
def test_a_full_disk_fails_the_run_and_not_the_sweep(words: list[str], tmp_path: Path) -> None:
    """No file may grow beyond 30 kB: what rank 16 writes does, what rank 1 writes does not."""
    code = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))\n"
        "runpy.run_path('run.py', run_name='__main__')\n"
    )
    sweep = ["-m", "rank=16,1", *words]
    run = [sys.executable, "-c", code, "run.py", *sweep, f"out_dir={tmp_path}"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "failed: rank=16: " in done.stderr, done.stderr
    assert "File too large" in done.stderr and min(results(tmp_path))[:8] == "lora-r1-"
    lab(*sweep, "sweep.retry=failed", out=tmp_path)
    assert len(results(tmp_path)) == 2


@pytest.mark.parametrize("word", ["sweep.time_limit=soon", "sweep.time_limit=0",
                                  "sweep.retry=running", "sweep.grace=-1"])  # fmt: skip
def test_keys_of_a_sweep_are_checked(word: str, words: list[str], tmp_path: Path) -> None:
    done = lab("-m", "rank=1,2", word, *words, out=tmp_path / "runs", code=1)
    assert word.partition("=")[0] in done.stderr + done.stdout
    assert not results(tmp_path / "runs")


@pytest.mark.parametrize("word", [
    "device=foo", "device=cpu,foo", "track.mode=x", "sweep.time_limit=abc", "sweep.time_limit=-3",
    "sweep.time_limit=0", "sweep.time_limit=[1]", "sweep.grace=-1", "sweep.retry=foo",
    "sweep.retry=5"])  # fmt: skip
def test_what_is_no_part_of_a_run_is_checked_once_before_any(
    word: str, words: list[str], tmp_path: Path
) -> None:
    for more in ([], ["dry=true"]):
        done = lab("-m", "rank=1,2", *words, word, *more, out=tmp_path / "runs", code=1)
        key, _, value = word.rpartition(",")[2].rpartition("=")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {key or 'device'}={value}") and not done.stdout
        assert not (tmp_path / "runs").exists()


def test_an_out_dir_that_is_a_file_is_named(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for more in (["rank=1", *words], ["study=smoke"]):
        done = lab("-m", *more, out=tmp_path / "file", code=1)
        assert done.stderr == f"error: out_dir={tmp_path}/file: Not a directory\n"


def test_the_log_has_the_threads_of_the_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        lab("rank=1", "device=cpu", *words, out=tmp_path / "runs")
    finally:
        torch.set_num_threads(before)
    (log,) = tmp_path.glob("runs/single/*/run.log")
    assert json.loads((log.parent / "env.json").read_text())["device"] == "cpu, 1 thread"
    assert ", cpu, 1 thread; " in log.read_text()


def test_lm_reads_one_file(words: list[str], tmp_path: Path) -> None:
    done = lab("rank=1", *words, f"task.path={tmp_path}", out=tmp_path / "runs", code=1)
    assert done.stderr == f"error: task.path={tmp_path}: a folder; task lm reads one text file\n"


def test_what_has_no_folder_is_not_said_to_run_again(words: list[str], tmp_path: Path) -> None:
    sweep = ["-m", "rank=1", *words, "train.steps=-3"]
    done = lab(*sweep, out=tmp_path / "runs", code=1)
    assert "train.steps=-3: a positive number" in done.stdout
    assert "They run again" not in done.stdout


def test_a_device_that_is_not_there_leaves_the_run_as_it_was(
    words: list[str], tmp_path: Path
) -> None:
    out, sweep = tmp_path / "runs", ["-m", "rank=1", *words, "sweep.isolate=false"]
    done = lab(*sweep, "device=cuda:99", out=out, code=1)
    assert "device=cuda:99: no " in done.stderr and "sweep.retry" not in done.stdout
    assert not list(out.glob("single/*"))
    assert states(lab(*sweep, "device=cpu", "dry=true", out=out)) == ["missing"]
    lab(*sweep, "device=cpu", out=out)
    assert len(results(out)) == 1


def test_times() -> None:
    assert [seconds("k", v) for v in (None, 90, "90", "1.5m", "2h", "1d12h")] == [
        None, 90.0, 90.0, 90.0, 7200.0, 129600.0
    ]  # fmt: skip


def test_composing_once_for_many_is_composing_each(tmp_path: Path) -> None:
    """Values of a combination are put into a composition that others share."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        hydra: Any = GlobalHydra.instance().hydra
        master = hydra.compose_config("config", ["rank=1,2"], run_mode=RunMode.MULTIRUN)
        composer = plan.Composer(hydra.config_loader, master)
        for words in (
            ["variant=dora", "rank=3", "seed=1"],
            ["variant=dora", "rank=4", "variant.form.detach_norm=false"],
            ["variant=qlora", "variant/init=pissa", "targets=[q_proj,v_proj]", "+rank_pattern.q=2"],
            ["experiment=forgetting", "task.items=7", "optim.lr=1e-3"],
            ["model=config", "model.hidden_size=64", "task=lm", "task.path=x"],
        ):
            whole = hydra.config_loader.load_sweep_config(master, words)
            whole = OmegaConf.masked_copy(whole, [k for k in whole if k != "hydra"])
            assert OmegaConf.to_container(composer.compose(words), resolve=True) == (
                OmegaConf.to_container(whole, resolve=True)
            )
        assert len(composer.made) == 4


def test_a_launcher_that_is_not_installed_is_named(words: list[str], tmp_path: Path) -> None:
    if importlib.util.find_spec("ray"):
        pytest.skip("Ray is installed")
    done = lab("-m", "hydra/launcher=ray", "rank=1,2", *words, out=tmp_path, code=1)
    assert done.stderr == ("error: hydra/launcher=ray: not installed; pip install "
                           "-c constraints.txt -e '.[ray]'\n")  # fmt: skip


@pytest.mark.slow
def test_joblib_s_processes_share_a_sweep(bad: Path, words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "runs"
    command = [sys.executable, "run.py", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
               f"variant=lora,{bad}:exits", "seed=0,1", *words, f"out_dir={out}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and len(results(out)) == 2
    assert done.stdout.count("failed: variant=exits") == 2


def test_status_shows_a_sweep(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "runs"
    words = ["rank=1,2", "variant/scale=none", "alpha=3", *words]
    said = lab("-m", *words, out=out).stdout
    assert "note: alpha=3 has no meaning with scale none: rank=1; rank=2\n" in said
    name = min(results(out))
    (out / "single" / name / "result.json").unlink()
    (out / "single" / name / "status.json").unlink()
    lab("-m", *words, "dry=true", out=out)
    rows = json.loads(module("experiments.status", str(out), "--json").stdout)
    assert [row["state"] for row in rows] == ["missing", "done"] and rows[0]["run"] == name
    done = rows[1]
    assert (done["step"], done["steps"]) == (2, 2) and done["loss"] > 0 and done["validation"] > 0
    assert done["steps_per_s"] == pytest.approx(2 / done["seconds"])
    shown = module("experiments.status", str(out / "single"), "--once").stdout
    assert name in shown and "2 runs: 1 missing, 1 done" in shown
    assert "no run there" in module("experiments.status", str(tmp_path / "no"), code=1).stderr


def test_a_wandb_agent_s_words_compose(words: list[str], tmp_path: Path) -> None:
    """`${args_no_hyphens}` of a sweep of W&B's: key=value, one a parameter."""
    import yaml

    page = yaml.safe_load((ROOT / "docs" / "wandb-sweep.yaml").read_text())
    assert page["command"][-1] == "${args_no_hyphens}" and page["program"] == "run.py"
    chosen = [f"{key}={about['values'][0] if 'values' in about else about['min']}"
              for key, about in page["parameters"].items()]  # fmt: skip
    done = lab(*chosen, *words, "dry=true", out=tmp_path / "runs")
    assert done.stdout.startswith("missing")


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--workers"]], ids=["driver", "workers"])
def test_two_hundred_runs_survive_twenty_kills(words: list[str]) -> None:
    run = [sys.executable, "-m", "benchmarks.survival", *words]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=7000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 results, 0 twice, 0 lost, 0 corrupt" in done.stdout
