"""OFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning (Qiu et al., NeurIPS 2023),
arXiv:2306.07280.

    W = W0 R^T,    R = diag(R_1, ..., R_k),    R_i = (I + Q_i) (I - Q_i)^-1,    Q_i = -Q_i^T

Blocks of b inputs are rotated, from Q = 0; norms of W0's rows and the angles between them stay. The
paper's W is transposed, R W0 there. What is trained is the upper triangle of each Q_i; the official
code (Zeju1997/oft, oft-control/oft.py) trains all b^2 numbers of it and uses half. The rank is b,
as PEFT's default names it; where b does not divide the inputs the largest divisor below is taken.
PEFT's exact Cayley transform and its Neumann series (its default, OFTv2, arXiv:2506.19847) turn in
opposite directions, as do two functions of the official code; the paper's formula, which is the
series', stands here: `neumann=5` is PEFT's default. The constrained COFT is not here.

A Q of 2 x 2 turns by 2 atan(q), so that q = 1 is a quarter turn; the norms of rows stay:

>>> import torch
>>> W0 = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
>>> W = OFT().weight(W0, {"Q": torch.tensor([[0.0], [1.0]])}, 1.0)
>>> [round(v, 4) for v in W[0].tolist()]
[1.0, 2.0, 4.0, -3.0]
>>> g = torch.Generator().manual_seed(0)
>>> W0, Q = torch.randn(5, 12, generator=g), torch.randn(3, 6, generator=g)
>>> W = OFT().weight(W0, {"Q": Q}, 1.0)
>>> torch.allclose(W @ W.T, W0 @ W0.T, atol=1e-4), OFT().rank_of(5, 20, 8, "here")
(True, 5)
>>> q = torch.tensor([[0.1]])  # I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4, with Q^2 = -q^2 I
>>> W = OFT(neumann=5).weight(torch.eye(2), {"Q": q}, 1.0)
>>> round(W[0, 0].item(), 6), round(W[1, 0].item(), 6)
(0.9801, 0.198)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors
from ._layer import Adapted
from ._registry import Incompatible, preset


def skew(q: Tensor, b: int) -> Tensor:
    """Upper triangles [..., b (b - 1) / 2] -> skew-symmetric matrices [..., b, b]."""
    row, column = torch.triu_indices(b, b, 1, device=q.device)
    upper = q.new_zeros(*q.shape[:-1], b, b)
    upper[..., row, column] = q
    return upper - upper.mT


def turned(Q: Tensor, neumann: int = 0) -> Tensor:
    """(I + Q) (I - Q)^-1 - I, which is 2 Q (I - Q)^-1; or by so many terms of Neumann's series."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    if not neumann:
        return torch.linalg.solve(eye - Q, 2 * Q, left=False)
    inverse = eye
    for _ in range(neumann - 2):
        inverse = eye + Q @ inverse
    return (eye + Q) @ inverse - eye


def divisor(n: int, r: int, where: str, of: int = 1, even: bool = False) -> int:
    """The largest block size from 2 to r of which `of` blocks divide n."""
    if r > n:
        raise Incompatible(
            f"rank={r}: the rank is a size of blocks, and {where} has {n} inputs; choose a smaller "
            f"rank or leave the layer out of targets"
        )
    for b in range(r, 1, -1):
        if n % (b * of) == 0 and not (even and b % 2):
            return b
    raise Incompatible(
        f"rank={r}: the {n} inputs of {where} fall into no{' even' if even else ''} blocks of 2 to "
        f"{r}{f', {of} to a group' if of > 1 else ''}; leave the layer out of targets"
    )


@dataclass(frozen=True)
class OFT(Form, name="oft"):
    """Rotates blocks of the inputs."""

    neumann: int = 0
    """terms of a Neumann series in place of the inverse (OFTv2, PEFT: 5); 0: the inverse"""

    rank_means = "b, the size of the rotated blocks of inputs; a divisor of their number"
    parameters = "n*(r - 1)//2"
    scaled = False
    rank_is_bounded = False

    def __post_init__(self) -> None:
        if self.neumann < 0 or self.neumann in (1, 2):
            raise Incompatible(f"form oft: neumann={self.neumann}; 0, or 3 and more")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"Q": (n // r, r * (r - 1) // 2)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        return {"Q": W0.new_zeros(self.shapes(m, n, r)["Q"])}

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        return divisor(n, r, where)

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        k, b = len(p["Q"]), W0.shape[1] // len(p["Q"])
        R = torch.eye(b, device=W0.device) + turned(skew(p["Q"], b), self.neumann)
        return torch.einsum("mkj,kij->mki", W0.unflatten(1, (k, b)).to(R.dtype), R).flatten(1)

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        k = len(layer.p["Q"])
        change = turned(skew(layer.p["Q"], layer.in_features // k), self.neumann)

        def moved(x: Tensor) -> Tensor:  # R^T x - x
            blocks = x.unflatten(-1, (k, -1))
            return torch.einsum("...ki,kij->...kj", blocks, change.to(x.dtype)).flatten(-2)

        if not layer.drops:
            return layer.frozen(x + moved(x))
        return layer.frozen(x) + layer.frozen.stored.product(moved(layer.dropout(x)))


preset(
    "oft",
    form="oft",
    scale="none",
    rank=16,
    alpha=None,
    lr=1e-4,
    lr_origin="OFT with b = 16 on Llama-2-7B in BOFT's Appendix A.3 (8e-4 for mathematics)",
)
