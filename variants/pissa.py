"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (Meng et al., NeurIPS 2024),
arXiv:2404.02948.

    W0 = U S V^T,    A = sqrt(S_r / s) V_r^T,    B = U_r sqrt(S_r / s),    base = W0 - s B A

The adapter holds the r largest singular triplets and trains them; the residual is frozen. Official
code: GraphPKU/PiSSA, utils/init_pissa.py, which calls PEFT; alpha = r, so s = 1. Where PEFT's fast
start (`pissa_niter_k`) is `svd_lowrank` with no oversampling and torch's global generator, wrong in
the first digit and different at each load, the fast one here is a seeded block Krylov method, exact
to fp32; and A0, B0 are kept, so that the original weight stays at hand.

QPiSSA (utils/init_qpissa.py) is the same on a quantized base, T times:

    s B_t A_t = SVD_r(W0 - Q_(t-1)),    Q_t = q(W0 - s B_t A_t),    Q_0 = 0

It begins with factors and ends with codes, LoftQ the other way round; Algorithm 1 of the paper
prints another residual. The scripts have r = 128, T = 5 and NF4 without double quantization.

The model starts where it was, the base does not; and s B A is the best rank-r part of W0:

>>> import torch
>>> W0 = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
>>> start = PiSSA().start(W0, 2, 4.0, torch.Generator(), {})
>>> part = 4.0 * start.B @ start.A
>>> [round(v, 4) for v in part.diag().tolist()], round((W0 - part).norm().item(), 4)
([3.0, 2.0, 0.0], 1.0)

With principal values out of the way, codes lose less; turns make it less still (nuclear norms):

>>> from .nf4 import NF4
>>> g, stored = torch.Generator().manual_seed(0), NF4().storing(torch.float32)
>>> U, V = (torch.linalg.qr(torch.randn(96, 96, generator=g)).Q for _ in range(2))
>>> W0 = U * torch.arange(1, 97) ** -0.5 @ V
>>> lost = [torch.linalg.matrix_norm(W0 - stored(W0), "nuc")]
>>> for T in (1, 5):
...     start = PiSSA(iterations=T).start_on(stored, W0, 8, 2.0, g, {})
...     part = 2.0 * start.B @ start.A
...     lost.append(torch.linalg.matrix_norm(W0 - stored(W0 - part) - part, "nuc"))
>>> bool(lost[2] < lost[1] < lost[0]), start.subtract == (start.A, start.B)
(True, True)
>>> one = PiSSA(iterations=1)
>>> torch.equal(one.start_on(stored, W0, 8, 2.0, g, {}).A, one.start(W0, 8, 2.0, g, {}).A)
True
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._api import Init, Start, Storing, Tensors
from ._registry import Incompatible, preset
from ._svd import METHODS, balanced, sliced

if TYPE_CHECKING:
    from ._adapter import Choice


@dataclass(frozen=True)
class PiSSA(Init, name="pissa"):
    """The r principal triplets into the adapter, the residual into the base."""

    method: str = "krylov"
    """`exact` (full SVD) or `krylov` (the same to fp32, faster)"""
    iterations: int = 1
    """T, turns of decomposing and quantizing; more than one on a lossy base alone"""

    moves_base = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise Incompatible(f"init pissa: method={self.method}; choices: {', '.join(METHODS)}")
        if self.iterations < 1:
            raise Incompatible(f"init pissa: iterations={self.iterations}, from 1")

    def fits(self, choice: "Choice") -> None:
        super().fits(choice)
        if self.iterations > 1 and not choice.base.lossy:
            raise self.refuse(choice.base, f"a lossy base for iterations={self.iterations}")

    def start(
        self, W0: Tensor, r: int, s: float, generator: torch.Generator, found: Tensors
    ) -> Start:
        A, B = balanced(*sliced(W0, r, "top", self.method, generator), s)
        return Start(A, B, subtract=(A, B))

    def start_on(
        self,
        stored: Storing,
        W0: Tensor,
        r: int,
        s: float,
        generator: torch.Generator,
        found: Tensors,
    ) -> Start:
        start = self.start(W0, r, s, generator, found)
        for _ in range(self.iterations - 1):
            residual = W0 - stored(W0 - s * start.B @ start.A)  # type: ignore[operator]
            start = self.start(residual, r, s, generator, found)
        return start


preset(
    "pissa",
    init="pissa",
    rank=16,
    alpha="r",
    lr=2e-5,
    lr_origin="the paper's Section 5.1 and the official scripts, batch 128",
)
preset(
    "qpissa",
    init={"name": "pissa", "iterations": 5},
    base="nf4",
    rank=128,
    alpha="r",
    lr=2e-5,
    lr_origin="the official run_qpissa.sh, Llama 2-7B, batch 128",
)
