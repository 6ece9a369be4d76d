"""ABBA: ABBA-Adapters: Efficient and Expressive Fine-Tuning of Foundation Models (Singhal et al.,
ICLR 2026), arXiv:2505.14238.

    W = W0 + s (B1 A1) * (B2 A2),    B1 A1 = the r1 principal triplets of W0,    B2 = 0

The product * is element by element. B1 = U sqrt(S) and A1 = sqrt(S) V^T are trained and not taken
out of W0; A2 ~ U(-sqrt(6/n), sqrt(6/n)). r = r1 + r2, in halves (an odd one to r1), so that ABBA
has the parameters of LoRA at rank r. Official code: CERT-Lab/abba, abba.py, which computes by
Khatri-Rao factors of r1 r2 directions, as here, and never uses its dropout. There s = sqrt(alpha1)
sqrt(alpha2) with no rank in it (scale `abba`, one alpha for both). Its `svd_lowrank` has no
oversampling, and draws from the global generator; the decomposition here is exact to fp32. PEFT has
no such form.

The start is the base, its first product the best rank-r1 matrix of W0 itself; s is alpha:

>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> W0 = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
>>> p = ABBA().start(W0, 3, 1.0, g)
>>> [round(abs(v), 4) for v in (p["B1"] @ p["A1"]).diag().tolist()], tuple(p["A2"].shape)
([4.0, 3.0, 0.0, 0.0], (1, 4))
>>> [round(v, 3) for v in (*p["A1"].norm(dim=1).tolist(), *p["B1"].norm(dim=0).tolist())]
[2.0, 1.732, 2.0, 1.732]
>>> ABBA().shapes(6, 8, 5)
{'A1': (3, 8), 'B1': (6, 3), 'A2': (2, 8), 'B2': (6, 2)}
>>> Constant().value(32, 16), bool(p["A2"].abs().max() > 0.5), bool(p["A2"].abs().max() < 1.5**0.5)
(32, True, True)
>>> p = {k: torch.randn(v, generator=g) for k, v in ABBA().shapes(6, 8, 4).items()}
>>> W = ABBA().weight(torch.zeros(6, 8), p, 2.0)
>>> bool(torch.allclose(W, 2 * (p["B1"] @ p["A1"]) * (p["B2"] @ p["A2"])))
True
>>> A2 = ABBA().start(torch.randn(8, 600, generator=g), 8, 1.0, g)["A2"]
>>> round(A2.abs().max().item(), 3)  # sqrt(6 / 600)
0.1
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Scale, Tensors, kaiming
from ._registry import Incompatible, preset
from ._svd import top


@dataclass(frozen=True)
class ABBA(Form, name="abba"):
    """W0 + s (B1 A1) * (B2 A2), element by element."""

    rank_means = "r1 + r2, the ranks of both products; an odd one goes to the first"
    parameters = "r*(m + n)"

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        r1, r2 = r - r // 2, r // 2
        return {"A1": (r1, n), "B1": (m, r1), "A2": (r2, n), "B2": (m, r2)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        U, S, Vh = top(W0, r - r // 2, "krylov", generator)
        A2 = math.sqrt(6) * kaiming(r // 2, n, W0, generator)
        root = S.sqrt()
        return {"A1": root[:, None] * Vh, "B1": U * root, "A2": A2, "B2": W0.new_zeros(m, r // 2)}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + s * (p["B1"] @ p["A1"]) * (p["B2"] @ p["A2"])

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        A = p["A1"][:, None] * p["A2"][None]  # [r1, r2, n]
        B = p["B1"][:, :, None] * p["B2"][:, None]  # [m, r1, r2]
        return A.flatten(0, 1), B.flatten(1)

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        if r < 2:
            raise Incompatible(f"rank={r}: {where} needs two products, so form abba a rank from 2")
        return super().rank_of(m, n, r, where)


@dataclass(frozen=True)
class Constant(Scale, name="abba"):
    """s = sqrt(alpha1 alpha2) with one alpha for both products: alpha, whatever the rank."""

    def value(self, alpha: float, r: int) -> float:
        return alpha


preset(
    "abba",
    form="abba",
    scale="abba",
    rank=32,
    alpha=32,
    lr=1e-3,
    lr_origin="the official scripts/train_arithmetic.sh (which gives each product rank 32)",
)
