"""LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models, Provably
and Efficiently (Zhang et al., ICML 2025), arXiv:2502.01235.

    -G = U S V^T,    B = U_r sqrt(S_r / (gamma S_1)),    A = sqrt(S_r / (gamma S_1)) V_r^T,
    W = W0 + s B A,    s = alpha / sqrt(r)

The best rank-r part of one step of full gradient descent, scaled to the norm 1/gamma: the base
keeps all it has, so the model starts after that step and not at the base. Official code:
YuanheZ/LoRA-One, run_exp.py (`reinit_lora_modules`, direction LoRA-One, scale stable), which has
the roots; the README's formula has S itself in both factors. There G is met in train mode and
decomposed by `svd_lowrank` with the global generator. The paper's preconditioner, which the
official code does not hold either, would be a choice of the axis `update`. PEFT has no such start.

s B A goes down the gradient, with norm s / gamma whatever the size of G:

>>> import torch
>>> G = torch.diag(torch.tensor([8.0, 2.0, 1.0]))
>>> found = LoRAOne().reduce(G, {"gradient": G}, 2)
>>> start = LoRAOne(gamma=4.0).start(G, 2, 5.0, torch.Generator(), found)
>>> [round(v, 4) for v in (start.B @ start.A).diag().tolist()], start.subtract
([-0.25, -0.0625, 0.0], None)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Init, Start, Tensors
from ._registry import Incompatible, preset
from ._svd import balanced, leading


@dataclass(frozen=True)
class LoRAOne(Init, name="lora_one"):
    """The rank-r part of one step down the gradient, in the adapter."""

    batches: int = 8
    """of the gradient; the authors take 8 samples, one a batch"""
    gamma: float = 128.0
    """the start has the spectral norm s / gamma"""

    needs = ("gradient",)
    starts_at_base = False

    def __post_init__(self) -> None:
        if self.batches < 1 or self.gamma <= 0:
            raise Incompatible(f"init lora_one: batches={self.batches} and gamma={self.gamma} "
                               f"must be positive")  # fmt: skip

    def reduce(self, W0: Tensor, found: Tensors, r: int) -> Tensors:
        U, S, Vh = leading(-found["gradient"], r)
        return {"U": U, "S": S, "Vh": Vh}

    def start(
        self, W0: Tensor, r: int, s: float, generator: torch.Generator, found: Tensors
    ) -> Start:
        U, S, Vh = (found[k].to(W0) for k in ("U", "S", "Vh"))
        share = S[:r] / (self.gamma * S[0].clamp_min(torch.finfo(S.dtype).tiny))
        return Start(*balanced(U[:, :r], share, Vh[:r]))


preset(
    "lora_one",
    init="lora_one",
    scale="rslora",
    rank=8,
    alpha=16,
    lr=2e-4,
    lr_origin="the official script for Llama 2-7B on MetaMathQA",
)
