"""Attach a variant to a model: choose the parts, resolve the targets, build the layers.

Each layer has a generator of its own, the same in every process; what went stale leaves the
optimizer; a head is no part of the stored base; what layers share counts once:

>>> import variants
>>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
>>> adapter = variants.attach(net, "relora", rank=2, targets="0,1",
...                           allocation={"name": "relora", "every": 2.0})
>>> first, second = (layer.params["A"] for layer in adapter.layers.values())
>>> torch.equal(first, second), _seed_of(0, "q")
(False, 64440134937876508)
>>> optimizer = adapter.optimizer(1e-3, steps=9)
>>> for _ in range(2):
...     net(torch.ones(1, 8)).sum().backward()
...     optimizer.step()
...     print(len(optimizer.state))
4
0
>>> net = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("body", "other", "lm_head")})
>>> choice = choose("tied_lora", 2)
>>> count_trained(choice, plan(net, choice, "body,other"))  # 2 (8 + 8) once, 2 + 8 twice
52
>>> layers = variants.attach(net, "qlora", rank=2, targets="body,lm_head").layers
>>> {path: type(layer.frozen.stored).__name__ for path, layer in layers.items()}
{'body': 'Blocks', 'lm_head': 'Dense'}

A layer may have an alpha of its own; disabled() may stand within disabled():

>>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
>>> adapter = variants.attach(net, "lora", rank=2, alpha=2, targets="0,1", alpha_pattern={"1": 8})
>>> [layer.s for layer in adapter.layers.values()]
[1.0, 4.0]
>>> with adapter.disabled():
...     with adapter.disabled():
...         pass
...     print([layer.enabled for layer in adapter.layers.values()])
[False, False]

A layer that an allocation gives no rank is left alone:

>>> net, choice = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), choose("eva", 1)
>>> ratios = {"0": {"ratios": torch.tensor([0.9, 0.8])}, "1": {"ratios": torch.tensor([0.1, 0.1])}}
>>> [(item.site.name, item.rank) for item in _reranked(choice, plan(net, choice, "0,1"), ratios)]
[('0', 2)]
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._api import Allocation, Base, Form, Init, Part, Scale, Tensors, Update, trained, wide
from ._calibrate import calibrate
from ._experts import experts, unstack
from ._kept import End, Remaking
from ._kinds import kind_of, matrix_of, shape_of
from ._layer import (
    Adapted,
    Copied,
    Frozen,
    Fused,
    freeze,
    plain,
    refuse_adapted,
    replace,
    stand_ins,
)
from ._merge import is_lossy, restack_all, stored_again
from ._registry import AXES, Incompatible, find_part, find_preset, unknown
from ._targets import Site, all_layers, all_linear, leaves, resolve
from ._together import bring_together

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
    alpha_per_rank: float | None = None  # of an alpha that is a multiple of the rank, such as 2r

    @property
    def parts(self) -> dict[str, Part]:
        return {axis: getattr(self, axis) for axis in AXES}

    def axes(self) -> dict[str, dict[str, Any]]:
        """{axis: {"name": part, **settings}}, the form that `attach` and files take."""
        return {axis: {"name": p.name, **asdict(p)} for axis, p in self.parts.items()}  # type: ignore[call-overload]

    def s(self, r: int, alpha: float | None = None) -> float:
        """The scale of a matrix of rank r, with another alpha if there is one."""
        if alpha is None:
            alpha = self.alpha if self.alpha_per_rank is None else self.alpha_per_rank * r
        return self.scale.value(1.0 if alpha is None else alpha, r)

    @property
    def untrained(self) -> tuple[str, ...]:
        """The tensors of p that never train: constants, and what init or update leave alone."""
        return (*self.form.constants, *self.init.frozen, *self.update.frozen)


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
        given, own = axes.get(axis), info.axes[axis]
        # a part that the preset has already keeps the preset's settings
        parts[axis] = chosen(axis, own if given in (None, own["name"]) else given)
    form: Form = parts["form"]
    if not form.scaled and parts["scale"].name != "none":
        needs_scale = "a form with a scale in its equation (one without takes scale none)"
        raise parts["scale"].refuse(form, needs_scale)
    for part in (parts["allocation"], parts["update"]):
        if part.moves_base and parts["base"].lossy:
            raise part.refuse(parts["base"], "a base that takes any number, as it moves it")
        if part.moves_base and not form.low_rank:
            raise part.refuse(form, "a low-rank form")
    notes = []
    if form.rank_means is None:
        if rank is not None:
            ranked = [axis for axis, part in parts.items() if hasattr(part, "rank")]
            where = f"; {ranked[0]}.rank is a setting" if ranked else ""
            notes.append(f"rank={rank} has no meaning for form {form.name}: there is none{where}")
        rank = None
    else:
        rank = _whole_rank(info.rank if rank is None else rank, preset)
    per_rank = None
    if not parts["scale"].has_alpha:
        if alpha is not None:
            notes.append(f"alpha={alpha} has no meaning with scale {parts['scale'].name}")
        alpha = None
    else:
        asked = info.alpha if alpha is None else alpha
        alpha = _alpha(asked, rank, preset)
        if isinstance(asked, str) and asked.endswith("r") and rank:
            per_rank = alpha / rank
    choice = Choice(
        info.name, rank=rank, alpha=alpha, notes=tuple(notes), alpha_per_rank=per_rank, **parts
    )
    for part in parts.values():
        part.fits(choice)
    for part in parts.values():
        missing = part.unavailable()
        if missing is not None:
            raise Incompatible(f"{part} needs {part.requires}: {missing}")
    names = set(form.shapes(8, 8, 1)) | set(form.shared_shapes(8, 8, 1))
    for part in (parts["init"], parts["update"]):
        missing = [name for name in part.frozen if name not in names]
        if missing:
            raise part.refuse(form, f"a form with a tensor {missing[0]} to leave untrained")
    if names and names <= set(choice.untrained):
        raise Incompatible(f"{parts['init']} and {parts['update']} leave nothing to train")
    return choice


def chosen(axis: str, given: Any) -> Part:
    """The part of a name, of a mapping {"name": part, setting: value}, or the part itself."""
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
    except (TypeError, ValueError):
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
    s: float
    tensors: dict[str, tuple[int, ...]]  # the form's, without those that layers share
    key: str = ""  # of the shared tensors
    untrained: tuple[str, ...] = ()
    alpha: float | None = None  # its own, by a pattern

    @property
    def trained(self) -> int:
        """Trained numbers of this matrix alone."""
        own = (shape for k, shape in self.tensors.items() if k not in self.untrained)
        return sum(torch.Size(shape).numel() for shape in own)


def planned_item(
    choice: Choice,
    site: Site,
    shape: tuple[int, int],
    rank: int,
    s: float,
    alpha: float | None = None,
) -> Planned:
    """The plan of one matrix."""
    m, n = shape
    form = choice.form
    key = form.key(m, n, rank) if form.shared else ""
    return Planned(site, shape, rank, s, form.shapes(m, n, rank), key, choice.untrained, alpha)


def plan(
    model: nn.Module,
    choice: Choice,
    targets: Targets | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> list[Planned]:
    """What `attach` would build. Looks at shapes only, so a model on the meta device will do."""
    refuse_adapted(model)
    layers, planned, largest = all_layers(model), [], 0
    if "" in layers:
        raise Incompatible(f"the model is one layer, a {type(model).__name__}, in whose place "
                           f"nothing can be put: wrap it, as nn.Sequential(layer)")  # fmt: skip
    if targets is None:
        targets = find_preset(choice.preset).targets
    sites = [
        site
        for site in resolve(model, targets, layers)
        if choice.form.applies(kind_of(layers[site.path]), _has_bias(layers[site.path]))
    ]
    if not sites:
        what = " ".join((choice.form.__doc__ or "").split())
        able = [p for p, m in layers.items() if choice.form.applies(kind_of(m), _has_bias(m))]
        raise Incompatible(
            f"form {choice.form.name}: no layer of targets={targets} can take it; it is: {what} "
            f"Layers of this model that can: {leaves(able)}"
        )
    choice.form.fits_layers([site.name for site in sites])
    ranks = _by_site(model, "rank_pattern", rank_pattern, sites)
    alphas = _by_site(model, "alpha_pattern", alpha_pattern, sites)
    for name, value in (("rank_pattern", ranks and choice.rank),
                        ("alpha_pattern", alphas and choice.alpha)):  # fmt: skip
        if value is None and (ranks if name == "rank_pattern" else alphas):
            raise Incompatible(f"{name}: preset {choice.preset} has no {name.partition('_')[0]}")
    for site in sites:
        m, n = shape_of(layers[site.path])
        m = m if site.rows is None else site.rows[1] - site.rows[0]
        if choice.rank is None:
            asked = int(_has_bias(layers[site.path]))
        else:
            try:
                asked = _whole_rank(ranks.get(site.name, choice.rank), choice.preset)
            except Incompatible as error:
                raise Incompatible(f"rank_pattern of {site.name}: {error}") from None
        rank = choice.form.rank_of(m, n, asked, site.name)
        largest = max(largest, min(m, n))
        alpha = alphas.get(site.name)
        if alpha is not None:
            try:
                alpha = _alpha(alpha, rank, choice.preset)
            except Incompatible as error:
                raise Incompatible(f"alpha_pattern of {site.name}: {error}") from None
        item = planned_item(choice, site, (m, n), rank, choice.s(rank, alpha), alpha)
        planned.append(item)
    if choice.rank is not None and choice.form.rank_is_bounded and choice.rank > largest:
        raise Incompatible(
            f"rank={choice.rank}: no target has a rank above {largest}; choose {largest} or less"
        )
    return planned


def shared_shapes(choice: Choice, planned: Sequence[Planned]) -> dict[str, tuple[int, int, int]]:
    """The (m, n, r) of each key of shared tensors: the largest of its layers."""
    found: dict[str, tuple[int, int, int]] = {}
    for item in planned if choice.form.shared else ():
        m, n, r = found.get(item.key, (0, 0, 0))
        found[item.key] = max(m, item.shape[0]), max(n, item.shape[1]), max(r, item.rank)
    return found


def count_trained(choice: Choice, planned: Sequence[Planned]) -> int:
    """Trained numbers of the whole plan, what layers share counted once."""
    total = sum(item.trained for item in planned)
    for m, n, r in shared_shapes(choice, planned).values():
        shapes = choice.form.shared_shapes(m, n, r)
        total += sum(torch.Size(s).numel() for k, s in shapes.items() if k not in choice.untrained)
    return total


def _has_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None


def _by_site(
    model: nn.Module, what: str, pattern: Mapping[str, Any] | None, sites: Sequence[Site]
) -> dict[str, Any]:
    """{site: value} of a pattern {role or name: value}; a later key wins over an earlier one."""
    found = {}
    own = {site.name for site in sites}
    if pattern is not None and not isinstance(pattern, Mapping):
        raise Incompatible(f"{what}={pattern}: a mapping from roles or layers to numbers")
    for word, value in (pattern or {}).items():
        try:
            hit = {s.name for s in resolve(model, [word])} & own
        except Incompatible as error:
            raise Incompatible(str(error).replace("targets=", f"{what}=", 1)) from None
        if not hit:
            raise Incompatible(f"{what}={word}: matches no layer that targets name")
        found |= dict.fromkeys(hit, value)
    return found


@dataclass(repr=False)
class Adapter:
    """A variant that sits in a model. Made by `attach` or `load`."""

    model: nn.Module
    choice: Choice
    layers: dict[str, Adapted]
    shared: dict[str, nn.ParameterDict]  # what layers hold together, by key
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
    trained_on: dict[str, Any] | None = None  # the base that it was trained on, where not this one
    given: frozenset[str] = frozenset()  # shared tensors that a file gave, whatever the seed draws
    merge_error: float = 0.0  # largest relative Frobenius error over the matrices, after merge()
    _penalty_asked: bool = False
    _ends: Sequence[End] = ()  # of the hooks on its model
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
        return sum(t.numel() for t in trained(self.layers))

    def parameters(self) -> list[Tensor]:
        """Every tensor that trains, modules trained in full included."""
        tensors = trained(self.layers)
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
        self._refuse_ended()
        others = [p for m in self.saved_modules.values() for p in m.copy.parameters()]
        if self.choice.update.scheduled:
            settings["steps"] = steps
        optimizer = self.choice.update.optimizer(
            self.layers, others, lr, weight_decay=weight_decay, **settings
        )
        self.step, self.trained_on = 0, None
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
        tensors = (t for layer in self.layers.values() for t in layer.params.values())
        device = next(tensors).device.type
        with torch.autocast(device, enabled=False):
            return self.choice.allocation.penalty(self.layers)

    def noted(self) -> Sequence[Tensor]:
        """What the allocation gathers in backward, beside gradients (`Allocation.noted`)."""
        state = self.allocation_state
        return () if state is None else self.choice.allocation.noted(self.layers, state)

    def ranks(self) -> dict[str, int]:
        """The directions in use, by layer."""
        return self.choice.allocation.ranks(self.layers, self.allocation_state)

    def state(self) -> dict[str, Any]:
        """What changes while training and is no tensor of the adapter, for a checkpoint."""
        return deepcopy({"step": self.step, "allocation": self.allocation_state})

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state()`."""
        self.step, self.allocation_state = state["step"], state["allocation"]
        if self.allocation_state is not None:
            self.choice.allocation.resumed(self.layers, self.allocation_state)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the adapter by name, as saved: trained, constant and what restores W0."""
        found: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            found |= {
                f"{name}.{k}": t
                for k, t in layer.params.items()
                if k not in self.choice.form.shared
            }
            if layer.kept is not None:
                found[f"{name}.moved.W0"] = layer.W0
            for k, t in zip("AB", layer.subtracted or (), strict=False):
                found[f"{name}.subtracted.{k}"] = t
            for k, t in zip("AB", layer.own_restoring or (), strict=False):
                found[f"{name}.restoring.{k}"] = t
        for key, tensors in self.shared.items():
            own = {f"shared.{key}.{k}": t for k, t in tensors.items()}
            redrawn = {f"shared.{key}.{k}" for k in self.choice.form.redrawn} - self.given
            found |= {k: t for k, t in own.items() if k not in redrawn}
        for name, module in self.saved_modules.items():
            found |= {f"modules.{name}.{k}": t for k, t in module.copy.state_dict().items()}
        return {k: t.detach() for k, t in found.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the numbers of `tensors()` of this adapter at another time."""
        for name, layer in self.layers.items():
            if f"{name}.moved.W0" in tensors:
                W0 = layer.W0
                layer.move_to(tensors[f"{name}.moved.W0"].to(W0))
            else:
                layer.move_back()
        for name, own in self.tensors().items():
            if name not in tensors:
                raise Incompatible(f"the saved adapter has no tensor {name!r}")
            own.copy_(tensors[name])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The original model, for as long as the context lasts.

        On a lossy base: as that stores it, Q, or Q + s B0 A0 where the init moved the base.
        """
        self._refuse_ended()
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
    def merge(self, requantize: bool = False) -> nn.Module:
        """Folds the adapter into plain layers of the model's own kinds; the adapter ends.

        A quantized base becomes its dequantized weights. Weights return to the model's dtype;
        `merge_error` says what that rounding cost.

        With `requantize` a lossy base stores each merged matrix again, in layers of its own
        (`variants.dequantize` makes plain ones of them), and `merge_error` says what that cost.
        """
        if requantize and not self.choice.base.lossy:
            raise Incompatible(
                f"requantize: base {self.choice.base.name} stores every number as it is; "
                f"merge() is all there is to do"
            )

        def merged(part: Any) -> Tensor:
            if isinstance(part, Frozen):
                return part.stored.dense()
            W = part.weight
            if W is part.W0:  # a form that leaves the weight alone
                return W
            rounded = W.to(part.W0.dtype)
            error = (torch.linalg.norm(rounded.to(W.dtype) - W) / torch.linalg.norm(W)).item()
            self.merge_error = max(self.merge_error, error)
            return rounded

        def module(layer: Any) -> nn.Module:
            if not (requantize and is_lossy(layer)):
                return plain(layer, merged, own_bias=True)
            stored, error = stored_again(layer)
            self.merge_error = max(self.merge_error, error)
            return stored

        return self._leave(module, "copy")

    @torch.no_grad()
    def detach(self) -> nn.Module:
        """Takes the adapter out: the original layers again.

        A lossy base stays as it was stored, with what a joint init (LoftQ) added to it at first.
        Where the init moved the base (PiSSA), what it took is put back, which is exact to the
        rounding of the base's dtype and not to the last bit.
        """

        def original(part: Any) -> Tensor:
            return part.original if isinstance(part, Adapted) else part.stored.dense()

        return self._leave(lambda layer: plain(layer, original, own_bias=False), "original")

    def _leave(self, module_of: Callable[[Any], nn.Module], saved: str) -> nn.Module:
        self._refuse_ended()
        for end in self._ends:
            end()
        for path, layer in list(stand_ins(self.model)):
            replace(self.model, path, module_of(layer))
        restack_all(self.model)
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
        """Writes Hugging Face PEFT's format into the folder `path`.

        The form's own method where PEFT has it (`_peft.py` lists them), LoRA for every other form
        of two factors, with twice the rank where the init moved the base.
        """
        from ._peft import save_peft

        self._refuse_ended()
        return save_peft(self, Path(path))


def attach(
    model: nn.Module,
    preset: str,
    *,
    rank: int | None = None,
    alpha: float | str | None = None,
    targets: Targets | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    modules_to_save: Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    **axes: Any,
) -> Adapter:
    """Puts a variant into `model` and freezes the rest.

    Args:
        preset: a name of `variants.names()`.
        rank, alpha: None takes the preset's default. alpha may be a multiple of the rank, "2r":
            of a layer's own rank, where a pattern gives it one.
        targets: roles (`all-linear`, `attention`, `mlp`, `q`, ..., `embeddings`, `norms`,
            `convolutions`) or names of layers; None takes the preset's, `all-linear` for most.
        dropout: probability on the adapter's input: y = W0 x + (W - W0) dropout(x).
        seed: of the initial tensors; each layer draws from its own generator.
        calibration: batches, each passed as `model(**batch)`, for a part that measures the model
            (`needs` in its file); with labels in them where it needs gradients. As many as the
            part's `batches` are taken; where there are fewer, all.
        modules_to_save: names of modules to train in full beside the adapter (a new head).
        rank_pattern, alpha_pattern: {role or name of a layer: its own rank or alpha}; of two keys
            that name a layer the later one holds.
        axes: another part on an axis: `init="pissa"`, or a mapping with settings.

    Raises:
        Incompatible: a name, pair, rank or target that cannot be; nothing was changed then.
    """
    choice = choose(preset, rank, alpha, **axes)
    notes = list(choice.notes)
    if calibration is not None and not needs(choice):
        notes.append("calibration batches have no use: no part of this variant needs any")
    adapter = build(
        model,
        choice,
        plan(model, choice, targets, rank_pattern, alpha_pattern),
        targets=find_preset(preset).targets if targets is None else targets,
        dropout=dropout,
        seed=seed,
        calibration=calibration,
        modules_to_save=tuple(modules_to_save),
        notes=notes,
    )
    for note in adapter.notes:
        warnings.warn(note, stacklevel=2)
    return adapter


def needs(choice: Choice) -> tuple[str, ...]:
    """The statistics of calibration batches that the variant asks for."""
    return tuple(dict.fromkeys((*choice.init.needs, *choice.allocation.needs)))


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
    calibration: Iterable[Mapping[str, Any]] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Builds the planned layers; with `tensors` (of a saved adapter) no init runs."""
    refuse_adapted(model)
    if not 0 <= dropout < 1:
        raise Incompatible(f"dropout={dropout}: a probability, from 0 to below 1")
    if dropout and not choice.form.drops:
        raise Incompatible(f"dropout={dropout}: form {choice.form.name} leaves W as it is, so "
                           f"there is no change to drop inputs of")  # fmt: skip
    if any(p.is_meta for p in model.parameters()):
        raise Incompatible("the model has no weights (it is on the meta device)")
    copied = [_find_module(model, name) for name in modules_to_save]
    for path in copied:
        _check_copied(model, path, [item.site.path for item in planned], tensors)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    notes = [*notes, *_coded(model, choice, planned)]
    dense: Base = find_part("base", "dense").load()
    found_layers = all_layers(model)
    linear = all_linear(model, found_layers)
    body = {path for path in linear if not any(_inside(path, c) for c in copied)}
    bases = {path: choice.base if path in body else dense for path in found_layers}
    found: Mapping[str, Tensors] = {}
    if tensors is None and needs(choice):
        if calibration is None:
            raise Incompatible(_no_calibration(choice))
        found, scores = calibrate(model, choice, planned, calibration, bases)
        planned = _reranked(choice, planned, scores)
    if dropout:
        for item in planned:
            if not kind_of(found_layers[item.site.path]).drops:
                raise Incompatible(f"dropout={dropout}: the input of {item.site.name} is no "
                                   f"vector of numbers to drop from")  # fmt: skip
    by_path: dict[str, list[Planned]] = {}
    for item in planned:
        by_path.setdefault(item.site.path, []).append(item)
    layers: dict[str, Adapted] = {}
    prints: dict[str, str] = {}
    new: dict[str, nn.Module] = {}
    with torch.no_grad():
        shared = _shared(model, choice, planned, seed, tensors)
        for path, module in found_layers.items():
            base = bases[path]
            if path in by_path:
                made = {}
                for item in by_path[path]:
                    name = item.site.name
                    prints[name] = fingerprint(_matrix(module, item.site))
                    own = found.get(name, {})
                    common: Any = shared.get(item.key, {})
                    layer = _layer(module, item, choice, base, dropout, seed, own, common, tensors)
                    made[item.site], layers[name] = layer, layer
                new[path] = _fuse(module, made, base)
            elif base.name != dense.name:
                new[path] = freeze(module, base)
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if any(f"{path}.{name}" in new for name, _ in experts(module)):
            unstack(module)
    for path, module in new.items():
        replace(model, path, module)
    saved = {path: _copy(model, path, tensors) for path in copied}
    sites = {item.site.name: item.site for item in planned}
    ends = [Remaking().install(model), *bring_together(model, layers, sites)]
    aside = [layer for layer in layers.values() if layer.acting_s != layer.full_s]
    if tensors is None and aside:
        notes = [*notes, f"alpha has no effect in {len(aside)} of {len(layers)} matrices, where "
                         f"form {choice.form.name} has an s of its own"]  # fmt: skip
    return Adapter(
        model, choice, layers, shared, sites, prints, targets, dropout, seed, saved, before,
        notes, given=frozenset(k for k in tensors or () if k.startswith("shared.")),
        _ends=ends,
    )  # fmt: skip


