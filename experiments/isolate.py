"""A run in a process of its own, forked from a server that has its imports done.

The process that works through jobs (the driver of a sweep, or a worker of joblib, Ray or Slurm)
starts one server (experiments/forks.py); each job is a fork of it. Whatever becomes of the fork -
an exit, a signal, a hang - costs that attempt alone.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .provenance import ROOT
from .record import Folder

TICK = 0.2  # seconds between looks at the clock and at the request to stop
_server: "Server | None" = None


def run(
    job: dict[str, Any], *, limit: float | None, grace: float, stop: Callable[[], int]
) -> dict[str, Any]:
    """What the job's line says, or what became of the process that should have said it.

    `stop` gives the signal by which the user asked to stop, or 0. An exception on its way through
    here (an interrupt, a scheduler's preemption) leaves the run a `grace` for its checkpoint.
    """
    global _server
    about = {"job": job, "env": dict(os.environ), "grace": grace}
    while True:
        if _server is None or not _server.alive:
            _server = Server()
            atexit.register(close)
        watch = Watch(_server, limit, grace, stop)
        with _preempted(watch):
            if watch.follow(about) != "outdated":
                return watch.line()
        close()


@contextlib.contextmanager
def _preempted(watch: "Watch") -> Iterator[None]:
    """Before a scheduler's own handler (submitit's, which queues the job again) the run saves what
    it has; the handler may end this process."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGUSR1, signal.SIGUSR2)}
    theirs: dict[int, Any] = {s: handler for s, handler in handlers.items() if callable(handler)}

    def note(signum: int, frame: Any) -> None:
        watch.leave()
        theirs[signum](signum, frame)

    for signum in theirs:
        signal.signal(signum, note)
    try:
        yield
    finally:
        for signum, handler in theirs.items():
            signal.signal(signum, handler)


def close() -> None:
    """Ends this process's server."""
    global _server
    if _server is not None:
        _server.close()
        _server = None


class Server:
    """The server, as its worker sees it."""

    def __init__(self) -> None:
        self.answers, theirs = os.pipe()
        self.process = self._started(theirs)
        os.close(theirs)
        self.rest = b""
        self.alive = True

    def _started(self, answers: int) -> Any:
        """Its process: what it answers comes by that pipe."""
        cores = os.environ.get("SLURM_CPUS_PER_TASK")  # torch would take those of the node
        environment = {"OMP_NUM_THREADS": cores} if cores else {}
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.forks", str(answers)],
            stdin=subprocess.PIPE,
            pass_fds=(answers,),
            cwd=ROOT,
            env=environment | os.environ,
            start_new_session=True,  # a terminal's interrupt is for the worker, which passes it on
        )

    def ask(self, about: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # then its answer is its end
            self.process.stdin.write(json.dumps(about).encode() + b"\n")
            self.process.stdin.flush()

    def answer(self, timeout: float) -> dict[str, Any] | None:
        """The next message; None: none in time. {"exit": None}: the server is gone."""
        while b"\n" not in self.rest:
            if not select.select([self.answers], [], [], timeout)[0]:
                return None
            piece = os.read(self.answers, 1 << 16)
            if not piece:
                self.alive = False
                return {"exit": None}
            self.rest += piece
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        os.close(self.answers)


class Watch:
    """Follows one job to its end, and ends it when its time is over or the user asks."""

    def __init__(
        self, server: Server, limit: float | None, grace: float, stop: Callable[[], int]
    ) -> None:
        self.server, self.limit, self.grace, self.stop = server, limit, grace, stop
        self.pid: int | None = None
        self.said: dict[str, Any] | None = None
        self.folder: str | None = None
        self.code: int | None = None
        self.why = ""  # we ended it
        self.left = False  # nobody waits for it any more
        self.began = self.asked = time.monotonic()

    def follow(self, about: dict[str, Any]) -> str:
        """Until the job is over, or the server says `outdated`."""
        self.server.ask(about)
        while True:
            try:
                message = self.server.answer(TICK)
                if message is None:
                    self._look()
                    continue
            except BaseException:
                self.leave()
                raise
            if "outdated" in message:
                return "outdated"
            if "exit" in message:
                self.code = message["exit"]
                return "over"
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        if "pid" in message:
            self.pid, self.began = message["pid"], time.monotonic()
        self.folder = message.get("folder", self.folder)
        self.said = message.get("line", self.said)

    def _look(self) -> None:
        now = time.monotonic()
        if self.why:
            if now - self.asked > self.grace:
                self._kill(signal.SIGKILL)
        elif self.pid is not None and self.limit is not None and now - self.began > self.limit:
            self.why, self.asked = f"time limit of {self.limit:g} s reached", now
            self._kill(signal.SIGTERM)
        elif self.stop():
            self.why, self.asked = "stopped", now
            self._kill(self.stop())

    def _kill(self, signum: int) -> None:
        """Signals the job; before it exists, the server."""
        if self.pid is None:
            self.server.process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def leave(self) -> None:
        """The worker has to go: the job may save what it has."""
        if self.left:
            return
        self.left = True
        self._kill(signal.SIGTERM)
        end = time.monotonic() + self.grace
        while time.monotonic() < end:
            message = self.server.answer(max(0.0, end - time.monotonic()))
            if message is not None and "exit" in message:
                return
        self._kill(signal.SIGKILL)

    def line(self) -> dict[str, Any]:
        """The job's own last word, unless we cut it short or it had none."""
        finished = self.said is not None and self.said["status"] in ("done", "diverged")
        if self.said is not None and (finished or self.why in ("", "stopped")):
            return self.said
        about = {"run": self.folder} if self.folder else {}
        if self.why == "stopped":
            return {"status": "interrupted", "error": "stopped", **about}
        error = self.why or _death(self.code)
        if self.why:
            error += "; sweep.retry=failed goes on from its checkpoint, if there is one"
        if self.folder:
            Folder(Path(self.folder)).ended("failed", error)
        return {"status": "failed", "error": error, **about}


def _death(code: int | None) -> str:
    if code is None:
        return "its server was killed"
    if code >= 0:
        return f"its process exited with code {code} without a word"
    more = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"its process died of {signal.Signals(-code).name}{more}"
