"""BOFT: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization
(Liu et al., ICLR 2024), arXiv:2311.06243.

    W = diag(g) W0 R^T,    R = D_{M-1} ... D_1 D_0,    D_i = P_i diag(R_i1, ..., R_ik) P_i^T

Each R_ij = (I + Q) (I - Q)^-1 is OFT's rotation of b numbers. P_i joins numbers that are b / 2 2^i
apart, so that with M factors each input reaches b 2^(M-1) others; M = 1 is OFT. Official code:
PEFT's tuners/boft/layer.py, to which wy1iu/butterfly-oft points. It has a magnitude g [m], which
the paper's count leaves out; it trains all of Q, twice what it uses, where here the upper triangle
is trained; it has Cayley's transform with the opposite sign of Q (the same rotations), and falls to
M = 1 without its CUDA extension. The rank is b: where b 2^(M-1) does not divide the inputs, or b is
odd, the largest that fits below it is taken.

Blocks of 2 mix 2 inputs, by two factors 4, by three 8; row norms are g times W0's:

>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> p = {"Q": torch.randn(3, 4, 1, generator=g), "g": torch.tensor([3.0])}
>>> W0 = torch.zeros(1, 8)
>>> W0[0, 5] = 2.0
>>> for M in (1, 2, 3):
...     W = BOFT(depth=M).weight(W0, p | {"Q": p["Q"][:M]}, 1.0)
...     print(W[0].abs().gt(1e-6).int().tolist(), round(W.norm().item(), 4))
[0, 0, 0, 0, 1, 1, 0, 0] 6.0
[0, 0, 0, 0, 1, 1, 1, 1] 6.0
[1, 1, 1, 1, 1, 1, 1, 1] 6.0

One factor is OFT; the second of two acts after the first, between the halves of 4 inputs:

>>> from variants.oft import OFT
>>> ones, W0 = torch.ones(1), torch.randn(1, 8, generator=g)
>>> first = BOFT(depth=1).weight(W0, {"Q": p["Q"][:1], "g": ones}, 1.0)
>>> torch.allclose(first, OFT().weight(W0, {"Q": p["Q"][0]}, 1.0))
True
>>> order = [0, 2, 1, 3, 4, 6, 5, 7]
>>> second = OFT().weight(first[:, order], {"Q": p["Q"][1]}, 1.0)[:, order]
>>> torch.allclose(BOFT(depth=2).weight(W0, {"Q": p["Q"][:2], "g": ones}, 1.0), second, atol=1e-5)
True

Blocks are joined by halves, so their size is even; without a join any that divides will do:

>>> BOFT().rank_of(5, 36, 3, "here"), BOFT(depth=1).rank_of(5, 36, 3, "here")
(2, 3)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors
from ._layer import Adapted
from ._registry import Incompatible, preset
from .oft import divisor, skew, turned


def permutation(n: int, b: int, factor: int, device: torch.device) -> Tensor:
    """P_i as indices: in groups of b 2^i, the half blocks at even places, then those at odd."""
    halves = torch.arange(n, device=device).view(-1, 2 ** (factor + 1), b // 2)
    return torch.cat([halves[:, 0::2], halves[:, 1::2]], 1).flatten()


@dataclass(frozen=True)
class BOFT(Form, name="boft"):
    """Rotates the inputs by a product of sparse rotations."""

    depth: int = 2
    """M, sparse rotations in the product"""

    rank_means = "b, the size of the rotated blocks of inputs; b 2^(M-1) divides their number"
    parameters = "n*(r - 1) + m"
    scaled = False
    rank_is_bounded = False

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise Incompatible(f"form boft: depth={self.depth}; 1 or more")
        if self.depth != 2:
            object.__setattr__(self, "parameters", f"{self.depth}*n*(r - 1)//2 + m")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"Q": (self.depth, n // r, r * (r - 1) // 2), "g": (m,)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        return {"Q": W0.new_zeros(self.shapes(m, n, r)["Q"]), "g": W0.new_ones(m)}

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        return divisor(n, r, where, 2 ** (self.depth - 1), even=self.depth > 1)

    def _orders(self, n: int, b: int, device: torch.device) -> list[Tensor]:
        if self.depth == 1:
            return [torch.arange(n, device=device)]
        return [permutation(n, b, i, device) for i in range(self.depth)]

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        n = W0.shape[1]
        b = n // p["Q"].shape[1]
        R = eye = torch.eye(n, dtype=p["Q"].dtype, device=W0.device)
        for q, order in zip(p["Q"], self._orders(n, b, W0.device), strict=True):
            P = eye[order]
            R = P @ (eye + torch.block_diag(*turned(skew(q, b)))) @ P.mT @ R
        return p["g"][:, None] * (W0.to(R.dtype) @ R.mT)

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        p, n = layer.p, layer.in_features
        k = p["Q"].shape[1]
        change = turned(skew(p["Q"], n // k))

        def rotated(x: Tensor) -> Tensor:  # R^T x, by the last factor first
            orders = self._orders(n, n // k, x.device)
            for D, order in zip(reversed(change), reversed(orders), strict=True):
                blocks = x[..., order.argsort()].unflatten(-1, (k, -1))
                moved = torch.einsum("...ki,kij->...kj", blocks, D.to(x.dtype)).flatten(-2)
                x = x + moved[..., order]
            return x

        product, g = layer.frozen.stored.product, p["g"].to(x.dtype)
        if layer.drops:
            dropped = layer.dropout(x)
            return layer.frozen(x) + g * product(rotated(dropped)) - product(dropped)
        y, bias = g * product(rotated(x)), layer.bias_like(x)
        return y if bias is None else y + bias


preset(
    "boft",
    form="boft",
    scale="none",
    rank=8,
    alpha=None,
    lr=1e-4,
    lr_origin="the paper's Appendix A.3, Llama-2-7B with M = 2, b = 8 (8e-4 for mathematics)",
)
