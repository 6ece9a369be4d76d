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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from ._api import LowRank, Tensors

PORTION = 2**16  # numbers


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


def distance(P: Sequence[Tensor], Q: Sequence[Tensor]) -> Tensor:
    """The mean of ||P^T P - I||_F over all P [m, r], and of ||Q Q^T - I||_F over all Q [r, n].

    >>> distance([2 * torch.eye(3, 1)], [torch.eye(1, 3)]).item()
    1.5
    >>> distance([2 * torch.eye(3, 1), torch.eye(3, 2)], [torch.eye(1, 3), torch.eye(2, 4)]).item()
    0.75
    """
    return Distance.apply(len(P), *P, *Q)  # type: ignore[return-value]


class Distance(torch.autograd.Function):
    """See `distance`: d / dP = 2 P (P^T P - I) / ||P^T P - I||_F.

    What the products leave is one tensor for each rank: an operation on it is one for all of them.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        alike: dict[int, list[int]] = {}
        products = [t.mT @ t for t in tensors[:count]] + [t @ t.mT for t in tensors[count:]]
        for i, product in enumerate(products):
            alike.setdefault(len(product), []).append(i)
        off = [torch.stack([products[i] for i in own]) for own in alike.values()]
        for some in off:
            some.diagonal(dim1=1, dim2=2).sub_(1)
        norms = [torch.linalg.vector_norm(some, dim=(1, 2)) for some in off]
        ctx.count, ctx.alike = count, alike
        ctx.save_for_backward(*norms, *off, *tensors)
        return torch.cat(norms).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        k = len(ctx.alike)
        norms, off = ctx.saved_tensors[:k], ctx.saved_tensors[k : 2 * k]
        tensors = ctx.saved_tensors[2 * k :]
        grads: list[Tensor | None] = [None] * len(tensors)
        for own, norm, some in zip(ctx.alike.values(), norms, off, strict=True):
            weights = torch.where(norm > 0, 2 * g / (len(tensors) * norm), 0)
            for i, each in zip(own, (some * weights[:, None, None]).unbind(), strict=True):
                grads[i] = tensors[i] @ each if i < ctx.count else each @ tensors[i]
        return None, *grads


def tensors(layers: Mapping[str, Any]) -> list[Tensor]:
    """P, E and Q of each layer in turn."""
    own = (layer.params._parameters for layer in layers.values())  # its items take the longer way
    return [p[k] for p in own for k in "PEQ"]


def in_kinds(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
    """All P, all E, all Q, of tensors in turn."""
    return tensors[::3], tensors[1::3], tensors[2::3]


def gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What each has gathered; 0 where that is nothing."""
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Their numbers in one row, of one tensor alone a view: an operation on it is one for the whole
    model."""
    return _flatten_dense_tensors(tensors)


def like(row: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts of such a row in the shapes of the tensors.

    >>> [t.tolist() for t in like(torch.arange(3), [torch.zeros(1, 1), torch.zeros(2)])]
    [[[0]], [1, 2]]
    """
    parts = row.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


def portions(tensors: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """The tensors, as many at a time as fit into a processor's cache, and where in the row of all
    they lie; on other devices all at once.

    >>> some = [torch.zeros(PORTION - 1), torch.zeros(1), torch.zeros(2)]
    >>> [(row.start, row.stop, len(own)) for row, own in portions(some)]
    [(0, 65536, 2), (65536, 65538, 1)]
    """
    begin = end = 0
    own: list[Tensor] = []
    for i, t in enumerate(tensors):
        own.append(t)
        end += t.numel()
        if i == len(tensors) - 1 or (t.device.type == "cpu" and end - begin >= PORTION):
            yield slice(begin, end), own
            begin, own = end, []


def averaged(
    mean: list[Tensor], spread: list[Tensor], now: list[Tensor], beta1: float, beta2: float
) -> None:
    """Moves the average of an importance, and that of its distance from the average, in place
    (AdaLoRA's Eq. 10 and 11). The importance is used up.

    >>> mean, spread = [torch.zeros(1)], [torch.zeros(1)]
    >>> averaged(mean, spread, [torch.ones(1)], 0.75, 0.5)
    >>> mean[0].item(), spread[0].item()
    (0.25, 0.375)
    >>> averaged(mean, spread, [torch.zeros(1)], 0.75, 0.5)  # below its average
    >>> mean[0].item(), spread[0].item()
    (0.1875, 0.28125)
    """
    torch._foreach_lerp_(mean, now, 1 - beta1)
    torch._foreach_sub_(now, mean)
    torch._foreach_abs_(now)
    torch._foreach_lerp_(spread, now, 1 - beta2)
