"""DVoRA: VeRA's direction (Kopiczko et al., ICLR 2024, arXiv:2310.11454) under a magnitude of DoRA
(Liu et al., ICML 2024, Table 5, arXiv:2402.09353).

    W = c (W0 + diag(b) B diag(d) A),    c = m / ||W0 + diag(b) B diag(d) A||_row

b, d, A and B are VeRA's; m starts at the row norms of W0, and the norm is a constant in backward as
in DoRA. No official code was found. PEFT has no such pair.

>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> {k: t.tolist() for k, t in DVoRA().start(3 * torch.eye(2), 1, 1.0, g).items()}
{'d': [0.10000000149011612], 'b': [0.0, 0.0], 'm': [3.0, 3.0]}
>>> p = DVoRA().start_shared(6, 8, 2, g, torch.empty(0)) | {"d": torch.ones(2)}
>>> p |= {"b": torch.ones(6, requires_grad=True), "m": torch.ones(6)}
>>> DVoRA().weight(torch.randn(6, 8, generator=g), p, 1.0).square().sum().backward()
>>> bool(p["b"].grad.norm() > 0.1)  # the gradient through the norm would take all of it away
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Tensors
from ._layer import Adapted
from ._registry import preset
from .dora import DoRA
from .vera import VeRA, factors


@dataclass(frozen=True)
class DVoRA(VeRA, name="dvora"):
    """DoRA's magnitude on VeRA's direction."""

    detach_norm: bool = True
    """take ||V|| as a constant in backward"""

    parameters = "2*m + r"

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(m, n, r), "m": (m,)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        norms = torch.linalg.vector_norm(W0, dim=1)
        return {**super().start(W0, r, s, generator), "m": norms}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        A, B = factors(p, *W0.shape)
        return DoRA(self.detach_norm).weight(W0, {"A": A, "B": B, "m": p["m"]}, 1.0)

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        A, B = factors(layer.p, layer.out_features, layer.in_features)
        return DoRA(self.detach_norm).product(x, layer, A, B, 1.0)


preset(
    "dvora",
    form="dvora",
    scale="none",
    rank=1024,
    alpha=None,
    lr=4e-3,
    lr_origin="the DoRA paper's Table 11, LLaMA-7B and LLaMA2-7B at rank 1024",
)
