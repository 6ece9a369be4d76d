"""Where a run comes from: the files of code that it used, versions, machine, revision."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from variants import _registry as registry

ROOT = Path(__file__).parents[1]
CODE = (".py", ".json", ".safetensors")  # the embedded model too
# what arranges runs and shows them: no result changes with it
ARRANGING = tuple(f"experiments/{name}.py" for name in (
    "command", "attempt", "sweep", "plan", "overview", "isolate", "forks", "lock", "status",
    "screen", "track", "network"))  # fmt: skip


def file_digest(path: Path) -> str | None:
    """sha256 of a file, or None where there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def digest_now(path: str | Path) -> str | None:
    """`file_digest`, read again only where size or time of the file changed."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return _digest(path, stat.st_size, stat.st_mtime_ns)


@cache
def _digest(path: str | Path, size: int, mtime_ns: int) -> str | None:
    return file_digest(Path(path))


def sources() -> dict[str, str]:
    """The hash of every file of the project that this process has imported so far, less those
    that arrange runs and show them."""
    found, here = {}, f"{ROOT}{os.sep}"
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and file.startswith(here) and ".venv" not in file:
            name = file.removeprefix(here)
            if name.startswith(("variants/", "experiments/")) and name not in ARRANGING:
                found[name] = digest_now(Path(file)) or ""
        elif file and module.__name__.startswith(registry.GROUP):  # a variant of the user's own
            found[file] = digest_now(Path(file)) or ""
    return dict(sorted(found.items()))


def tree() -> dict[str, str]:
    """The hash of every file of the project from which a run could be made."""
    files = registry.outside()
    for folder in ("variants", "experiments"):
        files += [f for f in (ROOT / folder).rglob("*") if f.suffix in CODE]
    return {str(f.relative_to(ROOT) if f.is_relative_to(ROOT) else f): digest_now(f) or ""
            for f in sorted(files)}  # fmt: skip


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
