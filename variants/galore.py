"""GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection (Zhao et al., ICML 2024),
arXiv:2403.03507.

    W = W - lr k Adam(G Q) Q^T  (m >= n),    W = W - lr k P Adam(P^T G)  (m < n)

W itself trains (form full); Q [n, r] or P [m, r] are the leading singular vectors of G at steps 0,
T, 2T, ... and Adam's moments live in those r directions, left as they are when the directions
change. Official code: jiaweizzhao/GaLore, galore_torch/galore_projector.py (`std`) and adamw.py;
eps stands where the paper and torch's AdamW have it, after the bias correction (there: before). A
matrix with less than r singular vectors keeps them all. What is no matrix goes by AdamW. Defaults
are the official ones; the preset has LoRA's rank and the step of the official fine-tuning script.
PEFT has no such optimizer.

The larger side keeps its size, so the moments hold r max(m, n) numbers; with every direction kept
nothing of the gradient is lost, with one its largest singular value is what is left:

>>> import torch
>>> for G in (torch.randn(6, 4), torch.randn(4, 6), torch.randn(4, 4)):
...     for r in (1, 4):
...         low, rebuilt = projected(G, directions(G, r))
...         print(tuple(low.shape), int(torch.linalg.matrix_rank(rebuilt(low))),
...               torch.allclose(rebuilt(low), G, atol=1e-5),
...               torch.allclose(low.norm(), torch.linalg.svdvals(G)[:r].norm()))
(6, 1) 1 False True
(6, 4) 4 True True
(1, 6) 1 False True
(4, 6) 4 True True
(4, 1) 1 False True
(4, 4) 4 True True

A first step is rate times factor long in each number of the projection, and keeps its directions:

>>> import variants
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False)).double()
>>> update = {"name": "galore", "rank": 2, "factor": 0.5}
>>> adapter = variants.attach(model, "galore", targets=["0"], update=update)
>>> optimizer, W = adapter.optimizer(lr=0.1), adapter.layers["0"].params["W"]
>>> before = W.detach().clone()
>>> _ = model(torch.randn(9, 8).double()).square().sum().backward(), optimizer.step()
>>> d = directions(W.grad, 2)
>>> torch.allclose((d.T @ (before - W)).abs(), torch.tensor(0.05).double())
True
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._api import Update, trained
from ._factors import Factored
from ._layer import Adapted
from ._registry import Incompatible, preset

if TYPE_CHECKING:
    from ._adapter import Choice


def directions(G: Tensor, r: int) -> Tensor:
    """Q [n, r] for a tall (or square) G [m, n], P [m, r] for a wide one."""
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return (Vh[:r].mT if G.shape[0] >= G.shape[1] else U[:, :r]).contiguous()


def projected(G: Tensor, d: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """G in the directions d, and the way back to [m, n]."""
    if G.shape[0] >= G.shape[1]:
        return G @ d, lambda low: low @ d.mT
    return d.mT @ G, lambda low: d @ low


class Projected(Factored):
    """Adam in the gradient's leading directions."""

    rank, every, factor = 0, 0, 0.0

    def move(self, group: dict[str, Any]) -> None:
        known = [W for W in group["params"] if W.grad is not None]
        low, ways = [], []
        for W in known:
            state = self.state[W]
            if state.get("step", 0) % self.every == 0:
                state["directions"] = directions(W.grad, self.rank)
            small, rebuilt = projected(W.grad, state["directions"])
            low.append(small)
            ways.append(rebuilt)
        moves = self.direction(group, known, low)
        along = [self.factor * rebuilt(d) for d, rebuilt in zip(moves, ways, strict=True)]
        self.descend(group, known, along)


@dataclass(frozen=True)
class GaLore(Update, name="galore"):
    """Adam on the gradient's projection; every number of W learns."""

    rank: int = 128
    """directions of the gradient that are kept"""
    every: int = 200
    """T, steps between two choices of directions"""
    factor: float = 0.25
    """k, by which a step is multiplied (`scale` in the official code)"""

    def __post_init__(self) -> None:
        if min(self.rank, self.every) < 1:
            raise Incompatible("update galore: rank and every are whole numbers, 1 or more")
        if self.factor <= 0:
            raise Incompatible(f"update galore: factor={self.factor} must be positive")

    def fits(self, choice: "Choice") -> None:
        if choice.form.shapes(8, 6, 1).get("W") != (8, 6):
            raise self.refuse(choice.form, "a form that trains W itself (full)")

    def optimizer(
        self, layers: Mapping[str, Adapted], others: Sequence[Tensor], lr: float, **settings: Any
    ) -> torch.optim.Optimizer:
        own = [t for t in trained(layers) if t.ndim == 2]
        optimizer = Projected(layers, others, own, lr, **settings)
        optimizer.rank, optimizer.every, optimizer.factor = self.rank, self.every, self.factor
        return optimizer


preset(
    "galore",
    form="full",
    scale="none",
    update={"name": "galore", "rank": 16},
    rank=None,
    alpha=None,
    lr=4.8e-4,
    lr_origin="times factor 1.2e-4, as the official script for RoBERTa-base on GLUE (3e-5 times 4)",
    width=768,
)
