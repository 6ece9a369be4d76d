"""Sweeps on a real Slurm cluster of one node: as root, `tests/slurm/cluster.sh install` first.

python -m pytest -m slurm -n 0
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sweep import TINY, text

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
LONG = ("train.steps=3000", "train.checkpoint_every=100", "train.eval_every=0")
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster of one node, with accounting; ended when the module is."""
    if os.geteuid() or not shutil.which("slurmctld"):
        pytest.skip("needs root, and Slurm: tests/slurm/cluster.sh install")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    subprocess.run([CLUSTER, "stop"], check=True)
    try:
        subprocess.run([CLUSTER, "start"], check=True)
        yield
    finally:
        subprocess.run([CLUSTER, "stop"], check=True)


def sweep(tmp_path: Path, *words: str, partition: str = "main", cores: int = 1) -> Any:
    """A driver at work on the cluster."""
    return subprocess.Popen(
        [sys.executable, "run.py", "-m", "hydra/launcher=submitit_slurm",
         f"hydra.launcher.partition={partition}", f"hydra.launcher.cpus_per_task={cores}",
         "hydra.launcher.timeout_min=10", *TINY, text(tmp_path), *words,
         f"out_dir={tmp_path / 'runs'}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def ended(driver: Any) -> str:
    """What the driver said, when it is over."""
    said, _ = driver.communicate(timeout=600)
    return said


def folders(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "runs" / "single").glob("*"))


def done(tmp_path: Path) -> list[Path]:
    return [f for f in folders(tmp_path) if (f / "result.json").is_file()]


def within(seconds: float, look: Callable[[], Any]) -> Any:
    """What `look` finds, once it finds something."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "in vain"
        time.sleep(0.2)
    return found


def training(tmp_path: Path) -> Path | None:
    """A run without a result that has its second checkpoint behind it, and so a whole one."""
    for folder in folders(tmp_path):
        rows = folder / "metrics.jsonl"
        steps = [json.loads(line)["step"] for line in whole(rows)] if rows.is_file() else []
        if max(steps, default=0) > 200 and folder not in done(tmp_path):
            return folder
    return None


def whole(file: Path) -> list[str]:
    """Its lines, but for one that is being written."""
    return file.read_text().rpartition("\n")[0].splitlines()


def log(folder: Path) -> str:
    return (folder / "run.log").read_text()


def test_a_multirun_is_one_array(tmp_path: Path) -> None:
    driver = sweep(tmp_path, "variant=lora,dora", "rank=2,4")
    said = ended(driver)
    assert driver.returncode == 0, said
    assert len(done(tmp_path)) == 4
    jobs = {p.name for p in (tmp_path / "runs").glob("**/.submitit/*_*") if p.is_dir()}
    assert len(jobs) == 4
    assert len({name.split("_")[0] for name in jobs}) == 1


def test_a_job_killed_hard_costs_its_own_run(tmp_path: Path) -> None:
    """SIGKILL to Slurm's whole step: worker, server and run. The others end; the run goes on."""
    driver = sweep(tmp_path, "variant=lora", "seed=0,1,2", *LONG)
    killed = within(120, lambda: training(tmp_path))
    pids = [int(word) for word in (killed / "lock").read_text().split() if word.isdigit()]
    victims = [pid for pid in map(worker, pids) if pid]
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    said = ended(driver)
    assert len(done(tmp_path)) >= 2, said
    if driver.returncode:  # the driver named it and left it: the same command finishes it
        assert killed.name in said
        driver = sweep(tmp_path, "variant=lora", "seed=0,1,2", *LONG,
                       "sweep.retry=failed")  # fmt: skip
        said = ended(driver)
    assert driver.returncode == 0, said
    assert len(done(tmp_path)) == 3
    assert "from step" in log(killed) or "resum" in log(killed)


def worker(pid: int) -> int | None:
    """The submitit process above a run's."""
    while pid > 1:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text()
            parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except FileNotFoundError:
            return None
        if "submitit.core._submit" in words and "srun" not in words:
            return pid
        pid = parent
    return None


def test_a_preempted_run_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    driver = sweep(tmp_path, "variant=lora", *LONG,
                   partition="low", cores=2)  # fmt: skip
    folder = within(120, lambda: training(tmp_path))
    subprocess.run(["sbatch", "-p", "main", "-c", "2", "-o", "/dev/null", "--wrap", "sleep 3"],
                   check=True)  # fmt: skip
    said = ended(driver)
    assert driver.returncode == 0, said
    assert "interrupted after step" in log(folder)
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "done"


def test_a_run_that_reaches_its_time_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    """The signal that Slurm sends `signal_delay_s` before the end, sent by hand."""
    driver = sweep(tmp_path, "variant=lora", *LONG)
    folder = within(120, lambda: training(tmp_path))
    job = subprocess.check_output(["squeue", "-h", "-o", "%A"], text=True).split()[0]
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    said = ended(driver)
    assert driver.returncode == 0, said
    assert (folder / "result.json").is_file()
    attempts = subprocess.check_output(
        ["sacct", "-n", "-D", "-X", "-j", job, "-o", "state"], text=True
    ).split()
    assert "REQUEUED" in attempts
