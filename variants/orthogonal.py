"""Orthogonal initialisation: Rethinking LoRA initialisations for faster convergence
(datta0, 2024, datta0.github.io/posts/rethink-lora-init).

    Q in O(r),    A = Q_odd^T N_1 / 10,    B = N_2 Q_even / 10,    N ~ N(0, 1),    B A = 0

Rows of one random orthogonal Q [r, r] are dealt out in turn: those at 0, 2, ... make A, those at 1,
3, ... make B. The two halves are orthogonal, so B A = 0 although neither factor is: the model and
the base start where they were. PEFT, lora/layer.py (`orthogonal_init`), draws from the global
generator and refuses an odd rank; here A then has one row of Q more.

Nothing is zero but the product:

>>> import torch
>>> start = Orthogonal().start(torch.zeros(30, 20), 5, 1.0, torch.Generator().manual_seed(0), {})
>>> bool((start.B @ start.A).abs().max() < 1e-6), start.subtract
(True, None)
>>> [int(torch.linalg.matrix_rank(t)) for t in (start.A, start.B)]
[3, 2]
>>> start = Orthogonal().start(torch.zeros(3000, 2000), 5, 1.0, torch.Generator(), {})
>>> [round((t.square().sum() / max(t.shape)).item(), 3) for t in (start.A, start.B)]
[0.03, 0.02]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Init, Start, Tensors
from ._registry import preset


@dataclass(frozen=True)
class Orthogonal(Init, name="orthogonal"):
    """Two non-zero factors on orthogonal halves of the rank's space."""

    deviation: float = 0.1
    """standard deviation of the random coordinates"""

    full_rank = False

    def start(
        self, W0: Tensor, r: int, s: float, generator: torch.Generator, found: Tensors
    ) -> Start:
        m, n = W0.shape
        square = torch.randn(r, r, generator=generator, dtype=torch.float64)
        Q = torch.linalg.qr(square).Q
        first, second = Q[0::2], Q[1::2]
        N1 = torch.randn(len(first), n, generator=generator)
        N2 = torch.randn(m, len(second), generator=generator)
        A = self.deviation * first.mT @ N1.double()
        B = self.deviation * N2.double() @ second
        return Start(A.to(W0), B.to(W0))


preset(
    "orthogonal",
    init="orthogonal",
    rank=16,
    alpha="2r",
    lr=2e-4,
    lr_origin="LoRA's",
)
