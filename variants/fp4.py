"""bitsandbytes' FP4, the 4-bit float that QLoRA (arXiv:2305.14314) compares NormalFloat with.

    W = table[code] * max |w of the block|,    table = (0, 1/16, 8, 12, 4, 6, 2, 3) / 12, then minus

One bit of sign, two of exponent, one of mantissa, though not as E2M1 has them: the exponent falls
as its bits rise, and the one number without an exponent, which would stand at 1 for an even step,
is 1/16 (.00520833 after division by 12), so a code is all but lost to a second zero, and another to
the zero that has a sign. The paper's FP4 results are with E2M1 (part `e2m1`). Official code:
bitsandbytes, functional.py, `create_fp8_map(True, 2, 1, 4)`, with which codes, scales and weights
agree bit for bit on the CPU; of numbers that become zero its CUDA kernel takes the other zero.

The table from the bits of the codes, mantissa m and exponent e; the quirk; half the codes for the
half that is negative, and the smallest numbers halfway to the zero next to them:

>>> import torch
>>> value = [m / 16 if e == 0 else (1 + m / 2) * 2.0 ** (4 - e) for e in range(4) for m in (0, 1)]
>>> value
[0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
>>> FP4_VALUES == tuple((torch.tensor([*value, *(-v for v in value)]) / 12).tolist())
True
>>> W = torch.tensor([[12.0, -12.0, 0.05, 0.02]])
>>> (FP4().store(W).dense() + 0.0).tolist()
[[12.0, -12.0, 0.0625, 0.0]]
"""

from dataclasses import dataclass

from torch import Tensor

from ._api import Base, Stored
from ._bitsandbytes import check_backend, store

FP4_VALUES = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
    -0.0,
    -0.0052083334885537624,
    -0.6666666865348816,
    -1.0,
    -0.3333333432674408,
    -0.5,
    -0.1666666716337204,
    -0.25,
)


@dataclass(frozen=True)
class FP4(Base, name="fp4"):
    """bitsandbytes' 4-bit float."""

    block: int = 64
    """numbers that share a scale"""
    double: bool = False
    """quantize the scales again, to 8 bits"""
    backend: str = "own"
    """`own`, or `bitsandbytes` for its functions and CUDA kernels: the same numbers"""

    lossy = True

    def __post_init__(self) -> None:
        check_backend(self)

    def store(self, W: Tensor) -> Stored:
        return store(W, FP4_VALUES, self.block, self.double, self.backend)