def _coded(model: nn.Module, choice: Choice, planned: Sequence[Planned]) -> list[str]:
    """What there is to say, or to refuse, where the model's files have codes for weights."""
    coded = [path for path, module in all_layers(model).items() if isinstance(module, Frozen)]
    if coded and choice.base.name != "dense":
        error = ", with its own error on top of theirs" if choice.base.lossy else ""
        note = (
            f"{len(coded)} layers were loaded in codes: base {choice.base.name} stores their "
            f"decoded weights anew{error}"
        )
        warnings.warn(note, stacklevel=4)
        return [note]
    for item in planned:
        if item.site.path in coded:
            for part in (choice.init, choice.allocation, choice.update):
                if part.moves_base:
                    raise Incompatible(
                        f"{part} moves the weight, and {item.site.name} was loaded in codes, which "
                        f"take no other number: choose a base that stores it anew (bf16, nf4, ...)"
                    )
            if item.site.rows is not None:
                raise Incompatible(
                    f"targets={item.site.role}: {item.site.path} was loaded in codes and is not "
                    f"taken apart: name it whole, or choose a base that stores it anew"
                )
    return []


def _no_calibration(choice: Choice) -> str:
    part = choice.init if choice.init.needs else choice.allocation
    return (
        f"{part} needs calibration batches, for the {' and the '.join(part.needs)} of each layer: "
        f"give attach(..., calibration=[...])"
    )


