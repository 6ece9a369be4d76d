"""The contract that every variant passes, and every pair that is not refused.

`check("dora", init="pissa")` runs all of it, for a variant of this package or of your own; a
clause that fails raises AssertionError with its name. Clauses about commands, runs and other
libraries (Hydra builds the same variant, a run resumes, PEFT's numbers) live in the tests.
"""

import ast
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._adapter import (
    Adapter,
    Choice,
    Planned,
    attach,
    choose,
    needs,
    planned_item,
    shared_shapes,
)
from ._api import LowRank
from ._io import load
from ._kinds import Kind, NormKind
from ._layer import Adapted
from ._registry import describe, find_part, find_preset


class Toy(nn.Module):
    """Two linear layers to adapt, a third that is no target, and a head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.first, self.second = nn.Linear(24, 20), nn.Linear(20, 24, bias=False)
        self.third, self.lm_head = nn.Linear(24, 24), nn.Linear(24, 5)
        for p in self.parameters():  # a decaying spectrum, as trained weights have
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
            if p.ndim == 2:
                U, S, Vh = torch.linalg.svd(p.data, full_matrices=False)
                p.data = U * (S * 0.7 ** torch.arange(len(S))) @ Vh

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        h = x + self.second(F.silu(self.first(x)))
        y = self.lm_head(h + self.third(h))
        return y if labels is None else {"loss": F.mse_loss(y, labels)}


class NormToy(Toy):
    """With a norm that has a bias and one that has none, for a form of norms."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(8)
        self.before, self.after = nn.LayerNorm(24), nn.RMSNorm(24)
        for norm in (self.before, self.after):
            for p in norm.parameters():
                p.data += 0.3 * torch.randn(24, generator=generator)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        return super().forward(self.after(self.before(x)), labels)


@cache
def _toy(cls: type[Toy]) -> Toy:
    """The model of that class, to be copied: its spectra take longer than a copy."""
    return cls()


def _calibration() -> list[dict[str, Tensor]]:
    """Two batches with labels, in the dtype of the model that will get them."""
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "x": torch.randn(48, 24, generator=generator),
            "labels": torch.randn(48, 5, generator=generator),
        }
        for _ in range(2)
    ]


def _inputs(dtype: torch.dtype = torch.float32, rows: int = 32) -> Tensor:
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(3)).to(dtype)


@dataclass(frozen=True)
class Case:
    """What is put to the contract."""

    preset: str
    rank: int = 4
    axes: dict[str, Any] = field(default_factory=dict)

    @property
    def norms(self) -> bool:
        """Whether the form is for norms, which are no matrices and take no dropout."""
        form = find_part("form", self.form).load()
        return form.applies(NormKind, True) and not form.applies(Kind, True)

    @property
    def drops(self) -> bool:
        """Whether the form has an input that can be dropped out."""
        return find_part("form", self.form).load().drops and not self.norms

    @property
    def form(self) -> str:
        """The name of the form."""
        form = self.axes.get("form") or describe(self.preset)["axes"]["form"]
        return form["name"] if isinstance(form, dict) else form

    def toy(self, dtype: torch.dtype = torch.float32) -> Toy:
        """The model."""
        return deepcopy(_toy(NormToy if self.norms else Toy)).to(dtype)

    def attach(self, model: nn.Module | None = None, **settings: Any) -> Adapter:
        model = self.toy() if model is None else model
        ranked = find_part("form", self.form).traits["rank_means"] is not None
        targets = ["before", "after"] if self.norms else ["first", "second"]
        own = {"rank": self.rank if ranked else None, "targets": targets}
        known = {a: self.axes.get(a) or part for a, part in describe(self.preset)["axes"].items()}
        choice = choose(self.preset, own["rank"], **known)
        if needs(choice):
            dtype = next(model.parameters()).dtype
            own["calibration"] = [{k: t.to(dtype) for k, t in b.items()} for b in _calibration()]
        if choice.scale.has_alpha:
            own["alpha"] = 3.0 * self.rank  # s = 1 would hide one that is forgotten
        settings = own | settings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an alpha that the form leaves aside
            return attach(model, self.preset, **settings, **self.axes)


