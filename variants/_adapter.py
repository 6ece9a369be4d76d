"""Attach a variant to a model: choose the parts, resolve the targets, build the layers."""

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._api import Allocation, Base, Form, Init, Part, Scale, Update, wide
from ._layer import (
    Adapted,
    Copied,
    Frozen,
    Fused,
    freeze,
    kind_of,
    plain,
    refuse_adapted,
    replace,
    stand_ins,
)
from ._registry import AXES, Incompatible, find_part, find_preset, unknown
from ._targets import Site, all_linear, linear_layers, resolve

Targets = str | Sequence[str]


@dataclass(frozen=True)
class Choice:
    """A variant with every default filled in: what a run of it is, apart from the model."""

    preset: str
    form: Form
    init: Init
    scale: Scale
    allocation: Allocation
    update: Update
    base: Base
    rank: int | None
    alpha: float | None
    notes: tuple[str, ...] = ()  # settings that were asked for and have no meaning here

    @property
    def parts(self) -> dict[str, Part]:
        return {axis: getattr(self, axis) for axis in AXES}

    def axes(self) -> dict[str, dict[str, Any]]:
        """{axis: {"name": part, **settings}}, the form that `attach` and files take."""
        return {axis: {"name": p.name, **asdict(p)} for axis, p in self.parts.items()}  # type: ignore[call-overload]

    def s(self, r: int) -> float:
        """The scale of a matrix of rank r."""
        return self.scale.value(1.0 if self.alpha is None else self.alpha, r)


def choose(
    preset: str, rank: int | None = None, alpha: float | str | None = None, **axes: Any
) -> Choice:
    """The preset with other parts on some axes; raises `Incompatible` where two do not fit.

    An axis takes a part's name, a mapping {"name": part, setting: value}, or a part.
    """
    info = find_preset(preset)
    for axis in axes:
        if axis not in AXES:
            raise unknown("axis", axis, list(AXES))
    parts: dict[str, Any] = {}
    for axis in AXES:
        given = axes.get(axis)
        parts[axis] = _part(axis, info.axes[axis] if given is None else given)
    form: Form = parts["form"]
    parts["init"].fits(form)
    parts["allocation"].fits(form)
    if not form.scaled and parts["scale"].name != "none":
        raise Incompatible(f"form {form.name} has no scale: it needs scale none")
    notes = []
    if form.rank_means is None:
        if rank is not None:
            notes.append(f"rank={rank} has no meaning for form {form.name}: there is none")
        rank = None
    else:
        rank = _whole_rank(info.rank if rank is None else rank, preset)
    if not parts["scale"].has_alpha:
        if alpha is not None:
            notes.append(f"alpha={alpha} has no meaning with scale {parts['scale'].name}")
        alpha = None
    else:
        alpha = _alpha(info.alpha if alpha is None else alpha, rank, preset)
    return Choice(preset, rank=rank, alpha=alpha, notes=tuple(notes), **parts)


def _part(axis: str, given: Any) -> Part:
    if isinstance(given, Part):
        if given.axis != axis:
            raise Incompatible(f"{axis}: {given} is a part of another axis")
        return given
    if isinstance(given, str):
        return find_part(axis, given).load()
    settings = dict(given)
    return find_part(axis, settings.pop("name", None)).load(**settings)


def _whole_rank(rank: Any, preset: str) -> int:
    if rank is None:
        raise Incompatible(f"rank: preset {preset} has no default rank for this form; give one")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise Incompatible(f"rank={rank}: the rank is a whole number, 1 or more")
    return rank


def _alpha(alpha: float | str | None, rank: int | None, preset: str) -> float:
    if alpha is None:
        raise Incompatible(f"alpha: preset {preset} has no default alpha for this scale; give one")
    try:
        if isinstance(alpha, str) and alpha.endswith("r"):
            value = float(alpha[:-1] or 1) * (rank or 1)
        else:
            value = float(alpha)
    except ValueError:
        raise Incompatible(f"alpha={alpha}: a number, or a multiple of the rank like 2r") from None
    if not 0 < value < float("inf"):
        raise Incompatible(f"alpha={alpha}: alpha is a positive number")
    return value


