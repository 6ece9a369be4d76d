"""An adapter opened for analysis: a run of this project, or a folder of PEFT's or native format.

A run says all that is needed to build its model, adapter and data again (config.yaml). A PEFT
folder says its base by name alone, and neither data nor how the adapter started.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import variants
from experiments.config import HF, Settings
from experiments.model import Loaded, Source
from experiments.record import read_json
from experiments.saved import load_adapter, load_model, settings_of_run
from experiments.tasks import BadInput
from variants._adapter import Adapter
from variants._io import SETTINGS, read_metadata, read_settings, read_tensors
from variants._kinds import kind_of
from variants._layer import Adapted
from variants._peft import CONFIG, WEIGHTS
from variants._targets import all_layers

from .spectra import Change, Factors
from .weights import Place, place_of

PREFIX = "adapter."  # of its tensors in a checkpoint


def change(layer: Adapted) -> Change:
    """dW = W - W0 of an adapted layer, W0 its original: by factors where the form has them.

    Where the init moved the base by s B0 A0 (PiSSA) that is a part of the change, of twice the
    rank.
    """
    p: Any = layer.params
    factors = layer.form.factors(p)
    if factors is None or layer.kept is not None:
        return (layer.weight - layer.original).detach()
    found = Factors(factors[0].detach(), factors[1].detach(), layer.full_s)
    return found if layer.restoring is None else found.less(*layer.restoring)


@dataclass
class Opened:
    """A model with an adapter in it, in eval mode."""

    path: Path
    settings: Settings | None  # of a run
    loaded: Loaded
    adapter: Adapter
    places: dict[str, Place]  # of each adapted matrix, by the layer's name
    modules: Mapping[str, Any]  # the model's layers as its files had them

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def file_matrix(self, name: str) -> Tensor:
        """W [m, n] of a layer as the model's files have it, whatever the base made of it."""
        site = self.places[name].site
        module = self.modules[site.path]
        W = kind_of(module)(module).matrix(module).detach()
        return W if site.rows is None else W[slice(*site.rows)]

    def checkpoints(self) -> list[tuple[int, dict[str, Tensor]]]:
        """(step, tensors of the adapter) of each checkpoint that the run keeps, in their order."""
        found = []
        for name in ("previous", "last"):
            folder = self.path / "checkpoint" / name
            state = read_json(folder / "state.json")
            if state is not None:
                tensors = read_tensors(folder / "tensors.safetensors")
                own = {k.removeprefix(PREFIX): t for k, t in tensors.items()
                       if k.startswith(PREFIX)}  # fmt: skip
                found.append((state["step"], own))
        return found


def opened(path: str | Path, model: str | Path | None = None, device: str = "cpu") -> Opened:
    """Opens the folder of a finished run, of PEFT's format, or of this project's own.

    Args:
        model: a folder or name on the hub, in place of the base that the folder names; needed for
            the project's own format, which names none.

    Raises:
        BadInput, Incompatible: a folder of none of these, or files that are missing or broken.
    """
    path, settings = Path(path).expanduser(), None
    if (path / "config.yaml").is_file():
        settings = settings_of_run(path)
        if model is not None:
            settings.model = HF(path=str(model), dtype=getattr(settings.model, "dtype", "fp32"))
        loaded, load = load_model(settings), partial(load_adapter, run=path)
    elif (path / CONFIG).is_file():
        loaded, load = _peft_base(path, model), partial(_load_peft, path=path)
    elif (path / SETTINGS).is_file():
        if model is None:
            raise BadInput(f"{path}: an adapter does not name its base: give --model DIR")
        loaded = Source(HF(path=str(model))).load()
        load = partial(_load, path=path)
    else:
        raise BadInput(f"{path}: no folder of a run (config.yaml) nor of an adapter ({CONFIG}, "
                       f"{SETTINGS})")  # fmt: skip
    loaded.model.to(device)
    modules = dict(all_layers(loaded.model))
    adapter = load(loaded)
    if not all(torch.isfinite(t).all() for t in adapter.parameters()):
        raise BadInput(f"{path}: its adapter has numbers that are not finite: the run diverged")
    places = {name: place_of(modules, adapter.sites[name]) for name in adapter.layers}
    loaded.model.eval()
    return Opened(path, settings, loaded, adapter, places, modules)


@dataclass(frozen=True)
class Asked:
    """What the command was asked, and how to open the folder again."""

    open: Callable[[], Opened]
    text: Path | None = None
    against: Opened | None = None
    eps: float = 0.5
    k: int = 10  # singular vectors that are looked at for intruders
    device: str = "cpu"
    reference: str = ""  # the preset that learning rates are relative to


def _load(loaded: Loaded, path: Path) -> Adapter:
    return variants.load(loaded.model, path, trainable=False)


def _load_peft(loaded: Loaded, path: Path) -> Adapter:
    """On the storage that the file says it was trained on, where it says one."""
    learned = read_metadata(path / WEIGHTS).get("lora_variants_base")
    base = None if learned is None else json.loads(learned)
    return variants.load_peft(loaded.model, path, trainable=False, base=base)


def _peft_base(path: Path, model: str | Path | None) -> Loaded:
    config = read_settings(path / CONFIG)
    name = model or config.get("base_model_name_or_path")
    if not name:
        raise BadInput(f"{path / CONFIG}: base_model_name_or_path is empty: give --model DIR")
    labels = 0
    if config.get("task_type") == "SEQ_CLS":
        labels = _labels(path)
    try:
        return Source(HF(path=str(name))).load(labels, regression=labels == 1)
    except BadInput as error:
        if model is not None:
            raise BadInput(str(error).replace("model.path=", "--model ", 1)) from None
        raise BadInput(f"{path}: its base is not reached ({error}): give --model DIR") from None


def _labels(path: Path) -> int:
    """How many outputs the head in a PEFT folder has."""
    heads = [t for k, t in read_tensors(path / WEIGHTS).items()
             if k.endswith(("score.weight", "classifier.weight", "out_proj.weight"))]  # fmt: skip
    if not heads:
        raise BadInput(f"{path}: a classifier whose head is not in the file")
    return len(heads[-1])
