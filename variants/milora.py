"""MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning
(Wang et al., NAACL 2025), arXiv:2406.09044.

    W0 = U S V^T,    A = sqrt(S_m / s) V_m^T,    B = U_m sqrt(S_m / s),    base = W0 - s B A

PiSSA from the other end: the r smallest singular triplets go into the adapter and are trained, the
principal ones stay frozen. Official code: sufenlp/MiLoRA, svd_init.py (`initialize_lora_layer`),
whose modes min, mid, max and random are the slices last, middle, top and random here; alpha = r, so
s = 1. For a matrix that is not square, "last" counts the min(m, n) triplets that there are, as
there. PEFT has no such start. The weight stays at hand, where the official script overwrites it.

The model starts where it was; what is trained is the least of W0, not the most:

>>> import torch
>>> W0 = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
>>> start = MiLoRA().start(W0, 1, 0.5, torch.Generator(), {})
>>> part = 0.5 * start.B @ start.A
>>> [round(v, 4) for v in part.diag().tolist()], round(start.A.norm().item(), 4)
([0.0, 0.0, 1.0], 1.4142)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Init, Start, Tensors
from ._registry import Incompatible, preset
from ._svd import SLICES, balanced, sliced


@dataclass(frozen=True)
class MiLoRA(Init, name="milora"):
    """The r minor triplets into the adapter, the rest stays frozen."""

    slice: str = "last"
    """which r triplets: `last`, `middle`, `top` or `random`, the paper's ablation"""

    moves_base = True

    def __post_init__(self) -> None:
        if self.slice not in SLICES:
            raise Incompatible(f"init milora: slice={self.slice}; choices: {', '.join(SLICES)}")

    def start(
        self, W0: Tensor, r: int, s: float, generator: torch.Generator, found: Tensors
    ) -> Start:
        A, B = balanced(*sliced(W0, r, self.slice, "exact", generator), s)
        return Start(A, B, subtract=(A, B))


preset(
    "milora",
    init="milora",
    rank=32,
    alpha="r",
    lr=3e-4,
    lr_origin="the paper's commonsense setting (that of LLM-Adapters), batch 16",
)
