"""Integers on an even grid (Jacob et al., CVPR 2018, arXiv:1712.05877), as LLM.int8() (Dettmers et
al., NeurIPS 2022, arXiv:2208.07339) and GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323) have it.

    W = (code - zero) * scale

Symmetric: scale = max |w| / q with q = 7 or 127 and the zero in the middle; the lowest code is not
used, as in LLM.int8(), whose weights are these with a scale for each row. Asymmetric: from the
least w (or 0) to the largest (or 0) in 15 or 255 steps, with an integer zero point of 8 bits for
each group, so zero stays exact: GPTQ's grid before it corrects errors (IST-DASLab/gptq, quant.py,
`find_params`), which QA-LoRA needs.

Zero stays, the largest number stays, and a zero point is worth a bit where a group has one sign;
the cost of a number with one scale for 64, for a row of 512, for the whole matrix:

>>> import torch
>>> W = torch.tensor([[0.0, 7.0, -2.6, 1.4]])
>>> Int4().store(W).dense().tolist()
[[0.0, 7.0, -3.0, 1.0]]
>>> W = torch.rand(64, 512, generator=torch.Generator().manual_seed(0))
>>> errors = [(Int4(symmetric=s).store(W).dense() - W).square().mean() for s in (True, False)]
>>> bool(errors[0] > 4 * errors[1])
True
>>> [Int4(group=g, symmetric=False).store(W).bits / W.numel() for g in ("64", "row", "tensor")]
[4.625, 4.078125, 4.001220703125]
"""

from dataclasses import dataclass

from torch import Tensor

from ._api import Base, Stored
from ._quantize import rounded
from ._registry import Incompatible


def check(part: "Int4 | Int8") -> None:
    """A group given as a number is as good as its digits."""
    object.__setattr__(part, "group", str(part.group))
    if part.group not in ("row", "tensor") and not (part.group.isdecimal() and int(part.group)):
        raise Incompatible(f"{part}: group={part.group}: a number of 1 or more, row or tensor")


def length(group: str, W: Tensor) -> int:
    """Numbers that share a scale."""
    return {"row": W.shape[1], "tensor": W.numel()}.get(group) or int(group)


@dataclass(frozen=True)
class Int4(Base, name="int4"):
    """4-bit integers, one fp32 scale a group."""

    group: str = "64"
    """numbers that share a scale, or `row`, or `tensor`"""
    symmetric: bool = True
    """no zero points: the grid reaches as far below zero as above"""
    double: bool = False
    """quantize the scales again, to 8 bits"""

    lossy = True

    def __post_init__(self) -> None:
        check(self)

    def store(self, W: Tensor) -> Stored:
        return rounded(W, 4, length(self.group, W), self.symmetric, self.double)


@dataclass(frozen=True)
class Int8(Base, name="int8"):
    """8-bit integers, one fp32 scale a row."""

    group: str = "row"
    """numbers that share a scale, or `row`, or `tensor`"""
    symmetric: bool = True
    """no zero points: the grid reaches as far below zero as above"""
    double: bool = False
    """quantize the scales again, to 8 bits"""

    lossy = True

    def __post_init__(self) -> None:
        check(self)

    def store(self, W: Tensor) -> Stored:
        return rounded(W, 8, length(self.group, W), self.symmetric, self.double)
