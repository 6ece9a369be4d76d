"""The server of a worker (experiments/isolate.py): imports once, and forks for each job.

It does nothing but import, so that a fork finds no thread and no CUDA. Where the worker dies, the
fork is asked to leave with a checkpoint, and made to after a while.

A line of json a job comes in; lines go out, on a pipe of their own: {"pid"}, from the fork
{"folder"} and {"line"}, and {"exit"} when it is gone; {"outdated"} where the code has changed.
"""

import contextlib
import json
import os
import select
import signal
import sys
import traceback
from typing import Any

from .provenance import ROOT


def serve(answers: int) -> None:
    """The server: a fork for each line that comes in, until there are no more."""
    import torch
    import transformers

    from . import attempt, job, track  # noqa: F401

    assert not torch.cuda.is_initialized()
    for name in ("LlamaForCausalLM", "AutoModelForCausalLM", "PreTrainedTokenizerFast"):
        getattr(transformers, name)  # transformers imports when asked
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker)
    code = _loaded()
    for line in sys.stdin:
        about = json.loads(line)
        if _loaded() != code:
            _say(answers, {"outdated": True})
            return
        if about["job"]["config"]["track"]["mode"] != "disabled":
            track.ready()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            _fork(about, answers)
        _say(answers, {"pid": pid})
        ended = _reaped(pid, woken, about["grace"])
        if ended != 0:
            track.mark_dead()
        _say(answers, {"exit": ended})


def _loaded() -> list[tuple[str, int]]:
    """The project's files that this process has imported, with their times."""
    files = {str(getattr(m, "__file__", None)) for m in list(sys.modules.values())}
    return sorted((f, os.stat(f).st_mtime_ns) for f in files if f.startswith(str(ROOT))
                  and ".venv" not in f and os.path.exists(f))  # fmt: skip


def _reaped(pid: int, woken: int, grace: float) -> int:
    """How the fork ended. It is asked to end, then made to, where the worker is gone."""
    poller = select.poll()
    poller.register(woken, select.POLLIN)
    poller.register(0, 0)  # only that its other end was closed
    wait, orders = None, [signal.SIGTERM, signal.SIGKILL]
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        ready = [fd for fd, _ in poller.poll(wait)]
        if woken in ready:
            os.read(woken, 1 << 10)
        elif orders:
            if wait is None:
                poller.unregister(0)
            os.kill(pid, orders.pop(0))
            wait = 1000 * grace if orders else None


def _fork(about: dict[str, Any], answers: int) -> None:
    """The job's own process, from here to its end."""
    code = 1
    try:
        from . import attempt

        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, attempt.terminate)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(about["job"]["cwd"])
        os.environ.clear()
        os.environ.update(about["env"])
        line = attempt.attempt(about["job"], lambda folder: _say(answers, {"folder": str(folder)}))
        _say(answers, {"line": line})
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _say(answers: int, message: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the worker is gone
        os.write(answers, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    serve(int(sys.argv[1]))
