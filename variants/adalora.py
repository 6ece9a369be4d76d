"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning
(Zhang et al., ICLR 2023), arXiv:2303.10512.

    W = W0 + s P diag(E) Q,    s = alpha / (r + 1e-5),    P, Q ~ N(0, 0.02^2),    E = 0

Triplets compete for one global budget, which falls by a cubic from the initial total to the target;
those with the least importance have their E set to zero, and may come back before the next mask.
Official code: QingruZhang/AdaLoRA, loralib/adalora.py (`RankAllocator`), which is right where the
paper is not: the uncertainty of Eq. 12 is |I - mean(I)|, and the penalty is a mean of unsquared
norms. s keeps the initial rank after pruning. Unlike there, a mask of nothing (target = initial) is
no error; unlike PEFT, the penalty never enters an evaluation loss, the averages are in the
checkpoint, and the schedule runs by itself from the optimizer's step.

Times below 1 are fractions of the run, others are steps. The budget of the official MNLI script:

>>> rule = AdaLoRABudget(target_rank=1, warmup=8000, final=50000, every=100)
>>> [rule.budget(t, 85900, 3 * 72, 72)[0] for t in (8000, 8001, 20000, 35900, 85900)]
[216, 215, 98, 72, 72]

Masks come every 100 steps:

>>> [rule.budget(t, 85900, 3 * 72, 72)[1] for t in (8001, 8100, 8101, 35899, 35901)]
[False, True, False, False, True]
>>> AdaLoRABudget(warmup=1, final=5, every=1).budget(20, 20, 12, 4)  # two thirds
(8, True)

Of three triplets, the second has the least importance, 2^2 + 2^2 by its P and Q to 3^2 and 4^2 by
E; averages keep 0.85 of what they were:

>>> import variants
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False))
>>> layers = variants.attach(model, "adalora", rank=3, targets=["0"]).layers
>>> rule = AdaLoRABudget(target_rank=2, warmup=1, final=5, every=1)
>>> state, p = rule.begin(layers, 20), layers["0"].params
>>> p["E"].data = torch.tensor([3.0, 1.0, 4.0])
>>> p["E"].grad = torch.tensor([1.0, 0.0, -1.0])
>>> for k in "PQ":
...     _ = p[k].data.fill_(2.0)
...     p[k].grad = torch.zeros_like(p[k])
>>> p["P"].grad[:, 1], p["Q"].grad[1] = 1.0, -1.0
>>> _ = rule.after_step(layers, state, 15)
>>> p["E"].tolist(), rule.ranks(layers, state)
([3.0, 0.0, 4.0], {'0': 2})
>>> first = [3 * 6]  # the first number of E, which comes after P
>>> [round(v, 4) for v in (*state["mean"][first].tolist(), *state["uncertainty"][first].tolist())]
[0.45, 0.3825]
>>> p["E"].grad = torch.zeros(3)
>>> _ = rule.after_step(layers, state, 3)
>>> [round(v, 4) for v in (*state["mean"][first].tolist(), *state["uncertainty"][first].tolist())]
[0.3825, 0.3825]
>>> _ = p["P"].data.zero_(), p["Q"].data.zero_()
>>> round(rule.penalty(layers).item(), 4)  # 0.1 ||I||_F
0.1732

A sign does not matter to what is in use; where the target is all there is, nothing is masked:

>>> p["E"].data = torch.tensor([-1.0, 0.0, 1.0])
>>> rule.ranks(layers, None)
{'0': 2}
>>> rule = AdaLoRABudget(target_rank=3, warmup=1, final=5, every=1)
>>> state = rule.begin(layers, 20)
>>> rule.after_step(layers, state, 17), p["E"].tolist()
([], [-1.0, 0.0, 1.0])
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import triplet
from ._api import Allocation, Scale, in_steps
from ._layer import Adapted
from ._registry import Incompatible, preset

if TYPE_CHECKING:
    from ._adapter import Choice


@dataclass(frozen=True)
class RankNum(Scale, name="adalora"):
    """s = alpha / (r + 1e-5), the official code's `ranknum`."""

    def value(self, alpha: float, r: int) -> float:
        return alpha / (r + 1e-5)


