"""IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning
(Zhang et al., 2023), arXiv:2308.12043.

    W = W0 + (alpha / k) sum over j <= k + h of E_j P_j Q_j,    P, Q ~ N(0, 0.02^2),    E = 0

k triplets of a matrix are in use, h more are learned in advance: their P and Q train, their E rests
at 1e-5. Every T steps the `top` matrices of the largest score take their h into use (E then trains)
and h new ones into reserve, until the mean k reaches the target; the reserve's E then becomes zero.
The score is mean(I) mean |I - mean(I)|, two moving averages of I = sum |D * dL/dD| / sqrt(m n),
where D = W - W0; triplets that are new warm their rate up. Official code: FeiyuZhang98/IncreLoRA,
loralib/loralib/increlora.py (`RankAllocator`), whose penalty takes each P_j and Q_j by itself, so
that it binds their lengths and no angles; the paper's, of P^T P - I and Q Q^T - I, is the default
here and the code's a setting. Its scale is alpha / (k + 1e-5). The code grows without a bound and
past the target where `top` times h does not divide what is missing; here a matrix has room for r,
and the last round takes no more than is missing. PEFT has no such allocation.

Times below 1 are fractions of the run, others are steps. A new triplet gets its own Adam state, as
each is a tensor by itself.

>>> import torch, variants
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 8))
>>> layers = variants.attach(model, "increlora", rank=4, targets=["0", "1"]).layers
>>> rule = Growth(target_rank=3.0, warmup=2.0, every=2.0, top=1)
>>> state = rule.begin(layers, 20)
>>> rule._grow(layers, state, scores=[0.1, 0.2]), state["used"]    # the larger score gets one
(['1:E1', '1:P2', '1:Q2'], {'0': 1, '1': 2})
>>> layer = layers["0"]
>>> state, numbers = rule.begin({"0": layer}, 20), []
>>> for step in range(1, 9):
...     _ = rule.after_step({"0": layer}, state, step)
...     E = [layer.params[f"E{j}"].item() for j in range(4)]
...     numbers += [(state["used"]["0"], sum(e > 0 for e in E))]
>>> numbers[0], numbers[3], numbers[4], numbers[7]       # in use, and E above zero
((1, 1), (1, 1), (2, 2), (3, 2))

Averages of a score that is 1 and then 0; and the penalty of P and Q that are zero, 0.1 ||I||_F:

>>> layer = layers["1"]
>>> state = rule.begin({"1": layer}, 20)
>>> for score in (1.0, 0.0):
...     state["score"]["1"] = torch.tensor(score)
...     _ = rule.after_step({"1": layer}, state, 1)
...     print(round(state["mean"].item(), 4), round(state["uncertainty"].item(), 4))
0.15 0.1275
0.1275 0.1275
>>> for t in layer.params.values():
...     _ = t.data.zero_() if t.ndim == 2 else None
>>> seen = len([k for k in layer.eval().p if k[0] == "E"])
>>> round(rule.penalty({"1": layer}).item() / seen**0.5, 4)
0.1

No more than is missing, however many a matrix gets at once:

>>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 8))
>>> layers = variants.attach(model, "increlora", rank=6, targets=["0", "1"]).layers
>>> rule = Growth(target_rank=2.5, add=2, top=2)
>>> state = rule.begin(layers, 20)
>>> _ = rule._grow(layers, state, scores=[0.1, 0.2])
>>> state["used"]
{'0': 2, '1': 3}

With `top` left open, as many matrices a round as reach the target by `until`: 7 in 3 rounds.

>>> rule = Growth(target_rank=4.5, warmup=2.0, until=8.0, every=2.0)
>>> rule.begin(variants.attach(torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 8)),
...                            "increlora", rank=6, targets=["0", "1"]).layers, 20)["top"]
3
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _rewarm
from ._api import Allocation, Layers, State, in_steps
from ._registry import Incompatible, preset
from .increments import Increments, in_use, off_orthogonal, settle, show
from .triplet import averaged

if TYPE_CHECKING:
    from ._adapter import Choice


@dataclass(frozen=True)
class Growth(Allocation, name="increlora"):
    """Few triplets at first; those matrices get more that change the loss most."""

    target_rank: float = 0.0
    """mean number of triplets of a matrix at the end; 0: half of the room"""
    initial: int = 1
    """triplets of every matrix at the start"""
    add: int = 1
    """h, triplets that a matrix gets at once"""
    top: int = 0
    """matrices that get some in a round; 0: as many as it takes to be done at `until`"""
    warmup: float = 0.1
    """before it, none gets any"""
    until: float = 0.6
    """where the growth ends if `top` is 0"""
    every: float = 0.02
    """T, between two rounds"""
    restart: float = 0.02
    """in which the rate of new triplets rises to that of the others"""
    beta1: float = 0.85
    """of the moving average of the importance"""
    beta2: float = 0.85
    """of the moving average of the distance from it"""
    orthogonality: float = 0.1
    """weight of the penalty: mean over all P and Q of ||P^T P - I||_F"""
    angles: bool = True
    """penalize P^T P - I (the paper); else only the lengths of P's columns (the official code)"""

    scheduled = True
    penalized = True

    def __post_init__(self) -> None:
        times = (self.warmup, self.until, self.every, self.restart)
        if min(self.initial, self.add) < 1 or min(self.top, self.target_rank, *times) < 0:
            raise Incompatible("allocation increlora: initial and add below 1, or others negative")
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise Incompatible("allocation increlora: beta1 or beta2 not between 0 and 1")

    def fits(self, choice: "Choice") -> None:
        if not isinstance(choice.form, Increments):
            raise self.refuse(choice.form, "a form that grows by triplets (increlora)")

    def begin(self, layers: Layers, steps: int) -> State:
        times = (self.warmup, self.until, self.every, self.restart)
        warmup, until, every, restart = (in_steps(t, steps) for t in times)
        used = {n: in_use(la) or min(self.initial, la.rank) for n, la in layers.items()}
        start, room = sum(used.values()), sum(layer.rank for layer in layers.values())
        target = round(self.target_rank * len(layers)) if self.target_rank else room // 2
        if target > room or (self.target_rank > 0 and target < start):
            raise Incompatible(f"allocation increlora: target_rank={self.target_rank}: {target} "
                               f"triplets, of {start} at first and room for {room}")  # fmt: skip
        rounds = max(1, (until - warmup) // max(1, every))
        top = self.top or max(1, math.ceil((target - start) / (self.add * rounds)))
        zeros = next(iter(layers.values())).params["share"].detach().new_zeros(len(layers))
        state = {"target": max(target, start), "top": top, "warmup": warmup, "every": max(1, every),
                 "restart": restart, "mean": zeros, "uncertainty": zeros.clone(), "score": {},
                 "used": used, "since": {}, "before": {}}  # fmt: skip
        settle(layers, state, self.add)
        return state

    def resumed(self, layers: Layers, state: State) -> None:
        show(layers, state, self.add)

    def penalty(self, layers: Layers) -> Tensor | None:
        found = [off for layer in layers.values() for off in off_orthogonal(layer.p, self.angles)]
        return self.orthogonality * torch.cat(found).mean()

    def noted(self, layers: Layers, state: State) -> Sequence[Tensor]:
        if state["budget"] >= state["target"]:
            return ()
        score = state["score"]
        for name, layer in layers.items():  # one that no token of this process reached
            if name not in score:
                score[name] = layer.params["share"].new_zeros(layer.out_features, layer.in_features)
        return [score[name] for name in layers]

    @torch.no_grad()
    def after_step(self, layers: Layers, state: State, step: int) -> Sequence[Tensor]:
        _rewarm.shorten(layers, state, step, state["restart"])
        new = []
        if state["budget"] < state["target"]:
            mean, uncertainty, found = state["mean"], state["uncertainty"], state["score"]
            score = torch.stack([found.get(k, torch.zeros(1)).abs().sum().to(mean) for k in layers])
            found.clear()
            averaged([mean], [uncertainty], [score], self.beta1, self.beta2)
            done = step - 1  # the official code asks before the optimizer's step
            if done > state["warmup"] and done % state["every"] == 0:
                new = self._grow(layers, state, (mean * uncertainty).tolist())
        _rewarm.hold(layers, state, step, state["restart"], new)
        return ()

    def _grow(self, layers: Layers, state: State, scores: list[float]) -> list[str]:
        """Gives the best matrices their reserve, and a new one; the names of what is new."""
        used, new = state["used"], []
        order = sorted(zip((-score for score in scores), layers, strict=True))
        best = [name for _, name in order if used[name] < layers[name].rank]
        for name in best[: state["top"]]:
            before, rank = used[name], layers[name].rank
            missing = state["target"] - sum(used.values())
            used[name] = after = min(before + min(self.add, missing), rank)
            new += [_rewarm.key_of(name, f"E{j}") for j in range(before, after)]
            reserve = range(before + self.add, min(after + self.add, rank))
            new += [_rewarm.key_of(name, f"{k}{j}") for j in reserve for k in "PQ"]
        settle(layers, state, self.add)
        return new

    def ranks(self, layers: Layers, state: State | None) -> dict[str, int]:
        return {name: in_use(layer) for name, layer in layers.items()}


preset("increlora", form="increlora", allocation="increlora", rank=8, alpha=16, lr=8e-4, width=768,
       lr_origin="the official script for DeBERTaV3-base on SST-2, target rank 8")  # fmt: skip
