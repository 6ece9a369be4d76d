"""A finished run, opened again: its settings, its model, its adapter."""

from pathlib import Path

from omegaconf import OmegaConf

from variants import Adapter

from . import config
from .model import Loaded, Source
from .tasks import BadInput


def settings_of_run(run: str | Path, *words: str) -> config.Settings:
    """The settings of a run from its config.yaml, with `key=value` words of task, eval or train.

    `task=NAME` starts from that task's own defaults.
    """
    path = Path(run)
    if not (path / "config.yaml").is_file():
        raise BadInput(f"{path}: no config.yaml there, so no folder of a run")
    saved = OmegaConf.load(path / "config.yaml")
    for word in words:
        key, _, value = word.partition("=")
        if key == "task":
            saved.task = {"name": value}
        elif key.partition(".")[0] not in ("task", "eval", "train") or not value:
            raise BadInput(f"{word}: only task=, task.*=, eval.*= and train.*= can be given")
    given = OmegaConf.from_dotlist([word for word in words if not word.startswith("task=")])
    schema = OmegaConf.structured(config.Settings)
    return config.settings_of(OmegaConf.merge(schema, saved, given))  # type: ignore[arg-type]


def load_model(settings: config.Settings) -> Loaded:
    """The untouched model of a run, with the head that it began with."""
    import torch

    torch.manual_seed(settings.seed)  # a new head draws from here
    task = settings.task
    return Source(settings.model).load(task.num_labels, regression=task.num_labels == 1)


def load_adapter(loaded: Loaded, run: str | Path) -> Adapter:
    """Puts a run's adapter into its model."""
    import variants

    if not (Path(run) / "adapter").is_dir():
        raise BadInput(f"{run}: no adapter there: the run is not finished")
    return variants.load(loaded.model, Path(run) / "adapter", trainable=False)


def open_run(run: str | Path) -> tuple[Loaded, Adapter]:
    """The model of a run with its adapter in it, in eval mode."""
    loaded = load_model(settings_of_run(run))
    return loaded, load_adapter(loaded, run)
