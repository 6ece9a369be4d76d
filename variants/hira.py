"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models (Huang et al.,
ICLR 2025), openreview.net/forum?id=TwJrTz9cRS.

    W = W0 * (1 + B A),    A ~ U(-1/sqrt(n), 1/sqrt(n)),    B = 0

The product * is element by element, so the change W0 * (B A) has a rank of up to r rank(W0). No
scale stands in the equation: W0 sets it, element by element. Official code: hqsiswiliam/hira,
hira/tuners/lora.py (`Linear.forward`), which has a scale `scale_ab` and never reads it, and refuses
to merge; merging is the equation. PEFT agrees in numbers (its dropout is on the change's input, as
here; the authors have none).

What W0 lacks stays absent, and the relative change of all else has rank r, not the change itself:

>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> W0 = torch.randn(6, 8, generator=g)
>>> W0[2, 3] = 0.0
>>> p = {"A": torch.randn(2, 8, generator=g), "B": torch.randn(6, 2, generator=g)}
>>> W = HiRA().weight(W0, p, 1.0)
>>> W[2, 3].abs().item(), bool(torch.allclose(W[0] / W0[0] - 1, p["B"][0] @ p["A"], atol=1e-5))
(0.0, True)
>>> int(torch.linalg.matrix_rank(W - W0))
6
>>> A = HiRA().start(torch.zeros(6, 100), 50, 1.0, g)["A"]
>>> 0.099 < A.abs().max().item() <= 0.1
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors, kaiming
from ._registry import preset


@dataclass(frozen=True)
class HiRA(Form, name="hira"):
    """W0 * (1 + B A), element by element."""

    rank_means = "r, of B A, which multiplies W0 element by element"
    parameters = "r*(m + n)"
    scaled = False

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"A": (r, n), "B": (m, r)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        return {"A": kaiming(r, n, W0, generator), "B": W0.new_zeros(m, r)}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 * (1 + p["B"] @ p["A"])

    def change(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 * (p["B"] @ p["A"])


preset(
    "hira",
    form="hira",
    scale="none",
    rank=32,
    alpha=None,
    lr=1e-3,
    lr_origin="the official README's command for LLaMA-3-8B, rank 32",
)
