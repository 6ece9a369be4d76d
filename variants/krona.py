"""KronA: Parameter Efficient Tuning with Kronecker Adapter (Edalati et al., 2022),
arXiv:2212.10650.

    W = W0 + s A_k (x) B_k,    A_k uniform,    B_k = 0,    s a constant

(x) is the Kronecker product: block (i, j) of the change is A_k[i, j] B_k. It is LoKr with both
factors full. The paper leaves the split of each side to the user; here it is LoKr's, the nearest to
square. No official code was found, and PEFT has no such form.

>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> form, W0 = KronA(strength=3.0), torch.zeros(128, 96)
>>> {k: bool(v.any()) for k, v in form.start(W0, 0, 1.0, g).items()}
{'A_k': True, 'B_k': False}
>>> full = {"A_k": torch.arange(64.0).view(8, 8), "B_k": torch.arange(192.0).view(16, 12)}
>>> form.weight(W0, full, 1.0)[17, 13].item()  # of A_k[1, 1] and B_k[1, 1]
351.0
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors, kaiming
from ._layer import Adapted
from ._registry import preset
from .lokr import check_factor, count, product, split


@dataclass(frozen=True)
class KronA(Form, name="krona"):
    """W0 + s A_k (x) B_k, both full."""

    factor: int = -1
    """the part of each side that goes to A_k, or the divisor next below; -1: nearest to square"""
    strength: float = 1.0
    """s, a constant that the paper tunes to each task"""

    rank_means = None
    parameters = (
        "(lambda a, b: a*b + m*n//(a*b))"
        "(*(lambda d: (d(d, m, math.isqrt(m)), d(d, n, math.isqrt(n))))"
        "(lambda d, x, k: k if x % k == 0 else d(d, x, k - 1)))"
    )
    parameters_in_words = "a*b + m*n/(a*b); a, b: the smaller parts of m and n"
    scaled = False

    def __post_init__(self) -> None:
        check_factor(self, self.factor)
        object.__setattr__(self, "parameters", count("a*b + m*n//(a*b)", self.factor))

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        (m1, m2), (n1, n2) = split(m, self.factor), split(n, self.factor)
        return {"A_k": (m1, n1), "B_k": (m2, n2)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        A, B = self.shapes(W0.shape[0], W0.shape[1], r).values()
        return {"A_k": kaiming(A[0], A[1], W0, generator), "B_k": W0.new_zeros(B)}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + self.change(W0, p, s)

    def change(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return self.strength * torch.kron(p["A_k"], p["B_k"])

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        A, B = (layer.p[k].to(x.dtype) for k in ("A_k", "B_k"))
        return layer.frozen(x) + self.strength * product(layer.dropout(x), A, [B])

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        return r


preset(
    "krona",
    form="krona",
    scale="none",
    rank=None,
    alpha=None,
    lr=5e-4,
    lr_origin="LoKr's, whose factors are of that size; the paper tunes it to each task",
    width=768,
)
