"""Codes in blocks: the engine under the quantized bases. All torch, any device.

A matrix is flattened row by row into blocks; each block is divided by its largest absolute value
and each number becomes the index of the nearest entry of a sorted table. bitsandbytes computes the
same, to the bit: multiply by the reciprocal, compare with the midpoints of the table.

The nearest entry, of each number in units of the largest by size; scales come back:

>>> codes, absmax = encode(torch.tensor([-2.0, 0.8, 1.2, 0.0, 4.0]), (-1.0, 0.0, 1.0), block=4)
>>> codes.tolist(), absmax.tolist()
([0, 1, 2, 1, 2], [2.0, 4.0])
>>> W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
>>> scales = [Blocks4(W, dynamic_map()[::17], 64, double).scales for double in (False, True)]
>>> bool((scales[0] / scales[1] - 1).abs().max() < 0.02), len(dynamic_map())
(True, 256)

A block of zeros has the code of zero:

>>> encode(torch.zeros(4), (-1.0, 0.0, 1.0), block=4)[0].tolist()
[1, 1, 1, 1]
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ._api import Stored
from ._registry import Incompatible

TINY = 1e-38  # divides a block of zeros, as bitsandbytes does


@cache
def dynamic_map() -> tuple[float, ...]:
    """The signed 8-bit dynamic type (Dettmers, 2015, arXiv:1511.04561): 256 values, ascending.

    A byte is a sign, a decimal exponent in unary, and a linear fraction in the bits that remain.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        fractions = (edges[:-1] + edges[1:]) / 2
        values += (10 ** (exponent - 6) * fractions).tolist()
        values += (-(10 ** (exponent - 6)) * fractions).tolist()
    return tuple(sorted(values))


@cache
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def encode(x: Tensor, table: tuple[float, ...], block: int) -> tuple[Tensor, Tensor]:
    """(codes uint8 [numel], absmax fp32 [blocks]) of x; the last block may be short."""
    scaled, absmax = _scaled(x, block)
    return _nearest(scaled, table)[: x.numel()], absmax


def encode_scales(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """`encode` with the dynamic map, to the bit as bitsandbytes does it for 8 bits.

    Its CPU kernel first rounds to a grid of 65,536 (csrc/cpu_ops.cpp, `norm_to_lut_index`), its
    CUDA kernel does not.
    """
    scaled, absmax = _scaled(x, block)
    if x.device.type == "cpu":
        grid = ((scaled + 1.0) * 0.5 * 65535 + 0.5).trunc()
        scaled = -1.0 + (2.0 * grid) / 65535
        scaled[absmax == 0] = -1.0
    return _nearest(scaled, dynamic_map())[: x.numel()], absmax


def _scaled(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """([blocks, block] in -1..1, absmax [blocks]); the end is filled with zeros."""
    flat = x.reshape(-1).float()
    blocks = F.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    return (blocks * (1.0 / absmax.clamp(min=TINY))[:, None]).clamp(-1, 1), absmax


def _nearest(scaled: Tensor, table: tuple[float, ...]) -> Tensor:
    values = _table(table, scaled.device)
    codes = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8).view(-1)


def decode(codes: Tensor, absmax: Tensor, table: tuple[float, ...], block: int) -> Tensor:
    """fp32 [numel]: the inverse of `encode`, up to the rounding to the table."""
    values = _table(table, codes.device)[codes.int()]
    blocks = F.pad(values, (0, -values.numel() % block)).view(-1, block)
    return (blocks * absmax[:, None]).view(-1)[: values.numel()]


class Blocks4(Stored):
    """A matrix as 4-bit codes, two in a byte (the first in the high half), with a scale a block.

    With `double`, the scales themselves are 8-bit codes of the dynamic type in blocks of 256,
    after their mean is taken out. fp32 tensors lie in integer buffers, so that `model.to(dtype)`
    cannot round them.
    """

    codes: Tensor
    nested: Tensor
    offset: Tensor
    absmax: Tensor

    def __init__(self, W: Tensor, table: tuple[float, ...], block: int, double: bool) -> None:
        super().__init__(W)
        if not torch.isfinite(W).all():
            raise Incompatible("a weight with numbers that are not finite cannot be quantized")
        self.table, self.block, self.nested_scales = table, block, double
        self.group = block
        codes, absmax = encode(W, table, block)
        zero = _nearest(torch.zeros(codes.numel() % 2), table)  # an odd matrix ends in half a byte
        pairs = torch.cat((codes, zero.to(codes.device))).view(-1, 2)
        self.register_buffer("codes", pairs[:, 0] << 4 | pairs[:, 1])
        if double:
            offset = absmax.mean()
            nested, absmax = encode_scales(absmax - offset, 256)
            self.register_buffer("nested", nested)
            self.register_buffer("offset", offset.view(torch.int32))
        self.register_buffer("absmax", absmax.view(torch.int32))

    @property
    def scales(self) -> Tensor:
        """fp32, one a block."""
        absmax = self.absmax.view(torch.float32)
        if not self.nested_scales:
            return absmax
        return decode(self.nested, absmax, dynamic_map(), 256) + self.offset.view(torch.float32)

    def dense(self) -> Tensor:
        m, n = self.shape
        codes = torch.stack((self.codes >> 4, self.codes & 15), dim=1).view(-1)[: m * n]
        return decode(codes, self.scales, self.table, self.block).view(m, n).to(self.dtype)

    def histogram(self) -> Tensor:
        m, n = self.shape
        codes = torch.stack((self.codes >> 4, self.codes & 15), dim=1).view(-1)[: m * n]
        return torch.bincount(codes, minlength=len(self.table))

    @property
    def bits(self) -> int:
        """The stored tensors, without the table and the one offset, which no matrix scales with."""
        return super().bits - (32 if self.nested_scales else 0)