def _reranked(
    choice: Choice, planned: list[Planned], scores: Mapping[str, Tensors]
) -> list[Planned]:
    """The plan with the ranks that a static allocation gives; a layer of rank 0 drops out."""
    ranks = choice.allocation.static(planned, scores)
    found = []
    for item in planned:
        r = ranks.get(item.site.name, item.rank)
        if r == item.rank:
            found.append(item)
        elif r > 0:
            s = item.s if choice.allocation.keeps_scale else choice.s(r, item.alpha)
            found.append(planned_item(choice, item.site, item.shape, r, s, item.alpha))
    return found


def _shared(
    model: nn.Module,
    choice: Choice,
    planned: Sequence[Planned],
    seed: int,
    tensors: Mapping[str, Tensor] | None,
) -> dict[str, nn.ParameterDict]:
    """What layers hold together: drawn from the seed, or read; one copy of each."""
    found = {}
    for key, (m, n, r) in shared_shapes(choice, planned).items():
        first = next(item for item in planned if item.key == key)
        W = all_layers(model)[first.site.path].weight
        like = torch.empty(0, dtype=wide(W.dtype), device=W.device)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(_seed_of(seed, f"shared {key}"))
        p = dict(choice.form.start_shared(m, n, r, generator, like))
        for k in p:
            saved = None if tensors is None else tensors.get(f"shared.{key}.{k}")
            if tensors is not None and (saved is not None or k not in choice.form.redrawn):
                if saved is None or saved.shape != p[k].shape:
                    raise Incompatible(f"the saved adapter has no fitting tensor shared.{key}.{k}")
                p[k] = saved.to(p[k], copy=True)
        found[key] = nn.ParameterDict(
            {k: nn.Parameter(v, requires_grad=k not in choice.untrained) for k, v in p.items()}
        )
    return found


