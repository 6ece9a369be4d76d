"""Save and load an adapter: safetensors and json, no pickle."""

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ._adapter import Adapter, build, choose, chosen, planned_item
from ._api import Base
from ._kinds import shape_of
from ._layer import refuse_adapted
from ._registry import Incompatible
from ._targets import Site, all_layers

FORMAT = 1
WEIGHTS, SETTINGS = "adapter.safetensors", "adapter.json"


def write_atomically(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_tensors(path: Path, tensors: dict[str, Tensor], **about: str) -> None:
    """A safetensors file that appears whole or not at all, with what `about` says of it; a full
    disk is an OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        own = {k: t.detach().contiguous() for k, t in tensors.items()}
        part.touch()
        mode = part.stat().st_mode  # safetensors' own would shut out a group's other users
        save_file(own, part, {"format": "pt", **about})
        part.chmod(mode)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; one that is missing or cut short is named."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise Incompatible(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise Incompatible(f"{path}: truncated, or not a safetensors file ({error})") from None


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a json file; one that is missing or cut short is named."""
    if not path.is_file():
        raise Incompatible(f"{path}: no such file")
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise Incompatible(f"{path}: truncated, or not json ({error})") from None
    if not isinstance(found, dict):
        raise Incompatible(f"{path}: not a json object")
    return found


def save(adapter: Adapter, path: Path) -> Path:
    """Writes the adapter into the folder `path`; the settings come last."""
    path.mkdir(parents=True, exist_ok=True)
    choice = adapter.choice
    settings = {
        "format": FORMAT,
        "preset": choice.preset,
        "axes": choice.axes(),
        "trained_on": trained_on(adapter),
        "rank": choice.rank,
        "alpha": choice.alpha,
        "targets": adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets),
        "dropout": adapter.dropout,
        "seed": adapter.seed,
        "modules_to_save": list(adapter.saved_modules),
        "sites": {
            name: {
                "path": site.path,
                "role": site.role,
                "rows": site.rows,
                "rank": adapter.layers[name].rank,
                "s": adapter.layers[name].full_s,
                "base": adapter.fingerprints[name],
            }
            for name, site in adapter.sites.items()
        },
    }
    write_tensors(path / WEIGHTS, adapter.tensors())
    write_atomically(path / SETTINGS, json.dumps(settings, indent=1) + "\n")
    return path


def load(
    model: nn.Module,
    path: str | Path,
    *,
    trainable: bool = True,
    base: str | Mapping[str, Any] | Base | None = None,
) -> Adapter:
    """Puts a saved adapter into `model`. No init runs, so no seed matters.

    Weights that differ from those that the adapter was made for are said (`warnings`), and so is
    another storage than that which it was trained on.

    Args:
        base: another part for the base axis, as `attach` takes it; None: the adapter's own.

    Raises:
        Incompatible: a file that is missing or truncated, or layers that the model lacks.
    """
    refuse_adapted(model)
    path = Path(path)
    settings = read_settings(path / SETTINGS)
    if settings.get("format") != FORMAT:
        raise Incompatible(f"{path}: format {settings.get('format')}, this code reads {FORMAT}")
    tensors = read_tensors(path / WEIGHTS)
    axes = settings["axes"] | ({} if base is None else {"base": base})
    choice = choose(settings["preset"], settings["rank"], settings["alpha"], **axes)
    layers, planned = all_layers(model), []
    for saved in settings["sites"].values():
        if saved["path"] not in layers:
            raise Incompatible(
                f"{path} was made for another model: this one has no layer {saved['path']}"
            )
        rows = None if saved["rows"] is None else (saved["rows"][0], saved["rows"][1])
        m, n = shape_of(layers[saved["path"]])
        m = m if rows is None else rows[1] - rows[0]
        site = Site(saved["path"], saved["role"], rows)
        planned.append(planned_item(choice, site, (m, n), saved["rank"], saved["s"]))
    adapter = build(
        model,
        choice,
        planned,
        targets=settings["targets"],
        dropout=settings["dropout"],
        seed=settings["seed"],
        modules_to_save=tuple(settings["modules_to_save"]),
        tensors=tensors,
    )
    other = [
        n for n, saved in settings["sites"].items() if adapter.fingerprints[n] != saved["base"]
    ]
    if other:
        warnings.warn(
            f"{path} was made for another base: {len(other)} of {len(planned)} matrices differ, "
            f"the first is {other[0]}",
            stacklevel=2,
        )
    say_other_base(adapter, path, settings.get("trained_on", settings["axes"]["base"]))
    if not trainable:
        for tensor in adapter.parameters():
            tensor.requires_grad_(False)
    return adapter


def trained_on(adapter: Adapter) -> dict[str, Any]:
    """The part of the base axis that the adapter learned on."""
    return adapter.trained_on or adapter.choice.axes()["base"]


def say_other_base(adapter: Adapter, path: Path, learned: dict[str, Any]) -> None:
    """Warns where an adapter stands on another storage than it learned on, and keeps in mind
    which that was."""
    here = adapter.choice.base
    there = chosen("base", {k: v for k, v in learned.items() if k not in here.kernels})
    names = [_named(part) for part in (there, here)]
    if names[0] != names[1]:
        adapter.trained_on = learned
        warnings.warn(
            f"{path} was trained on base {names[0]} and stands on base {names[1]}: its outputs "
            f"differ by what the two storages do",
            stacklevel=3,
        )


def _named(base: Any) -> str:
    """The part with the settings that are not its defaults and change its numbers."""
    given = {f.name: getattr(base, f.name) for f in fields(base) if f.name not in base.kernels}
    own = {f.name: f.default for f in fields(base)}
    return " ".join([base.name, *(f"{k}={v}" for k, v in given.items() if v != own[k])])
