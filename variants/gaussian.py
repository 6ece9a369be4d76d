"""Gaussian initialisation: LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021),
arXiv:2106.09685, Section 4.1, whose code draws from a uniform distribution instead.

    A ~ N(0, sigma^2),    B = 0,    sigma = 1/sqrt(n)   (`fan_in`)   or   1/r   (`rank`)

The paper says "a random Gaussian initialization for A" and no sigma. `fan_in` is the width's, as in
the analyses of LoRA's start (Hayou et al., arXiv:2406.08447), three times the variance of loralib's
uniform draw; `rank` is PEFT's `init_lora_weights="gaussian"`, lora/layer.py.

>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> def deviation(rule):
...     return Gaussian(rule).start(torch.zeros(3, 2500), 10, 1.0, g, {}).A.std().item()
>>> [round(deviation(rule), 3) for rule in ("fan_in", "rank")]
[0.02, 0.1]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Init, Start, Tensors
from ._registry import Incompatible, preset


@dataclass(frozen=True)
class Gaussian(Init, name="gaussian"):
    """A from a Gaussian, B zero."""

    rule: str = "fan_in"
    """standard deviation of A: `fan_in`, 1/sqrt(n), or `rank`, PEFT's 1/r"""

    def __post_init__(self) -> None:
        if self.rule not in ("fan_in", "rank"):
            raise Incompatible(f"init gaussian: rule={self.rule}; choices: fan_in, rank")

    def start(
        self, W0: Tensor, r: int, s: float, generator: torch.Generator, found: Tensors
    ) -> Start:
        m, n = W0.shape
        sigma = n**-0.5 if self.rule == "fan_in" else 1 / r
        A = (sigma * torch.randn(r, n, generator=generator)).to(W0)
        return Start(A, W0.new_zeros(m, r))


preset(
    "gaussian",
    init="gaussian",
    rank=16,
    alpha="2r",
    lr=2e-4,
    lr_origin="LoRA's",
)
