"""The folder of a run: the truth about it. Every file appears whole or not at all.

OUT_DIR/<study, or single>/<variant>-r<rank>-<hash>/ with config.yaml, env.json, metrics.jsonl,
predictions.jsonl, checkpoint/, adapter/, run.log, status.json and, last, result.json.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from variants import _registry as registry

from .tasks import BadInput

ROOT = Path(__file__).parents[1]
SCHEMA = 1


def write_json(path: Path, value: Any) -> None:
    """Atomically; a number that is not finite becomes null, since json has none."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("w") as file:
            json.dump(_finite(value), file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """The content, or None where the file is missing or was cut short."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


class Terminated(KeyboardInterrupt):
    """SIGTERM: a scheduler takes the machine back."""


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
    def state(self) -> str:
        """missing, running, failed, interrupted, done or diverged; `stale` after the last two if
        the code changed since."""
        result = self.result
        if result is not None:
            return "stale" if self.changed_sources() else result["status"]
        status = read_json(self.path / "status.json")
        if status is None:
            return "missing"
        if status["status"] != "failed" and not self.is_locked():
            return "interrupted"
        return status["status"]

    def changed_sources(self) -> list[str]:
        """The files of the project that the run used and that differ now."""
        env = read_json(self.path / "env.json") or {}
        return [
            name
            for name, digest in env.get("sources", {}).items()
            if file_digest(ROOT / name) != digest
        ]

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Holds the run for this process; False where another has it. Dies with the process."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"out_dir={self.path.parents[1]}: {error.strerror}") from None
        with (self.path / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            file.truncate(0)
            file.write(f"{socket.gethostname()} {os.getpid()}\n")
            file.flush()
            yield True

    def is_locked(self) -> bool:
        """Whether a living process holds the run."""
        try:
            with (self.path / "lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def set_status(self, status: str, **details: Any) -> None:
        """running, failed (with `error` and `traceback`), done or diverged; `group` stays."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        kept = {"group": self.group} if self.group is not None else {}
        new = {"status": status, "time": now, **kept, **details}
        write_json(self.path / "status.json", new)

    @property
    def group(self) -> str | None:
        """The W&B group of the run."""
        return (read_json(self.path / "status.json") or {}).get("group")

    def set_aside(self) -> Path:
        """Renames the folder, so that the run starts anew and nothing is lost."""
        for i in range(1, 1000):
            aside = self.path.with_name(f"{self.path.name}.old{i}")
            if not aside.exists():
                self.path.rename(aside)
                return aside
        raise FileExistsError(f"{self.path}: a thousand old runs beside it")


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
        self.file.write(json.dumps(_finite(row)) + "\n")
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


def file_digest(path: Path) -> str | None:
    """sha256 of a file, or None where there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def sources() -> dict[str, str]:
    """The hash of every file of the project that this process has imported so far."""
    found = {}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(ROOT) and ".venv" not in file:
            name = str(Path(file).relative_to(ROOT))
            if name.startswith(("variants/", "experiments/")):
                found[name] = file_digest(Path(file)) or ""
        elif file and module.__name__.startswith(registry.GROUP):  # a variant of the user's own
            found[file] = file_digest(Path(file)) or ""
    return dict(sorted(found.items()))


def environment() -> dict[str, Any]:
    """Versions, machine and revision: what a reader needs to repeat the run."""
    packages = ("torch", "transformers", "safetensors", "numpy", "hydra-core", "omegaconf", "wandb")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": revision(),
        "sources": sources(),
    }


def revision() -> dict[str, Any]:
    """{"commit", "dirty"} of the project's checkout; nulls outside one."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}
