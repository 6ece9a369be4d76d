"""The matrices of a Hugging Face folder, one at a time, straight from its safetensors files.

What is a layer, and of which kind and role, the model says that transformers builds of config.json
without numbers (on the meta device); which of them are meant, `targets` as `attach` takes them.
Names that differ between files and model go through the conversions of transformers' own loading;
of experts whose matrices lie apart in the files only the one that is asked for is read.
"""

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from variants import Incompatible
from variants._kinds import Expert, kind_of, matrix_of
from variants._targets import FUSED, Site, all_layers, resolve, role_of

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Place:
    """One matrix of the model."""

    site: Site
    shape: tuple[int, int]
    role: str  # q, k, ..., several with + where they lie in one matrix, or the layer's own name
    stack: str  # the path up to the number of the layer, such as model.layers
    layer: int | None

    @property
    def name(self) -> str:
        return self.site.name


@dataclass(frozen=True)
class Source:
    """Where a parameter lies: under one key of the files, or under those that it is made of."""

    keys: tuple[tuple[str, str], ...]  # (pattern of the converter, key)
    converter: Any = None
    name: str = ""  # of the parameter by which the converter works


class Weights:
    """A folder of a model, read by and by.

    Raises:
        Incompatible: a folder or files that are missing or broken, a target that matches nothing,
            a parameter that the files lack.
    """

    def __init__(self, folder: str | Path, targets: str | list[str] = "all-linear") -> None:
        self.folder = Path(folder).expanduser()
        self.files = _files(self.folder)
        self.model = skeleton(self.folder)
        self.layers = all_layers(self.model)
        self.places = [place_of(self.layers, site) for site in resolve(self.model, targets)]
        names = {_parameter(self.layers[place.site.path], place.site.path) for place in self.places}
        self.sources = _sources(self.model, names, self.files)
        missing = sorted(names - set(self.sources))
        if missing:
            raise Incompatible(
                f"{self.folder}: the files lack {len(missing)} of {len(names)} matrices of a "
                f"{type(self.model).__name__}, the first is {missing[0]}"
            )

    def __iter__(self) -> Iterator[tuple[Place, Tensor, dict[str, Tensor]]]:
        """Each matrix [m, n] in the dtype of the files, in the model's order; no statistics."""
        for place in self.places:
            yield place, self.read(place), {}

    def read(self, place: Place) -> Tensor:
        """The matrix [m, n] in the dtype of the files."""
        site, module = place.site, self.layers[place.site.path]
        stored = self._stored(module, _parameter(module, site.path))
        if stored.shape != module.weight.shape or not stored.is_floating_point():  # type: ignore[union-attr]
            raise Incompatible(
                f"{self.folder}: {site.path} is {stored.dtype} {tuple(stored.shape)} in the files, "
                f"the model has numbers {tuple(module.weight.shape)}: is it quantized already?"  # type: ignore[union-attr]
            )
        W = kind_of(module)(module).to_matrix(stored)
        return W if site.rows is None else W[slice(*site.rows)]

    def _stored(self, module: Any, parameter: str) -> Tensor:
        source = self.sources[parameter]
        index = module.index if isinstance(module, Expert) else None
        if source.converter is None:
            ((_, key),) = source.keys
            return self._tensor(key, index)
        converter = deepcopy(source.converter)
        lists: dict[str, list[str]] = {}
        for pattern, key in source.keys:
            lists.setdefault(pattern, []).append(key)
        own = index
        for pattern, keys in lists.items():
            if index is not None and len(keys) == module.count:
                keys, own = keys[index : index + 1], 0  # one tensor an expert: of this one alone
            for key in keys:
                converter.add_tensor(source.name, key, pattern, lambda key=key: self._tensor(key))
        made = converter.convert(source.name, model=self.model, config=self.model.config)[parameter]
        made = made[0] if isinstance(made, list) else made
        return made if own is None else made[own]

    def _tensor(self, key: str, index: int | None = None) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.files[key], "pt") as file:
                return file.get_tensor(key) if index is None else file.get_slice(key)[index]
        except SafetensorError as error:
            raise _broken(self.files[key], error) from None


def place_of(layers: dict[str, Any], site: Site) -> Place:
    """What there is to say of a matrix without its numbers."""
    m, n = matrix_of(layers[site.path]).shape
    m = m if site.rows is None else site.rows[1] - site.rows[0]
    front, _, last = site.path.rpartition(".")
    leaf = front.rpartition(".")[2] if last.isdigit() else last
    role = site.role or "+".join(FUSED.get(leaf, ())) or role_of(site.path) or leaf
    numbered = re.match(r"(.*?)\.(\d+)\.", site.path)
    stack, layer = (numbered[1], int(numbered[2])) if numbered else ("", None)
    return Place(site, (m, n), role, stack, layer)


def _parameter(module: Any, path: str) -> str:
    return path.rpartition(".")[0] if isinstance(module, Expert) else f"{path}.weight"


def _files(folder: Path) -> dict[str, Path]:
    """The file of each key; every file is opened once, so that a broken one is named at once."""
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        raise Incompatible(f"{folder}: no such folder")
    if (folder / INDEX).is_file():
        try:
            paths = {
                folder / name
                for name in json.loads((folder / INDEX).read_text())["weight_map"].values()
            }
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise Incompatible(f"{folder / INDEX}: truncated, or no index ({error})") from None
    else:
        single = folder / SINGLE
        paths = {single} if single.is_file() else set(folder.glob("*.safetensors"))
    if not paths:
        raise Incompatible(f"{folder}: no safetensors file there")
    found = {}
    for path in sorted(paths):
        if not path.is_file():
            raise Incompatible(f"{path}: no such file, which {INDEX} names")
        try:
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise _broken(path, error) from None
    return found


def _broken(path: Path, error: Exception) -> Incompatible:
    return Incompatible(f"{path}: truncated, or no safetensors file ({error})")


def skeleton(folder: Path) -> Any:
    """The model of config.json on the meta device, of the class that it names."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    if not (folder / "config.json").is_file():
        raise Incompatible(f"{folder}: no config.json there, so no model of transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        cls: Any = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            return (transformers.AutoModel.from_config if cls is None else cls._from_config)(config)
    except (OSError, ValueError, KeyError) as error:
        raise Incompatible(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from None


def _sources(model: Any, names: set[str], files: dict[str, Path]) -> dict[str, Source]:
    """Where each of the parameters lies, as far as the files have them."""
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name in names:
        for key in (name, prefix + name, name.removeprefix(prefix)):
            if key in files:
                found[name] = Source((("", key),))
                break
    return found if len(found) == len(names) else _converted(model, names, files) | found


def _converted(model: Any, names: set[str], files: dict[str, Path]) -> dict[str, Source]:
    """The parameters by the names and conversions with which transformers loads the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    steps = get_model_conversion_mapping(model)
    renamings = [s for s in steps if isinstance(s, WeightRenaming)]
    converters = [s for s in steps if isinstance(s, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    own, prefix = model.state_dict(), model.base_model_prefix
    keys: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(files, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        keys.setdefault(name, []).append((pattern or "", key))
    found = {}
    for first, parts in keys.items():
        converter = by_pattern.get(parts[0][0])
        targets = converter.target_patterns if converter else [""]
        for target in targets:  # of one that makes several parameters, the first one stands for all
            name = first.replace(targets[0], target) if converter else first
            if name in names:
                found[name] = Source(tuple(parts), converter, first)
    return found
