"""DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
Adaptation (Valipour et al., EACL 2023), arXiv:2210.07558.

    W = W0 + (alpha / b) B[:, :b] A[:b],    b ~ U{1, ..., r} anew for each step

so that the first directions learn to serve alone, and the trained adapter can be cut to any rank.
Evaluation and merging take all r. Official code: huawei-noah/Efficient-NLP,
DyLoRA/loralib/DyLoRA.py (`dynamic`): each factor times sqrt(r / b) under the scale alpha / r; its
NLU script has every layer at one b, and `frozen`: the directions before b are seen, only b itself
gets a gradient (the paper's other form, a setting here as there). Each layer takes r / b times its
own scale, so alpha / b becomes alpha / sqrt(r) r / b with rsLoRA's. PEFT has no such allocation.

What a step sees, and the size of it:

>>> import torch, variants
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False)).train()
>>> layer = variants.attach(model, "dylora", rank=4, alpha=8, targets=["0"]).layers["0"]
>>> _ = torch.nn.init.normal_(layer.params["B"]), DyLoRA().show({"0": layer}, 2)
>>> A, B, x = layer.params["A"], layer.params["B"], torch.randn(3, 8)
>>> change = layer(x) - layer.frozen(x)
>>> torch.allclose(change, (8 / 2) * x @ A[:2].T @ B[:, :2].T, atol=1e-5)
True
>>> change.sum().backward()
>>> [bool(row.any()) for row in A.grad]
[True, True, False, False]
>>> state, drawn = DyLoRA().begin({"0": layer}, 400), []
>>> for step in range(1, 400):
...     _ = DyLoRA().after_step({"0": layer}, state, step)
...     drawn += [state["b"]]
>>> sorted(set(drawn)), all(70 < drawn.count(b) < 130 for b in (1, 2, 3, 4))
([1, 2, 3, 4], True)
>>> _ = DyLoRA().after_step({"0": layer}, state, 400)  # the last one: all of it from here on
>>> layer.seen is None
True

A layer of rank 2 beside one of rank 4 is whole at b = 3, at its own scale:

>>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
>>> pattern = {"1": 2}
>>> layers = variants.attach(model, "dylora", rank=4, targets="0,1", rank_pattern=pattern).layers
>>> DyLoRA().show(layers, 3)
>>> [round(layer.s / layer.full_s, 2) for layer in layers.values()]
[1.33, 1.0]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._api import Allocation, Layers, State, Tensors
from ._factors import need_product, seed_of
from ._registry import preset

if TYPE_CHECKING:
    from ._adapter import Choice


@dataclass(frozen=True)
class DyLoRA(Allocation, name="dylora"):
    """The first b directions, b drawn for each step."""

    frozen: bool = False
    """train direction b alone; those before it are seen and not trained"""

    scheduled = True
    partial = True

    def fits(self, choice: "Choice") -> None:
        need_product(self, choice)
        if choice.init.moves_base:
            raise self.refuse(choice.init, "an init that leaves the base, since it shows a part")

    def begin(self, layers: Layers, steps: int) -> State:
        state = {"steps": steps, "seed": seed_of(layers), "b": 0, "budget": 0}
        self._next(layers, state, 1)
        return state

    def resumed(self, layers: Layers, state: State) -> None:
        self.show(layers, state["b"])

    def after_step(self, layers: Layers, state: State, step: int) -> Sequence[Tensor]:
        self._next(layers, state, step + 1)
        return ()

    def _next(self, layers: Layers, state: State, step: int) -> None:
        """Draws b of `step`; after the last it is 0."""
        largest = max(layer.rank for layer in layers.values())
        generator = torch.Generator().manual_seed(state["seed"] + step)
        drawn = int(torch.randint(1, largest + 1, (), generator=generator))
        state["b"] = drawn if step <= state["steps"] else 0
        shown = state["b"] or largest
        state["budget"] = sum(min(shown, layer.rank) for layer in layers.values())
        self.resumed(layers, state)

    def show(self, layers: Layers, b: int) -> None:
        """Lets every layer see its first b directions in training; 0: all of them."""
        for layer in layers.values():
            own = min(b, layer.rank)
            layer.seen = (self._first(own), layer.rank / own) if b else None

    def _first(self, b: int) -> Callable[[Tensors], Tensors]:
        def view(p: Tensors) -> Tensors:
            A, B = p["A"][:b], p["B"][:, :b]
            if self.frozen:
                A = torch.cat([A[: b - 1].detach(), A[b - 1 :]])
                B = torch.cat([B[:, : b - 1].detach(), B[:, b - 1 :]], dim=1)
            return {**dict(p.items()), "A": A, "B": B}

        return view


preset(
    "dylora",
    allocation="dylora",
    rank=8,
    alpha=16,
    lr=5e-4,
    lr_origin="the official script for RoBERTa-base on GLUE, which trains with `frozen`",
    width=768,
)
