"""MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure (Kang & Yin,
2024), arXiv:2409.15371; first versions: Bone, DiSHA.

    W = W0 + D^T [I I ... I],    D [r, m] = 0
    W = W0 + W0' D + D,  block by block (BAT)

MiSS: column j of the change is row j mod r of D, so inputs are summed in groups, r numbers wide,
before D; a last group that is shorter is padded with zeros. BAT: each r x r block of W0 in block
row i becomes W0_ij + W0_ij D_i + D_i with one D_i [r, r] for the row; where r divides a side not,
that side is padded with zeros too (PEFT refuses it). No scale in either. Official code: JL-er/Bone,
which points to PEFT (peft/tuners/miss, once bone); PEFT drops out x in MiSS, and nothing in BAT.

Columns repeat with period r; in BAT they do not, and what W0 has enters:

>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> W0, p = torch.randn(4, 7, generator=g), {"D": torch.randn(3, 4, generator=g)}
>>> change = MiSS().weight(W0, p, 1.0) - W0
>>> bool(torch.allclose(change, p["D"].mT[:, [0, 1, 2, 0, 1, 2, 0]], atol=1e-6))
True
>>> W0, p = torch.randn(4, 6, generator=g), {"D": torch.randn(2, 2, 2, generator=g)}
>>> change, D = BAT().weight(W0, p, 1.0) - W0, p["D"][1]
>>> bool(torch.allclose(change[2:, 4:], W0[2:, 4:] @ D + D, atol=1e-6))
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ._api import Form, Tensors
from ._layer import Adapted
from ._registry import Incompatible, preset


@dataclass(frozen=True)
class MiSS(Form, name="miss"):
    """W0 + D^T [I I ... I]."""

    rank_means = "r, the width of the groups of inputs that share their numbers, at most n"
    parameters = "r*m"
    scaled = False
    rank_is_bounded = False

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"D": (r, m)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        return {"D": W0.new_zeros(r, W0.shape[0])}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + self.change(W0, p, s)

    def change(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        n, r = W0.shape[1], p["D"].shape[0]
        return p["D"].mT.repeat(1, -(-n // r))[:, :n]

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        D = layer.p["D"].to(x.dtype)
        r = D.shape[0]
        padded = F.pad(layer.dropout(x), (0, -x.shape[-1] % r))
        return layer.frozen(x) + padded.unflatten(-1, (-1, r)).sum(-2) @ D

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        return shared_width(r, n, where)


@dataclass(frozen=True)
class BAT(Form, name="bat"):
    """W0 + W0' D + D in r x r blocks, one D for each row of blocks."""

    rank_means = "r, the side of the blocks, at most n"
    parameters = "(m + r - 1)//r*r*r"
    parameters_in_words = "r*r*(m/r), m/r rounded up"
    scaled = False
    rank_is_bounded = False

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"D": (-(-m // r), r, r)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        return {"D": W0.new_zeros(-(-W0.shape[0] // r), r, r)}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + self.change(W0, p, s)

    def change(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        (m, n), D = W0.shape, p["D"]
        r = D.shape[-1]
        padded = F.pad(W0, (0, -n % r, 0, -m % r)).to(D.dtype)
        blocks = padded.unflatten(0, (-1, r)).unflatten(2, (-1, r))  # [i, row, j, column]
        changed = torch.einsum("iajb,ibc->iajc", blocks, D) + D[:, :, None]
        return changed.flatten(2).flatten(0, 1)[:m, :n]

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        return shared_width(r, n, where)


def shared_width(r: int, n: int, where: str) -> int:
    if r > n:
        raise Incompatible(f"rank={r}: {where} has {n} inputs, no group of them is wider than that")
    return r


preset(
    "miss",
    form="miss",
    scale="none",
    rank=64,
    alpha=None,
    lr=2e-5,
    lr_origin="the paper's table for LLMs (rank 64, cosine), and the official scripts/run_bone.sh",
)
preset(
    "bat",
    form="bat",
    scale="none",
    rank=64,
    alpha=None,
    lr=2e-5,
    lr_origin="that of MiSS",
)
