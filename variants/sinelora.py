"""Sine-LoRA: Efficient Learning with Sine-Activated Low-Rank Matrices (Ji et al., ICLR 2025),
arXiv:2403.19243.

    W = W0 + s sin(omega B A) / sqrt(n),    s = alpha / r,    A ~ U(-1/sqrt(n), 1/sqrt(n)),    B = 0

The sine acts on each entry of the product, so the change has a high rank; near 0 it is LoRA with
the scale s omega / sqrt(n). Official code: samy-ji/Sine-Low-Rank, llm/peft/src/peft/tuners/
sinlora.py (`freq` is omega; g = sqrt(n), which a stale copy under build/lib lacks).
omega has no default there; a larger one gives a higher rank and a rougher loss. Copies that take
the sine of the activations B A x compute something else. PEFT has no such form.

A rank-1 product gives a change of higher rank, in which n, omega and s stand where they should:

>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> p = {"A": torch.randn(1, 16, generator=g), "B": torch.randn(9, 1, generator=g)}
>>> change = SineLoRA(omega=20.0).weight(torch.zeros(9, 16), p, 3.0)
>>> int(torch.linalg.matrix_rank(change)) > 5
True
>>> bool(torch.allclose(change[4], 3 * torch.sin(20 * p["B"][4] * p["A"][0]) / 4, atol=1e-5))
True
>>> def slope(n):  # of y = (W - W0) x by B, where B is 0 and A and x are alike at every width
...     p, A = {"B": torch.zeros(1, 1, requires_grad=True)}, torch.full((1, n), n**-0.5)
...     y = SineLoRA(omega=20.0).change(torch.zeros(1, n), p | {"A": A}, 1.0).sum()
...     return torch.autograd.grad(y, p["B"])[0].item()
>>> lora = lambda n: n**0.5  # B A x of the same A and x
>>> round(slope(64) / lora(64) / (slope(4096) / lora(4096)), 4)  # so much more where it is narrow
8.0
>>> A = SineLoRA().start(torch.zeros(6, 100), 50, 1.0, g)["A"]
>>> 0.099 < A.abs().max().item() <= 0.1
True
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors, kaiming
from ._registry import Incompatible, preset


@dataclass(frozen=True)
class SineLoRA(Form, name="sinelora"):
    """W0 + s sin(omega B A) / sqrt(n)."""

    omega: float = 200.0
    """the frequency; neither paper nor code has one for all tasks"""

    rank_means = "r, of the product B A inside the sine"
    parameters = "r*(m + n)"

    def __post_init__(self) -> None:
        if not self.omega > 0:
            raise Incompatible(f"form sinelora: omega={self.omega}; a positive number")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"A": (r, n), "B": (m, r)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        return {"A": kaiming(r, n, W0, generator), "B": W0.new_zeros(m, r)}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + self.change(W0, p, s)

    def change(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return s * torch.sin(self.omega * p["B"] @ p["A"]) / math.sqrt(W0.shape[1])


preset(
    "sinelora",
    form="sinelora",
    rank=8,
    alpha="2r",
    lr=3e-4,
    lr_origin="the defaults of the official llm/finetune.py, as rank and alpha; omega has none",
    width_exponent=0.281,  # LoRA's .781, less the half by which s omega / sqrt(n) itself grows
)
