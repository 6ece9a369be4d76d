"""Runs from Python, with the words of the command line.

    from experiments.call import run
    result = run("variant=dora", "rank=16")

The run has the folder that `python run.py variant=dora rank=16` gives it; a finished one is read.
"""

from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from variants import _registry as registry

from .command import _named
from .config import register, settings_of
from .provenance import ROOT
from .tasks import BadInput

_registered: Any = None  # the names that Hydra knows of


def run(*words: str) -> dict[str, Any]:
    """result.json's content, and under `folder` where the run lies.

    Nothing is printed (run.log has it). A word that cannot be is refused as on the command line.
    """
    from . import job
    from .screen import Screen

    prepared = job.prepare(settings_of(composed(*words)), _inputs())
    if prepared.settings.dry:
        raise BadInput("dry=true: a run from Python is made, not planned")
    screen = Screen(quiet=True)
    try:
        return job.run(prepared, screen) | {"folder": str(prepared.folder.path)}
    finally:
        screen.close()


def composed(*words: str) -> Any:
    """The configuration of these words."""
    global _registered
    words = tuple(_named(word) for word in words)
    if _registered is not registry.index():  # a file of one's own may have joined
        register()
        _registered = registry.index()
    with initialize_config_dir(str(Path(ROOT) / "conf"), version_base="1.3"):
        return compose("config", list(words))


@cache
def _inputs() -> Any:
    """Data and models, read once for as long as this process lives and they stay as they are."""
    from .job import Inputs

    return Inputs()