def _disturb(adapter: Adapter, size: float = 0.05) -> Adapter:
    """Moves every trained tensor, as training would."""
    generator = torch.Generator().manual_seed(11)
    for layer in adapter.layers.values():
        for t in layer.trained:
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
            t.data += (size * noise).to(t.dtype)
    for module in adapter.saved_modules.values():
        for t in module.copy.parameters():
            t.data += size
    return adapter


def _close(a: Tensor, b: Tensor, tolerance: float, what: str, least: float = 1e-30) -> None:
    error = ((a - b).abs().max() / b.abs().max().clamp_min(least)).item()
    assert error <= tolerance, f"{what}: relative error {error:.1e}, allowed {tolerance:.0e}"


def _allowed(case: Case, adapter: Adapter, x: Tensor) -> float:
    """How far from the original outputs a start may be: 1e-5, or twice the error of storage alone.

    Where an init moved the base, that of what was stored then: it may be larger than the weight.
    """
    base, plain, stored = adapter.choice.base, case.toy(), case.toy()
    if not base.lossy:
        return 1e-5
    for name in ("first", "second", "third"):
        layer, own = getattr(stored, name), adapter.layers.get(name)
        taken = own.subtracted if own else None
        part = taken[1] @ taken[0] if taken else 0.0
        layer.weight.data = base.store(layer.weight.data - part).dense() + part
    return 2 * ((stored(x) - plain(x)).abs().max() / plain(x).abs().max()).item()


def starts_at_base(case: Case) -> None:
    """Step 0 is the base; on a lossy base, within its storage error."""
    model, x = case.toy(), _inputs()
    with torch.no_grad():
        before = model(x)
        adapter = case.attach(model)
        if not (adapter.choice.form.starts_at_base and adapter.choice.init.starts_at_base):
            return
        _close(model(x), before, _allowed(case, adapter, x), "start")
        with adapter.disabled():
            stored = model(x)
        _close(model(x), stored, 1e-5, "start against the stored base")


def forward_equals_weight(case: Case) -> None:
    """The fast path is the equation, with dropout and without."""
    for dropout in (0.0, 0.4) if case.drops else (0.0,):
        adapter = _disturb(case.attach(case.toy(torch.float64), dropout=dropout))
        for layer in adapter.layers.values():
            x = torch.randn(2, 3, _width(layer), dtype=torch.float64)
            with torch.no_grad():
                W0, W, product = layer.W0, layer.weight, layer.kind.product
                wanted = product(x, W, layer.bias)
                _close(layer.eval()(x), wanted, 1e-9, "eval")
                torch.default_generator.manual_seed(5)
                fast = layer.train()(x)
                torch.default_generator.manual_seed(5)
                if layer.drops:
                    dropped = layer.dropout(x)
                    wanted = F.linear(x, W0, layer.bias) + F.linear(dropped, W - W0)
                _close(fast, wanted, 1e-9, "train")
    adapter = _disturb(case.attach(case.toy(torch.float64)))
    adapter.optimizer(lr=1e-3, steps=20)  # an allocation begins: a part may be seen in training
    for layer in adapter.layers.values():
        x = torch.randn(2, 3, _width(layer), dtype=torch.float64)
        for mode in (layer.train(), layer.eval()):
            with torch.no_grad():
                W = layer.form.weight(layer.W0, mode.p, mode.s)
                _close(mode(x), layer.kind.product(x, W, layer.bias), 1e-9, "in mid-schedule")


def _width(layer: Adapted) -> int:
    """Features of the layer's input; a norm's are those of its output."""
    return layer.in_features if layer.kind.matrices else layer.out_features


def merged_equals_unmerged(case: Case) -> None:
    """merge() leaves plain layers with the same outputs, in mid-schedule too."""
    for seed in (0, 1):  # of which an allocation makes what it shows first
        model, x = case.toy(), _inputs()
        kinds = [type(module) for module in model.modules()]
        adapter = _disturb(case.attach(model, seed=seed))
        adapter.optimizer(lr=1e-3, steps=20)
        with torch.no_grad():
            before = model.eval()(x)
            model.train()
            adapter.merge()
            assert [type(module) for module in model.modules()] == kinds
            _close(model(x), before, 1e-5, "merged")


