"""NormalFloat, of QLoRA (Dettmers et al., NeurIPS 2023), arXiv:2305.14314, Section 3, Appendix E.

    W = table[code] * max |w of the block|,    table = quantiles of N(0, 1), brought to [-1, 1]

At even steps of probability, 8 quantiles from the middle up and 7 from the middle down, with an
exact zero between: k bits have 2^(k-1) above, one less below. Official code: bitsandbytes,
functional.py, `create_normal_map`, whose numbers for 4 bits are constants here as there, and with
which codes, scales and weights agree bit for bit, double quantization included. The paper's "8-bit
floats" for the scales are the dynamic type, not E4M3. LoftQ's code takes the quantile of 4 bits as
the outermost one for all k (`offset=0.9677083`).

The table, from its definition; a quantile's probability lies half a step from the end; and what a
number costs: 4.5 bits in blocks of 64, or 4.127 with the scales in 8 bits:

>>> bool((torch.tensor(normal(4)) - torch.tensor(NF4_VALUES)).abs().max() < 2e-7)
True
>>> [round(v, 4) for v in normal(2)], [round(v, 4) for v in normal(2, 0.9677083)]
([-1.0, 0.0, 0.4358, 1.0], [-1.0, 0.0, 0.3379, 1.0])
>>> W = torch.randn(512, 512)
>>> [round(base.store(W).bits / W.numel(), 6) for base in (NF4(), NF4Double(), NF(bits=3))]
[4.5, 4.126953, 3.5]
>>> NF().store(W).table == NF4_VALUES, NF(offset=0.95).store(W).table == normal(4, 0.95)
(True, True)
"""

from dataclasses import dataclass
from functools import cache

import torch

from ._api import Base, Stored
from ._bitsandbytes import check_backend, store
from ._quantize import PACKED, check_group, nearest
from ._registry import Incompatible

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@cache
def normal(bits: int, offset: float = 0.0) -> tuple[float, ...]:
    """The 2^bits values; `offset` is the probability of the outermost quantile, 0: half a step."""
    half = 2 ** (bits - 1)
    offset = offset or 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    up, down = (
        torch.special.ndtri(torch.linspace(offset, 0.5, count + 1, dtype=torch.float64)[:-1])
        for count in (half, half - 1)
    )
    values = torch.cat((-down, torch.zeros(1), up.flip(0))) / up[0]
    return tuple(values.float().tolist())


@dataclass(frozen=True)
class NF4(Base, name="nf4"):
    """4-bit NormalFloat, one fp32 scale a block."""

    block: int = 64
    """numbers that share a scale"""
    backend: str = "own"
    """`own`, or `bitsandbytes` for its functions and CUDA kernels: the same numbers"""

    lossy = True

    def __post_init__(self) -> None:
        check_backend(self)

    def store(self, W: torch.Tensor) -> Stored:
        return store(W, NF4_VALUES, self.block, False, self.backend)


@dataclass(frozen=True)
class NF4Double(Base, name="nf4_dq"):
    """4-bit NormalFloat, the scales quantized again to 8 bits."""

    block: int = 64
    """numbers that share a scale"""
    backend: str = "own"
    """`own`, or `bitsandbytes` for its functions and CUDA kernels: the same numbers"""

    lossy = True

    def __post_init__(self) -> None:
        check_backend(self)

    def store(self, W: torch.Tensor) -> Stored:
        return store(W, NF4_VALUES, self.block, True, self.backend)


@dataclass(frozen=True)
class NF(Base, name="nf"):
    """NormalFloat of 2, 3, 4 or 8 bits."""

    bits: int = 4
    """of a code: 2, 3, 4 or 8; with 4 the part is `nf4`, or `nf4_dq`"""
    block: int = 64
    """numbers that share a scale"""
    double: bool = False
    """quantize the scales again, to 8 bits"""
    offset: float = 0.0
    """probability of the outermost quantile; 0: QLoRA's rule; LoftQ takes 0.9677083 for all"""

    lossy = True

    def __post_init__(self) -> None:
        if self.bits not in PACKED:
            choices = ", ".join(map(str, PACKED))
            raise Incompatible(f"base nf: bits={self.bits}; choices: {choices}")
        if self.offset and not 0.5 < self.offset < 1:
            raise Incompatible(f"base nf: offset={self.offset}: a probability above 0.5, or 0")
        check_group(self, "block")

    def store(self, W: torch.Tensor) -> Stored:
        table = normal(self.bits, self.offset) if self.bits != 4 or self.offset else NF4_VALUES
        return nearest(W, table, self.block, self.double)
