"""rsLoRA: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (Kalajdzievski, 2023),
arXiv:2312.03732.

    W = W0 + s B A,    s = alpha / sqrt(r)

With alpha / r the adapter's output fades as the rank grows; with alpha / sqrt(r) it keeps its size
(Theorem 3.2). No official repository; PEFT's `use_rslora` is the same.

The output's standard deviation does not depend on the rank (alpha / r: it falls as 1/sqrt(r)):

>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> def deviation(scale, r):
...     A, B, x = (torch.randn(*shape, generator=g) for shape in ((r, 64), (512, r), (64, 64)))
...     return (scale.value(16.0, r) * B @ (A @ x)).std().item()
>>> [round(deviation(RsLoRA(), r) / deviation(RsLoRA(), 4), 1) for r in (16, 256)]
[1.0, 1.0]
"""

import math
from dataclasses import dataclass

from ._api import Scale
from ._registry import preset


@dataclass(frozen=True)
class RsLoRA(Scale, name="rslora"):
    """s = alpha / sqrt(r)."""

    def value(self, alpha: float, r: int) -> float:
        return alpha / math.sqrt(r)


preset(
    "rslora",
    scale="rslora",
    rank=16,
    alpha=16,
    lr=2e-4,
    lr_origin="LoRA's",
)
