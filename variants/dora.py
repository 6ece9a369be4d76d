"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., ICML 2024), arXiv:2402.09353.

    W = c (W0 + s B A),    c = m / ||W0 + s B A||_row,    m starts at ||W0||_row

Eq. 5, with the norm taken as a constant in backward (Section 4.3). Official code: NVlabs/DoRA,
commonsense_reasoning/peft/src/peft/tuners/dora.py: the norm runs over the input features of each
output feature, so m has one number a row. Dropout hits all but the plain base product:
y = W0 x + (W - W0) dropout(x), as there. That takes a second base product; `dropout_on=low_rank`
has one, y = c (W0 x + s B A dropout(x)). PEFT agrees with the official code, but forms B A densely,
in fp32, at each step, and gives NaN on a zero row; here the norm is factored, and a zero row stays
zero.

QDoRA is DoRA on a quantized base Q. Official code: AnswerDotAI/fsdp_qlora, scripts/dora.py: NF4,
double quantized; s = 1 whatever alpha is, A ~ N(0, 1/r), no dropout; and m starts at the row norms
of the weight before it was quantized, so not quite at Q. Here it starts at Q, with m = ||Q||_row.

Row norms are m and nothing else, wherever A and B go:

>>> import torch
>>> p = {"A": torch.randn(2, 8), "B": torch.randn(6, 2), "m": torch.arange(1.0, 7.0)}
>>> W = DoRA().weight(torch.randn(6, 8), p, s=2.0)
>>> torch.allclose(W.norm(dim=1), p["m"])
True

The norm is a constant in backward, else no change of A or B could move ||W||; a row of zeros stays
one; and a row that B A all but cancels keeps its digits:

>>> _ = p["B"].requires_grad_()
>>> DoRA().weight(torch.randn(6, 8), p, s=2.0).square().sum().backward()
>>> bool(p["B"].grad.norm() > 1)
True
>>> nothing = {"A": torch.ones(1, 3), "B": torch.zeros(2, 1), "m": torch.zeros(2)}
>>> DoRA().weight(torch.zeros(2, 3), nothing, 1.0).tolist()
[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
>>> import variants
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
>>> layer = variants.attach(model, "dora", rank=1, alpha=1, targets=["0"]).layers["0"]
>>> A, B = torch.ones(1, 8), torch.ones(6, 1)
>>> layer.move_to(-2 * B @ A + 1e-4)
>>> bool(torch.allclose(row_norms(layer, A, B, 2.0), (layer.W0 + 2 * B @ A).norm(dim=1)))
True

QDoRA starts at the stored base, at its own row norms:

>>> model = torch.nn.Sequential(torch.nn.Linear(64, 6))
>>> layer = variants.attach(model, "qdora", rank=2, targets=["0"]).layers["0"]
>>> torch.allclose(layer.weight, layer.W0), torch.equal(layer.params["m"], layer.W0.norm(dim=1))
(True, True)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import LowRank, Tensors, wide
from ._layer import Adapted
from ._magnitude import corrected, rescaled
from ._product import adapted
from ._registry import Incompatible, preset

CANCELLED = 1e-3  # of ||W0||^2: below, the factored norm has lost too many digits


@dataclass(frozen=True)
class DoRA(LowRank, name="dora"):
    """Magnitude and direction: a learned norm for each output feature."""

    detach_norm: bool = True
    """take ||V|| as a constant in backward (`dora_simple` in the official code)"""
    dropout_on: str = "change"
    """what sees dropped inputs: `change`, all of W - W0, as the authors; `low_rank`, B A alone"""

    parameters = "r*(m + n) + m"

    def __post_init__(self) -> None:
        if self.dropout_on not in ("change", "low_rank"):
            raise Incompatible(f"{self}: dropout_on={self.dropout_on}; choices: change, low_rank")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"A": (r, n), "B": (m, r), "m": (m,)}

    def embed(self, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensors:
        return {"A": A, "B": B, "m": torch.linalg.vector_norm(W + s * B @ A, dim=1)}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        V = W0 + s * p["B"] @ p["A"]
        norm = torch.linalg.vector_norm(V, dim=1)
        return self._ratio(p["m"], norm)[:, None] * V

    def _ratio(self, m: Tensor, norm: Tensor) -> Tensor:
        norm = norm.detach() if self.detach_norm else norm
        return m / norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        return self.product(x, layer, layer.p["A"], layer.p["B"], layer.s)

    def product(self, x: Tensor, layer: Adapted, A: Tensor, B: Tensor, s: float) -> Tensor:
        """c (W0 + s B A) x of any direction B A, such as VeRA's, under the layer's magnitude m."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            norm = row_norms(layer, A, B, s)
        c = self._ratio(layer.p["m"], norm)
        base, drawn = layer.frozen.stored, layer.draw_dropout()
        if layer.drops and self.dropout_on == "change":
            return corrected(x, base, layer.bias, A, B, c, s, *drawn)
        moved = rescaled(adapted(x, base, None, A, B, s, *drawn), c)
        bias = layer.bias_like(x)
        return moved if bias is None else moved + bias


def row_norms(layer: Adapted, A: Tensor, B: Tensor, s: float) -> Tensor:
    """||W0 + s B A|| of each row [m], in fp32 or wider, without forming B A.

    ||W0||^2 + 2 s rowsum((W0 A^T) * B) + s^2 rowsum((B (A A^T)) * B), the first term kept.
    """
    W0 = layer.W0.to(wide(layer.W0.dtype))
    cross = ((W0 @ A.mT) * B).sum(1)
    square = ((B @ (A @ A.mT)) * B).sum(1)
    squared = layer.row_squares + 2 * s * cross + s**2 * square
    cancelled = squared < CANCELLED * layer.row_squares
    if torch.compiler.is_compiling():
        from ._compiled import directly

        squared = directly(squared, cancelled, W0, A, s * B)
    elif cancelled.any():
        rows = W0[cancelled] + s * B[cancelled] @ A
        squared = squared.masked_scatter(cancelled, rows.square().sum(1))
    return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()


preset(
    "dora",
    form="dora",
    rank=16,
    alpha="2r",
    lr=2e-4,
    lr_origin="the paper's Table 8, LLaMA-7B and LLaMA2-7B at rank 16",
)
preset(
    "qdora",
    form="dora",
    base="nf4_dq",
    rank=64,
    alpha="r",
    lr=1e-5,
    lr_origin="the official train.py's default, which its scripts keep",
)
