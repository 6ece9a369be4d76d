"""Full fine-tuning of the target matrices: the anchor of every comparison.

    W is trained itself,    W = W0 at the start

Biderman et al. 2024 (arXiv:2405.09673) give the customs: about a tenth of LoRA's learning rate. The
same modules move as with an adapter; embeddings, norms and biases stay frozen. The untouched W0 is
kept beside the trained one, so that the original is at hand; its bytes are counted.

The change has any rank:

>>> import torch
>>> W = Full().weight(torch.zeros(6, 8), {"W": torch.eye(6, 8)}, s=1.0)
>>> int(torch.linalg.matrix_rank(W))
6
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors
from ._registry import preset


@dataclass(frozen=True)
class Full(Form, name="full"):
    """Every number of W."""

    rank_means = None
    parameters = "m*n"
    scaled = False
    replaces = True

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"W": (m, n)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        return {"W": W0.clone()}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return p["W"]

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        return min(m, n)


preset(
    "full",
    form="full",
    scale="none",
    rank=None,
    alpha=None,
    lr=2e-5,
    lr_origin="a tenth of LoRA's, after LoRA Without Regret (2025)",
)
