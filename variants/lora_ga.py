"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (Wang et al., NeurIPS 2024),
arXiv:2407.05000.

    G = U S V^T,    A = c V[:, :r]^T,    B = c U[:, r:2r],    c = m^(1/4) / sqrt(gamma),
    base = W0 - s B A,    s = alpha / sqrt(r)

G is the loss's gradient by W0 over a few batches. The first step of A and B then moves W along the
2r leading directions of G, the best that rank 2r can do. Official code: Outsider565/LoRA-GA,
peft/src/peft/tuners/lora/layer.py (`lora_ga_init`): direction ArB2r and scale `stable`, the factors
without the singular values. There G is met in train mode, and `svd_lowrank` draws from the global
generator; here in eval mode, and to fp32. PEFT's own LoRA-GA (`rule="peft"`) leaves A with unit
rows and takes the singular values into B, c U S: another start, with a B that is as small as G.
A matrix of fewer than 2r directions is refused; the official slice is then too short. The official
direction `random`, scale `weightS` and `norm_clip` are not here.

Directions of A and of B are different ones, each of the length m^(1/4) / sqrt(gamma):

>>> import torch
>>> G = torch.arange(20.0).diag()[4:]
>>> found = LoRAGA().reduce(G, {"gradient": G}, 1)
>>> start = LoRAGA(gamma=4.0).start(torch.zeros(16, 20), 1, 3.0, torch.Generator(), found)
>>> [[(int(i), round(t.abs().max().item(), 4)) for i in t.abs().argmax().view(1)]
...  for t in (start.A, start.B)]
[[(19, 1.0)], [(14, 1.0)]]

Of the length 1/s, in turn, and by PEFT's rule:

>>> start = LoRAGA(scale="gd").start(torch.zeros(16, 20), 1, 4.0, torch.Generator(), found)
>>> [round(t.abs().max().item(), 4) for t in (start.A, start.B)]
[0.25, 0.25]
>>> start = LoRAGA(direction="ArBr").start(torch.zeros(16, 20), 1, 3.0, torch.Generator(), found)
>>> [int(t.abs().argmax()) for t in (start.A, start.B)]
[18, 15]
>>> init = LoRAGA(gamma=4.0, rule="peft")
>>> start = init.start(torch.zeros(16, 20), 1, 3.0, torch.Generator(), found)
>>> [round(t.abs().max().item(), 4) for t in (start.A, start.B)]  # B: c times 18
[1.0, 18.0]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Init, Start, Tensors
from ._registry import Incompatible, preset
from ._svd import leading

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr")
SCALES = ("stable", "unit", "gd")
RULES = ("authors", "peft")


@dataclass(frozen=True)
class LoRAGA(Init, name="lora_ga"):
    """Leading singular vectors of the gradient; the base gives up their product."""

    batches: int = 8
    """of the gradient; the authors' runs take 8 of one sample, their example 64 of two"""
    gamma: float = 16.0
    """of the scale `stable`; 64 in the paper's runs of Llama 2-7B"""
    direction: str = "ArB2r"
    """which of the first 2r: `ArB2r`, `A2rBr`, or `ArBr`, in turn"""
    scale: str = "stable"
    """length: `stable`, m^(1/4)/sqrt(gamma); `unit`, 1; `gd`, 1/s"""
    rule: str = "authors"
    """`authors`, or `peft`: B times the singular values, and A not scaled by `stable`"""

    needs = ("gradient",)
    moves_base = True

    def __post_init__(self) -> None:
        if self.batches < 1 or self.gamma <= 0:
            raise Incompatible(f"init lora_ga: batches={self.batches} and gamma={self.gamma} "
                               f"must be positive")  # fmt: skip
        for key, choices in (("direction", DIRECTIONS), ("scale", SCALES), ("rule", RULES)):
            if getattr(self, key) not in choices:
                raise Incompatible(
                    f"init lora_ga: {key}={getattr(self, key)}; choices: {', '.join(choices)}"
                )

    def reduce(self, W0: Tensor, found: Tensors, r: int) -> Tensors:
        U, S, Vh = leading(found["gradient"], min(2 * r, *W0.shape))
        return {"U": U, "S": S, "Vh": Vh}

    def start(
        self, W0: Tensor, r: int, s: float, generator: torch.Generator, found: Tensors
    ) -> Start:
        m, n = W0.shape
        if 2 * r > min(m, n):
            raise Incompatible(f"init lora_ga: rank={r} takes {2 * r} directions of the gradient, "
                               f"a {m} x {n} matrix has {min(m, n)}")  # fmt: skip
        U, S, Vh = (found[k].to(W0) for k in ("U", "S", "Vh"))
        first, second = slice(0, r), slice(r, 2 * r)
        of_A, of_B = {
            "ArB2r": (first, second),
            "A2rBr": (second, first),
            "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
        }[self.direction]
        A, B = Vh[of_A], U[:, of_B]
        length = {"stable": m**0.25 / self.gamma**0.5, "unit": 1.0, "gd": 1 / s}[self.scale]
        B = B * length
        if self.rule == "peft":
            B = B * S[of_B]
        if self.rule == "authors" or self.scale != "stable":
            A = A * length
        return Start(A.clone(), B, subtract=(A, B))


preset(
    "lora_ga",
    init={"name": "lora_ga", "gamma": 64.0},
    scale="rslora",
    rank=8,
    alpha=16,
    lr=2e-5,
    lr_origin="the official example for Llama 2-7B; rank, alpha, scale and gamma of reproduce/",
)
