"""Direct factorization W ~ A B: "LoRA的变体" ("Variants of LoRA") by 禅与计算机程序设计艺术, in the
series "Large language models from theory to practice": the article that it all started from.

    W = A B d + u,    A = U_r S_r and B = V_r^T of (W0 - u) / d

A [m, r] and B [r, n] are trained in place of W: nothing of W0 stays beside them, so a low rank
starts away from the base and a full one at it. By SVD, u = 0 and d = 1; by PCA, u holds the column
means; after `standardize`, the columns' means and deviations, which are kept and put back. A matrix
that is smaller than the rank is factorized at its full rank.

The article's example, the matrix 1..9 at rank 2, comes back, with singular values 16.848 and 1.068:

>>> import torch
>>> W = torch.arange(1.0, 10.0, dtype=torch.float64).view(3, 3)
>>> p = Factorized().start(W, 2, 1.0, torch.Generator())
>>> [round(v, 3) for v in p["A"].norm(dim=0).tolist()]
[16.848, 1.068]
>>> bool((Factorized().weight(W, p, 1.0) - W).abs().max() < 1e-6)
True

It prints the second row of V^T as (.776, .075, -.626) beside U's second column (.887, .249, -.387).
The two do not belong together; with the sign of that row turned, the printed product is W to .014:

>>> A = torch.tensor([[-3.609, 0.947], [-8.776, 0.266], [-13.943, -0.413]], dtype=torch.float64)
>>> B = torch.tensor([[-0.479, -0.572, -0.665], [0.776, 0.075, -0.626]], dtype=torch.float64)
>>> [round(v, 2) for v in (A @ B)[0].tolist()]
[2.46, 2.14, 1.81]
>>> B[1] *= -1
>>> round((A @ B - W).abs().max().item(), 3)
0.014

A constant column has no deviation to be divided by, and comes back:

>>> form, W[:, 1] = Factorized(standardize=True), 4.0
>>> torch.allclose(form.weight(W, form.start(W, 3, 1.0, torch.Generator()), 1.0), W)
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ._api import Form, Tensors
from ._layer import Adapted
from ._registry import Incompatible, preset
from ._svd import exact


@dataclass(frozen=True)
class Factorized(Form, name="factorized"):
    """A B in place of W."""

    method: str = "svd"
    """`svd`, or `pca`: columns centred, their means kept"""
    standardize: bool = False
    """bring the columns of W0 to mean 0 and deviation 1 first, and put both back"""

    rank_means = "r, the rank of W itself, at most min(m, n)"
    parameters = "min(r, m, n)*(m + n)"
    constants = ("mean", "deviation")
    scaled = False
    replaces = True
    starts_at_base = False

    def __post_init__(self) -> None:
        if self.method not in ("svd", "pca"):
            raise Incompatible(f"form factorized: method={self.method}; choices: svd, pca")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"A": (m, r), "B": (r, n)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        kept = {}
        if self.method == "pca" or self.standardize:
            kept["mean"] = W0.mean(0)
        if self.standardize:
            deviation = W0.std(0, correction=0)
            kept["deviation"] = torch.where(deviation > 0, deviation, 1.0)
        U, S, Vh = exact((W0 - kept.get("mean", 0.0)) / kept.get("deviation", 1.0), r)
        return {"A": U * S, "B": Vh, **kept}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        W = p["A"] @ p["B"]
        if "deviation" in p:
            W = W * p["deviation"]
        return W + p["mean"] if "mean" in p else W

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        if layer.drops:
            return super().forward(x, layer)
        p = {k: v.to(x.dtype) for k, v in layer.p.items()}
        scaled = x * p["deviation"] if "deviation" in p else x
        y = F.linear(F.linear(scaled, p["B"]), p["A"], layer.bias_like(x))
        return y + (x @ p["mean"])[..., None] if "mean" in p else y

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        return min(r, m, n)


preset(
    "factorized",
    form="factorized",
    scale="none",
    rank=16,
    alpha=None,
    lr=2e-5,
    lr_origin="full fine-tuning's, since W itself is what moves; the article names none",
)
