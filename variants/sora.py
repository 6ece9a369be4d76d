"""SoRA: Sparse Low-rank Adaptation of Pre-trained Language Models (Ding et al., EMNLP 2023),
arXiv:2311.11696.

    W = W0 + s B diag(g) A,    g ~ N(0, 1),    g <- sign(g) max(|g| - xi, 0)    after each step

The gate's soft threshold is the proximal step of an L1 penalty on g (the paper's xi = eta lambda);
directions whose gate reaches zero are gone unless their gradient brings them back. Official code:
TsinghuaC3I/SoRA, src/lora.py and src/sparse_optimizer.py: xi is a constant (`sparse_lambda_2`), as
here; but its three assignments in a row also send every |g| in (xi, 2 xi) to zero, and keep |g| =
xi. Its scripts add mean |g| to the loss as well, with weight 10, which the paper does not. The
sparsifying scheduler (the paper's Algorithm 1: further runs, each with a larger xi) is a sweep over
`threshold` here, and its gates have an optimizer of their own, without decay. Inits that give A and
B find g = 1. PEFT has no such gate.

Gates are drawn, so some are near zero from the start, and each multiplies its direction:

>>> import torch
>>> p = SoRA().start(torch.zeros(9, 9), 900, 1.0, torch.Generator().manual_seed(0))
>>> round(p["g"].mean().item(), 1), round(p["g"].std().item(), 1)
(0.0, 1.0)
>>> p = {"A": torch.eye(2, 3), "B": torch.eye(3, 2), "g": torch.tensor([2.0, -3.0])}
>>> SoRA().weight(torch.zeros(3, 3), p, s=10.0).diag().tolist()
[20.0, -30.0, 0.0]

The threshold is soft: what it leaves is smaller by xi, and nothing between xi and 2 xi is lost:

>>> soft(torch.tensor([-3.0, -1.5, -1.0, 0.2, 1.2, 2.0]), 1.0).tolist()
[-2.0, -0.5, -0.0, 0.0, 0.20000004768371582, 1.0]
>>> layer = type("Layer", (), {"params": p})
>>> _ = SoftThreshold(0.5).after_step({"x": layer}, {}, step=7)
>>> p["g"].tolist()
[1.5, -2.5]
>>> SoftThreshold().ranks({"x": layer}, None)
{'x': 2}
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._api import Allocation, Layers, LowRank, State, Tensors, kaiming
from ._registry import Incompatible, preset

if TYPE_CHECKING:
    from ._adapter import Choice


@dataclass(frozen=True)
class SoRA(LowRank, name="sora"):
    """W0 + s B diag(g) A: a gate on each direction."""

    rank_means = "r, the initial number of directions of every matrix; gates then close"
    parameters = "r*(m + n + 1)"

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"A": (r, n), "B": (m, r), "g": (r,)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        A = kaiming(r, n, W0, generator)
        g = torch.randn(r, generator=generator, dtype=torch.float32).to(W0)
        return {"A": A, "B": W0.new_zeros(m, r), "g": g}

    def embed(self, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensors:
        return {"A": A, "B": B, "g": A.new_ones(A.shape[0])}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + s * (p["B"] * p["g"]) @ p["A"]

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        return p["A"], p["B"] * p["g"]


def soft(g: Tensor, xi: float) -> Tensor:
    """sign(g) max(|g| - xi, 0)."""
    return g.sign() * (g.abs() - xi).clamp_min(0)


@dataclass(frozen=True)
class SoftThreshold(Allocation, name="sora"):
    """Closes gates: a soft threshold on g after each step."""

    threshold: float = 3e-4
    """xi, by which |g| shrinks at each step"""

    scheduled = True

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise Incompatible(f"allocation sora: threshold={self.threshold} is negative")

    def fits(self, choice: "Choice") -> None:
        if not isinstance(choice.form, SoRA):
            raise self.refuse(choice.form, "a form with gates (sora)")

    def begin(self, layers: Layers, steps: int) -> State:
        return {"budget": sum(self.ranks(layers, None).values())}

    @torch.no_grad()
    def after_step(self, layers: Layers, state: State, step: int) -> Sequence[Tensor]:
        for layer in layers.values():
            layer.params["g"].copy_(soft(layer.params["g"], self.threshold))
        state["budget"] = sum(self.ranks(layers, None).values())
        return ()  # Adam's moments of a closed gate go on: it may open again

    def ranks(self, layers: Layers, state: State | None) -> dict[str, int]:
        return {name: int((layer.params["g"] != 0).sum()) for name, layer in layers.items()}


preset(
    "sora",
    form="sora",
    allocation="sora",
    rank=8,
    alpha=16,
    lr=8e-4,
    lr_origin="the official script for DeBERTaV3-base on STS-B",
    width=768,
)