@dataclass(frozen=True)
class Planned:
    """One matrix of the plan: where it is, its shape, and what its layer will train."""

    site: Site
    shape: tuple[int, int]
    rank: int
    tensors: dict[str, tuple[int, ...]]

    @property
    def trained(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.tensors.values())


def plan(model: nn.Module, choice: Choice, targets: Targets = "all-linear") -> list[Planned]:
    """What `attach` would build. Looks at shapes only, so a model on the meta device will do."""
    refuse_adapted(model)
    layers, planned, largest = linear_layers(model), [], 0
    for site in resolve(model, targets):  # type: ignore[arg-type]
        module = layers[site.path]
        m, n = kind_of(module).matrix(module).shape
        m = m if site.rows is None else site.rows[1] - site.rows[0]
        rank = choice.form.rank_of(m, n, choice.rank or 0, site.name)
        largest = max(largest, min(m, n))
        planned.append(Planned(site, (m, n), rank, choice.form.shapes(m, n, rank)))
    if choice.rank is not None and choice.rank > largest:
        raise Incompatible(
            f"rank={choice.rank}: no target has a rank above {largest}; choose {largest} or less"
        )
    return planned


@dataclass(repr=False)
class Adapter:
    """A variant that sits in a model. Made by `attach` or `load`."""

    model: nn.Module
    choice: Choice
    layers: dict[str, Adapted]
    sites: dict[str, Site]
    fingerprints: dict[str, str]
    targets: Targets
    dropout: float
    seed: int
    saved_modules: dict[str, Copied]
    trainable_before: dict[str, bool]
    notes: list[str]
    step: int = 0
    allocation_state: dict[str, Any] | None = None
    merge_error: float = 0.0  # largest relative Frobenius error over the matrices, after merge()
    _penalty_asked: bool = False
    _warned: set[str] = field(default_factory=set)

    def __repr__(self) -> str:
        return (
            f"Adapter({self.choice.preset}, rank={self.choice.rank}, "
            f"{len(self.layers)} layers, {self.num_trainable:,} trained)"
        )

    @property
    def num_replaced(self) -> int:
        """Numbers of the base whose place the trained ones take (full fine-tuning)."""
        if not self.choice.form.replaces:
            return 0
        return sum(layer.out_features * layer.in_features for layer in self.layers.values())

    @property
    def num_trainable(self) -> int:
        """Trained numbers of the adapter; modules trained in full (a new head) are not counted."""
        return sum(t.numel() for layer in self.layers.values() for t in layer.trained)

    def parameters(self) -> list[Tensor]:
        """Every tensor that trains, modules trained in full included."""
        tensors: list[Tensor] = [t for layer in self.layers.values() for t in layer.trained]
        for module in self.saved_modules.values():
            tensors += module.copy.parameters()
        return tensors

    def optimizer(
        self, lr: float, *, steps: int | None = None, weight_decay: float = 0.0, **settings: Any
    ) -> torch.optim.Optimizer:
        """The update axis over the trained tensors; `steps` is the length of the run.

        The allocation runs by itself after each step of this optimizer. One that changes during
        the run needs `steps`; without, it keeps its first budget and says so.
        """
        others = [p for m in self.saved_modules.values() for p in m.copy.parameters()]
        optimizer = self.choice.update.optimizer(
            self.layers, others, lr, weight_decay=weight_decay, **settings
        )
        self.step = 0
        if steps is not None:
            self.allocation_state = self.choice.allocation.begin(self.layers, steps)
        elif self.choice.allocation.scheduled:
            self._warn(
                f"{self.choice.allocation} follows a schedule and was not told the number of "
                f"steps: it keeps its first budget. Give optimizer(lr, steps=...)"
            )
        optimizer.register_step_post_hook(self._after_step)
        return optimizer

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self.layers:
            return  # merged or detached
        self.step += 1
        if self.choice.allocation.penalized and not self._penalty_asked:
            self._warn(
                f"{self.choice.allocation} has a penalty that is not in the loss: "
                f"add adapter.penalty() to it"
            )
        self._penalty_asked = False
        if self.allocation_state is not None:
            stale = self.choice.allocation.after_step(self.layers, self.allocation_state, self.step)
            for tensor in stale:
                optimizer.state.pop(tensor, None)

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=3)

    def penalty(self) -> Tensor | None:
        """The allocation's term of the training loss (AdaLoRA's orthogonality), or None."""
        self._penalty_asked = True
        if not self.layers or not self.choice.allocation.penalized:
            return None
        device = self.parameters()[0].device.type
        with torch.autocast(device, enabled=False):
            return self.choice.allocation.penalty(self.layers)

    def ranks(self) -> dict[str, int]:
        """The directions in use, by layer."""
        return self.choice.allocation.ranks(self.layers, self.allocation_state)

    def state(self) -> dict[str, Any]:
        """What changes while training and is no tensor of the adapter, for a checkpoint."""
        return deepcopy({"step": self.step, "allocation": self.allocation_state})

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state()`."""
        self.step, self.allocation_state = state["step"], state["allocation"]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the adapter by name, as saved: trained, constant and subtracted."""
        found: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            found |= {f"{name}.{k}": t for k, t in layer.p.items()}
            for k, t in zip("AB", layer.subtracted or (), strict=False):
                found[f"{name}.subtracted.{k}"] = t
        for name, module in self.saved_modules.items():
            found |= {f"modules.{name}.{k}": t for k, t in module.copy.state_dict().items()}
        return {k: t.detach() for k, t in found.items()}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The original model, for as long as the context lasts."""
        switches: list[Any] = [*self.layers.values(), *self.saved_modules.values()]
        before = [switch.enabled for switch in switches]
        for switch in switches:
            switch.enabled = False
        try:
            yield
        finally:
            for switch, enabled in zip(switches, before, strict=True):
                switch.enabled = enabled

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Folds the adapter into plain layers of the model's own kinds; the adapter ends.

        A quantized base becomes its dequantized weights. Weights return to the model's dtype;
        `merge_error` says what that rounding cost.
        """

        def merged(part: nn.Module) -> Tensor:
            if isinstance(part, Frozen):
                return part.stored.dense()
            W = part.weight  # type: ignore[union-attr]
            rounded = W.to(part.W0.dtype)  # type: ignore[union-attr]
            error = (torch.linalg.norm(rounded.to(W.dtype) - W) / torch.linalg.norm(W)).item()
            self.merge_error = max(self.merge_error, error)
            return rounded

        return self._leave(merged, "copy")

    @torch.no_grad()
    def detach(self) -> nn.Module:
        """Takes the adapter out: the original layers again.

        A lossy base stays as it was stored. Where the init moved the base (PiSSA), what it took is
        put back, which is exact to the rounding of the base's dtype and not to the last bit.
        """
        return self._leave(
            lambda part: part.original if isinstance(part, Adapted) else part.stored.dense(),
            "original",
        )

    def _leave(self, matrix: Any, saved: str) -> nn.Module:
        self._refuse_ended()
        for path, layer in list(stand_ins(self.model)):
            replace(self.model, path, plain(layer, matrix))
        for path, module in self.saved_modules.items():
            narrow, error = module.narrowed() if saved == "copy" else (module.original, 0.0)
            self.merge_error = max(self.merge_error, error)
            replace(self.model, path, narrow)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.trainable_before.get(name, False))
        self.layers, self.saved_modules = {}, {}
        return self.model

    def _refuse_ended(self) -> None:
        if not self.layers:
            raise Incompatible("the adapter has left its model: it was merged or detached")

    def save(self, path: str | Path) -> Path:
        """Writes adapter.safetensors and adapter.json into the folder `path`."""
        from ._io import save

        self._refuse_ended()
        return save(self, Path(path))

    def save_peft(self, path: str | Path) -> Path:
        """Writes Hugging Face PEFT's format into the folder `path`."""
        from ._peft import save_peft

        self._refuse_ended()
        return save_peft(self, Path(path))


def attach(
    model: nn.Module,
    preset: str,
    *,
    rank: int | None = None,
    alpha: float | str | None = None,
    targets: Targets = "all-linear",
    dropout: float = 0.0,
    seed: int = 0,
    calibration: Any = None,
    modules_to_save: Sequence[str] = (),
    **axes: Any,
) -> Adapter:
    """Puts a variant into `model` and freezes the rest.

    Args:
        preset: a name of `variants.names()`.
        rank, alpha: None takes the preset's default. alpha may be a multiple of the rank, "2r".
        targets: roles (`all-linear`, `attention`, `mlp`, `q`, ...) or names of layers.
        dropout: probability on the adapter's input: y = W0 x + (W - W0) dropout(x).
        seed: of the initial tensors; each layer draws from its own generator.
        calibration: batches for an init that measures the model (`needs` in its file).
        modules_to_save: names of modules to train in full beside the adapter (a new head).
        axes: another part on an axis: `init="pissa"`, or a mapping with settings.

    Raises:
        Incompatible: a name, pair, rank or target that cannot be; nothing was changed then.
    """
    choice = choose(preset, rank, alpha, **axes)
    notes = list(choice.notes)
    if calibration is not None and not choice.init.needs:
        notes.append(f"calibration batches have no use: init {choice.init.name} needs none")
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return build(
        model,
        choice,
        plan(model, choice, targets),
        targets=targets,
        dropout=dropout,
        seed=seed,
        modules_to_save=tuple(modules_to_save),
        notes=notes,
    )


def build(
    model: nn.Module,
    choice: Choice,
    planned: list[Planned],
    *,
    targets: Targets,
    dropout: float,
    seed: int,
    modules_to_save: tuple[str, ...] = (),
    notes: Sequence[str] = (),
    scales: Mapping[str, float] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Builds the planned layers; with `tensors` (of a saved adapter) no init runs."""
    refuse_adapted(model)
    if not 0 <= dropout < 1:
        raise Incompatible(f"dropout={dropout}: a probability, from 0 to below 1")
    if any(p.is_meta for p in model.parameters()):
        raise Incompatible("the model has no weights (it is on the meta device)")
    copied = [_find_module(model, name) for name in modules_to_save]
    for path in copied:
        _check_copied(model, path, [item.site.path for item in planned], tensors)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    body = {path for path in all_linear(model) if not any(_inside(path, c) for c in copied)}
    by_path: dict[str, list[Planned]] = {}
    for item in planned:
        by_path.setdefault(item.site.path, []).append(item)
    dense: Base = find_part("base", "dense").load()
    layers: dict[str, Adapted] = {}
    prints: dict[str, str] = {}
    new: dict[str, nn.Module] = {}
    with torch.no_grad():
        for path, module in linear_layers(model).items():
            base = choice.base if path in body else dense
            if path in by_path:
                made = {}
                for item in by_path[path]:
                    name = item.site.name
                    prints[name] = fingerprint(_matrix(module, item.site))
                    s = choice.s(item.rank) if scales is None else scales[name]
                    layer = _layer(module, item, choice, base, s, dropout, seed, tensors)
                    made[item.site], layers[name] = layer, layer
                new[path] = _fuse(module, made, base)
            elif choice.base.name != dense.name and path in body:
                new[path] = freeze(module, base)
    model.requires_grad_(False)
    for path, module in new.items():
        replace(model, path, module)
    saved = {path: _copy(model, path, tensors) for path in copied}
    sites = {item.site.name: item.site for item in planned}
    return Adapter(
        model, choice, layers, sites, prints, targets, dropout, seed, saved, before, list(notes)
    )


def _layer(
    module: nn.Module,
    item: Planned,
    choice: Choice,
    base: Base,
    s: float,
    dropout: float,
    seed: int,
    tensors: Mapping[str, Tensor] | None,
) -> Adapted:
    """One adapted matrix: start, move the base, store it, embed the factors."""
    name, rows = item.site.name, item.site.rows
    W = _matrix(module, item.site)
    W0 = W.detach().to(wide(W.dtype))
    generator = torch.Generator().manual_seed(_seed_of(seed, name))
    start = subtracted = None
    if tensors is None:
        start = choice.init.start(W0, item.rank, s, generator)
        if start is not None and start.subtract is not None:
            A0, B0 = start.subtract
            subtracted = (A0.clone(), s * B0)
    elif f"{name}.subtracted.A" in tensors:
        A0, B0 = (tensors[f"{name}.subtracted.{k}"].to(W0) for k in "AB")
        subtracted = (A0, B0)
    if subtracted is not None:
        W = (W0 - subtracted[1] @ subtracted[0]).to(W.dtype)
    frozen = freeze(module, base, rows, W)
    if tensors is not None:
        own = {k: tensors.get(f"{name}.{k}") for k in (*item.tensors, *choice.form.constants)}
        p = {k: t.to(W0, copy=True) for k, t in own.items() if t is not None}
        _check(name, p, item.tensors)
    else:
        stored = frozen.stored.dense().to(W0.dtype)
        if start is None:
            p = dict(choice.form.start(stored, item.rank, s, generator))
        else:
            p = dict(choice.form.embed(stored, start.A, start.B, s))  # type: ignore[attr-defined]
    return Adapted(
        frozen, choice.form, p, rank=item.rank, s=s, dropout=dropout, subtracted=subtracted
    )


def _check(name: str, p: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for k, shape in shapes.items():
        if k not in p:
            raise Incompatible(f"the saved adapter has no tensor {k!r} for layer {name}")
        if tuple(p[k].shape) != tuple(shape):
            raise Incompatible(
                f"the saved tensor {name}.{k} is {tuple(p[k].shape)}, the model asks for {shape}"
            )


def _matrix(module: nn.Module, site: Site) -> Tensor:
    W = kind_of(module).matrix(module)
    return W if site.rows is None else W[slice(*site.rows)]


def _fuse(module: nn.Module, made: dict[Site, Adapted], base: Base) -> nn.Module:
    """The layer itself, or the slices of a fused layer, those between adapted ones frozen."""
    first = next(iter(made))
    if first.rows is None:
        return made[first]
    size = first.rows[1] - first.rows[0]
    by_start = {site.rows[0]: (site.role, layer) for site, layer in made.items() if site.rows}
    slices: dict[str, nn.Module] = {}
    for begin in range(0, kind_of(module).matrix(module).shape[0], size):
        role, layer = by_start.get(begin, (None, None))
        slices[role or f"frozen_{begin}"] = layer or freeze(module, base, (begin, begin + size))
    return Fused(slices, kind_of(module))


def _find_module(model: nn.Module, name: str) -> str:
    paths = [path for path, _ in model.named_modules()]
    found = [p for p in paths if p == name] or [p for p in paths if p.endswith("." + name)]
    if len(found) != 1:
        top = ", ".join(path for path, _ in model.named_children())
        raise Incompatible(
            f"modules_to_save={name}: matches {len(found)} modules, not one; at the top: {top}"
        )
    return found[0]


def _inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(outer + ".")


def _check_copied(
    model: nn.Module, path: str, adapted: list[str], tensors: Mapping[str, Tensor] | None
) -> None:
    """A module trained in full holds no adapted layer, and a saved one has the model's shapes."""
    inside = [p for p in adapted if _inside(p, path)]
    if inside:
        raise Incompatible(
            f"modules_to_save={path}: the target {inside[0]} lies in it; leave one of the two out"
        )
    own = model.get_submodule(path).state_dict()
    if not own:
        raise Incompatible(f"modules_to_save={path}: nothing in it can be trained")
    for name, tensor in own.items() if tensors is not None else ():
        saved = (tensors or {}).get(f"modules.{path}.{name}")
        if saved is None or saved.shape != tensor.shape:
            shape = None if saved is None else tuple(saved.shape)
            raise Incompatible(
                f"the saved tensor {path}.{name} is {shape}, the model asks for "
                f"{tuple(tensor.shape)}"
            )


def _copy(model: nn.Module, path: str, tensors: Mapping[str, Tensor] | None) -> Copied:
    copied = Copied(model.get_submodule(path))
    if tensors is not None:
        prefix = f"modules.{path}."
        own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        copied.copy.load_state_dict(own)
    replace(model, path, copied)
    return copied


def _seed_of(seed: int, name: str) -> int:
    """A generator for each layer: the same A whatever else is adapted, on any device."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def fingerprint(W: Tensor) -> str:
    """Of a matrix: its shape and 4,096 entries, evenly spaced from the first to the last."""
    count = min(W.numel(), 4096)  # 4,095 parts of the way, so that no one column is all it sees
    places = torch.arange(count, device=W.device) * (W.numel() - 1) // max(1, count - 1)
    sample = W.detach()[places // W.shape[1], places % W.shape[1]].float().cpu()
    digest = hashlib.sha256(str(tuple(W.shape)).encode())
    digest.update(sample.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
