"""LoHa: Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation
(Yeh et al., ICLR 2024), arXiv:2309.14859; FedPara (Hyeon-Woo et al., ICLR 2022), arXiv:2108.06098.

    W = W0 + s (B1 A1) * (B2 A2),    s = alpha / r,    A1, A2 ~ N(0, 1),  B1 ~ N(0, 0.1^2),  B2 = 0

The product * of two matrices of rank r, element by element, has a rank of up to r^2. Official code:
KohakuBlueleaf/LyCORIS, lycoris/modules/loha.py (w1_a = B1, w1_b = A1, w2_a = B2, w2_b = A2). Its
forward applies s once, its `get_diff_weight`, which merges, twice; here it is once. PEFT starts
elsewhere (rule `peft`): B1, A1, B2 uniform with bounds 1/sqrt of their columns, and A2 = 0.

Rank 2 gives a change of rank 4, with s in it once; the authors' start has B2 = 0 and A2 of unit
variance, whatever n:

>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> p = LoHa().start(torch.zeros(60, 80), 2, 1.0, g)
>>> [round(p[k].std().item(), 1) for k in ("A1", "A2", "B1", "B2")]
[1.0, 1.0, 0.1, 0.0]
>>> p["B2"] = torch.ones(60, 2).cumsum(0) ** torch.arange(2)
>>> change = LoHa().weight(torch.zeros(60, 80), p, 3.0)
>>> int(torch.linalg.matrix_rank(change))
4
>>> one = 3 * (p["B1"][7] @ p["A1"][:, 9]) * (p["B2"][7] @ p["A2"][:, 9])
>>> bool(torch.isclose(change[7, 9], one, rtol=1e-4))
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors, kaiming
from ._registry import Incompatible, preset


@dataclass(frozen=True)
class LoHa(Form, name="loha"):
    """W0 + s (B1 A1) * (B2 A2), element by element."""

    rule: str = "authors"
    """where the factors start: `authors` (LyCORIS), or `peft`"""

    rank_means = "r of each of the two products; their Hadamard product has up to r^2"
    parameters = "2*r*(m + n)"

    def __post_init__(self) -> None:
        if self.rule not in ("authors", "peft"):
            raise Incompatible(f"form loha: rule={self.rule}; choices: authors, peft")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"A1": (r, n), "B1": (m, r), "A2": (r, n), "B2": (m, r)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        if self.rule == "peft":
            A1, B1, B2 = (kaiming(*shape, W0, generator) for shape in ((r, n), (m, r), (m, r)))
            return {"A1": A1, "B1": B1, "A2": W0.new_zeros(r, n), "B2": B2}
        A1, B1, A2 = (
            torch.randn(*shape, generator=generator) for shape in ((r, n), (m, r), (r, n))
        )
        return {"A1": A1.to(W0), "B1": 0.1 * B1.to(W0), "A2": A2.to(W0), "B2": W0.new_zeros(m, r)}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + self.change(W0, p, s)

    def change(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return s * (p["B1"] @ p["A1"]) * (p["B2"] @ p["A2"])


preset(
    "loha",
    form="loha",
    rank=4,
    alpha=2,
    lr=5e-4,
    lr_origin="the LyCORIS paper's default of three (1e-4, 5e-4, 1e-3), on Stable Diffusion",
    width=768,
)