def _layer(
    module: nn.Module,
    item: Planned,
    choice: Choice,
    base: Base,
    dropout: float,
    seed: int,
    found: Tensors,
    shared: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor] | None,
) -> Adapted:
    """One adapted matrix: start, move the base, store it, embed the factors."""
    name, rows, s = item.site.name, item.site.rows, item.s
    W = _matrix(module, item.site)
    W0 = W.detach().to(wide(W.dtype))
    generator = torch.Generator().manual_seed(_seed_of(seed, name))
    start = subtracted = restoring = None
    if tensors is None:
        stored = base.storing(W.dtype)
        start = choice.init.start_on(stored, W0, item.rank, s, generator, found)
        if start is not None:
            subtracted, restoring = (
                pair and (pair[0].clone(), s * pair[1]) for pair in (start.subtract, start.restore)
            )
    else:
        subtracted, restoring = (
            (tensors[f"{name}.{k}.A"].to(W0), tensors[f"{name}.{k}.B"].to(W0))
            if f"{name}.{k}.A" in tensors else None
            for k in ("subtracted", "restoring")
        )  # fmt: skip
    if subtracted is not None:
        W = (W0 - subtracted[1] @ subtracted[0]).to(W.dtype)
    frozen = freeze(module, base, rows, None if subtracted is None else W)
    if tensors is not None:
        form = choice.form
        own = {k: tensors.get(f"{name}.{k}") for k in (*item.tensors, *form.constants)}
        p = {k: t.to(W0, copy=True) if t.is_floating_point() else t.to(W0.device, copy=True)
             for k, t in own.items() if t is not None}  # fmt: skip
        _check(name, p, item.tensors)
    else:
        Q = frozen.stored.dense().to(W0.dtype)
        if start is None or start.A is None:
            p = dict(choice.form.start(Q, item.rank, s, generator))
        else:
            p = dict(choice.form.embed(Q, start.A, start.B, s))  # type: ignore[attr-defined]
    layer = Adapted(
        frozen,
        choice.form,
        p | dict(shared),
        untrained=choice.untrained,
        rank=item.rank,
        s=s,
        dropout=dropout,
        subtracted=subtracted,
        restoring=restoring,
    )
    if tensors is not None and f"{name}.moved.W0" in tensors:
        layer.move_to(tensors[f"{name}.moved.W0"].to(W.device, W.dtype))
    return layer


