"""GoRA: Gradient-driven Adaptive Low Rank Adaptation (He et al., NeurIPS 2025), arXiv:2502.12171.

    r_i = round(I_i / sum(I) * sum r (m + n)) // (m_i + n_i),    I = mean |W0 * G|,
    A ~ U(-1/sqrt(n), 1/sqrt(n)),    B = -(gamma / s) sqrt(n / r) G A^T (A A^T)^-1,
    W = W0 + s B A,    s = alpha / sqrt(r_i)

G is the loss's gradient by W0 over some batches. Ranks share the trained numbers by the importance
of each weight, between r/2 and 4r; then A compresses G, and s B A is a step of about the norm gamma
|G| down its rows. The base keeps all it has, so the model does not start there. Official code:
hhnqqq/MyTransformers, common/lora_modules/gora.py (`get_allocated_rank` with union_mean,
`grad_compress_init`) and scripts/gora, rank-stable and with `dynamic_scaling`. As published, that
code lacks the minus of the paper (its own error measure, against -lr G, has it); `sign="code"`
repeats it. It measures in train mode. Its LoRA+ (B at 16 times the rate) is the axis `update`. PEFT
has no such start.

A step against the gradient, of its size, in the plane that A happens to span:

>>> import torch
>>> G = torch.randn(40, 400, generator=torch.Generator().manual_seed(1))
>>> start = GoRA(gamma=0.5).start(G, 30, 2.0, torch.Generator().manual_seed(0), {"gradient": G})
>>> step = 2.0 * start.B @ start.A
>>> round((step.norm() / G.norm()).item(), 1), bool((step * G).sum() < 0)
(0.5, True)

A budget of 4 (10 + 10) + 4 (10 + 30) = 240 numbers, of which importance gives each matrix half:

>>> from types import SimpleNamespace as Item
>>> planned = [Item(site=Item(name=k), shape=(10, n), rank=4) for k, n in (("a", 10), ("b", 30))]
>>> sign = (-1) ** torch.arange(10)[:, None]
>>> found = {k: Importance().reduce(W, {"gradient": sign * W}, 4) for k, W in
...          (("a", torch.ones(10, 10)), ("b", torch.eye(10, 30) * 30**0.5))}
>>> Importance().static(planned, found)
{'a': 6, 'b': 3}
>>> Importance().static(planned, found | {"b": {"importance": torch.tensor(1e-9)}})  # 10, r/2
{'a': 10, 'b': 2}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._api import Allocation, Init, Start, Tensors, kaiming
from ._registry import Incompatible, preset

if TYPE_CHECKING:
    from ._adapter import Choice, Planned


@dataclass(frozen=True)
class GoRA(Init, name="gora"):
    """A random, B the gradient as A compresses it."""

    batches: int = 32
    """of the gradient"""
    gamma: float = 0.05
    """size of the first step, in units of the gradient"""
    sign: str = "descent"
    """`descent`, as in the paper, or `code`: up the gradient, as published"""

    needs = ("gradient",)
    starts_at_base = False

    def __post_init__(self) -> None:
        if self.batches < 1 or self.gamma <= 0:
            raise Incompatible(f"init gora: batches={self.batches} and gamma={self.gamma} must be "
                               f"positive")  # fmt: skip
        if self.sign not in ("descent", "code"):
            raise Incompatible(f"init gora: sign={self.sign}; choices: descent, code")

    def start(
        self, W0: Tensor, r: int, s: float, generator: torch.Generator, found: Tensors
    ) -> Start:
        n, G = W0.shape[1], found["gradient"].to(W0)
        A = kaiming(r, n, W0, generator)
        one = torch.eye(r, dtype=A.dtype, device=A.device)
        compressed = torch.linalg.solve(A @ A.mT + 1e-8 * one, A @ G.mT).mT
        step = self.gamma / s * (n / r) ** 0.5
        return Start(A, (step if self.sign == "code" else -step) * compressed)


@dataclass(frozen=True)
class Importance(Allocation, name="gora"):
    """Trained numbers in proportion to mean |W0 * G|."""

    batches: int = 32
    """of the gradient"""
    lowest: float = 0.5
    """least rank, in units of the one asked for"""
    highest: float = 4.0
    """largest rank, likewise"""

    needs = ("gradient",)

    def __post_init__(self) -> None:
        if self.batches < 1 or not 0 <= self.lowest <= 1 <= self.highest:
            raise Incompatible(
                f"allocation gora: batches={self.batches}, lowest={self.lowest}, "
                f"highest={self.highest}: a batch or more, lowest <= 1 <= highest"
            )

    def fits(self, choice: "Choice") -> None:
        if not choice.form.low_rank:
            raise self.refuse(choice.form, "a low-rank form")

    def most(self, m: int, n: int, r: int) -> int:
        return min(round(self.highest * r), m, n)

    def reduce(self, W0: Tensor, found: Tensors, r: int) -> Tensors:
        return {"importance": (W0 * found["gradient"]).abs().mean()}

    def static(
        self, planned: "Sequence[Planned]", found: Mapping[str, Tensors]
    ) -> Mapping[str, int]:
        importance = {i.site.name: found[i.site.name]["importance"].item() for i in planned}
        total = sum(importance.values())
        if total <= 0:
            raise Incompatible("allocation gora: the gradient of every layer is zero")
        budget = sum(sum(item.shape) * item.rank for item in planned)
        ranks = {}
        for item in planned:
            m, n = item.shape
            r = round(budget * importance[item.site.name] / total) // (m + n)
            r = max(r, round(self.lowest * item.rank))
            ranks[item.site.name] = min(r, self.most(m, n, item.rank))
        return ranks


preset(
    "gora",
    init="gora",
    scale="rslora",
    allocation="gora",
    rank=8,
    alpha=16,
    lr=5e-5,
    lr_origin="the official scripts for Llama 3.1-8B, where LoRA+ takes B at 16 times that",
)