def only_the_adapter_trains(case: Case) -> None:
    """Each trained tensor gets a finite gradient; nothing else does."""
    adapter = _disturb(case.attach())
    adapter.model(_inputs()).square().mean().backward()
    own = {id(t) for t in adapter.parameters()}
    assert own, "nothing trains"
    for name, p in adapter.model.named_parameters():
        if id(p) in own:
            assert p.requires_grad and p.grad is not None, f"{name} has no gradient"
            assert torch.isfinite(p.grad).all(), f"{name} has a gradient that is not finite"
        else:
            assert not p.requires_grad and p.grad is None, f"{name} is frozen, yet it learns"
    assert type(adapter.model.third) is nn.Linear or not isinstance(adapter.model.third, Adapted)


def optimizer_holds_each_tensor_once(case: Case) -> None:
    """Each trained tensor stands in one group, once, those of a head in full included."""
    adapter = case.attach(modules_to_save=["lm_head"])
    optimizer = adapter.optimizer(lr=1e-3, steps=10)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(t) for t in adapter.parameters())


def takes_any_factors(case: Case) -> None:
    """A low-rank form put at any A and B has the weight W + s B A, so that every init fits it."""
    form = case.attach().choice.form
    if not isinstance(form, LowRank):
        return
    generator = torch.Generator().manual_seed(2)
    for m, n in ((20, 24), (24, 20)):
        W, B, A = (torch.randn(*shape, generator=generator, dtype=torch.float64)
                   for shape in ((m, n), (m, 3), (3, n)))  # fmt: skip
        p = form.embed(W, A, B, 0.7)
        _close(form.weight(W, p, 0.7), W + 0.7 * B @ A, 1e-9, "embed")


def saves_and_loads(case: Case) -> None:
    """What is saved comes back under another global seed, trainable, with equal outputs."""
    adapter = _disturb(case.attach())
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), forked_rng(99):
        adapter.save(folder)
        files = sorted(p.name for p in Path(folder).iterdir())
        assert files == ["adapter.json", "adapter.safetensors"], files
        loaded = load(case.toy(), folder)
        assert torch.equal(loaded.model(_inputs()), adapter.model(_inputs()))
        with adapter.disabled(), loaded.disabled():
            assert torch.equal(loaded.model(_inputs()), adapter.model(_inputs()))
        assert all(t.requires_grad for t in loaded.parameters())
        frozen = load(case.toy(), folder, trainable=False)
        assert not any(t.requires_grad for t in frozen.parameters())


def same_seed_same_bits(case: Case) -> None:
    """The seed alone decides; the global generator does not, and is left alone."""
    starts = []
    for global_seed in (1, 2):
        with forked_rng(global_seed):
            model = case.toy()
            before = torch.get_rng_state()
            starts.append(case.attach(model, seed=3).tensors())
            assert torch.equal(before, torch.get_rng_state()), "global generator was drawn from"
    assert all(torch.equal(starts[0][k], starts[1][k]) for k in starts[0])


def keeps_dtypes(case: Case) -> None:
    """A bf16 model stays bf16, its adapter is fp32, its output bf16; fp64 stays fp64."""
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        adapter = case.attach(case.toy(dtype), modules_to_save=["lm_head"])
        assert adapter.model(_inputs(dtype)).dtype == dtype
        assert {t.dtype for t in adapter.parameters()} == {kept}
        adapter.merge()
        assert {p.dtype for p in adapter.model.parameters()} == {dtype}


def learns_its_own_form(case: Case) -> None:
    """A teacher of the same form is learned."""
    x = _inputs(rows=256)
    teacher = _disturb(case.attach(), size=0.2)
    with torch.no_grad():
        y = teacher.model(x)
    tried = []
    for lr in (1e-2, 1e-1, 1e-3):  # a variant has a learning rate of its own; one of three will do
        # what is drawn and never trained is a part of the teacher, so the student has the same
        drawn = teacher.choice.form.redrawn or teacher.choice.untrained
        student = case.attach(seed=0 if drawn else 1)
        allowed = 0.5 if student.choice.allocation.scheduled else 0.1  # a falling budget drops some
        losses = _fit(student, x, y, lr, allowed)
        tried.append(f"lr {lr:g}: {losses[0]:.3g} -> {losses[-1]:.3g}")
        if losses[-1] < allowed * losses[0]:
            return
    raise AssertionError(f"loss {', '.join(tried)}")


