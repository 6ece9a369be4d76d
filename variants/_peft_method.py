"""One method of PEFT: what each says of its names and settings, and what all have in common.

What is out of reach of a method (two ranks where it has one, a block size that does not divide a
layer) is refused; what it says in another way (a sign, a scale, a transposed factor, a random base)
is converted exactly.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ._adapter import Adapter, Choice, choose
from ._kinds import Kind, matrix_of
from ._layer import Adapted
from ._registry import Incompatible

Named = dict[str, Tensor]


@dataclass
class File:
    """What lies in a folder of PEFT's format. What a method reads it takes out."""

    path: str
    config: Mapping[str, Any]
    layers: dict[str, Named]  # by layer, then by PEFT's name
    shared: Named  # of the whole model
    modules: Mapping[str, Any]  # the model's own, by layer

    def get(self, key: str, default: Any) -> Any:
        """A setting; an absent one has PEFT's default."""
        value = self.config.get(key)
        return default if value is None else value

    def pattern(self, patterns: str, name: str, default: Any) -> Any:
        """PEFT's rule: keys are regular expressions on the end of the path, the first one wins."""
        for key, value in (self.config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        return default

    def shape(self, name: str) -> tuple[int, int]:
        m, n = matrix_of(self.modules[name]).shape
        return m, n

    def refuse(self, *keys: str) -> Incompatible:
        """The error for settings that have no equal here."""
        given = ", ".join(f"{key}={self.config.get(key)}" for key in keys)
        return Incompatible(f"{self.path}: {given} has no equal here")


@dataclass
class Read:
    """The adapter that a file means."""

    choice: Choice
    ranks: dict[str, int]
    scales: dict[str, float]
    tensors: Named  # as `Adapter.tensors` names them


@dataclass
class Written:
    """What PEFT would write of an adapter."""

    config: dict[str, Any]
    layers: dict[str, Named]
    shared: Named


class Method:
    """One method of PEFT. The defaults fit one with the same tensors and a rank for each layer."""

    kind: ClassVar[str]  # PEFT's name
    preset: ClassVar[str]
    names: ClassVar[Mapping[str, str]] = {}  # PEFT's tensors of a layer, and ours
    also: ClassVar[tuple[str, ...]] = ()  # those of a layer that have no one name here
    shared: ClassVar[tuple[str, ...]] = ()  # its tensors of the whole model
    reads: ClassVar[tuple[str, ...]] = ("r",)  # the settings that matter here
    ignores: ClassVar[tuple[str, ...]] = ()  # those that a trained adapter does not depend on
    dropout: ClassVar[str | None] = None  # its name for ours
    kinds: ClassVar[tuple[type[Kind], ...]] = (Kind,)

    def save(self, adapter: Adapter) -> Written:
        config = self.config(adapter)
        layers = {name: self.write(layer) for name, layer in adapter.layers.items()}
        return Written(config, layers, {})

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """PEFT's settings of this adapter."""
        return {"r": self.one("r", [layer.rank for layer in adapter.layers.values()])}

    def write(self, layer: Adapted) -> Named:
        """One layer's tensors by PEFT's names."""
        p = layer.params
        return {theirs: p[own] for theirs, own in self.names.items() if own in p}

    def load(self, file: File) -> Read:
        ranks, tensors = {}, {}
        for name, found in file.layers.items():
            ranks[name], p = self.read(file, name, found)
            tensors |= {f"{name}.{k}": t for k, t in p.items()}
        choice = self.choose(file, ranks, tensors)
        scales = {name: self.scale(file, name, choice, r) for name, r in ranks.items()}
        return Read(choice, ranks, scales, tensors)

    def choose(self, file: File, ranks: Mapping[str, int], p: Named) -> Choice:
        """The parts that the settings mean, and the tensors read (p, by `layer.tensor`)."""
        return choose(self.preset, rank=file.config["r"])

    def read(self, file: File, name: str, found: Named) -> tuple[int, Named]:
        """The rank of one layer and its p."""
        p = {own: found.pop(theirs) for theirs, own in self.names.items() if theirs in found}
        return file.pattern("rank_pattern", name, file.config.get("r")), p

    def scale(self, file: File, name: str, choice: Choice, r: int) -> float:
        """s of one layer."""
        return choice.s(r)

    def one(self, what: str, values: Iterable[Any]) -> Any:
        """The value that all layers have."""
        found = sorted(set(values))
        if len(found) > 1:
            few = ", ".join(map(str, found[:4]))
            raise Incompatible(
                f"PEFT's {self.kind} has one {what} for all layers, here are {few}; "
                f"export it merged instead"
            )
        return found[0]

    def takes(self, shell: Any) -> bool:
        """Whether PEFT has the method on this very layer, one of `kinds`."""
        return True

    def drops(self, file: File) -> float:
        """The dropout of a file."""
        return file.get(self.dropout, 0.0) if self.dropout else 0.0

    def refuse(self, adapter: Adapter, reason: str) -> Incompatible:
        """The error for an adapter that the method cannot say."""
        form = adapter.choice.form.name
        return Incompatible(f"form {form}: PEFT's {self.kind} {reason}; export it merged instead")


def patterned(key: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The first layer's value as PEFT's `key`, and others by whole paths (it takes ends of paths).

    >>> patterned("alpha", {"a": 1, "b.c": 2})
    {'alpha': 1, 'alpha_pattern': {'^b\\\\.c': 2}}
    """
    first = next(iter(values.values()))
    other = {f"^{re.escape(name)}": value for name, value in values.items() if value != first}
    name = "rank" if key == "r" else key.removeprefix("lora_")
    return {key: first, f"{name}_pattern": other}


def dotted(method: Method, key: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same for the two methods that look for `.*\\.KEY$` in a path, or for the path itself."""
    first = next(iter(values.values()))
    other = {name: value for name, value in values.items() if value != first}
    for name in other:
        longer = [path for path in values if re.match(rf".*\.{name}$", path)]
        if longer:
            raise Incompatible(
                f"PEFT's {method.kind} takes the {key} of {name} for that of {longer[0]} too; "
                f"export it merged instead"
            )
    return {key: first, f"{key}_pattern": other}


def ranks_of(adapter: Adapter) -> dict[str, int]:
    return {name: layer.rank for name, layer in adapter.layers.items()}


def first_scale(adapter: Adapter) -> float:
    return next(iter(adapter.layers.values())).full_s
