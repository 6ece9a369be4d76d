"""The form of AdaLoRA (Zhang et al., ICLR 2023), arXiv:2303.10512: a singular value decomposition.

    W = W0 + s P diag(E) Q,    P, Q ~ N(0, 0.02^2),    E = 0

Nothing holds P and Q orthogonal but a penalty, which is the allocation's. Official code:
QingruZhang/AdaLoRA, loralib/adalora.py (`SVDLinear`).

P and Q start small; a change that is given is decomposed, its singular values in E:

>>> p = Triplet().start(torch.zeros(90, 60), 30, 1.0, torch.Generator().manual_seed(0))
>>> [round(p[k].std().item(), 3) for k in "PEQ"]
[0.02, 0.0, 0.02]
>>> A, B = torch.eye(2, 5), torch.diag(torch.tensor([1.0, 3.0, 0.0, 0.0]))[:, :2]
>>> p = Triplet().embed(torch.zeros(4, 5), A, B, 1.0)
>>> [round(v, 4) for v in p["E"].tolist()]
[3.0, 1.0]
>>> torch.allclose(Triplet().weight(torch.zeros(4, 5), p, 1.0), B @ A)
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import LowRank, Tensors


@dataclass(frozen=True)
class Triplet(LowRank, name="triplet"):
    """W0 + s P diag(E) Q: a singular value decomposition held together by a penalty."""

    rank_means = "r, the initial number of triplets of every matrix; the budget then falls"
    parameters = "r*(m + n + 1)"

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"P": (m, r), "E": (r,), "Q": (r, n)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        P, Q = (0.02 * torch.randn(*shape, generator=generator) for shape in ((m, r), (r, n)))
        return {"P": P.to(W0), "E": W0.new_zeros(r), "Q": Q.to(W0)}

    def embed(self, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensors:
        left, right = torch.linalg.qr(B), torch.linalg.qr(A.mT)
        U, E, Vh = torch.linalg.svd(left.R @ right.R.mT)
        return {"P": left.Q @ U, "E": E, "Q": Vh @ right.Q.mT}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + s * (p["P"] * p["E"]) @ p["Q"]

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        return p["Q"], p["P"] * p["E"]


def off_orthogonal(P: Tensor, Q: Tensor) -> list[Tensor]:
    """P^T P - I and Q Q^T - I [r, r], of P [m, r] and Q [r, n].

    >>> [t.tolist() for t in off_orthogonal(2 * torch.eye(3, 1), torch.eye(1, 3))]
    [[[3.0]], [[0.0]]]
    """
    one = torch.eye(P.shape[1], dtype=P.dtype, device=P.device)
    return [P.mT @ P - one, Q @ Q.mT - one]


def averaged(
    mean: list[Tensor], spread: list[Tensor], now: list[Tensor], beta1: float, beta2: float
) -> None:
    """Moves the average of an importance, and that of its distance from the average, in place
    (AdaLoRA's Eq. 10 and 11).

    >>> mean, spread = [torch.zeros(1)], [torch.zeros(1)]
    >>> averaged(mean, spread, [torch.ones(1)], 0.75, 0.5)
    >>> mean[0].item(), spread[0].item()
    (0.25, 0.375)
    >>> averaged(mean, spread, [torch.zeros(1)], 0.75, 0.5)  # below its average
    >>> mean[0].item(), spread[0].item()
    (0.1875, 0.28125)
    """
    torch._foreach_lerp_(mean, now, 1 - beta1)
    torch._foreach_lerp_(spread, torch._foreach_abs(torch._foreach_sub(now, mean)), 1 - beta2)
