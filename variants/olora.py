"""OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models (Büyükakyüz, 2024),
arXiv:2406.01775.

    W0 = Q R,    B = Q[:, :r],    A = R[:r, :],    base = W0 - s B A

A thin QR decomposition: B has orthonormal columns that span W0's first r columns, A holds their
coordinates. Official code: the author's own in PEFT, lora/layer.py (`olora_init`), which is
repeated here: neither factor is divided by s, so the base loses s times the part, not the part.
PEFT leaves the base moved when the adapter is disabled; here the original stays at hand.

B is orthonormal; with s = 1 the first r columns of the base would be empty, with s = 2 they turn:

>>> import torch
>>> W0 = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
>>> start = OLoRA().start(W0, 2, 2.0, torch.Generator(), {})
>>> base = W0 - 2.0 * start.B @ start.A
>>> torch.allclose(base[:, :2], -W0[:, :2], atol=1e-6), bool(base[:, 2:].norm() > 1)
(True, True)
>>> torch.allclose(start.B.T @ start.B, torch.eye(2), atol=1e-6)
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Init, Start, Tensors
from ._registry import preset


@dataclass(frozen=True)
class OLoRA(Init, name="olora"):
    """The first r columns of Q and rows of R into the adapter."""

    moves_base = True

    def start(
        self, W0: Tensor, r: int, s: float, generator: torch.Generator, found: Tensors
    ) -> Start:
        Q, R = torch.linalg.qr(W0)
        A, B = R[:r].contiguous(), Q[:, :r].contiguous()
        return Start(A, B, subtract=(A, B))


preset(
    "olora",
    init="olora",
    rank=32,
    alpha=16,
    lr=3e-4,
    lr_origin="the author's script in PEFT, examples/olora_finetuning",
)