@dataclass(frozen=True)
class AdaLoRABudget(Allocation, name="adalora"):
    """Importance of each triplet, a falling budget, and the orthogonality penalty."""

    target_rank: float = 0.0
    """mean rank per matrix at the end; 0: two thirds of the initial one, the paper's proportion"""
    warmup: float = 0.1
    """before it, every triplet stays"""
    final: float = 0.5
    """the last part of the run, with the final triplets"""
    every: float = 0.001
    """between two masks"""
    beta1: float = 0.85
    """of the moving average of the importance"""
    beta2: float = 0.85
    """of the moving average of the distance from it"""
    orthogonality: float = 0.1
    """weight of the penalty: mean over all P and Q of ||P^T P - I||_F"""

    scheduled = True
    penalized = True

    def __post_init__(self) -> None:
        for name in ("target_rank", "warmup", "final", "every", "orthogonality"):
            if getattr(self, name) < 0:
                raise Incompatible(f"allocation adalora: {name}={getattr(self, name)} is negative")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise Incompatible(f"allocation adalora: {name} must lie between 0 and 1")

    def fits(self, choice: "Choice") -> None:
        if not isinstance(choice.form, triplet.Triplet):
            raise self.refuse(choice.form, "a form with singular values (triplet)")

    def times(self, steps: int) -> tuple[int, int, int]:
        """(end of warm-up, length of the final phase, interval) in steps."""
        warmup, final, every = (in_steps(t, steps) for t in (self.warmup, self.final, self.every))
        if warmup + final >= steps or final + 1 >= steps:
            raise Incompatible(
                f"allocation adalora: warmup={warmup} and final={final} steps leave nothing of "
                f"{steps} to measure importance and let the budget fall in"
            )
        return warmup, final, max(1, every)

    def budget(self, step: int, steps: int, start: int, matrices: int) -> tuple[int, bool]:
        """(triplets allowed after `step`, whether to mask now), of `start` in all."""
        warmup, final, every = self.times(steps)
        target = round(self.target_rank * matrices) if self.target_rank else round(start * 2 / 3)
        if not 1 <= target <= start:
            raise Incompatible(
                f"allocation adalora: target_rank={self.target_rank} leaves {target or 'no'} "
                f"triplets; the initial rank gives {start}"
            )
        if step <= warmup:
            return start, False
        if step > steps - final:
            return target, True
        left = 1 - (step - warmup) / (steps - final - warmup)
        return int(target + (start - target) * left**3), step % every == 0

    def begin(self, layers: Mapping[str, Adapted], steps: int) -> dict[str, Any]:
        start = sum(layer.rank for layer in layers.values())
        self.budget(steps, steps, start, len(layers))  # refuses an impossible schedule now
        zeros = torch.zeros_like(triplet.flat(triplet.tensors(layers)))
        ranks = {name: layer.rank for name, layer in layers.items()}
        return {"steps": steps, "budget": start, "ranks": ranks, "threshold": 0.0, "mean": zeros,
                "uncertainty": zeros.clone()}  # fmt: skip

    def penalty(self, layers: Mapping[str, Adapted]) -> Tensor | None:
        P, _, Q = triplet.in_kinds(triplet.tensors(layers))
        return self.orthogonality * triplet.distance(P, Q)

    @torch.no_grad()
    def after_step(
        self, layers: Mapping[str, Adapted], state: dict[str, Any], step: int
    ) -> list[Tensor]:
        steps, mean, uncertainty = state["steps"], state["mean"], state["uncertainty"]
        done = step - 1  # the official scripts ask before they count the step
        p = triplet.tensors(layers)
        if done < steps - self.times(steps)[1]:
            for own, some in triplet.portions(p):
                now = triplet.flat(torch._foreach_mul(some, triplet.gradients(some))).abs_()
                triplet.averaged([mean[own]], [uncertainty[own]], [now], self.beta1, self.beta2)
        start = sum(layer.rank for layer in layers.values())
        state["budget"], mask = self.budget(done, steps, start, len(layers))
        if mask and state["budget"] < start:
            P, E, Q = triplet.in_kinds(triplet.like(mean * uncertainty, p))
            importance = torch.cat(list(E)) + torch.cat([t.mean(0) for t in P])
            importance += torch.cat([t.mean(1) for t in Q])
            threshold = importance.kthvalue(start - state["budget"]).values
            E = list(triplet.in_kinds(p)[1])
            kept = (~(importance <= threshold)).to(importance.dtype)
            torch._foreach_mul_(E, triplet.like(kept, E))
            *flags, state["threshold"] = torch.cat([kept, threshold[None]]).tolist()
            own = iter(flags)
            state["ranks"] = {k: int(sum(islice(own, la.rank))) for k, la in layers.items()}
        return []  # the official code leaves Adam's moments: a masked E may return

    def ranks(self, layers: Mapping[str, Adapted], state: dict[str, Any] | None) -> dict[str, int]:
        if state is not None:  # those of the last mask: a masked E moves again until the next
            return dict(state["ranks"])
        return {name: int((layer.params["E"] != 0).sum()) for name, layer in layers.items()}


preset("adalora", form="triplet", scale="adalora", allocation="adalora", rank=12, alpha=32, lr=5e-4,
       lr_origin="the official script for MNLI, DeBERTaV3-base (5e-4 to 2.2e-3 for other tasks)",
       width=768)  # fmt: skip
