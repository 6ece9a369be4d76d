"""CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware
Parameter-Efficient Fine-tuning (Yang et al., NeurIPS 2024), arXiv:2406.05223.

    W0 C = U S V^T,    A = sqrt(S_r / s) V_r^T C^-1,    B = U_r sqrt(S_r / s),    base = W0 - s B A

C is the covariance of the layer's inputs in a context. `instruction` (instruction-previewed mode)
takes the r largest triplets, of the context to be learned; `knowledge` (knowledge-preserved mode)
the r smallest, where the batches are of the context to keep, such as questions of general
knowledge. Official code: iboing/CorDA, cordalib/decomposition.py (`decompose_to_adapter`) and
act_aware_utils.py: each sample is divided by its largest entry, so that loud samples count like
quiet ones, and C is the mean over samples of the sum over tokens: a sum for a mean leaves B A alone
and sets the balance of A and B; C is damped by 0.01 of its mean diagonal, doubled until ||C C^-1 -
I|| < 0.05. There s = 1; PEFT's CorDA is the same with s, and takes a batch for a sample. Padding is
left out here.

What the inputs make much of counts, not what W0 does: the direction taken is the second here.

>>> import torch
>>> C = torch.diag(torch.tensor([1.0, 100.0, 1.0]))
>>> W0 = torch.diag(torch.tensor([3.0, 1.0, 2.0]))
>>> for mode in ("instruction", "knowledge"):
...     init = CorDA(mode=mode)
...     found = init.reduce(W0, {"scaled_covariance": C}, 1)
...     start = init.start(W0, 1, 2.0, torch.Generator(), found)
...     print([round(v, 4) for v in (2.0 * start.B @ start.A).diag().tolist()])
[0.0, 1.0, 0.0]
[0.0, 0.0, 2.0]

Fewer than were measured are the smallest of them; the damping knows no unit:

>>> W0 = torch.diag(torch.tensor([3.0, 1.0, 2.0]))
>>> found = CorDA(mode="knowledge").reduce(W0, {"scaled_covariance": torch.eye(3)}, 2)
>>> start = CorDA(mode="knowledge").start(W0, 1, 2.0, torch.Generator(), found)
>>> [round(v, 4) for v in (2.0 * start.B @ start.A).diag().tolist()]
[0.0, 1.0, 0.0]
>>> bool(torch.allclose(CorDA().damped(C)[0], CorDA().damped(1000 * C)[0] / 1000))
True
>>> CorDA().damped(C)[0][0, 0].item()  # 1 + 0.01 of (1 + 100 + 1) / 3
1.340000033378601
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Init, Start, Tensors
from ._registry import Incompatible, preset
from ._svd import balanced, sliced

SLICE = {"instruction": "top", "knowledge": "last"}


@dataclass(frozen=True)
class CorDA(Init, name="corda"):
    """Triplets of weight times input covariance; the base gives up their product."""

    mode: str = "instruction"
    """`instruction`: the largest, of the context to learn; `knowledge`: the smallest, to keep it"""
    batches: int = 8
    """of the covariance; the authors take 256 samples"""
    damping: float = 0.01
    """of C, in units of its mean diagonal; doubled until C can be inverted"""
    inverted: float = 0.05
    """||C C^-1 - I||_F below which C counts as inverted"""

    needs = ("scaled_covariance",)
    moves_base = True

    def __post_init__(self) -> None:
        if self.mode not in SLICE:
            raise Incompatible(f"init corda: mode={self.mode}; choices: {', '.join(SLICE)}")
        for key in ("batches", "damping", "inverted"):
            if getattr(self, key) <= 0:
                raise Incompatible(f"init corda: {key}={getattr(self, key)} must be positive")

    def reduce(self, W0: Tensor, found: Tensors, r: int) -> Tensors:
        C, inverse = self.damped(found["scaled_covariance"].to(W0))
        fixed = torch.Generator().manual_seed(0)
        U, S, Vh = sliced(W0 @ C, r, SLICE[self.mode], "exact", fixed, cached=False)
        return {"U": U, "S": S, "VhC": Vh @ inverse}

    def damped(self, C: Tensor) -> tuple[Tensor, Tensor]:
        """C with as much of the identity as its inversion takes, and the inverse."""
        one, mean = torch.eye(len(C), dtype=C.dtype, device=C.device), C.diag().mean()
        if mean <= 0:
            raise Incompatible("init corda: the inputs of a layer are zero in every batch")
        damping = self.damping
        while True:
            fixed = C + damping * mean * one
            inverse, info = torch.linalg.inv_ex(fixed)
            if info == 0 and torch.dist(fixed @ inverse, one) < self.inverted:
                return fixed, inverse
            damping *= 2

    def start(
        self, W0: Tensor, r: int, s: float, generator: torch.Generator, found: Tensors
    ) -> Start:
        U, S, VhC = (found[k].to(W0) for k in ("U", "S", "VhC"))
        cut = slice(None, r) if self.mode == "instruction" else slice(len(S) - r, None)
        A, B = balanced(U[:, cut], S[cut], VhC[cut], s)
        return Start(A, B, subtract=(A, B))


preset(
    "corda",
    init="corda",
    rank=16,
    alpha="r",
    lr=2e-5,
    lr_origin="the official tools/train_CorDA.sh, Llama 2-7B, batch 128, rank 128",
)
