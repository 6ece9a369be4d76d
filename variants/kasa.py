"""KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models (Wang et al.,
ICLR 2025), arXiv:2412.06071.

    W = W0 - U_r S_r V_r^T + s B diag(d) A,    B = 0,    d ~ N(0, 1),
    loss = task + (beta sum ||d||^2 + gamma sum (||A^T A - I|| + ||B B^T - I||)) / L

The r smallest singular triplets of W0 are dropped as noise, for good: the model does not start at
the base (disabled, it is the base all the same). Three parts: the form, the init that truncates,
and the two penalties, as an allocation. Official code: juyongjiang/KaSA, peft/.../lora/layer.py
(`update_layer`) and main.py (`loss_fn`). There n - r triplets are kept, not min(m, n) - r, so that
a matrix with n - m >= r loses none (`rule="code"` of the init); the Gram matrices are the wide ones
[n, n] and [m, m], which adds n - r under the root, and L, the number of matrices, divides. PEFT's
KaSA truncates as the paper, and sums over layers with Gram matrices [r, r] (`rule="peft"`).

>>> import torch
>>> W0 = torch.diag(torch.tensor([3.0, 1.0, 2.0]))
>>> A0, B0 = Truncated().start(W0, 1, 2.0, torch.Generator(), {}).subtract
>>> [round(v, 4) for v in (W0 - 2.0 * B0 @ A0).diag().tolist()]
[3.0, 0.0, 2.0]
>>> p = {"A": torch.eye(2), "B": torch.eye(2), "d": torch.tensor([0.5, -3.0])}
>>> KaSA().weight(torch.zeros(2, 2), p, 2.0).diag().tolist()
[1.0, -6.0]
>>> g = torch.Generator().manual_seed(0)
>>> round(KaSA().start(torch.zeros(1000, 1000), 1000, 1.0, g)["d"].std().item(), 1)
1.0

Of one matrix, d^2 = 9, ||A^T A - I|| = 1 and ||B B^T - I|| = sqrt(1 + 1 + 3^2):

>>> from types import SimpleNamespace
>>> p = {"A": torch.eye(1, 2), "B": torch.eye(3, 1) * 2, "d": torch.tensor([3.0])}
>>> rule = Regularized(beta=1.0, gamma=10.0)
>>> layer = SimpleNamespace(params=p)
>>> round(rule.penalty({"x": layer, "y": layer}).item(), 3)  # their mean
52.166
>>> Truncated("code").start(torch.rand(4, 6), 2, 1.0, g, {}) is None  # 6 - 2 triplets stay: all
True
>>> Truncated("code").start(torch.rand(6, 4), 2, 1.0, g, {}).subtract[0].shape
torch.Size([2, 4])
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._api import Allocation, Init, Layers, LowRank, Start, Tensors, kaiming
from ._registry import Incompatible, preset
from ._svd import balanced, sliced

if TYPE_CHECKING:
    from ._adapter import Choice


@dataclass(frozen=True)
class KaSA(LowRank, name="kasa"):
    """W0 + s B diag(d) A: singular values that know what the task needs."""

    parameters = "r*(m + n + 1)"

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"A": (r, n), "B": (m, r), "d": (r,)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        A = kaiming(r, n, W0, generator)
        return {"A": A, "B": W0.new_zeros(m, r), "d": torch.randn(r, generator=generator).to(W0)}

    def embed(self, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensors:
        return {"A": A, "B": B, "d": W.new_ones(len(A))}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + s * (p["B"] * p["d"]) @ p["A"]

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        return p["A"], p["B"] * p["d"]


@dataclass(frozen=True)
class Truncated(Init, name="kasa"):
    """The form's own start, on a base without its r minor triplets."""

    rule: str = "paper"
    """`paper`: min(m, n) - r triplets stay; `code`: n - r stay, as published"""

    moves_base = True
    starts_at_base = False

    def __post_init__(self) -> None:
        if self.rule not in ("paper", "code"):
            raise Incompatible(f"init kasa: rule={self.rule}; choices: paper, code")

    def start(
        self, W0: Tensor, r: int, s: float, generator: torch.Generator, found: Tensors
    ) -> Start | None:
        m, n = W0.shape
        dropped = r if self.rule == "paper" else min(m, n) - (n - r)
        if dropped >= min(m, n):
            raise Incompatible(f"init kasa: rank={r} would drop all that a {m} x {n} matrix has")
        if dropped <= 0:
            return None
        minor = balanced(*sliced(W0, dropped, "last", "exact", generator), s)
        return Start(None, None, subtract=minor)


@dataclass(frozen=True)
class Regularized(Allocation, name="kasa"):
    """Small singular values and orthogonal factors, as terms of the training loss."""

    beta: float = 1e-4
    """weight of the singular values' squares"""
    gamma: float = 1e-3
    """weight of the distance of A and B from orthogonal"""
    rule: str = "authors"
    """`authors`: wide Gram matrices, mean over matrices; `peft`: narrow ones, sum"""

    penalized = True

    def __post_init__(self) -> None:
        if self.beta < 0 or self.gamma < 0:
            raise Incompatible("allocation kasa: beta and gamma must not be negative")
        if self.rule not in ("authors", "peft"):
            raise Incompatible(f"allocation kasa: rule={self.rule}; choices: authors, peft")

    def fits(self, choice: "Choice") -> None:
        if not isinstance(choice.form, KaSA):
            raise self.refuse(choice.form, "form kasa")

    def penalty(self, layers: Layers) -> Tensor | None:
        terms = []
        for layer in layers.values():
            p = layer.params
            terms.append(self.beta * p["d"].square().sum())
            for narrow in (p["A"], p["B"].mT):  # [r, n], [r, m]
                r, wide = narrow.shape
                one = torch.eye(r, dtype=narrow.dtype, device=narrow.device)
                off = (narrow @ narrow.mT - one).flatten()
                if self.rule == "authors":  # ||X^T X - I_n||^2 = ||X X^T - I_r||^2 + n - r
                    off = torch.cat([off, off.new_full((1,), (wide - r) ** 0.5)])
                terms.append(self.gamma * torch.linalg.vector_norm(off))
        total = torch.stack(terms).sum()
        return total / len(layers) if self.rule == "authors" else total


preset(
    "kasa",
    form="kasa",
    init="kasa",
    allocation="kasa",
    rank=8,
    alpha=16,
    lr=4e-4,
    lr_origin="the official script for RoBERTa-base on CoLA",
    width=768,
)
