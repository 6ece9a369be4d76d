"""Models whose files have codes for weights: bitsandbytes' 4 bits, read without bitsandbytes.

The codes become the storage of the layers as they are. Nothing is quantized again, and no dense
matrix is ever made: the model is built with holes in the places of those layers, its other weights
come by `from_pretrained`, and the holes are filled.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .tasks import BadInput


def is_coded(folder: Path) -> bool:
    """Whether config.json says so; a kind of codes that this cannot read is refused."""
    config = json.loads((folder / "config.json").read_text())
    settings = config.get("quantization_config")
    if settings is None:
        return False
    method = settings.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or not settings.get("load_in_4bit"):
        bits = " in 8 bits" if settings.get("load_in_8bit") else ""
        raise BadInput(
            f"model.path={folder}: its weights are stored by {method}{bits}; what is read here are "
            f"numbers, and bitsandbytes' 4 bits"
        )
    return True


def load_coded(cls: Any, folder: Path, dtype: torch.dtype, **settings: Any) -> tuple[Any, Any]:
    """(model, loading info) as `cls.from_pretrained` gives them, with its codes as storage."""
    import transformers

    from variants._bitsandbytes import base_of
    from variants._layer import Frozen, replace

    labels = {k: settings.pop(k) for k in ("num_labels",) if k in settings}
    config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **labels)
    del config.quantization_config
    if settings.pop("trust_remote_code", False):
        raise BadInput(f"model.path={folder}: weights in codes, and code of its own: not both")
    if hasattr(cls, "_model_mapping"):
        cls = cls._model_mapping[type(config)]
    stored = dict(_stored(folder, dtype))
    kinds: dict[str, Any] = {}

    def with_holes(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        for path in stored:
            kinds[path] = _dig(self, path, folder)

    holed = type(cls.__name__, (cls,), {"__init__": with_holes, "__module__": cls.__module__})
    model, info = holed.from_pretrained(folder, config=config, dtype=dtype, **settings)
    model.__class__ = cls
    for path, codes in stored.items():
        bias = model.get_submodule(path).bias
        replace(model, path, Frozen(codes, bias, kinds[path], base_of(codes)))
    return model, info


def _stored(folder: Path, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """(path, storage) of each layer in codes; a layer's tensors lie in one file."""
    from variants._bitsandbytes import STATE
    from variants._io import read_tensors
    from variants._quantize import Blocks

    for file in sorted(folder.glob("*.safetensors")):
        tensors = read_tensors(file)
        for name in [key.partition(STATE)[0] for key in tensors if STATE in key]:
            codes = Blocks.from_bitsandbytes(tensors, name)
            codes.dtype = dtype
            yield name.removesuffix(".weight"), codes


def _dig(model: nn.Module, path: str, folder: Path) -> Any:
    """Puts a module with the layer's bias alone in its place; returns the kind of the layer."""
    from variants._kinds import Conv1DKind, Kind, kind_of
    from variants._layer import replace

    try:
        layer: Any = model.get_submodule(path)
        kind = kind_of(layer)
    except AttributeError:
        layer, kind = None, None
    if kind not in (Kind, Conv1DKind):
        raise BadInput(
            f"model.path={folder}: {path} is in codes, and a {type(model).__bases__[0].__name__} "
            f"has no linear layer there"
        )
    hole: Any = nn.Module()
    hole.register_parameter("bias", layer.bias)
    hole.weight = torch.empty(0)  # which a model's own initialisation fills, as it goes by
    replace(model, path, hole)
    return kind(layer)
