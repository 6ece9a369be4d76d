"""Hugging Face PEFT's format, in and out, for the methods that both have.

Keys: `base_model.model.` + path + `.lora_A.weight` and so on. Of LoRA and AdaLoRA `_peft_lora.py`,
of HiRA, LoHa, LoKr, MiSS, BAT, DeLoRA, GraLoRA, VeRA, RandLoRA, VB-LoRA, FourierFT, C3A, SHiRA,
OFT, BOFT, HRA, (IA)^3, LN tuning and RoAd `_peft_methods.py` says which tensors and settings are
which of ours. What PEFT cannot say is refused, and so is a tensor or a setting of a file that is
not read here and may change what it computes.
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._adapter import Adapter, build, choose, planned_item
from ._api import Base
from ._io import (
    read_metadata,
    read_settings,
    read_tensors,
    say_other_base,
    trained_on,
    write_atomically,
    write_tensors,
)
from ._kinds import Conv1DKind, kind_of, matrix_of
from ._peft_method import File, Method, Named, Read
from ._peft_methods import METHODS, method_of
from ._registry import Incompatible
from ._targets import Site, all_layers, resolve

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEADS = ("classifier", "score")
ROOT, PREFIX = "base_model.", "base_model.model."
# Settings of any method that say what is adapted, whence, and how it started: the tensors say the
# first, and a trained adapter does not depend on the others.
IGNORED = (
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_weights", "layers_pattern", "layers_to_transform", "modules_to_save",
    "peft_type", "peft_version", "revision", "target_modules", "task_type",
)  # fmt: skip


@torch.no_grad()
def save_peft(adapter: Adapter, path: Path) -> Path:
    """Writes the adapter as PEFT would."""
    method = method_of(adapter)
    _refuse_unsaid(adapter, method)
    written = method.save(adapter)
    tensors = {f"{PREFIX}{name}.{k}": t for name, p in written.layers.items() for k, t in p.items()}
    tensors |= {f"{ROOT}{k}": t for k, t in written.shared.items()}
    for name, module in adapter.saved_modules.items():
        tensors |= {f"{PREFIX}{name}.{k}": t for k, t in module.copy.state_dict().items()}
    model_config = getattr(adapter.model, "config", None)
    config = written.config | {
        "auto_mapping": None,
        "base_model_name_or_path": getattr(model_config, "name_or_path", None),
        "inference_mode": True,
        "modules_to_save": list(adapter.saved_modules) or None,
        "peft_type": method.kind,
        "target_modules": _target_modules(adapter),
        "task_type": _task_type(adapter),
    }
    if Conv1DKind in method.kinds:
        config["fan_in_fan_out"] = any(
            isinstance(layer.kind, Conv1DKind) for layer in adapter.layers.values()
        )
    if method.dropout:
        config[method.dropout] = adapter.dropout
    elif adapter.dropout:
        warnings.warn(
            f"PEFT's {method.kind} has no dropout of this kind: dropout={adapter.dropout} of the "
            f"training is not in the file",
            stacklevel=3,
        )
    path.mkdir(parents=True, exist_ok=True)
    # PEFT's settings have no place for it, and it reads no such metadata
    learned = json.dumps(trained_on(adapter))
    own = {k: t.detach().clone() for k, t in tensors.items()}
    write_tensors(path / WEIGHTS, own, lora_variants_base=learned)
    write_atomically(path / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return path


def _refuse_unsaid(adapter: Adapter, method: Method) -> None:
    """Refuses what no method of PEFT says, and layers on which it has not this one."""
    base = adapter.choice.base
    for name, layer in adapter.layers.items():
        if adapter.sites[name].rows is not None:
            raise Incompatible(f"PEFT's format has no place for a slice of a fused layer: {name}")
        if layer.kept is not None:
            raise Incompatible(
                f"PEFT's format cannot say that the frozen weight of {name} was moved in training; "
                f"export it merged instead"
            )
        if type(layer.kind) not in method.kinds or not method.takes(layer.kind.shell):
            raise Incompatible(
                f"PEFT's {method.kind} is not for {name}, {layer.kind.shell}; export it merged "
                f"instead"
            )
        if base.lossy and layer.subtracted is not None:
            raise Incompatible(
                f"PEFT's format cannot say that {adapter.choice.init} moved the weight before base "
                f"{base.name} stored it; export it merged or native"
            )
    if base.lossy:
        warnings.warn(
            f"the adapter was trained on base {base.name}: on weights stored otherwise its outputs "
            f"differ by that storage's error",
            stacklevel=4,
        )


def _target_modules(adapter: Adapter) -> list[str] | str:
    """The adapted paths; as one expression where PEFT would take the end of another path too."""
    own = set(adapter.layers)
    if any(path.endswith(f".{name}") and path not in own
           for path, _ in adapter.model.named_modules() for name in own):  # fmt: skip
        return "|".join(map(re.escape, sorted(own)))
    return sorted(own)


def _task_type(adapter: Adapter) -> str | None:
    name = type(adapter.model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if name.endswith("ForSequenceClassification"):  # there PEFT looks for the head in the file
        heads = [path for path, _ in adapter.model.named_children() if path in HEADS]
        return "SEQ_CLS" if set(heads) <= set(adapter.saved_modules) else None
    return None


def load_peft(
    model: nn.Module,
    path: str | Path,
    *,
    trainable: bool = True,
    base: str | Mapping[str, Any] | Base | None = None,
) -> Adapter:
    """Puts an adapter in PEFT's format, of any method named above, into `model`.

    PEFT's files do not say how the base was stored in training (QLoRA's in 4 bits): give `base` to
    have it stored so here. A file that was written here says it, and another base is warned of.

    Args:
        base: a part of the base axis, as `attach` takes it; None: the weights as they are.

    Raises:
        Incompatible: a method or a setting that has no equal here, a missing or truncated file.
    """
    path = Path(path)
    config, tensors = read_settings(path / CONFIG), read_tensors(path / WEIGHTS)
    kinds = {method.kind: method for method in reversed(METHODS)}
    kind = config.get("peft_type")
    if kind not in kinds:
        raise Incompatible(
            f"{path}: peft_type {kind} is not read; choices: {', '.join(sorted(kinds))}"
        )
    method = kinds[kind]
    if config.get("bias", "none") != "none":
        raise Incompatible(f"{path}: bias={config['bias']}: trained biases are not read")
    known = {*IGNORED, *method.reads, *method.ignores, method.dropout, "bias"}
    for key, value in config.items():
        if value and key not in known:
            raise Incompatible(f"{path}: {key}={value} has no equal here")
    modules = _saved_modules(method, tensors, config)
    file = _sorted(model, path, method, config, tensors, modules)
    try:
        read = method.load(file)
    except KeyError as error:
        raise Incompatible(f"{path}: {error} is missing") from None
    left = [f"{name}.{key}" for name, found in file.layers.items() for key in found]
    if left or file.shared:
        raise Incompatible(f"{path}: the tensor {[*left, *file.shared][0]} has no equal here")
    if base is not None:
        own = read.choice
        axes = own.axes() | {"base": base}
        read.choice = choose(own.preset, own.rank, own.alpha, **axes)
    adapter = _built(model, read, modules, config, method.drops(file))
    learned = read_metadata(path / WEIGHTS).get("lora_variants_base")
    if learned is None:
        adapter.notes.append("the file does not say how the base was stored in training")
    else:
        say_other_base(adapter, path, json.loads(learned))
    if not trainable:
        for tensor in adapter.parameters():
            tensor.requires_grad_(False)
    return adapter


def _named(method: Method, key: str) -> tuple[str, str] | None:
    """(layer, PEFT's name of the tensor) of a key, or None: no tensor of the method."""
    for theirs in (*method.names, *method.also):
        if key.startswith(PREFIX) and key.endswith(f".{theirs}"):
            return key.removeprefix(PREFIX).removesuffix(f".{theirs}"), theirs
    return None


def _saved_modules(method: Method, tensors: Named, config: Mapping[str, Any]) -> Named:
    """{"modules.<path>.<tensor>": ...} of modules_to_save, whose keys carry no mark in PEFT."""
    names = config.get("modules_to_save") or []
    found = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        if _named(method, key) is None and any(
            re.search(rf"(^|\.){re.escape(n)}\.", path) for n in names
        ):
            found[f"modules.{path}"] = tensor
    return found


def _sorted(
    model: nn.Module,
    path: Path,
    method: Method,
    config: Mapping[str, Any],
    tensors: Named,
    modules: Named,
) -> File:
    """The file by layers. A tensor of no layer must be the model's own, number for number (PEFT
    saves embeddings)."""
    own = model.state_dict()
    layers: dict[str, Named] = {}
    shared: Named = {}
    for key, tensor in tensors.items():
        name, place = key.removeprefix(PREFIX), _named(method, key)
        if place is not None:
            layers.setdefault(place[0], {})[place[1]] = tensor
        elif key.removeprefix(ROOT) in method.shared:
            shared[key.removeprefix(ROOT)] = tensor
        elif f"modules.{name}" not in modules:
            mine = own.get(name.replace(".base_layer.", "."))
            if mine is None or mine.shape != tensor.shape or not torch.equal(mine.cpu(), tensor):
                raise Incompatible(f"{path}: the tensor {key} has no equal here")
    if not layers:
        raise Incompatible(f"{path}: the PEFT adapter has no layer that is read here")
    found = all_layers(model)
    resolve(model, list(layers))  # refuses what the model lacks or ties to another place
    for name in layers:
        if kind_of(found[name]) not in method.kinds or not method.takes(found[name]):
            raise Incompatible(f"{path}: {method.kind} on {name}, {found[name]}, is not read")
    return File(str(path), config, layers, shared, found)


def _built(
    model: nn.Module, read: Read, modules: Named, config: Mapping[str, Any], dropout: float
) -> Adapter:
    layers, planned = all_layers(model), []
    for name, r in read.ranks.items():
        m, n = matrix_of(layers[name]).shape
        planned.append(planned_item(read.choice, Site(name), (m, n), r, read.scales[name]))
    names = config.get("modules_to_save") or []
    saved = [
        path
        for path, _ in model.named_modules()
        if any(_is(path, name) for name in names)
        and any(key.startswith(f"modules.{path}.") for key in modules)
    ]
    return build(
        model,
        read.choice,
        planned,
        targets=sorted(read.ranks),
        dropout=dropout,
        seed=0,
        modules_to_save=tuple(saved),
        tensors=read.tensors | modules,
    )


def _is(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)
