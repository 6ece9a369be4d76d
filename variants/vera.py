"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al., ICLR 2024), arXiv:2310.11454.

    W = W0 + diag(b) B diag(d) A,    b = 0,    d = 0.1,    A and B frozen, one pair for all layers

A and B are drawn by Kaiming's uniform rule from the seed and are not saved; each layer trains the
vectors d [r] and b [m]. No alpha. The paper does not say what layers of different shapes share:
here each shape has a pair; PEFT has one as large as the largest layer, of which each takes a corner
(`share=largest`). The bound is sqrt(6 / fan-in), torch's default and PEFT's, sqrt(6) times that of
LoRA's A. The ranks of the paper (256, 1024) may exceed a small matrix. No official repository was
found.

b scales rows and d scales what lies between; A and B have the variance 2 / fan-in:

>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> p = VeRA().start_shared(6, 8, 2, g, torch.empty(0)) | {"d": torch.tensor([1.0, 0.0])}
>>> dW = VeRA().weight(torch.zeros(6, 8), p | {"b": torch.arange(6.0)}, 1.0)
>>> torch.allclose(dW[3], 3 * p["B"][3, 0] * p["A"][0]), dW[0].norm().item()
(True, 0.0)
>>> pair = VeRA().start_shared(64, 96, 1024, g, torch.empty(0))
>>> for k, fan_in in (("A", 96), ("B", 1024)):  # 2 and sqrt(6)
...     print(round(pair[k].var().item() * fan_in, 1), round(pair[k].max().item() * fan_in**0.5, 2))
2.0 2.45
2.0 2.45
>>> VeRA().start(torch.eye(2), 1, 1.0, g)["d"].tolist()
[0.10000000149011612]
>>> [VeRA(share=rule).key(6, 8, 2) for rule in ("largest", "shape")]
['r2', '6x8-r2']
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors, kaiming
from ._layer import Adapted
from ._registry import Incompatible, preset


def factors(p: Tensors, m: int, n: int) -> tuple[Tensor, Tensor]:
    """diag(d) A and diag(b) B, of a pair that may be larger than the layer."""
    return p["d"][:, None] * p["A"][:, :n], p["b"][:, None] * p["B"][:m]


@dataclass(frozen=True)
class VeRA(Form, name="vera"):
    """A frozen random pair for all layers, two trained vectors for each."""

    d_init: float = 0.1
    """where d begins"""
    share: str = "shape"
    """`shape`: a pair for each shape; `largest`: one pair, cut to size (PEFT)"""

    rank_means = "r, the number of shared random directions; it may exceed the matrix"
    parameters = "m + r"
    constants = ("A", "B")
    shared = ("A", "B")
    redrawn = ("A", "B")
    scaled = False
    rank_is_bounded = False

    def __post_init__(self) -> None:
        if self.share not in ("shape", "largest"):
            raise Incompatible(f"{self}: share={self.share}; choices: shape, largest")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"d": (r,), "b": (m,)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        return {"d": W0.new_full((r,), self.d_init), "b": W0.new_zeros(W0.shape[0])}

    def start_shared(
        self, m: int, n: int, r: int, generator: torch.Generator, like: Tensor
    ) -> Tensors:
        # U(-sqrt(6 / fan-in), sqrt(6 / fan-in))
        A, B = (kaiming(*shape, like, generator) for shape in ((r, n), (m, r)))
        return {"A": 6**0.5 * A, "B": 6**0.5 * B}

    def key(self, m: int, n: int, r: int) -> str:
        return f"r{r}" if self.share == "largest" else f"{m}x{n}-r{r}"

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        return r

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        A, B = factors(p, *W0.shape)
        return W0 + B @ A

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        A, B = factors(layer.p, layer.out_features, layer.in_features)
        return layer.product(x, A, B)


preset(
    "vera",
    form="vera",
    scale="none",
    rank=1024,
    alpha=None,
    lr=4e-3,
    lr_origin="the paper's Table 9, instruction tuning of Llama-2-7B at rank 1024",
)
