"""MoSLoRA: Mixture-of-Subspaces in Low-Rank Adaptation (Wu et al., EMNLP 2024), arXiv:2406.11909.

    W = W0 + s B M A,    s = alpha / r,    M [r, r] ~ U(-1/sqrt(r), 1/sqrt(r)),    B = 0

LoRA adds r subspaces, one for each pair of a row of A and a column of B; the trained mixer M joins
each row with each column. A starts as in LoRA. Official code: wutaiqiang/MoSLoRA,
commonsense_reasoning/peft/src/peft/tuners/lora.py (`lora_AB`), with the uniform M above; other
starts, an orthogonal one among them, stand there as comments. A low-rank init gives A and B, and M
= I then. PEFT has no such form.

With M = I it is LoRA; another M moves the change, within the same row and column spaces:

>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> form = MoSLoRA()
>>> p = {"A": torch.randn(2, 8, generator=g), "B": torch.randn(6, 2, generator=g)}
>>> one = form.weight(torch.zeros(6, 8), p | {"M": torch.eye(2)}, 2.0)
>>> turned = form.weight(torch.zeros(6, 8), p | {"M": torch.tensor([[0.0, 1.0], [0.0, 0.0]])}, 2.0)
>>> bool(torch.allclose(one, 2 * p["B"] @ p["A"])), int(torch.linalg.matrix_rank(turned))
(True, 1)
>>> bool(torch.allclose(turned, 2 * torch.outer(p["B"][:, 0], p["A"][1])))
True
>>> M = form.start(torch.zeros(6, 400), 100, 1.0, g)["M"]
>>> round(M.std().item() * 3**0.5, 2)  # 1/sqrt(100)
0.1
>>> drawn = [MoSLoRA("orthogonal").start(torch.zeros(6, 8), 4, 1.0, g)["M"] for _ in range(20)]
>>> sorted({bool(M[0, 0] > 0) for M in drawn})  # any rotation is as likely as its opposite
[False, True]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import LowRank, Tensors, kaiming
from ._registry import Incompatible, preset


@dataclass(frozen=True)
class MoSLoRA(LowRank, name="moslora"):
    """W0 + s B M A."""

    mixer: str = "kaiming"
    """how M starts: `kaiming` (uniform), or `orthogonal`"""

    parameters = "r*(m + n) + r*r"

    def __post_init__(self) -> None:
        if self.mixer not in ("kaiming", "orthogonal"):
            raise Incompatible(f"form moslora: mixer={self.mixer}; choices: kaiming, orthogonal")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"A": (r, n), "B": (m, r), "M": (r, r)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        M = kaiming(r, r, W0, generator)
        if self.mixer == "orthogonal":
            drawn = torch.linalg.qr(torch.randn(r, r, generator=generator))
            M = (drawn.Q * drawn.R.diag().sign()).to(W0)  # uniform over all rotations
        return {**super().start(W0, r, s, generator), "M": M}

    def embed(self, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensors:
        return {"A": A, "B": B, "M": torch.eye(A.shape[0], dtype=A.dtype, device=A.device)}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + s * p["B"] @ p["M"] @ p["A"]

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        return p["M"] @ p["A"], p["B"]


preset(
    "moslora",
    form="moslora",
    rank=16,
    alpha="2r",
    lr=3e-4,
    lr_origin="the official commonsense_reasoning/train_moslora.sh, LLaMA-3-8B",
)
