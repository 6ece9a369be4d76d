"""AbnormalFloat: NF4 Isn't Information Theoretically Optimal (and that's Good) (Yoshida, 2023),
arXiv:2306.06965.

    W = table[code] * max |w of the block|,    P(mid_i < x < q_i) = P(q_i < x < mid_{i+1})

NormalFloat's quantiles are those of a normal number, but what is stored is x = w / max |w|, a
normal number over the largest of its block, whose law depends on the block's size. AF4's values
make the expected absolute error least under that law: each q is the median of what is rounded to
it, between the midpoints mid to its neighbours. -1 and 1 are fixed, 8 values lie above zero and 7
below, each half solved alone with its first cell beginning at zero, and an exact zero is put
between. The published table for blocks of 64 stands here as bitsandbytes has it (functional.py,
`get_4bit_type`); for other blocks the values are solved for, to within 1e-6 of the published ones.

The published table from the law; a larger block's largest number is larger, so values move inward:

>>> import torch
>>> bool((torch.tensor(abnormal(64)) - torch.tensor(AF4_VALUES)).abs().max() < 1e-6)
True
>>> [round(v, 4) for v in abnormal(4096)[8:]]  # the paper's: 0.03129431, ..., 0.56468758, 1
[0.0313, 0.0948, 0.1613, 0.2334, 0.3158, 0.4174, 0.5647, 1.0]
"""

from dataclasses import dataclass
from functools import cache

from torch import Tensor

from ._api import Base, Stored
from ._quantize import nearest
from ._registry import Incompatible

AF4_VALUES = (
    -1.0,
    -0.69441008,
    -0.51243739,
    -0.3736951,
    -0.25607552,
    -0.14982478,
    -0.04934812,
    0.0,
    0.04273164,
    0.12934483,
    0.21961274,
    0.31675666,
    0.42563882,
    0.55496234,
    0.72424863,
    1.0,
)


@cache
def abnormal(block: int) -> tuple[float, ...]:
    """The values for blocks of that many numbers."""
    import numpy as np
    from scipy.special import ndtr

    largest = np.linspace(1e-3, 9, 2001)  # of |w| in a block, with its density
    inside = 2 * ndtr(largest) - 1
    density = inside ** (block - 1) * np.exp(-(largest**2) / 2)
    x = np.linspace(0, 1, 2001)
    law = ((ndtr(np.outer(x, largest)) - 0.5) / inside) @ (density / density.sum())  # P(0 < . < x)
    halves = []
    for count in (7, 8):
        q, moved = np.linspace(0, 1, count + 1)[1:], 1.0
        while moved > 1e-10:
            cells = np.interp(np.append(0, (q[1:] + q[:-1]) / 2), x, law)
            medians = np.append(np.interp((cells[1:] + cells[:-1]) / 2, law, x), 1.0)
            q, moved = medians, np.abs(medians - q).max()
        halves.append(q)
    return (*(-halves[0][::-1]).tolist(), 0.0, *halves[1].tolist())


@dataclass(frozen=True)
class AF4(Base, name="af4"):
    """4-bit AbnormalFloat, one fp32 scale a block."""

    block: int = 64
    """numbers that share a scale; the table depends on it"""
    double: bool = False
    """quantize the scales again, to 8 bits"""

    lossy = True

    def __post_init__(self) -> None:
        if self.block < 2:
            raise Incompatible(f"base af4: block={self.block}: 2 or more, of which one is largest")

    def store(self, W: Tensor) -> Stored:
        table = AF4_VALUES if self.block == 64 else abnormal(self.block)
        return nearest(W, table, self.block, self.double)
