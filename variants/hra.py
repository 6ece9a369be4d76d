"""HRA: Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
Adaptation (Yuan et al., NeurIPS 2024), arXiv:2405.17484.

    W = W0 H_1 H_2 ... H_r,    H_i = I - 2 u_i u_i^T / ||u_i||^2

A product of reflections of the inputs is orthogonal, and differs from I by rank r. Neighbours start
equal, u_1 = u_2, u_3 = u_4, ..., so that they cancel; hence an even r (PEFT warns of an odd one and
starts elsewhere). Official code: DaShenZi721/HRA, llama/peft/oft/layer.py, which reflects a layer's
outputs (r m numbers), by vectors near zero, divided by sqrt(||u||^2 + eps): no quite reflections,
and a start slightly off the base. PEFT's, by the same authors, has the paper's unit vectors of the
inputs and the equal pairs, and is followed. W does not see ||u||, but a step of Adam turns u by
about lr sqrt(n) / ||u||: there ||u|| starts at sqrt(2 n / r) / sqrt(3), in the official code near
0.006 at width 4096, and here at 1 / sqrt(3) whatever n and r. The penalty on U^T U - I (lambda in
the paper) is no part of a form and not here; nor is its limit, PEFT's `apply_GS`, whose
Gram-Schmidt vectors of equal neighbours are 0 / 0.

The product is I - U T U^T with a small triangular T (its short path); one reflection turns u:

>>> import torch
>>> W0 = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
>>> HRA().weight(W0, {"u": torch.tensor([[5.0], [0.0]])}, 1.0).tolist()
[[-3.0, 4.0], [-1.0, 0.0]]
>>> u = torch.tensor([[1.0, 1.0], [0.0, 1.0]])  # mirrors 45 degrees apart: a quarter turn
>>> [[round(v, 4) for v in row] for row in HRA().weight(W0, {"u": u}, 1.0).tolist()]
[[-4.0, 3.0], [-0.0, 1.0]]
>>> for n, r in ((4096, 8), (400, 32)):
...     u = HRA().start(torch.zeros(1, n), r, 1.0, torch.Generator().manual_seed(0))["u"]
...     print([round(v, 1) for v in u[:, :2].norm(dim=0).tolist()], torch.equal(u[:, 0], u[:, 1]))
[0.6, 0.6] True
[0.6, 0.6] True
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors, kaiming
from ._layer import Adapted
from ._registry import Incompatible, preset


@dataclass(frozen=True)
class HRA(Form, name="hra"):
    """Reflects the inputs r times."""

    rank_means = "r, the number of reflections of every adapted matrix, an even one"
    parameters = "r*n"
    scaled = False

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"u": (n, r)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        half = kaiming(r // 2, W0.shape[1], W0, generator)
        return {"u": half.repeat_interleave(2, dim=0).mT.contiguous()}

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        if r % 2:
            raise Incompatible(
                f"rank={r}: form hra starts from pairs of reflections that cancel; an even rank"
            )
        return super().rank_of(m, n, r, where)

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        W = W0
        for u in (p["u"] / torch.linalg.vector_norm(p["u"], dim=0)).mT:
            W = W - 2 * torch.outer(W.to(u.dtype) @ u, u)
        return W

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        U = layer.p["u"] / torch.linalg.vector_norm(layer.p["u"], dim=0)
        inverse = (U.mT @ U).triu(1) + 0.5 * torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        UT = torch.linalg.solve_triangular(inverse, U, upper=True, left=False)  # U T

        def moved(x: Tensor) -> Tensor:  # H_1 ... H_r x - x
            return -(x @ U.to(x.dtype)) @ UT.mT.to(x.dtype)

        if not layer.drops:
            return layer.frozen(x + moved(x))
        return layer.frozen(x) + layer.frozen.stored.product(moved(layer.dropout(x)))


preset(
    "hra",
    form="hra",
    scale="none",
    rank=8,
    alpha=None,
    lr=1e-5,
    lr_origin="the paper's Appendix, Llama-2-7B with lambda = 0, and llama/tune.sh, whose vectors "
    "start near zero",
)
