"""Weights & Biases: a mirror of the run folder, never a condition for the run.

It runs in a process of its own, so that its import, its service and the network cost the run
nothing, and nothing it does can stop the run. Mode `auto` goes online where there is a key and a
network, else offline; it never asks, and never waits for long. The same run keeps its id, so that
a resumed one continues it. A run that dies is marked failed.

Lines of json go in ({"open": ...}, {"row": ...}, {"finish": ...}), others come back, all with the
id of the run that they are for. The runs of a sweep, each a fork, share one such process: what a
killed one leaves there (half a line, an answer that nobody took, an open run) is passed over. One
run is open at a time, but for those of a pack, which are open `beside` each other.
"""

import contextlib
import json
import netrc
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from .config import Track
from .network import online
from .record import NotHere

PATIENCE = 120  # seconds that a run waits, at its end, for a slow network
# serves every run of this process and of its forks, one after another
_server: subprocess.Popen[str] | None = None
_owner = 0  # the process that started it


def ready() -> subprocess.Popen[str]:
    """The process beside, started if there is none. A fork has that of its parent."""
    global _server, _owner
    if _server is None or (_owner == os.getpid() and _server.poll() is not None):
        _owner = os.getpid()
        _server = subprocess.Popen(
            [sys.executable, "-m", "experiments.track"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parents[1],
            start_new_session=True,  # an interrupt is for the run, which then says so here
        )
    return _server


def mark_dead() -> None:
    """The runs that are open, if any are, have died: for a parent whose fork did."""
    if _server is not None:
        _write(_server, {"id": None, "finish": {}, "failed": True})


def _write(server: subprocess.Popen[str], message: dict[str, Any]) -> bool:
    """Whether there was anyone to take it. A line of its own, whatever stands before it."""
    try:
        assert server.stdin is not None
        server.stdin.write(f"\n{json.dumps(message)}\n")
        server.stdin.flush()
    except OSError:
        return False
    return True


class Tracker:
    """One run before W&B, or before nothing when disabled."""

    def __init__(
        self,
        track: Track,
        folder: Path,
        *,
        name: str,
        group: str,
        tags: list[str],
        config: dict[str, Any],
        say: Callable[[str], None],
        beside: bool = False,
    ) -> None:
        """`beside`: other runs of this process may be open."""
        self.say, self.enabled = say, track.mode != "disabled"
        if not self.enabled:
            return
        about = {
            "project": track.project,
            "entity": track.entity,
            "id": folder.name.rpartition("-")[2],
            "name": name,
            "group": group,
            "tags": tags,
            "config": config,
            "dir": str(folder.resolve()),
        }
        self.id = about["id"]
        self._send({"open": about, "track": asdict(track), "beside": beside})
        if track.mode == "online":  # asked for by name: without it there is no run
            answer = self._answer()
            if answer.get("error"):
                raise NotHere(f"track.mode=online: {answer['error']}")

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl, at its own step."""
        self._send({"row": row})

    def finish(self, summary: dict[str, Any] | None, failed: bool = False) -> None:
        """Closes the run, waiting until all of it is written; a failed one is marked failed."""
        if self.enabled:
            self._send({"finish": summary or {}, "failed": failed})
            for line in self._answer().get("said", []):
                self.say(line)
            self.enabled = False

    def _send(self, message: dict[str, Any]) -> None:
        if self.enabled and not _write(ready(), {"id": self.id, **message}):
            self.enabled = False
            self.say("track: W&B's process ended; the run goes on without it")

    def _answer(self) -> dict[str, Any]:
        """This run's next line of the other side, or what stands for it when none comes in time."""
        assert _server is not None
        assert _server.stdout is not None
        source, line, end = _server.stdout.fileno(), b"", time.monotonic() + PATIENCE
        while come := select.select([source], [], [], max(0.0, end - time.monotonic()))[0]:
            piece = os.read(source, 1)  # no more than its own: a fork after this one reads on
            if not piece:
                break
            line += piece
            if piece == b"\n":
                answer, line = json.loads(line), b""
                if answer["id"] == self.id:
                    return answer
        self.enabled = False
        why = "ended" if come else f"did not answer for {PATIENCE} s"
        with contextlib.suppress(ProcessLookupError):
            os.kill(_server.pid, signal.SIGKILL)  # a fork is not its parent, and cannot .kill() it
        _server.wait()
        text = f"track: W&B's process {why}; the run folder has everything"
        return {"said": [text], "error": text}


def serve() -> None:
    """The other side: mirrors runs until its input ends. A run that was open then has died."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what W&B prints is not an answer
    runs: dict[str, tuple[Any, list[str]]] = {}  # those that are open, and what is to be said

    def answer(name: str, **about: Any) -> None:
        answers.write(json.dumps({"id": name, **about}) + "\n")
        answers.flush()

    def close(name: str, summary: dict[str, Any], failed: bool) -> None:
        run, said = runs.pop(name, (None, []))
        if run is not None:
            for key, value in summary.items():
                run.summary[key] = value
            run.finish(exit_code=int(failed))
        answer(name, said=said)

    for line in sys.stdin:
        try:
            message = json.loads(line)
        except ValueError:  # empty, or the half that a killed run has written
            continue
        name = message["id"]
        if "open" in message:
            for other in list(runs) if not message["beside"] else []:  # it was killed
                close(other, {}, failed=True)
            run, said = _open(message["open"], message["track"]["mode"], message["beside"])
            runs[name] = run, said
            if message["track"]["mode"] == "online":
                answer(name, error=None if run else said[-1])
        elif "row" in message and runs.get(name, (None,))[0] is not None:
            row = message["row"]
            values = {k: v for k, v in row.items() if k != "step"}
            runs[name][0].log(values, step=row["step"])
        elif "finish" in message:
            for one in list(runs) if name is None else [name]:
                close(one, message["finish"], message["failed"])
    for name in list(runs):
        close(name, {}, failed=True)


def _open(about: dict[str, Any], asked: str, beside: bool) -> tuple[Any, list[str]]:
    """(the run, what is to be said); no run where even the offline one cannot be opened."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    mode, said = _mode(asked)
    if mode == "online" and not online(_url()):
        return None, [f"no network to W&B at {_url()}"]
    settings = wandb.Settings(init_timeout=30, console="off", silent=True)
    rest: dict[str, Any] = {"resume": "allow", "settings": settings,
                            "reinit": "create_new" if beside else "finish_previous"}  # fmt: skip
    try:
        return wandb.init(mode=mode, **about, **rest), said  # type: ignore[arg-type]
    except Exception as error:
        said.append(f"track: W&B cannot be reached ({type(error).__name__}: {error})")
    if asked != "online":
        with contextlib.suppress(Exception):
            said[-1] += "; this run is offline"
            return wandb.init(mode="offline", **about, **rest), said
    return None, said


def _mode(asked: str) -> tuple[Any, list[str]]:
    if asked != "auto":
        return asked, []
    if not _has_key():
        return "offline", []
    if not online(_url()):
        return "offline", ["track: no network to W&B; this run is offline, `wandb sync` sends it"]
    return "online", []


def _url() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(urlparse(_url()).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


if __name__ == "__main__":
    serve()
