"""The folder of a run: the truth about it. Every file appears whole or not at all.

OUT_DIR/<study, or single>/<variant>-r<rank>-<hash>/ with config.yaml, env.json, metrics.jsonl,
predictions.jsonl, checkpoint/, adapter/, run.log, status.json and, last, result.json.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from variants import Incompatible

from . import lock
from .provenance import ROOT, digest_now, file_digest, tree
from .tasks import BadInput

SCHEMA = 1
FINISHED = ("done", "diverged", "stale")  # states of a run: Folder.state says what they are
NOT_AGAIN = ("failed", "refused")  # a sweep runs them again when asked, or with other code
# what the user can mend: one line; anything else is ours, and keeps its traceback
EXPECTED = (BadInput, Incompatible, OSError)


def write_json(path: Path, value: Any) -> None:
    """Atomically; a number that is not finite becomes null, since json has none."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("w") as file:
            json.dump(finite(value), file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def make(folder: Path, out_dir: Any) -> None:
    """Makes a folder inside out_dir, or says why that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"out_dir={out_dir}: {error.strerror}") from None


def finite(value: Any) -> Any:
    """`value` with null for every number that is not finite, since json has none."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def some(names: Sequence[str], between: str = ", ") -> str:
    """The first three, and whether there are more."""
    return between.join([*names[:3], *["..."] * (len(names) > 3)])


def read_json(path: Path) -> Any:
    """The content, or None where the file is missing or was cut short."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


class Terminated(KeyboardInterrupt):
    """SIGTERM: a scheduler takes the machine back."""


class NotHere(BadInput):
    """What the place lacks that was asked for by a key that is no part of the run (a device, a
    network): the command is refused, and the run's folder keeps nothing of it."""


@dataclass(frozen=True)
class Folder:
    """One run's folder."""

    path: Path

    @property
    def result(self) -> dict[str, Any] | None:
        """What the run found; its presence means that it is finished."""
        found = read_json(self.path / "result.json")
        return found if isinstance(found, dict) and found.get("schema") == SCHEMA else None

    @property
    def status(self) -> dict[str, Any]:
        """What status.json says; {} where there is none."""
        found = read_json(self.path / "status.json")
        return found if isinstance(found, dict) else {}

    @property
    def changed_at(self) -> int:
        """When the status was written, in ns; 0: never."""
        try:
            return (self.path / "status.json").stat().st_mtime_ns
        except OSError:
            return 0

    @property
    def state(self) -> str:
        """missing; running; interrupted: the next attempt goes on; failed; refused: it cannot be
        built; done; diverged; or, of these two, stale: the code changed since."""
        result = self.result
        if result is not None:
            return "stale" if self.changed_sources() else result["status"]
        if self.is_locked():
            return "running"
        status = self.status.get("status", "missing")
        return status if status in ("missing", *NOT_AGAIN) else "interrupted"

    def changed_sources(self) -> list[str]:
        """The files on which the run, or its failure, depends and that differ now."""
        env = read_json(self.path / "env.json") or {}
        used = self.status.get("sources") or env.get("sources") or {}
        return [
            name for name, digest in used.items() if digest_now(os.path.join(ROOT, name)) != digest
        ]

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Holds the run for this process; False where another has it. Dies with the process.

        A folder that is left without a file is taken away.
        """
        file = self.path / "lock"
        make(self.path, self.path.parents[1])
        with lock.hold(file) as held:
            try:
                yield held
            finally:
                if held and os.listdir(self.path) == ["lock"]:
                    file.unlink()
                    with contextlib.suppress(OSError):  # another process begins in it
                        self.path.rmdir()

    def is_locked(self) -> bool:
        """Whether a living process holds the run."""
        return lock.is_held(self.path / "lock")

    @property
    def holder(self) -> str:
        """`host pid` of the process that holds the run, or held it when it died."""
        return lock.holder(self.path / "lock")

    def set_status(self, status: str, **details: Any) -> None:
        """running, interrupted, failed or refused (with `error` and `sources`), done or diverged;
        `group` stays."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        kept = {"group": self.group} if self.group is not None else {}
        new = {"status": status, "time": now, **kept, **details}
        write_json(self.path / "status.json", new)

    def sweep_up(self) -> None:
        """Takes away what a kill within a write has left; for who holds the run."""
        for part in self.path.rglob("*.part"):
            part.unlink(missing_ok=True)

    def ended(self, status: str, error: str, sources: dict[str, str] | None = None) -> None:
        """Marks an attempt as failed or refused, unless the run goes on in another process.

        `sources`: the files on which that depends. None: the process ended without a word; they
        are in env.json if it came so far, else it may be any of the project's.
        """
        with self.locked() as held:
            if held and self.result is None:
                if sources is None:
                    env = self.path / "env.json"
                    if env.exists() and env.stat().st_mtime_ns >= self.changed_at:
                        sources = (read_json(env) or {}).get("sources")
                self.set_status(status, error=error, sources=sources or tree())

    @property
    def group(self) -> str | None:
        """The W&B group of the run."""
        return self.status.get("group")

    def set_aside(self) -> Path:
        """Moves what the run left beside it, so that it starts anew and nothing is lost.

        A kill on the way leaves a finished run, or one that starts anew: never one that would go
        on from an old checkpoint.
        """
        asides = (self.path.with_name(f"{self.path.name}.old{i}") for i in range(1, 1000))
        aside = next(path for path in asides if not path.exists())
        aside.mkdir()
        first = ["checkpoint", "result.json"]
        for name in [*first, *sorted(set(os.listdir(self.path)) - {*first, "lock"})]:
            if (self.path / name).exists():
                (self.path / name).rename(aside / name)
        return aside


class Metrics:
    """metrics.jsonl: one row a line, in the order of steps, in one stream."""

    def __init__(self, path: Path, resume_after: int | None) -> None:
        """Keeps the rows up to step `resume_after` (None: none); the rest is written again."""
        rows = []
        if path.exists() and resume_after is not None:
            for line in path.read_text(errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= resume_after:
                        rows.append(line + "\n")
                except (ValueError, TypeError, KeyError):
                    continue  # cut short by a kill, or not ours
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text("".join(rows))
        os.replace(part, path)
        self.rows = [json.loads(row) for row in rows]
        self.file = path.open("a")

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.file.write(json.dumps(finite(row)) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class Log:
    """run.log: what was said, with the time."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a")

    def write(self, text: str) -> None:
        for line in text.splitlines():
            self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def interrupted(error: KeyboardInterrupt) -> str:
    """What an interrupt left behind; `error` says after which step, where that was saved."""
    if str(error):
        return f"interrupted {error}: the same command goes on from there"
    return "interrupted: the same command goes on from the last checkpoint, if there is one"


def one_line(error: BaseException) -> str:
    """The message without line breaks."""
    return " ".join(str(error).split())


def complaining(main: Callable[[], int]) -> Callable[[], int]:
    """The `main` of a command that says in one line what the user can mend, with exit code 1."""

    @wraps(main)
    def run() -> int:
        try:
            return main()
        except EXPECTED as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            return 1

    return run


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Any], state: Any) -> None:
    """Writes checkpoint/last, keeping the one before as checkpoint/previous.

    A kill at any moment leaves one of the two whole: the new one is written beside them, then
    renamed, and each carries a hash of its tensors.
    """
    from variants._io import write_tensors

    folder.mkdir(exist_ok=True)
    new, last, previous = folder / f"new.{os.getpid()}", folder / "last", folder / "previous"
    for old in folder.glob("new.*"):
        shutil.rmtree(old, ignore_errors=True)
    new.mkdir()
    try:
        write_tensors(new / "tensors.safetensors", tensors)
        write_json(
            new / "state.json",
            {"step": step, "state": state, "sha256": file_digest(new / "tensors.safetensors")},
        )
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if last.exists():
        shutil.rmtree(previous, ignore_errors=True)
        last.rename(previous)
    new.rename(last)


def load_checkpoint(folder: Path) -> tuple[int, dict[str, Any], Any] | None:
    """(step, tensors, state) of the newest checkpoint that is whole, or None."""
    from safetensors.torch import load_file

    for name in ("last", "previous"):
        state = read_json(folder / name / "state.json")
        tensors = folder / name / "tensors.safetensors"
        if state is not None and file_digest(tensors) == state["sha256"]:
            return state["step"], load_file(tensors), state["state"]
    return None


def pack(value: Any, name: str, tensors: dict[str, Any]) -> Any:
    """`value` as plain json, its tensors moved into `tensors` under names."""
    if hasattr(value, "untyped_storage"):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        pairs = [[k, pack(v, f"{name}.{k}", tensors)] for k, v in value.items()]
        return {"items": pairs}  # a list of pairs: an optimizer's keys are numbers
    if isinstance(value, list | tuple):
        return [pack(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    return value


def unpack(value: Any, tensors: Mapping[str, Any]) -> Any:
    """The inverse of `pack`; tuples come back as lists."""
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {k: unpack(v, tensors) for k, v in value["items"]}
    return [unpack(v, tensors) for v in value] if isinstance(value, list) else value
