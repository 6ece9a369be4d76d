"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), arXiv:2106.09685.

    W = W0 + s B A,    s = alpha / r,    A ~ U(-1/sqrt(n), 1/sqrt(n)),    B = 0

Official code: microsoft/LoRA, loralib/layers.py (`Linear`). The paper draws A from a Gaussian; the
code, and all that followed it, from the uniform distribution above. Dropout acts on the adapter's
input alone. LoRA is the identity of this laboratory: each axis takes its first value here. PEFT has
the same start and scale; its alpha is 8 at any rank unless it is given.

What it buys: the change has rank r, whatever the data say.

>>> import torch
>>> p = {"A": torch.randn(2, 8), "B": torch.randn(6, 2)}
>>> W = LoRA().weight(torch.zeros(6, 8), p, s=2.0)
>>> int(torch.linalg.matrix_rank(W)), bool(torch.allclose(W, 2 * p["B"] @ p["A"]))
(2, True)
>>> Standard().value(32.0, 16), Unscaled().value(32.0, 16)
(2.0, 1.0)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._api import Allocation, Init, LowRank, Scale, Start, Tensors, Update, trained
from ._layer import Adapted
from ._registry import preset

if TYPE_CHECKING:
    from ._adapter import Choice


@dataclass(frozen=True)
class LoRA(LowRank, name="lora"):
    """W0 + s B A."""

    parameters = "r*(m + n)"

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"A": (r, n), "B": (m, r)}

    def embed(self, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensors:
        return {"A": A, "B": B}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + s * p["B"] @ p["A"]

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        return p["A"], p["B"]


@dataclass(frozen=True)
class Default(Init, name="default"):
    """The form's own start: for LoRA, A uniform and B zero."""

    def fits(self, choice: "Choice") -> None:
        """Every form has a start of its own."""

    def start(
        self, W0: Tensor, r: int, s: float, generator: torch.Generator, found: Tensors
    ) -> Start | None:
        return None


@dataclass(frozen=True)
class Standard(Scale, name="standard"):
    """s = alpha / r."""

    def value(self, alpha: float, r: int) -> float:
        return alpha / r


@dataclass(frozen=True)
class Unscaled(Scale, name="none"):
    """s = 1: for a form in whose equation no scale stands."""

    has_alpha = False

    def value(self, alpha: float, r: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Uniform(Allocation, name="uniform"):
    """The same rank everywhere, from start to end."""


@dataclass(frozen=True)
class AdamW(Update, name="adamw"):
    """Decoupled weight decay (Loshchilov & Hutter, 2019), one learning rate for all."""

    def optimizer(
        self, layers: Mapping[str, Adapted], others: Sequence[Tensor], lr: float, **settings: Any
    ) -> torch.optim.Optimizer:
        settings.setdefault("fused", not settings.get("foreach"))
        return torch.optim.AdamW([*trained(layers), *others], lr=lr, **settings)


preset(
    "lora",
    rank=16,
    alpha="2r",
    lr=2e-4,
    lr_origin="the paper's for GPT-2 and GPT-3 (Tables 11 and 12), widths 1,024 to 12,288",
)
