"""MiCA: MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning (Rüdiger & Raschka, 2026),
arXiv:2604.01694.

    W0 = U S V^T,    W = W0 + s B A,    B = U[:, -r:] frozen,    A = 0 trains

Minor Component Adaptation: what is learned may leave a layer only along its least used output
directions. B A = 0 at the start, so the base is not touched, and r n numbers train. Official code:
the authors' in PEFT, lora/layer.py (`mica_init`) and lora/variants.py (`MiCALinearVariant`). "The
last r" counts the min(m, n) left singular vectors that there are: with m > n the null space of
W0^T, which is emptier still, is not used, as there. PEFT refuses DoRA with it, here they
compose; its example adapts q and v alone.

>>> import torch
>>> start = MiCA().start(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 1, 1.0, torch.Generator(), {})
>>> start.B.abs().view(-1).tolist(), start.A.abs().max().item(), MiCA.frozen
([1.0, 0.0, 0.0], 0.0, ('B',))
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Init, Start, Tensors
from ._registry import preset
from ._svd import sliced


@dataclass(frozen=True)
class MiCA(Init, name="mica"):
    """B is the minor left singular vectors and stays; A starts at zero and trains."""

    frozen = ("B",)

    def start(
        self, W0: Tensor, r: int, s: float, generator: torch.Generator, found: Tensors
    ) -> Start:
        U, _, _ = sliced(W0, r, "last", "exact", generator)
        return Start(W0.new_zeros(r, W0.shape[1]), U.contiguous())


preset(
    "mica",
    init="mica",
    rank=32,
    alpha="2r",
    lr=1e-4,
    lr_origin="PEFT's MetaMathQA benchmark, lora--llama-3.2-3B-rank32-mica",
    width=3072,
    parameters="r*n",
)