def started(
    W: Tensor, name: str, choice: Choice, statistics: Tensors | None = None, seed: int = 0
) -> Adapted:
    """One matrix W [m, n] as `attach` would start it at the layer `name`, apart from any model.

    Args:
        statistics: of its inputs and gradient, by name, where the init `needs` any.
    """
    if choice.form.shared:
        raise choice.init.refuse(choice.form, "a form whose layers share nothing, to start one")
    missing = [k for k in choice.init.needs if k not in (statistics or {})]
    if missing:
        raise Incompatible(
            f"{choice.init} needs the {missing[0]} of {name}, from a text or batches"
        )
    m, n = W.shape
    rank = choice.form.rank_of(m, n, choice.rank or 1, name)
    item = planned_item(choice, Site(name), (m, n), rank, choice.s(rank))
    linear: Any = nn.Linear(n, m, bias=False, device="meta")
    linear.weight = nn.Parameter(W, requires_grad=False)
    own = {k: (statistics or {})[k] for k in choice.init.needs}
    found: Tensors = {}
    if own:
        found = choice.init.reduce_on(choice.base.storing(W.dtype), W.to(wide(W.dtype)), own, rank)
    return _layer(linear, item, choice, choice.base, 0.0, seed, found, {}, None)


def _check(name: str, p: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for k, shape in shapes.items():
        if k not in p:
            raise Incompatible(f"the saved adapter has no tensor {k!r} for layer {name}")
        if tuple(p[k].shape) != tuple(shape):
            raise Incompatible(
                f"the saved tensor {name}.{k} is {tuple(p[k].shape)}, the model asks for {shape}"
            )


def _matrix(module: nn.Module, site: Site) -> Tensor:
    W = matrix_of(module)
    return W if site.rows is None else W[slice(*site.rows)]


def _fuse(module: nn.Module, made: dict[Site, Adapted], base: Base) -> nn.Module:
    """The layer itself, or the slices of a fused layer, those between adapted ones frozen."""
    first = next(iter(made))
    if first.rows is None:
        return made[first]
    by_start = {site.rows[0]: (site, layer) for site, layer in made.items() if site.rows}
    slices: dict[str, nn.Module] = {}
    begin, end = 0, shape_of(module)[0]
    while begin < end:
        if begin in by_start:
            site, layer = by_start[begin]
            slices[site.role], begin = layer, site.rows[1]  # type: ignore[index]
        else:
            after = min((start for start in by_start if start > begin), default=end)
            slices[f"frozen_{begin}"] = freeze(module, base, (begin, after))
            begin = after
    return Fused(slices, kind_of(module)(module))


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
