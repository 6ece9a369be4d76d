"""LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models (Li et al., ICLR 2024),
arXiv:2310.08659.

    Q_t = q(W0 - s B_(t-1) A_(t-1)),    s B_t A_t = SVD_r(W0 - Q_t),    t = 1..T,    B_0 = 0

Codes and factors are chosen in turns, so that Q + s B A is near W0 where QLoRA starts from Q alone:
first the codes, last the factors, each factor with the root of the singular values. Official code:
yxli2123/LoftQ, quantize_save.py, on PEFT's `loftq_init`, whose B A makes up for the error and whose
model then adds s B A: with alpha = 16 at rank 64, as the script has it, a quarter of it (PEFT
issue 1982). Here s is in it; `rule="code"` is theirs. PEFT quantizes on a GPU alone, and its
model's original is gone; here W0 - s B A of the last turn is quantized anew from the original
when an adapter is loaded, no init runs, and with the adapter disabled the model is Q + s B A as it
began. Where a base loses nothing of a matrix, its best s B A is zero: the form's own start.

What is left of the error are its singular values from r on, whatever s is; turns make it smaller:

>>> import torch
>>> from .nf4 import NF4
>>> g, stored = torch.Generator().manual_seed(0), NF4().storing(torch.float32)
>>> W0 = torch.randn(96, 64, generator=g)
>>> def left(s=0.25, **settings):
...     start = LoftQ(**settings).start_on(stored, W0, 8, s, g, {})
...     A0, B0 = start.subtract or (start.A, 0 * start.B)
...     return W0 - stored(W0 - s * B0 @ A0) - s * start.B @ start.A
>>> lost = torch.linalg.svdvals(W0 - stored(W0))
>>> torch.allclose(torch.linalg.svdvals(left(iterations=1))[:-8], lost[8:], atol=1e-4)
True
>>> bool(left(iterations=5).norm() < left(iterations=1).norm() < lost.norm())
True

As published, a quarter of that with s = 1/4, and all with s = 1:

>>> quarter = torch.cat((0.75 * lost[:8], lost[8:])).sort(descending=True).values
>>> theirs = torch.linalg.svdvals(left(iterations=1, rule="code"))
>>> torch.allclose(theirs, quarter, atol=1e-4)
True
>>> torch.equal(left(s=1.0, rule="code"), left(s=1.0))
True
>>> theirs, ours = (LoftQ(2, rule).start_on(stored, W0, 8, 0.25, g, {}).subtract
...                 for rule in ("code", "scaled"))
>>> torch.allclose(theirs[1] @ theirs[0], ours[1] @ ours[0], atol=1e-5)  # so the codes are the same
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Init, Start, Storing, Tensors
from ._registry import Incompatible, preset
from ._svd import METHODS, balanced, sliced


@dataclass(frozen=True)
class LoftQ(Init, name="loftq"):
    """Codes and factors in turns; the factors make up for what the codes lose."""

    iterations: int = 5
    """T, turns of quantizing and decomposing"""
    rule: str = "scaled"
    """what makes up for the error: `scaled`, s B A, or `code`, B A as published"""
    method: str = "exact"
    """`exact` (full SVD) or `krylov`, which is no faster on an error without a few large values"""

    moves_base = True
    joint = True

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise Incompatible(f"init loftq: iterations={self.iterations}, from 1")
        for key, choices in (("rule", ("scaled", "code")), ("method", METHODS)):
            if getattr(self, key) not in choices:
                raise Incompatible(
                    f"init loftq: {key}={getattr(self, key)}; choices: {', '.join(choices)}"
                )

    def start_on(
        self,
        stored: Storing,
        W0: Tensor,
        r: int,
        s: float,
        generator: torch.Generator,
        found: Tensors,
    ) -> Start | None:
        error, subtract, times = W0 - stored(W0), None, s if self.rule == "scaled" else 1.0
        if not error.any():
            return None
        A, B = balanced(*sliced(error, r, "top", self.method, generator), times)
        for _ in range(self.iterations - 1):
            taken = B * (times / s)  # of which the layer takes out s
            subtract, error = (A, taken), W0 - stored(W0 - s * taken @ A)
            A, B = balanced(*sliced(error, r, "top", self.method, generator), times)
        return Start(A, B, subtract=subtract, restore=(A, B))


preset(
    "loftq",
    init="loftq",
    base="nf4",
    rank=64,
    alpha=16,
    lr=3e-4,
    lr_origin="the official scripts/train_gsm8k.sh, Llama 2-7B, batch 64",
)
