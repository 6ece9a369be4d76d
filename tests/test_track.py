"""Weights & Biases is a mirror: with a key and no network, or stuck, it costs a run nothing."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments import track
from experiments.config import Track

KEY = "0123456789abcdef" * 2 + "01234567"
NOWHERE = "http://127.0.0.1:9"


def tracker(
    folder: Path, said: list[str], mode: str = "auto", beside: bool = False
) -> track.Tracker:
    return track.Tracker(Track(mode=mode), folder, name="n", group="g", tags=[], config={"a": 1},
                         say=said.append, beside=beside)  # fmt: skip


@pytest.fixture
def own_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The next run starts a server of its own, with the environment of now."""
    monkeypatch.setattr(track, "_server", None)
    yield
    assert track._server is not None
    track._server.communicate()


@pytest.mark.usefixtures("own_server")
def test_a_key_without_a_network_means_offline_and_stays_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)
    said: list[str] = []
    run = tracker(tmp_path, said)
    run.log({"step": 1, "loss": 2.0})
    run.finish({"status": "done"})
    assert said == ["track: no network to W&B; this run is offline, `wandb sync` sends it"]
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files and not [p for p in files if KEY.encode() in p.read_bytes()]


@pytest.mark.usefixtures("own_server")
def test_online_asked_for_by_name_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)
    with pytest.raises(track.NotHere, match=f"track.mode=online: no network.* {NOWHERE}"):
        tracker(tmp_path, [], "online")


def test_a_stuck_process_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = subprocess.Popen(["sleep", "60"], text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)  # fmt: skip
    monkeypatch.setattr(track, "_server", stuck)
    monkeypatch.setattr(track, "PATIENCE", 0.2)
    said: list[str] = []
    run = tracker(tmp_path, said, "offline")
    run.log({"step": 1, "loss": 2.0})
    run.finish({})
    assert said == ["track: W&B's process did not answer for 0.2 s; the run folder has everything"]
    assert stuck.poll() is not None
    stuck.communicate()


def written(folder: Path) -> bytes:
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return file.read_bytes()


@pytest.mark.usefixtures("own_server")
def test_runs_of_a_pack_are_open_beside_each_other(tmp_path: Path) -> None:
    """Each has its own rows, and one that ends leaves the other open."""
    names, said = ("first", "second"), list[str]()
    for name in names:
        (tmp_path / f"{name}-{name}").mkdir()
    runs = [tracker(tmp_path / f"{name}-{name}", said, "offline", beside=True) for name in names]
    for step in (1, 2):
        for name, run in zip(names, runs, strict=True):
            run.log({"step": step, f"loss_of_{name}": float(step)})
    runs[0].finish({"status": "done"})
    runs[1].log({"step": 3, "after_the_other": 1.0})
    runs[1].finish({"status": "done"})
    assert not said
    second = tmp_path / "second-second"
    end = time.monotonic() + 30  # W&B may write the last of it a little later
    while b"after_the_other" not in written(second) and time.monotonic() < end:
        time.sleep(0.1)
    for name, other in (names, names[::-1]):
        content = written(tmp_path / f"{name}-{name}")
        assert f"loss_of_{name}".encode() in content
        assert f"loss_of_{other}".encode() not in content
        assert (b"after_the_other" in content) == (name == "second")
