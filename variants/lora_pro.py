"""LoRA-Pro: Are Low-Rank Adapters Properly Optimized? (Wang et al., ICLR 2025), arXiv:2407.18242.

    g_A' = (B^T B)^-1 g_A / s^2 + X A,    g_B' = (I - P_B) g_B (A A^T)^-1 / s^2 - B X

P_B = B (B^T B)^-1 B^T (Theorem 2.1): with these, W moves along s (B g_A' + g_B' A), the nearest to
full fine-tuning's gradient that factors can reach, whatever X. X solves the Sylvester equation
B^T B X + X A A^T = -(B^T B)^-1 g_A A^T / s^2, which keeps g_A', g_B' nearest to g_A, g_B (Theorem
2.3). At the start B = 0: A rests, and B moves by g_B (A A^T)^-1 / s^2.

`mode=full` (Algorithm 2): Adam's moments are those of the [m, n] gradient s (B g_A' + g_B' A), at
the cost of full fine-tuning's memory; Adam's direction g then takes that gradient's place, with s
B^T g and s g A^T for g_A and g_B. `mode=efficient`: AdamW's moments of g_A' and g_B' themselves.
Official code: mrflogs/LoRA-Pro, DeepSpeed-0.15.1/deepspeed/runtime/zero/stage_1_and_2.py
(`lorapro_full_adjustment`): `full`, with s fixed at 2 even where rsLoRA's scale is in use (here the
layer's own) and moments in bf16 (here as wide as the factors); it adds 1e-8 I to the Gram matrices
that it inverts, as here. PEFT has no such optimizer.

The gradient of W does not depend on X, and is the full one's projection on what A and B span:

>>> import torch
>>> B, A, G = torch.randn(6, 2).double(), torch.randn(2, 8).double(), torch.randn(6, 8).double()
>>> s = 3.0
>>> gA, gB = adjusted(A, B, s * B.T @ G, s * G @ A.T, s, damping=0.0)
>>> P, Q = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
>>> torch.allclose(s * (B @ gA + gB @ A), P @ G + (G - P @ G) @ Q)
True
>>> inverse = torch.inverse(B.T @ B)                    # what of g_B' lies in B's columns is -B X
>>> X = -inverse @ B.T @ gB
>>> torch.allclose(B.T @ B @ X + X @ A @ A.T, -inverse @ (s * B.T @ G) @ A.T / s**2)
True

A first step of `full` is Adam's, so that of the sign of G, as far as A and B can follow:

>>> import variants
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False)).double()
>>> adapter = variants.attach(model, "lora_pro", rank=2, alpha=6, targets=["0"])
>>> p, optimizer = adapter.layers["0"].params, adapter.optimizer(lr=1e-6)
>>> p["A"].data, p["B"].data = A.clone(), B.clone()
>>> x, W = torch.randn(9, 8).double(), adapter.layers["0"].weight.detach()
>>> (model(x).square().sum() / 2).backward()
>>> optimizer.step()
>>> G = (x @ W.T).T @ x
>>> G = P @ G + (G - P @ G) @ Q                         # what Adam sees
>>> moved, sign = (W - adapter.layers["0"].weight.detach()) / 1e-6, G.sign()
>>> torch.allclose(moved, P @ sign + (sign - P @ sign) @ Q, atol=1e-3)
True
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._api import Update
from ._factors import Paired, batched, damped_inverse, need_factors
from ._layer import Adapted
from ._registry import Incompatible, preset

if TYPE_CHECKING:
    from ._adapter import Choice


def sylvester(L: Tensor, R: Tensor, C: Tensor) -> Tensor:
    """X of L X + X R = C for symmetric L, R [..., r, r] of no negative eigenvalue."""
    (low, U), (high, V) = torch.linalg.eigh(L), torch.linalg.eigh(R)
    sums = low[..., :, None] + high[..., None, :]
    return U @ ((U.mT @ C @ V) / sums.clamp_min(torch.finfo(C.dtype).tiny)) @ V.mT


def adjusted(
    A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, s: float | Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """(g_A', g_B') of gradients g_A [..., r, n] and g_B [..., m, r]."""
    left, right = B.mT @ B, A @ A.mT
    left_inverse = damped_inverse(left, damping)
    base = left_inverse @ gA / s**2
    X = sylvester(left, right, -base @ A.mT)
    gB = gB @ damped_inverse(right, damping) / s**2
    return base + X @ A, gB - B @ (left_inverse @ (B.mT @ gB)) - B @ X


class Pro(Paired):
    """Descent along adjusted gradients, with Adam before (full) or after (efficient) them."""

    damping, full = 0.0, True

    def move(self, group: dict[str, Any]) -> None:
        known = self.learning()
        A, B = [pair.A for pair in known], [pair.B for pair in known]
        s = [pair.s for pair in known]
        gA, gB = ([t.grad for t in tensors] for tensors in (A, B))
        tensors = [t for pair in known for t in (pair.A, pair.B)]
        found = self._adjusted(A, B, gA, gB, s)
        if self.full:
            gradient = [
                pair.s * (pair.B @ a + b @ pair.A)
                for pair, (a, b) in zip(known, found, strict=True)
            ]
            g = self.direction(group, B, gradient)  # B's state holds the moments [m, n]
            gA = [pair.s * pair.B.mT @ d for pair, d in zip(known, g, strict=True)]
            gB = [pair.s * d @ pair.A.mT for pair, d in zip(known, g, strict=True)]
            along = [d for both in self._adjusted(A, B, gA, gB, s) for d in both]
            self.descend(group, tensors, along)
        else:
            self.adamw(group, tensors, [d for both in found for d in both])

    def _adjusted(self, *columns: Any) -> list[tuple[Tensor, ...]]:
        return batched(lambda A, B, a, b, s: adjusted(A, B, a, b, s, self.damping), *columns)


@dataclass(frozen=True)
class LoRAPro(Update, name="lora_pro"):
    """Gradients of A and B adjusted so that W moves as near to full fine-tuning as they can."""

    mode: str = "full"
    """`full`: Adam's moments of the [m, n] gradient; `efficient`: of the adjusted g_A and g_B"""
    damping: float = 1e-8
    """added to the diagonal of B^T B and of A A^T where they are inverted"""

    def __post_init__(self) -> None:
        if self.mode not in ("full", "efficient"):
            raise Incompatible(f"update lora_pro: mode={self.mode}; choices: full, efficient")
        if self.damping < 0:
            raise Incompatible(f"update lora_pro: damping={self.damping} is negative")

    def fits(self, choice: "Choice") -> None:
        need_factors(self, choice)
        if not choice.init.full_rank:  # B^T B and A A^T are then singular, and so is X's equation
            raise self.refuse(choice.init, "an init whose A and B have r independent directions")

    def optimizer(
        self, layers: Mapping[str, Adapted], others: Sequence[Tensor], lr: float, **settings: Any
    ) -> torch.optim.Optimizer:
        optimizer = Pro(layers, others, lr, **settings)
        optimizer.damping, optimizer.full = self.damping, self.mode == "full"
        return optimizer


preset(
    "lora_pro",
    update="lora_pro",
    rank=8,
    alpha=16,
    lr=2e-5,
    lr_origin="the paper's for LLaMA-2-7B (full fine-tuning's, which its gradient imitates)",
)
