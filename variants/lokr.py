"""LoKr: Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation
(Yeh et al., ICLR 2024), arXiv:2309.14859.

    W = W0 + s W1 (x) W2,    W2 = B2 A2,    s = alpha / r,    W1 uniform,  B2 uniform,  A2 = 0

(x) is the Kronecker product: block (i, j) of the change is W1[i, j] W2. Each side of W0 is split
into two factors, the smaller to W1, by `factor`. Official code: KohakuBlueleaf/LyCORIS,
lycoris/modules/lokr.py and functional/general.py (`factorization`): W2 is full, and starts at 0,
where r is at least half its longer side; with both full s is 1, whatever alpha. The paper's Eq. 5
bounds the smaller part by sqrt too where `factor` divides the side; the code, and this, does not.
The code's `get_diff_weight`, which merges, applies s twice. PEFT (rule `peft`) starts with W1 = 0
and both parts of W2 uniform, and scales full factors by alpha / r as well; a `factor` that divides
a side goes to W1 there even where it is the larger part.

Blocks of the change are multiples of one matrix, so its rank is that of W1 times that of W2:

>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> form, W0 = LoKr(), torch.zeros(128, 96)
>>> {k: tuple(v) for k, v in form.shapes(128, 96, 4).items()}
{'W1': (8, 8), 'B2': (16, 4), 'A2': (4, 12)}
>>> p = form.start(W0, 4, 1.0, g) | {"A2": torch.randn(4, 12, generator=g)}
>>> W = form.weight(W0, p, 0.5)
>>> int(torch.linalg.matrix_rank(W))
32
>>> bool(torch.allclose(W[48:64, 60:72], 0.5 * p["W1"][3, 5] * p["B2"] @ p["A2"]))
True

Both factors full: no scale. Where they start:

>>> full = {"W1": torch.ones(8, 8), "W2": torch.ones(16, 12)}
>>> [LoKr(rule=rule).weight(W0, full, 0.5)[0, 0].item() for rule in ("authors", "peft")]
[1.0, 0.5]
>>> {k: bool(v.any()) for k, v in LoKr().start(W0, 8, 1.0, g).items()}
{'W1': True, 'W2': False}
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ._api import Form, Tensors, kaiming
from ._layer import Adapted
from ._registry import Incompatible, preset


def split(side: int, factor: int) -> tuple[int, int]:
    """Two factors of `side`, the smaller first: near `factor`, or near to square (-1).

    >>> split(128, -1), split(250, 4), split(360, 16), split(127, 8), split(12, 6)
    ((8, 16), (2, 125), (15, 24), (1, 127), (2, 6))
    """
    if factor > 0 and side % factor == 0:
        small = min(factor, side // factor)
    else:
        most = math.isqrt(side)
        most = most if factor < 0 else min(most, factor)
        small = next(k for k in range(most, 0, -1) if side % k == 0)
    return small, side // small


@dataclass(frozen=True)
class LoKr(Form, name="lokr"):
    """W0 + s W1 (x) (B2 A2)."""

    factor: int = -1
    """the part of each side that goes to W1, or the divisor next below; -1: nearest to square"""
    decompose_both: bool = False
    """factors for W1 too, where r is below half its longer side"""
    rule: str = "authors"
    """where the factors start, and s of full ones: `authors` (LyCORIS), or `peft`"""

    rank_means = "r of W2 = B2 A2; W2 is full where r is at least half its longer side"
    parameters = (
        "(lambda a, b: a*b + (r*(m//a + n//b) if 2*r < max(m//a, n//b) else m*n//(a*b)))"
        "(*(lambda d: (d(d, m, math.isqrt(m)), d(d, n, math.isqrt(n))))"
        "(lambda d, x, k: k if x % k == 0 else d(d, x, k - 1)))"
    )
    parameters_in_words = "a*b + r*(m/a + n/b), W2 not full; a, b: the smaller parts of m and n"
    rank_is_bounded = False

    def __post_init__(self) -> None:
        check_factor(self, self.factor)
        small = "a*b" if not self.decompose_both else "(r*(a + b) if 2*r < max(a, b) else a*b)"
        large = "(r*(m//a + n//b) if 2*r < max(m//a, n//b) else m*n//(a*b))"
        object.__setattr__(self, "parameters", count(f"{small} + {large}", self.factor))
        if self.rule not in ("authors", "peft"):
            raise Incompatible(f"form lokr: rule={self.rule}; choices: authors, peft")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        (m1, m2), (n1, n2) = split(m, self.factor), split(n, self.factor)
        shapes: dict[str, tuple[int, ...]] = {"W1": (m1, n1)}
        if self.decompose_both and 2 * r < max(m1, n1):
            shapes = {"B1": (m1, r), "A1": (r, n1)}
        if 2 * r < max(m2, n2):
            return shapes | {"B2": (m2, r), "A2": (r, n2)}
        return shapes | {"W2": (m2, n2)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        shapes = self.shapes(m, n, r)
        ending = "A2" if "A2" in shapes else "W2"
        if self.rule == "peft":
            ending = "B1" if "B1" in shapes else "W1"
        return {
            k: W0.new_zeros(shape) if k == ending else kaiming(shape[0], shape[1], W0, generator)
            for k, shape in shapes.items()
        }

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + self.change(W0, p, s)

    def change(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        W1 = p["W1"] if "W1" in p else p["B1"] @ p["A1"]
        W2 = p["W2"] if "W2" in p else p["B2"] @ p["A2"]
        return self.acting_s(p, s) * torch.kron(W1, W2)

    def acting_s(self, p: Tensors, s: float) -> float:
        """s, or 1 where the authors have none."""
        return 1.0 if self.rule == "authors" and "W1" in p and "W2" in p else s

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        p = {k: v.to(x.dtype) for k, v in layer.p.items()}
        W1 = p["W1"] if "W1" in p else p["B1"] @ p["A1"]
        parts = [p["W2"]] if "W2" in p else [p["A2"], p["B2"]]
        return layer.frozen(x) + self.acting_s(p, layer.s) * product(layer.dropout(x), W1, parts)

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        return r


def check_factor(form: Form, factor: int) -> None:
    if factor == 0 or factor < -1:
        raise Incompatible(f"{form}: factor={factor}; a whole number from 1, or -1")


def count(total: str, factor: int) -> str:
    """`total` of a and b, the smaller parts of m and n, as a formula of m and n: `split` in it.

    >>> m, n, r, formula = 128, 96, 4, count("a*b + r*(m//a + n//b)", -1)
    >>> eval(formula) == 8 * 8 + 4 * (16 + 12)
    True
    """
    part = "d(d, {0}, math.isqrt({0}))"
    if factor > 0:
        part = f"min({factor}, {{0}}//{factor}) if {{0}} % {factor} == 0 else "
        part += f"d(d, {{0}}, min({factor}, math.isqrt({{0}})))"
    return (
        f"(lambda a, b: {total})(*(lambda d: ({part.format('m')}, {part.format('n')}))"
        "(lambda d, x, k: k if x % k == 0 else d(d, x, k - 1)))"
    )


def product(x: Tensor, W1: Tensor, parts: list[Tensor]) -> Tensor:
    """(W1 (x) W2) x without the Kronecker product: W1 X W2^T, X the rows of x; W2 in parts."""
    X = x.unflatten(-1, (W1.shape[1], -1))
    for part in parts:
        X = F.linear(X, part)
    return (W1 @ X).flatten(-2)


preset(
    "lokr",
    form="lokr",
    rank=16,
    alpha="r",
    lr=5e-4,
    lr_origin="the LyCORIS paper's default of three (1e-4, 5e-4, 1e-3), on Stable Diffusion, there "
    "with factor 8 and a full W2",
    width=768,
)
