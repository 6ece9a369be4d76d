"""Tasks, one file each. A class with a `name` in a file of this folder is a task."""

import importlib
from functools import cache
from pathlib import Path

from ._task import BadInput, Example, Item, Splits, Task

__all__ = ["BadInput", "Example", "Item", "Splits", "Task", "tasks"]


@cache
def tasks() -> dict[str, type[Task]]:
    """Every task by name."""
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        importlib.import_module(f"{__name__}.{file.stem}")
    return {cls.name: cls for cls in Task.__subclasses__()}
