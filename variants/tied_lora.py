"""Tied-LoRA: Enhancing Parameter Efficiency of LoRA with Weight Tying
(Renduchintala et al., NAACL 2024), arXiv:2311.09578.

    W = W0 + s diag(v) B diag(u) A,    A and B one pair for all layers,    u = 1,    v = 1,    B = 0

A and B are trained and tied over the layers; u [r] and v [m] are each layer's own. This is the
configuration that the paper recommends, with all four trained (its others freeze some). The paper
adapts one fused matrix a block, so that one shape is all there is; here layers of one shape share
a pair. u and v begin at 1, so that the first step is LoRA's. There is no official repository, and
PEFT has no such method.

Two layers of one shape move in one basis, each along its own vectors:

>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> p = {"A": torch.randn(2, 8, generator=g), "B": torch.randn(6, 2, generator=g)}
>>> p |= {"u": torch.tensor([1.0, 2.0]), "v": torch.tensor([1.0, 1, 1, 1, 1, 0])}
>>> dW = TiedLoRA().weight(torch.zeros(6, 8), p, 0.5)
>>> torch.allclose(dW[0], 0.5 * (p["B"][0, 0] * p["A"][0] + 2 * p["B"][0, 1] * p["A"][1]))
True
>>> dW[5].abs().max().item()
0.0
>>> start = TiedLoRA().start(torch.zeros(6, 8), 2, 1.0, g)
>>> start["u"].tolist(), start["v"].tolist()
([1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
>>> import torch.nn as nn, variants
>>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
>>> variants.attach(net, "tied_lora", rank=2, targets="0,1").num_trainable  # 2 * 16 once
52
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors, kaiming
from ._registry import preset


@dataclass(frozen=True)
class TiedLoRA(Form, name="tied_lora"):
    """One trained pair for the layers of a shape, two trained vectors for each."""

    parameters = "m + r"
    shared_parameters = "r*(m + n)"
    shared = ("A", "B")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"u": (r,), "v": (m,)}

    def shared_shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"A": (r, n), "B": (m, r)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        return {"u": W0.new_ones(r), "v": W0.new_ones(W0.shape[0])}

    def start_shared(
        self, m: int, n: int, r: int, generator: torch.Generator, like: Tensor
    ) -> Tensors:
        return {"A": kaiming(r, n, like, generator), "B": like.new_zeros(m, r)}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        A, B = self.factors(p)
        return W0 + s * B @ A

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        return p["u"][:, None] * p["A"], p["v"][:, None] * p["B"]


preset(
    "tied_lora",
    form="tied_lora",
    rank=8,
    alpha="r",
    lr=2e-4,
    lr_origin="LoRA's; the paper tunes it for each task",
)
