"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (Meng et al., NeurIPS 2024),
arXiv:2404.02948.

    W0 = U S V^T,    A = sqrt(S_r / s) V_r^T,    B = U_r sqrt(S_r / s),    base = W0 - s B A

The adapter holds the r largest singular triplets and trains them; the residual is frozen. Official
code: GraphPKU/PiSSA, utils/init_pissa.py, which calls PEFT; alpha = r, so s = 1. Where PEFT's fast
start (`pissa_niter_k`) is `svd_lowrank` with no oversampling and torch's global generator, wrong in
the first digit and different at each load, the fast one here is a seeded block Krylov method, exact
to fp32; and A0, B0 are kept, so that the original weight stays at hand.

The model starts where it was, the base does not; and s B A is the best rank-r part of W0:

>>> import torch
>>> W0 = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
>>> start = PiSSA().start(W0, 2, 4.0, torch.Generator(), {})
>>> part = 4.0 * start.B @ start.A
>>> [round(v, 4) for v in part.diag().tolist()], round((W0 - part).norm().item(), 4)
([3.0, 2.0, 0.0], 1.0)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Init, Start, Tensors
from ._registry import Incompatible, preset
from ._svd import METHODS, balanced, sliced


@dataclass(frozen=True)
class PiSSA(Init, name="pissa"):
    """The r principal triplets into the adapter, the residual into the base."""

    method: str = "krylov"
    """`exact` (full SVD) or `krylov` (the same to fp32, faster)"""

    moves_base = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise Incompatible(f"init pissa: method={self.method}; choices: {', '.join(METHODS)}")

    def start(
        self, W0: Tensor, r: int, s: float, generator: torch.Generator, found: Tensors
    ) -> Start:
        A, B = balanced(*sliced(W0, r, "top", self.method, generator), s)
        return Start(A, B, subtract=(A, B))


preset(
    "pissa",
    init="pissa",
    rank=16,
    alpha="r",
    lr=2e-5,
    lr_origin="the paper's Section 5.1 and the official scripts, batch 128",
)
