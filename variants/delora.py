"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation (Bini et al., ICLR 2025),
arXiv:2503.18225.

    W = W0 + (l/r) (B X A - D Y C) N,    X = diag(1 / (||b_i|| ||a_i||)),    N = diag(||W0||_column)

l is trained, one number a matrix: the boundary of the change, since each of the r directions has
norm 1. C and D are frozen copies of A and B as they start (uniform), Y their X: so it starts at the
base, where B = 0 would divide by nothing. Official code: ExplainableML/DeLoRA,
peft/src/peft/tuners/delora.py (`get_ABCD`). There l multiplies both terms, and `frozen_C.data =
delora_A.weight.data` shares its storage: where no move to another device comes between, the copy is
trained along and the change stays 0. Here it is a copy. PEFT (rule `peft`; its authors call it the
better start) has B = 0, no copy, and norms of at least 1e-4. The authors give l a learning rate of
its own, half that of A and B in the LLaMA-2 runs; here all share one.

Lengths of a_i and b_i are without effect; columns of the change follow those of W0:

>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> W0, form = torch.randn(6, 8, generator=g), DeLoRA(boundary=3.0)
>>> p = form.start(W0, 2, 1.0, g)
>>> p["A"] = torch.randn(2, 8, generator=g)
>>> W, longer = (form.weight(W0, p | {"A": scale * p["A"]}, 1.0) for scale in (1.0, 7.0))
>>> bool(torch.allclose(W, longer, atol=1e-5)), bool((W - W0).abs().max() > 0.1)
(True, True)
>>> one = DeLoRA(boundary=3.0, rule="peft")
>>> p = one.start(W0, 2, 1.0, g) | {"A": torch.ones(2, 8), "B": torch.ones(6, 2)}
>>> change = one.weight(W0, p, 1.0) - W0
>>> round((change / W0.norm(dim=0)).norm().item(), 4)  # the boundary, where directions agree
3.0
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors, kaiming
from ._registry import Incompatible, preset

SMALLEST = 1e-4  # norm in the rule of PEFT


@dataclass(frozen=True)
class DeLoRA(Form, name="delora"):
    """W0 plus r directions of norm 1, times a trained boundary."""

    boundary: float = 8.0
    """l at the start"""
    rule: str = "authors"
    """`authors`: minus a frozen copy; `peft`: B = 0"""

    parameters = "r*(m + n) + 1"
    constants = ("norms", "C", "D")
    scaled = False

    def __post_init__(self) -> None:
        if self.rule not in ("authors", "peft"):
            raise Incompatible(f"form delora: rule={self.rule}; choices: authors, peft")
        if not self.boundary > 0:
            raise Incompatible(f"form delora: boundary={self.boundary}; a positive number")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"A": (r, n), "B": (m, r), "boundary": (1,)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        p = {
            "A": kaiming(r, n, W0, generator),
            "B": W0.new_zeros(m, r) if self.rule == "peft" else kaiming(m, r, W0, generator),
            "boundary": W0.new_full((1,), self.boundary),
            "norms": torch.linalg.vector_norm(W0, dim=0),
        }
        return p if self.rule == "peft" else p | {"C": p["A"].clone(), "D": p["B"].clone()}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + self.change(W0, p, s)

    def change(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        directions = p["B"] * self.inverse(p["A"], p["B"]) @ p["A"]
        if self.rule == "authors":
            directions = directions - p["D"] * self.inverse(p["C"], p["D"]) @ p["C"]
        return p["boundary"] / p["A"].shape[0] * directions * p["norms"]

    def inverse(self, A: Tensor, B: Tensor) -> Tensor:
        """1 / (||b_i|| ||a_i||), of each direction [r]."""
        a, b = torch.linalg.vector_norm(A, dim=1), torch.linalg.vector_norm(B, dim=0)
        if self.rule == "peft":
            a, b = a.clamp_min(SMALLEST), b.clamp_min(SMALLEST)
        return 1 / (a * b)

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor] | None:
        if self.rule == "authors":
            return None  # a difference of products: taken before it is rounded
        scale = p["boundary"] / p["A"].shape[0] * self.inverse(p["A"], p["B"])
        return p["A"] * p["norms"], p["B"] * scale


preset(
    "delora",
    form="delora",
    scale="none",
    rank=16,
    alpha=None,
    lr=1e-2,
    lr_origin="the paper's Appendix B, LLaMA-2-7B on Alpaca (5e-3 for the boundary)",
)