def _fit(student: Adapter, x: Tensor, y: Tensor, lr: float, allowed: float) -> list[float]:
    """Losses over 300 steps, or until one is `allowed` times the first."""
    steps = 300
    optimizer, losses = student.optimizer(lr=lr, steps=steps), []
    for _ in range(steps):
        loss = F.mse_loss(student.model(x), y)
        penalty = student.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if losses[-1] < allowed * losses[0]:
            break
    return losses


def is_documented(case: Case) -> None:
    """Citation, equation, and an executable fact in the file."""
    known = describe(case.preset)
    assert len(known["paper"]) > 20, "no citation in the docstring's first paragraph"
    assert "=" in known["equation"] or "W" in known["equation"], "no indented equation"
    assert ">>>" in known["notes"], "no executable fact"
    assert known["defaults"]["lr"] > 0 and known["defaults"]["lr_origin"]


def disabled_is_the_original(case: Case) -> None:
    """With the adapter disabled the model is what it was; detach() leaves just that.

    On a lossy base it is what was stored, with what a joint init added to that: the start.
    """
    model, x = case.toy(), _inputs()
    with torch.no_grad():
        before = model(x)
        adapter = case.attach(model, modules_to_save=["lm_head"])
        start, choice = model(x), _disturb(adapter).choice
        with adapter.disabled():
            off = model(x)
        _close(off, before, _allowed(case, adapter, x), "disabled")
        if choice.form.starts_at_base and choice.init.starts_at_base:
            _close(off, start, 1e-5, "disabled against the start")
        adapter.detach()
        _close(model(x), off, 1e-5, "detached")
    assert all(p.requires_grad for p in model.parameters()), "detach() did not unfreeze the model"


