"""ReLoRA: High-Rank Training Through Low-Rank Updates (Lialin et al., ICLR 2024), arXiv:2307.05695.

    W0 <- W0 + s B A,    A ~ U(-1/sqrt(n), 1/sqrt(n)),    B <- 0    every T steps

so that the sum of many changes of rank r has a higher rank. Adam's moments of the old factors would
pull the new ones back towards them, and are dropped. Official code: Guitaricet/relora,
peft_pretraining/relora.py (`merge_and_reinit`) and training_utils.py (`optimizer_reset`), which
leaves one in a thousand of the moments, at random, and so keeps Adam's count of steps; here that
count begins again with the moments. Its first A is zero by mistake, so that nothing learns before
the first restart. Paper and code warm the rate up again after each restart, all of it; here the
adapter's tensors warm up and a new head does not. Magnitudes (DoRA's m) stay: the base takes s B A,
so W is what it was. PEFT has no such restart.

Times below 1 are fractions of the run, others are steps; the last step never restarts. The layer's
weight does not move, the base takes all of it, and the original comes back when it is disabled:

>>> import torch, variants
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False)).double()
>>> layer = variants.attach(model, "relora", rank=2, targets=["0"]).layers["0"]
>>> p, W0 = layer.params, layer.W0.clone()
>>> _ = torch.nn.init.normal_(p["B"])
>>> W, A, rule = layer.weight.detach(), p["A"].detach().clone(), ReLoRA(every=5.0)
>>> state = rule.begin({"0": layer}, steps=20)
>>> [len(rule.after_step({"0": layer}, state, step)) for step in (4, 5, 20)]  # what went stale
[0, 2, 0]
>>> torch.equal(layer.W0, W), bool(p["B"].any()), bool((p["A"] == A).any()), torch.equal(
...     layer.original, W0)
(True, False, False, True)
>>> A = p["A"].detach().clone()
>>> _ = rule.after_step({"0": layer}, state, 10)
>>> bool((p["A"] == A).any()), bool(p["A"].abs().max() <= 8**-0.5)  # anew, not the same again
(False, True)
>>> rule = ReLoRA(every=5.0, warmup=3.0)
>>> state = rule.begin({"0": layer}, steps=20)
>>> _ = rule.after_step({"0": layer}, state, 5)
>>> sorted(state["before"]), sorted(state["since"].values())
(['0:A', '0:B'], [5, 5])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _rewarm
from ._api import Allocation, Layers, State, in_steps, kaiming
from ._factors import need_product, seed_of
from ._registry import Incompatible, preset

if TYPE_CHECKING:
    from ._adapter import Choice


@dataclass(frozen=True)
class ReLoRA(Allocation, name="relora"):
    """Merges the factors into the base and begins them anew, again and again."""

    every: float = 0.25
    """T, between two restarts"""
    warmup: float = 0.02
    """after a restart, until the rate is whole again"""

    scheduled = True
    moves_base = True

    def __post_init__(self) -> None:
        if self.every <= 0 or self.warmup < 0:
            raise Incompatible("allocation relora: every must be positive, warmup not negative")

    def fits(self, choice: "Choice") -> None:
        need_product(self, choice)
        if "B" in choice.init.frozen:
            raise self.refuse(choice.init, "an init that leaves B to train, as it begins B at zero")
        if choice.update.moves_base:
            raise self.refuse(choice.update, "an update that leaves the base to it")

    def begin(self, layers: Layers, steps: int) -> State:
        every, warmup = max(1, in_steps(self.every, steps)), in_steps(self.warmup, steps)
        if every >= steps:
            raise Incompatible(
                f"allocation relora: every={every} steps leaves no restart in a run of {steps}"
            )
        ranks = sum(layer.rank for layer in layers.values())
        state = {"steps": steps, "every": every, "warmup": warmup, "seed": seed_of(layers),
                 "budget": ranks}  # fmt: skip
        _rewarm.begin(state)
        return state

    @torch.no_grad()
    def after_step(self, layers: Layers, state: State, step: int) -> Sequence[Tensor]:
        _rewarm.shorten(layers, state, step, state["warmup"])
        if step % state["every"] or step >= state["steps"]:
            _rewarm.hold(layers, state, step, state["warmup"])
            return ()
        generator, stale = torch.Generator().manual_seed(state["seed"] + step), []
        for layer in layers.values():
            A, B = layer.params["A"], layer.params["B"]
            layer.move(layer.full_s * B @ A)
            A.copy_(kaiming(A.shape[0], A.shape[1], A, generator))
            B.zero_()
            stale += [A, B]
        again = [_rewarm.key_of(name, k) for name, layer in layers.items()
                 for k in layer.params if k not in layer.untrained]  # fmt: skip
        _rewarm.hold(layers, state, step, state["warmup"], again)
        return stale


preset(
    "relora",
    allocation="relora",
    rank=16,
    alpha="2r",
    lr=4e-4,
    lr_origin="twice LoRA's, as the official README asks for twice the usual rate",
)
