"""Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models (Zhang & Pilanci, ICML 2024),
arXiv:2402.02347.

    g_A' = (B^T B + d I)^-1 g_A,    g_B' = g_B (A A^T + d I)^-1

then a step of AdamW (`rule=adamw`, the paper's scaled AdamW) or of plain descent (`rule=sgd`, its
scaled GD). The metric's geometry is that of the product: without damping a step of scaled GD moves
B A alike from every basis (B R, R^-1 A) of it. Official code:
pilancilab/Riemannian_Preconditioned_LoRA, Mistral-7B/mistral/custom_optimizer.py (`AdamWr`), which
means to keep A as it was for B's gradient (`c1 = p1.data`) but keeps a reference, so that B is
scaled by the new A; leaves the gradient as it is where the inverse fails; and has no bias
correction, so that its steps are up to 6.5 times as long (at the tenth). Here, as in PEFT's
`create_riemannian_optimizer` (d = 0.01 there), both are scaled by the factors of the step's start,
and the inverse is a pseudo-inverse where there is none. d is the official default; its README tunes
it for each task from 1e-6 to 100.

Another basis of the same product gives the same gradient of it:

>>> import torch
>>> B, A, G = torch.randn(6, 2).double(), torch.randn(2, 8).double(), torch.randn(6, 8).double()
>>> R = torch.tensor([[2.0, 1.0], [0.0, -0.5]]).double()
>>> def change(B, A):
...     gA, gB = preconditioned(A, B, B.T @ G, G @ A.T, damping=0.0)
...     return B @ gA + gB @ A
>>> torch.allclose(change(B, A), change(B @ R, R.inverse() @ A))
True

By `sgd` a step is the rate times that; by `adamw` a first step has the length of the rate:

>>> import variants
>>> def step(rule):
...     model = torch.nn.Sequential(torch.nn.Linear(8, 6)).double()
...     update = {"name": "riemannian", "rule": rule}
...     adapter = variants.attach(model, "riemannian", rank=2, targets=["0"], update=update)
...     p, optimizer = adapter.layers["0"].params, adapter.optimizer(lr=0.1)
...     p["B"].data = B.clone()
...     model(torch.ones(3, 8).double()).square().sum().backward()
...     optimizer.step()
...     return (B - p["B"]).detach()
>>> [bool((step(rule).abs() - 0.1).abs().max() < 1e-4) for rule in ("adamw", "sgd")]
[True, False]
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


def preconditioned(
    A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """The two gradients in the metric of the product B A."""
    return (
        damped_inverse(B.mT @ B, damping) @ gA,
        gB @ damped_inverse(A @ A.mT, damping),
    )


class Scaled(Paired):
    """AdamW, or plain descent, along preconditioned gradients."""

    damping, adaptive = 0.0, True

    def move(self, group: dict[str, Any]) -> None:
        known = self.learning()
        found = batched(
            lambda A, B, gA, gB: preconditioned(A, B, gA, gB, self.damping),
            *([getattr(pair, k) for pair in known] for k in "AB"),
            *([getattr(pair, k).grad for pair in known] for k in "AB"),
        )
        tensors = [t for pair in known for t in (pair.A, pair.B)]
        grads = [g for both in found for g in both]
        if self.adaptive:
            self.adamw(group, tensors, grads)
        else:
            self.descend(group, tensors, grads)


@dataclass(frozen=True)
class Riemannian(Update, name="riemannian"):
    """Gradients of A and B scaled by the inverse of the other factor's Gram matrix."""

    damping: float = 1e-6
    """d, added to the diagonal of B^T B and of A A^T"""
    rule: str = "adamw"
    """what is done with the scaled gradients: `adamw` (moments of them) or `sgd`"""

    def __post_init__(self) -> None:
        if self.rule not in ("adamw", "sgd"):
            raise Incompatible(f"update riemannian: rule={self.rule}; choices: adamw, sgd")
        if self.damping < 0:
            raise Incompatible(f"update riemannian: damping={self.damping} is negative")

    def fits(self, choice: "Choice") -> None:
        need_factors(self, choice)

    def optimizer(
        self, layers: Mapping[str, Adapted], others: Sequence[Tensor], lr: float, **settings: Any
    ) -> torch.optim.Optimizer:
        optimizer = Scaled(layers, others, lr, **settings)
        optimizer.damping, optimizer.adaptive = self.damping, self.rule == "adamw"
        return optimizer


preset(
    "riemannian",
    update="riemannian",
    rank=16,
    alpha="r",
    lr=5e-5,
    lr_origin="the official README's for Mistral-7B on GLUE, alpha that of its mistral_glue.py",
)
