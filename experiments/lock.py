"""A lock on a run, for every process of every host that sees its folder.

It is a `flock`, which dies with its process whatever kills it. Some file systems keep flock to one
host (Lustre with `localflock`, NFS with `local_lock`); there two hosts would both get it. So the
holder writes `host pid` into the file and touches it every PULSE seconds, and leaves it empty; a
name of another host under a fresh pulse holds, one under an old pulse is stale.
"""

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from .tasks import BadInput

PULSE = 15.0  # seconds
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def hold(file: Path) -> Iterator[bool]:
    """Holds the lock in this process; False where another has it."""
    with _opened(file) as handle:
        if handle is None or _elsewhere(file):
            yield False
            return
        handle.truncate(0)
        handle.write(f"{socket.gethostname()} {os.getpid()}\n")
        handle.flush()
        done = threading.Event()
        beat = threading.Thread(target=_pulse, args=(file, done), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            done.set()
            beat.join()
            with contextlib.suppress(OSError):  # a full disk
                handle.truncate(0)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[TextIO | None]:
    """The file under its flock; None where another process has that."""
    while True:
        with file.open("a+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _TAKEN:
                    why = f"this file system takes no locks ({error.strerror})"
                    raise BadInput(f"{file}: {why}; choose another out_dir") from None
                yield None
                return
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle.fileno()), file.stat()):
                    yield handle
                    return
            # whoever had it took the file away meanwhile


def is_held(file: Path) -> bool:
    """Whether a living process holds the lock."""
    try:
        with file.open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return _elsewhere(file)
    except FileNotFoundError:
        return False
    except OSError:
        return True


def holder(file: Path) -> str:
    """`host pid` of who holds the lock, or who held it when it died."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _pulse(file: Path, done: threading.Event) -> None:
    while not done.wait(PULSE):
        with contextlib.suppress(OSError):
            os.utime(file)


def _elsewhere(file: Path) -> bool:
    """Whether another host's name stands in the file under a pulse of late."""
    host = holder(file).partition(" ")[0]
    fresh = abs(time.time() - file.stat().st_mtime) < 4 * PULSE
    return bool(host) and host != socket.gethostname() and fresh