def resumes_in_mid_schedule(case: Case) -> None:
    """Adapter, optimizer and state, taken at one step, continue to the same bits."""

    def steps(adapter: Adapter, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            loss = adapter.model(_inputs()).square().mean()
            penalty = adapter.penalty()
            (loss if penalty is None else loss + penalty).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = case.attach()
    optimizer = whole.optimizer(lr=1e-2, steps=12)
    steps(whole, optimizer, 5)
    kept = deepcopy((whole.tensors(), whole.state(), optimizer.state_dict()))
    steps(whole, optimizer, 7)
    resumed = case.attach()
    optimizer = resumed.optimizer(lr=1e-2, steps=12)
    resumed.restore(kept[0])
    resumed.set_state(kept[1])
    optimizer.load_state_dict(kept[2])
    steps(resumed, optimizer, 7)
    ends = whole.tensors(), resumed.tensors()
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def counts_the_papers_parameters(case: Case) -> None:
    """Trained numbers equal the formula of the file."""
    adapter = case.attach()
    own = "" if case.axes else find_preset(case.preset).parameters
    expected = by_formula(adapter.choice, _planned(adapter), own)
    assert adapter.num_trainable == expected, (adapter.num_trainable, expected)


def by_formula(choice: Choice, planned: Sequence[Planned], own: str = "") -> int:
    """The trained numbers of a plan, by its form's formulas or by its preset's `own`."""
    left = (*choice.init.frozen, *choice.update.frozen)
    expected = 0
    for item in planned:
        m, n = item.shape
        expected += evaluated(own or choice.form.parameters, item.rank, m, n)
        if not own:  # the form's formula, less what the init or the update leaves untrained
            expected -= sum(math.prod(v) for k, v in item.tensors.items() if k in left)
    for m, n, r in shared_shapes(choice, planned).values():
        expected += evaluated(choice.form.shared_parameters, r, m, n)
        shapes = choice.form.shared_shapes(m, n, r)
        expected -= sum(math.prod(v) for k, v in shapes.items() if k in left)
    return expected


def scales_by_the_rank(case: Case) -> None:
    """s is that of the rank a layer has, or of the rank asked for, as the allocation says."""
    adapter = case.attach()
    for layer in adapter.layers.values():
        r = case.rank if adapter.choice.allocation.keeps_scale else layer.rank
        assert layer.full_s == adapter.choice.s(r), (layer.full_s, r)


def evaluated(formula: str, r: int, m: int, n: int) -> int:
    """A variant's formula of trained numbers, for one matrix."""
    names = {"min": min, "max": max, "int": int, "math": math, "r": r, "m": m, "n": n}
    code = compile(ast.parse(formula, mode="eval"), "parameters", "eval")
    return eval(code, {"__builtins__": {}} | names)  # a literal in a file of the variant's own


def _planned(adapter: Adapter) -> list[Any]:
    return [
        planned_item(adapter.choice, adapter.sites[name], (la.out_features, la.in_features),
                     la.rank, la.full_s)
        for name, la in adapter.layers.items()
    ]  # fmt: skip


def gradients_agree_with_float64(case: Case) -> None:
    """fp32 gradients of the fast path, against the dense equation in float64, dropout included."""
    for dropout in (0.0, 0.4) if case.drops else (0.0,):
        _gradients(_disturb(case.attach(dropout=dropout)))


def _gradients(adapter: Adapter) -> None:
    generator = torch.Generator().manual_seed(4)
    for layer in adapter.layers.values():
        x = torch.randn(16, _width(layer), generator=generator).requires_grad_()
        up = torch.randn(16, layer.out_features, generator=generator)
        torch.default_generator.manual_seed(5)
        got = torch.autograd.grad(layer(x), [x, *layer.trained], up)
        torch.default_generator.manual_seed(5)
        mask = layer.dropout(torch.ones_like(x)).double()
        p = {
            k: t.detach().double().requires_grad_(k not in layer.untrained)
            if t.is_floating_point() else t.detach()
            for k, t in layer.params.items()
        }  # fmt: skip
        x64 = x.detach().double().requires_grad_()
        W = layer.form.weight(layer.W0.double(), p, layer.s)
        bias = None if layer.frozen.bias is None else layer.frozen.bias.double()
        bias = layer.form.bias(bias, p)
        y = layer.kind.product(x64, W, bias)
        if layer.drops:
            W0 = layer.W0.double()
            y = F.linear(x64, W0, bias) + F.linear(mask * x64, W - W0)
        wanted = torch.autograd.grad(
            y,
            [x64, *(t for k, t in p.items() if k not in layer.untrained)],
            up.double(),
        )
        largest = max(b.abs().max().item() for b in wanted[1:])
        for a, b in zip(got, wanted, strict=True):  # one number's may be what is left of a sum
            least = largest if b.numel() == 1 else 1e-30
            _close(a.double(), b, 2e-5, "gradient", least)


@contextmanager
def forked_rng(seed: int) -> Any:
    """Another global seed, for as long as the context lasts."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)  # torch's own notes a stack for every device
        yield


CLAUSES: dict[str, Callable[[Case], None]] = {
    clause.__name__: clause
    for clause in (
        starts_at_base,
        forward_equals_weight,
        merged_equals_unmerged,
        only_the_adapter_trains,
        optimizer_holds_each_tensor_once,
        takes_any_factors,
        saves_and_loads,
        same_seed_same_bits,
        keeps_dtypes,
        learns_its_own_form,
        is_documented,
        disabled_is_the_original,
        resumes_in_mid_schedule,
        counts_the_papers_parameters,
        scales_by_the_rank,
        gradients_agree_with_float64,
    )
}


def check(preset: str, *, rank: int = 4, **axes: Any) -> list[str]:
    """Puts a variant to every clause of the contract; returns their names.

    Raises:
        AssertionError: a clause that fails, by name.
        Incompatible: parts that refuse each other.
    """
    case = Case(preset, rank, axes)
    for name, clause in CLAUSES.items():
        try:
            clause(case)
        except AssertionError as error:
            raise AssertionError(f"{preset} {axes or ''}: {name}: {error}") from error
    return list(CLAUSES)
