"""A finished run, opened again: its settings, its model, its adapter."""

import warnings
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from variants import Adapter
from variants._registry import outside_of, unknown

from . import config
from .model import Loaded, Source
from .provenance import digest_now
from .record import read_json
from .tasks import BadInput, tasks


def settings_of_run(run: str | Path, *words: str) -> config.Settings:
    """The settings of a run from its config.yaml, with `key=value` words of task, eval or train.

    `task=NAME` starts from that task's own defaults.
    """
    path = Path(run)
    if not (path / "config.yaml").is_file():
        raise BadInput(f"{path}: no config.yaml there, so no folder of a run")
    try:
        saved: Any = OmegaConf.load(path / "config.yaml")
        for key, choices in (("model.kind", config.MODELS), ("task.name", tasks())):
            if OmegaConf.select(saved, key) not in choices:
                raise ValueError(f"{key} is none of {', '.join(choices)}")
        schema = OmegaConf.structured(config.Settings)
        schema.task = _keys_of(OmegaConf.select(saved, "task.name"))
        settings = OmegaConf.merge(schema, saved)
    except (OmegaConfBaseException, YAMLError, AssertionError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else "not a mapping"
        raise BadInput(f"{path / 'config.yaml'}: not the settings of a run ({why})") from None
    for word in sorted(words, key=lambda word: not word.startswith("task=")):
        _set(settings, word)
    return config.settings_of(settings)  # type: ignore[arg-type]


def _keys_of(task: str) -> Any:
    """The keys of a task, typed, with its own defaults."""
    return OmegaConf.structured(config.twin(tasks()[task]))


def _set(settings: Any, word: str) -> None:
    """One `key=value`; a key that does not exist and a value of another type are named."""
    key, _, value = word.partition("=")
    if key == "task":
        if value not in tasks():
            raise BadInput(str(unknown("task", value, list(tasks()))))
        settings.task = _keys_of(value)
        return
    if not (key.startswith(("task.", "eval.")) or key == "train.seq_len") or not value:
        raise BadInput(f"{word}: only task=, task.*=, eval.*= and train.seq_len= can be given")
    try:
        settings.merge_with_dotlist([word])
    except (ConfigAttributeError, ConfigKeyError):
        group = OmegaConf.select(settings, key.partition(".")[0])
        raise BadInput(f"{key}: no such key; choices: {', '.join(group)}") from None
    except (OmegaConfBaseException, YAMLError) as error:
        raise BadInput(f"{word}: {str(error).splitlines()[0]}") from None


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
        raise BadInput(f"{run}: no adapter there: the run is not finished, or rerun=true is due")
    adapter = variants.load(loaded.model, Path(run) / "adapter", trainable=False)
    used = (read_json(Path(run) / "env.json") or {}).get("sources", {}).values()
    name = adapter.choice.preset
    for file in outside_of(name, adapter.choice.parts):
        if used and digest_now(file) not in used:
            told = f"{run}: trained with another {name} than that of {file} as it is now"
            warnings.warn(told, stacklevel=2)
    return adapter


def open_run(run: str | Path) -> tuple[Loaded, Adapter]:
    """The model of a run with its adapter in it, in eval mode."""
    loaded = load_model(settings_of_run(run))
    return loaded, load_adapter(loaded, run)
