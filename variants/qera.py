"""QERA: an Analytical Framework for Quantization Error Reconstruction (Zhang et al., ICLR 2025),
arXiv:2410.06040.

    s B A = SVD_r((W0 - Q) C^(1/2)) C^(-1/2),    Q = q(W0),    C = E[x x^T]

Of all s B A of rank r the one whose layer has outputs nearest those of W0, in the mean of squares
over calibration inputs (Theorem 1); LoftQ's is nearest in the weight. `approx` takes C for diagonal
(Theorem 2), as if input features were uncorrelated. Official code: ChengZhang-98/QERA,
fine_tuning/initialization.py: B = U_r S_r / s and A = V_r^T C^(-1/2), solved with scipy's root of
C; as V_r^T C^(-1/2) = S_r^-1 U_r^T (W0 - Q), no root is inverted here, and any R with R R^T = C
will do. The scripts take `approx` at 4 bits and `exact` at 2, 256 or 512 samples, and bitsandbytes'
FP4, double quantized.

What is left of the outputs is what the singular values from r on make of them, and no other part of
that rank leaves so little; where features are uncorrelated, `approx` is no less:

>>> import torch
>>> from .loftq import LoftQ
>>> from .nf4 import NF4
>>> g, stored = torch.Generator().manual_seed(0), NF4().storing(torch.float64)
>>> W0, X = (torch.randn(n, 24, generator=g).double() for n in (64, 200))
>>> X = X * torch.arange(1, 25) ** -1.0 @ torch.randn(24, 24, generator=g).double()
>>> C, error = X.T @ X / 200, W0 - stored(W0)
>>> def outputs(init, C=C):
...     found = init.reduce_on(stored, W0, {"covariance": C}, 4)
...     start = init.start_on(stored, W0, 4, 0.25, g, found)
...     left = error - 0.25 * start.B @ start.A
...     return (left @ C @ left.T).trace()
>>> lost = torch.linalg.eigvalsh(error @ C @ error.T)  # the squares of the singular values
>>> torch.allclose(outputs(QERA()), lost[:-4].sum())
True
>>> inits = QERA(), QERA(mode="approx"), LoftQ(iterations=1)
>>> exact, approx, unweighted = (outputs(init).item() for init in inits)
>>> exact < approx < unweighted
True
>>> torch.allclose(*(outputs(init, C.diag().diag()) for init in inits[:2]))
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Init, Start, Storing, Tensors
from ._registry import Incompatible, preset
from ._svd import sliced

SMALLEST = 1e-6  # of the largest singular value: below, fp32 has no digit of one
NOISE = 10  # units in the last place of the largest variance: below, a sum's rounding


@dataclass(frozen=True)
class QERA(Init, name="qera"):
    """The factors that make up for the error of a layer's outputs."""

    mode: str = "exact"
    """`exact`: by the covariance of the inputs; `approx`: by its diagonal alone"""
    batches: int = 32
    """of the covariance; the authors take 256 or 512 samples"""

    needs = ("covariance",)
    moves_base = True
    joint = True

    def __post_init__(self) -> None:
        if self.mode not in ("exact", "approx"):
            raise Incompatible(f"init qera: mode={self.mode}; choices: exact, approx")
        if self.batches < 1:
            raise Incompatible(f"init qera: batches={self.batches}, from 1")

    def reduce_on(self, stored: Storing, W0: Tensor, found: Tensors, r: int) -> Tensors:
        error = W0 - stored(W0)
        fixed = torch.Generator().manual_seed(0)
        weighted = self.weighted(error, found["covariance"].to(W0))
        U, S, _ = sliced(weighted, r, "top", "exact", fixed, cached=False)
        if not S.any():
            return {}
        return {"A": (U.mT @ error) / S.clamp_min(SMALLEST * S[0])[:, None], "B": U * S}

    def weighted(self, error: Tensor, C: Tensor) -> Tensor:
        """error R, with R R^T = C."""
        if self.mode == "approx":
            return error * C.diag().sqrt()
        values, vectors = torch.linalg.eigh(C)
        values[values < NOISE * torch.finfo(C.dtype).eps * values[-1]] = 0
        return error @ vectors * values.sqrt()

    def start(
        self, W0: Tensor, r: int, s: float, generator: torch.Generator, found: Tensors
    ) -> Start | None:
        if not found:  # the base loses nothing of this matrix
            return None
        A, B = found["A"][:r].to(W0), found["B"][:, :r].to(W0)
        S = torch.linalg.vector_norm(B, dim=0)
        if S[-1] <= SMALLEST * S[0]:
            raise Incompatible(
                f"init qera: the inputs of a layer have fewer than rank={r} directions in the "
                f"calibration batches: give more of them, or a smaller rank"
            )
        return Start(A, B / s, restore=(A, B / s))


preset(
    "qera",
    init={"name": "qera", "mode": "approx"},
    base={"name": "fp4", "double": True},
    rank=128,
    alpha="2r",
    lr=3e-5,
    lr_origin="the official scripts for GSM8K, Llama 2-7B, batch 16",
)
