"""QLoRA: Efficient Finetuning of Quantized LLMs (Dettmers et al., NeurIPS 2023), arXiv:2305.14314.

    W = decode(encode(W0)) + s B A,    a block's number = its code's value times its largest |w|

The 16 values are quantiles of N(0, 1) at even steps of probability, 8 from the middle up and 7 from
the middle down, with an exact zero between, brought to [-1, 1]. Blocks have 64 numbers, and double
quantization puts their scales into 8 bits. Official code: artidoro/qlora, qlora.py, on
bitsandbytes' functional.py, with which codes, scales and weights here agree bit for bit. The
paper's "8-bit floats" are the dynamic type, not E4M3. The base stays frozen in 4 bits; a product
decodes one matrix and drops it again. With PEFT the base is bitsandbytes' as well and the adapter
fp32, as here, where the official script has it in bf16; PEFT's merge quantizes the sum again, here
merging gives the decoded weights with the change in them.

The table, from its definition (Appendix E): quantiles of the normal distribution, a zero, and one
more value on the positive side; and what a number costs, 4.5 bits or 4.127:

>>> from scipy.stats import norm
>>> import numpy as np
>>> import torch
>>> positive, negative = (norm.ppf(torch.linspace(0.9677083, 0.5, k)[:-1]) for k in (9, 8))
>>> values = np.sort(np.concatenate((positive, [0.0], -negative))) / positive.max()
>>> bool(np.abs(values - np.array(NF4_VALUES)).max() < 3e-8)
True
>>> W = torch.randn(512, 512)
>>> [round(base.store(W).bits / W.numel(), 6) for base in (NF4(), NF4Double())]
[4.5, 4.126953]
"""

from dataclasses import dataclass

from torch import Tensor

from ._api import Base, Stored
from ._quantize import nearest
from ._registry import preset

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


@dataclass(frozen=True)
class NF4(Base, name="nf4"):
    """4-bit NormalFloat, one fp32 scale a block."""

    block: int = 64
    """numbers that share a scale"""

    lossy = True

    def store(self, W: Tensor) -> Stored:
        return nearest(W, NF4_VALUES, self.block)


@dataclass(frozen=True)
class NF4Double(Base, name="nf4_dq"):
    """4-bit NormalFloat, the scales quantized again to 8 bits."""

    block: int = 64
    """numbers that share a scale"""

    lossy = True

    def store(self, W: Tensor) -> Stored:
        return nearest(W, NF4_VALUES, self.block, double=True)


preset(
    "qlora",
    base="nf4_dq",
    rank=64,
    alpha=16,
    lr=2e-4,
    lr_origin="the paper's Table 9, 7B and 13B",
)
