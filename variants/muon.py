"""Muon: An Optimizer for Hidden Layers in Neural Networks (Jordan et al., 2024,
kellerjordan.github.io/posts/muon); Muon is Scalable for LLM Training (Liu et al., 2025),
arXiv:2502.16982.

    M = mu M + (1 - mu) G,    W = W - lr k NS((1 - mu) G + mu M),    NS(U S V^T) = about U V^T

NS is five steps of X <- a X + (b X X^T + c (X X^T)^2) X with (a, b, c) = (3.4445, -4.7750, 2.0315)
from X / ||X||, which send a singular value of 0.4 % of the norm or more to somewhere between 0.68
and 1.2, and leave smaller ones smaller. k = sqrt(max(1, m / n)) in the official code
(KellerJordan/Muon, muon.py), 0.2 sqrt(max(m, n)) in the second paper, which gives the steps AdamW's
size, so that AdamW's rate fits. Here each matrix of the adapter moves so (LoRA's A and B, the W of
full), vectors and heads by AdamW with `rest` times the rate: `rest` and AdamW's betas have no
effect where matrices are all there is. The official iteration runs in bf16 for speed; here in the
dtype of the factors. PEFT has no such optimizer.

The singular values of a step are alike where the gradient's are not, and with the second
paper's factor its numbers are about 0.2 of the rate, as AdamW's:

>>> import torch, variants
>>> U, V = torch.linalg.qr(torch.randn(9, 4)).Q, torch.linalg.qr(torch.randn(6, 4)).Q
>>> S = torch.linalg.svdvals(newton_schulz(U @ torch.diag(torch.tensor([1, 0.5, 0.2, 0.1])) @ V.T))
>>> bool(S[:4].min() > 0.65), bool(S[0] < 1.25), bool(S[4:].max() < 1e-3)
(True, True, True)
>>> model = torch.nn.Sequential(torch.nn.Linear(40, 30, bias=False))
>>> adapter = variants.attach(model, "muon", rank=10, targets=["0"])
>>> optimizer, B = adapter.optimizer(lr=1.0), adapter.layers["0"].params["B"]
>>> _ = (model(torch.randn(99, 40)) * torch.randn(99, 30)).sum().backward(), optimizer.step()
>>> 0.14 < B.square().mean().sqrt().item() < 0.25
True

The average takes 1 - mu of a gradient; a step looks ahead, to (1 - mu) G + mu M:

>>> first, B0 = 0.05 * B.grad, B.detach().clone()
>>> torch.allclose(optimizer.state[B]["momentum"], first)
True
>>> B.grad = torch.randn(30, 10, generator=torch.Generator().manual_seed(0)) * B.grad.norm()
>>> optimizer.step()
>>> M = 0.95 * first + 0.05 * B.grad
>>> wanted = 0.2 * 30**0.5 * newton_schulz(0.05 * B.grad + 0.95 * M)
>>> torch.allclose(B0 - B, wanted, atol=1e-4)
True
>>> optimizer.rule = "spectral"
>>> optimizer._k(40, 10), optimizer._k(10, 40)
(2.0, 1.0)
>>> update = {"name": "muon", "rest": 0.5}  # DoRA's m is no matrix
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
>>> adapter = variants.attach(model, "muon", rank=2, form="dora", update=update, targets=["0"])
>>> [group["lr"] for group in adapter.optimizer(lr=1.0).param_groups]
[1.0, 0.5]
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._api import Update, trained
from ._factors import Factored, batched
from ._layer import Adapted
from ._registry import Incompatible, preset

if TYPE_CHECKING:
    from ._adapter import Choice


def newton_schulz(G: Tensor, steps: int = 5) -> Tensor:
    """Nearly U V^T of G [..., m, n] = U S V^T; zero where G is."""
    X = G.mT if G.shape[-2] > G.shape[-1] else G
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) + 1e-7)
    for _ in range(steps):
        XX = X @ X.mT
        X = 3.4445 * X + (-4.7750 * XX + 2.0315 * XX @ XX) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X


class Orthogonal(Factored):
    """Descent along orthogonalized momentum."""

    mu, rule = 0.0, ""

    def move(self, group: dict[str, Any]) -> None:
        known = [t for t in group["params"] if t.grad is not None]
        if not known:
            return
        for t in known:
            if "momentum" not in self.state[t]:
                self.state[t]["momentum"] = torch.zeros_like(t)
        momentum, grads = [self.state[t]["momentum"] for t in known], [t.grad for t in known]
        torch._foreach_lerp_(momentum, grads, 1 - self.mu)
        ahead = torch._foreach_lerp(grads, momentum, self.mu)
        found = batched(lambda G: (newton_schulz(G),), list(ahead))
        self.descend(
            group, known, [self._k(*t.shape) * d for t, (d,) in zip(known, found, strict=True)]
        )

    def _k(self, m: int, n: int) -> float:
        return math.sqrt(max(1, m / n)) if self.rule == "spectral" else 0.2 * math.sqrt(max(m, n))


@dataclass(frozen=True)
class Muon(Update, name="muon"):
    """Momentum with all singular values made equal, for matrices; AdamW for the rest."""

    momentum: float = 0.95
    """mu, with Nesterov's look ahead"""
    rule: str = "rms"
    """size of a step: `rms` 0.2 sqrt(max(m, n)), as AdamW's; `spectral` sqrt(max(1, m / n))"""
    rest: float = 1.0
    """AdamW's rate over Muon's, for what is no matrix (0.015 beside `spectral`)"""

    def __post_init__(self) -> None:
        if self.rule not in ("rms", "spectral"):
            raise Incompatible(f"update muon: rule={self.rule}; choices: rms, spectral")
        if not 0 <= self.momentum < 1:
            raise Incompatible(f"update muon: momentum={self.momentum} must lie in [0, 1)")

    def fits(self, choice: "Choice") -> None:
        if not any(len(shape) == 2 for shape in choice.form.shapes(8, 8, 2).values()):
            raise self.refuse(choice.form, "a form that trains a matrix")

    def optimizer(
        self, layers: Mapping[str, Adapted], others: Sequence[Tensor], lr: float, **settings: Any
    ) -> torch.optim.Optimizer:
        own = [t for t in trained(layers) if t.ndim == 2]
        optimizer = Orthogonal(layers, others, own, lr, rest_lr=self.rest * lr, **settings)
        optimizer.mu, optimizer.rule = self.momentum, self.rule
        return optimizer


preset(
    "muon",
    update="muon",
    rank=16,
    alpha="2r",
    lr=2e-4,
    lr_origin="LoRA's, whose step size the second paper's factor keeps",
)
