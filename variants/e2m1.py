"""E2M1, the 4-bit float of the OCP Microscaling Formats (Rouhani et al., 2023), arXiv:2310.10537.

    W = table[code] * max |w of the block|,    table = (0, 0.5, 1, 1.5, 2, 3, 4, 6) / 6, then minus

A sign, two bits of exponent with bias 1, one of mantissa; the code is the bits. This is the FP4 of
QLoRA's tables (arXiv:2305.14314), scaled as QLoRA scales: one fp32 number for a block of 64. The
MX formats have blocks of 32 with a power of two for a scale, NVIDIA's NVFP4 blocks of 16 with an
E4M3 number; neither is this. bitsandbytes' `fp4` has other numbers.

The table from its bits, without an exponent a subnormal number; a block's numbers in units of 1/6:

>>> value = [m / 2 if e == 0 else (1 + m / 2) * 2.0 ** (e - 1) for e in range(4) for m in (0, 1)]
>>> E2M1_VALUES == tuple(v / 6 for v in (*value, *(-v for v in value)))
True
>>> import torch
>>> E2M1().store(torch.tensor([[6.0, -2.4, 0.3, 5.1]])).dense().tolist()
[[6.0, -2.0, 0.5, 6.0]]
>>> [base.store(torch.randn(256, 64)).bits / 256 / 64 for base in (E2M1(), E2M1(double=True))]
[4.5, 4.126953125]
"""

from dataclasses import dataclass

from torch import Tensor

from ._api import Base, Stored
from ._quantize import check_group, nearest

E2M1_VALUES = (
    0.0,
    0.5 / 6,
    1 / 6,
    1.5 / 6,
    2 / 6,
    3 / 6,
    4 / 6,
    1.0,
    -0.0,
    -0.5 / 6,
    -1 / 6,
    -1.5 / 6,
    -2 / 6,
    -3 / 6,
    -4 / 6,
    -1.0,
)


@dataclass(frozen=True)
class E2M1(Base, name="e2m1"):
    """The 4-bit float E2M1, one fp32 scale a block."""

    block: int = 64
    """numbers that share a scale"""
    double: bool = False
    """quantize the scales again, to 8 bits"""

    lossy = True

    def __post_init__(self) -> None:
        check_group(self, "block")

    def store(self, W: Tensor) -> Stored:
        return nearest(W, E2M1_VALUES, self.block, self.double)
