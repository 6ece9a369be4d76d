"""Init[AB]: Beyond Zero Initialization: Investigating the Impact of Non-Zero Initialization on LoRA
Fine-Tuning Dynamics (Li et al., ICML 2025), arXiv:2505.23194.

    A ~ U(-a/sqrt(n), a/sqrt(n)),    B ~ U(-b/sqrt(n), b/sqrt(n)),    base = W0 - s B A

Both factors are random, and the base gives up their product, so that the model starts where it was
while both factors have a gradient from the first step. Checked against yuang-lee/lr-matters-lora,
run-lora/utils/init_AB_util.py (`AB_1_1_RESET`), which carries the authors' code: both bounds have
the layer's input width n in them, B's too. The paper's other form leaves the product in the model
as noise, finds it to be harmless, and is not here. PEFT has no such start.

B is as large as A, entry for entry, whatever its own shape:

>>> import torch
>>> start = InitAB().start(torch.zeros(4, 100), 64, 1.0, torch.Generator().manual_seed(0), {})
>>> [round(t.abs().max().item(), 2) for t in (start.A, start.B)]
[0.1, 0.1]
>>> start.subtract is not None
True
>>> start = InitAB(a=2.0, b=3.0).start(torch.zeros(99, 100), 64, 1.0, torch.Generator(), {})
>>> [round(t.abs().max().item(), 2) for t in (start.A, start.B)]
[0.2, 0.3]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Init, Start, Tensors, kaiming
from ._registry import Incompatible, preset


@dataclass(frozen=True)
class InitAB(Init, name="init_ab"):
    """Both factors random; the base gives up their product."""

    a: float = 1.0
    """bound of A, in units of 1/sqrt(n)"""
    b: float = 1.0
    """bound of B, in units of 1/sqrt(n)"""

    moves_base = True

    def __post_init__(self) -> None:
        if self.a <= 0 or self.b <= 0:
            raise Incompatible(f"init init_ab: a={self.a}, b={self.b}: both bounds are positive")

    def start(
        self, W0: Tensor, r: int, s: float, generator: torch.Generator, found: Tensors
    ) -> Start:
        m, n = W0.shape
        A = self.a * kaiming(r, n, W0, generator)
        unit = 2 * torch.rand(m, r, generator=generator) - 1
        B = (self.b * unit / n**0.5).to(W0)
        return Start(A, B, subtract=(A, B))


preset(
    "init_ab",
    init="init_ab",
    rank=16,
    alpha="r",
    lr=1e-4,
    lr_origin="about half of LoRA's: 1.8 times lower by arXiv:2602.04998 (alpha = r)",
)
