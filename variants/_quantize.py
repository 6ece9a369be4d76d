"""Codes in groups: the engine under the quantized bases. All torch, any device.

    W = table[code] * scale + shift,    one scale (and shift) for `group` numbers, row by row

A matrix is flattened row by row into groups of equal length, the last one short where it must be:
blocks of 64, rows (group = n) or the whole matrix (group = m n). `nearest` divides each group by
its largest absolute value and takes the nearest entry of a table; `rounded` puts integers on an
even grid, as wide as the group. bitsandbytes computes the same, to the bit: multiply by the
reciprocal, compare with the midpoints of the table.

The nearest entry, of each number in units of the largest by size; scales come back:

>>> codes, absmax = encode(torch.tensor([-2.0, 0.8, 1.2, 0.0, 4.0]), (-1.0, 0.0, 1.0), group=4)
>>> codes.tolist(), absmax.tolist()
([0, 1, 2, 1, 2], [2.0, 4.0])
>>> W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
>>> scales = [nearest(W, dynamic_map(), 64, double).scales for double in (False, True)]
>>> bool((scales[0] / scales[1] - 1).abs().max() < 0.02), len(dynamic_map())
(True, 256)

A group of zeros has the code of zero, and a table need not be in order:

>>> encode(torch.zeros(4), (-1.0, 0.0, 1.0), group=4)[0].tolist()
[1, 1, 1, 1]
>>> encode(torch.tensor([-2.0, 0.1, 2.0]), (0.0, 1.0, -1.0), group=3)[0].tolist()
[2, 0, 1]

Eight codes of 3 bits lie in three bytes, the first in the highest bits:

>>> codes = torch.arange(8, dtype=torch.uint8)
>>> pack(codes, 3).tolist() == [0b00000101, 0b00111001, 0b01110111]
True

Integers with a zero point reach from the least number to the largest, zero among them, exactly:

>>> W = torch.tensor([[0.0, 1.0, 2.0, 3.0], [-2.0, 0.0, 0.5, 4.0]])
>>> stored = rounded(W, 2, 4, symmetric=False)
>>> stored.codes.view(2, 4).tolist(), stored.zero.tolist(), stored.scales.tolist()
([[0, 1, 2, 3], [0, 1, 1, 3]], [0, 1], [1.0, 2.0])
>>> stored.dense().tolist()
[[0.0, 1.0, 2.0, 3.0], [-2.0, 0.0, 0.0, 4.0]]
>>> rounded(torch.tensor([[1.0, 2.0, 3.0]]), 2, 3, symmetric=False).dense().tolist()
[[1.0, 2.0, 3.0]]
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _decode
from ._api import Stored
from ._registry import Incompatible

TINY = 1e-38  # divides a group of zeros, as bitsandbytes does
AT_ONCE = 2**20  # numbers: what is at hand then fits a cache
NESTED = 256  # scales that share a scale, where scales are quantized too
PACKED = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # bits -> codes that fill whole bytes, bytes


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


def encode(x: Tensor, table: tuple[float, ...], group: int) -> tuple[Tensor, Tensor]:
    """(codes uint8 [numel], absmax fp32 [groups]) of x; the last group may be short."""
    groups, parts = _grouped(x, group), []
    for part in groups.split(max(1, AT_ONCE // group)):
        scaled, absmax = _scaled(part)
        parts.append((_nearest(scaled, table), absmax))
    codes, absmax = (torch.cat(own) for own in zip(*parts, strict=True))
    if x.numel() % group and x.device.type == "cpu":
        # bitsandbytes multiplies by 1 / absmax, but on the CPU it divides a group that is short
        absmax[-1] = absmax[-1].clamp(min=TINY)
        codes[-group:] = _nearest((groups[-1] / absmax[-1]).clamp(-1, 1), table)
    return _alone(codes[: x.numel()]), absmax


def encode_scales(x: Tensor) -> tuple[Tensor, Tensor]:
    """`encode` with the dynamic map, to the bit as bitsandbytes does it for 8 bits.

    Its CPU kernel first rounds to a grid of 65,536 (csrc/cpu_ops.cpp, `norm_to_lut_index`), its
    CUDA kernel does not.
    """
    scaled, absmax = _scaled(_grouped(x, NESTED))
    if x.device.type == "cpu":
        grid = ((scaled + 1.0) * 0.5 * 65535 + 0.5).trunc()
        scaled = -1.0 + (2.0 * grid) / 65535
        scaled[absmax == 0] = -1.0
    return _alone(_nearest(scaled, dynamic_map())[: x.numel()]), absmax


def _grouped(x: Tensor, group: int) -> Tensor:
    """fp32 [groups, group] of x, row by row; the end is filled with zeros. One that is short of a
    single group is not."""
    group = max(1, min(group, x.numel()))
    flat, rest = x.reshape(-1).float(), -x.numel() % group
    return (F.pad(flat, (0, rest)) if rest else flat).view(-1, group)


def _scaled(groups: Tensor) -> tuple[Tensor, Tensor]:
    """([groups, group] in -1..1, absmax [groups])."""
    absmax = groups.abs().amax(1)
    return (groups * (1.0 / absmax.clamp(min=TINY))[:, None]).clamp_(-1, 1), absmax


@cache
def _midpoints(table: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(fp32 numbers between the sorted values of a table, the code of each value)."""
    values, order = torch.tensor(table).sort(stable=True)
    return (values[:-1] + values[1:]) / 2, order.to(torch.uint8)


def _nearest(scaled: Tensor, table: tuple[float, ...]) -> Tensor:
    """uint8 [numel]: how many midpoints lie below each number, as the table's codes."""
    midpoints, order = _midpoints(table)
    if len(table) > 16:
        bounds = midpoints.to(scaled.device)
        codes = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    else:  # a comparison with each is several times faster than a search
        codes = torch.zeros_like(scaled, dtype=torch.uint8)
        for midpoint in midpoints.tolist():
            codes += scaled > midpoint
    if tuple(sorted(table)) != table:
        codes = order.to(scaled.device)[codes.int()]
    return codes.view(-1)


def decode(codes: Tensor, scales: Tensor, table: tuple[float, ...], group: int) -> Tensor:
    """fp32 [numel]: the inverse of `encode`, up to the rounding to the table."""
    out = torch.empty(codes.numel(), device=codes.device)
    return _decode.decode(codes, 8, table, scales, None, group, out)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [numel] in as few bytes, the first in the highest bits, the end filled with 0."""
    count, size = PACKED[bits]
    if count == 1:
        return codes
    lanes = F.pad(codes, (0, -codes.numel() % count)).view(-1, count)
    word = torch.zeros_like(lanes[:, 0], dtype=torch.int32 if size > 1 else torch.uint8)
    for lane in range(count):
        word |= lanes[:, lane].to(word.dtype) << bits * (count - 1 - lane)
    if size == 1:
        return word
    parts = [(word >> 8 * (size - 1 - i) & 255).to(torch.uint8) for i in range(size)]
    return torch.stack(parts, dim=1).view(-1)


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """uint8 codes [numel]: the inverse of `pack`."""
    count, size = PACKED[bits]
    if count == 1:
        return packed[:numel]
    word = packed
    if size > 1:
        places = packed.view(-1, size).int()
        word = sum((places[:, i] << 8 * (size - 1 - i) for i in range(size)), places.new_zeros(()))
    mask = (1 << bits) - 1
    lanes = [(word >> bits * (count - 1 - i) & mask).to(torch.uint8) for i in range(count)]
    return torch.stack(lanes, dim=1).view(-1)[:numel]


class Blocks(Stored):
    """A matrix as packed codes of k bits, with a fp32 scale for each group of numbers.

    With `double` the scales themselves are 8-bit codes of the dynamic type in blocks of 256, after
    their mean is taken out. A group's `shift` is -zero * scale with a zero point (`zero`, uint8),
    or a number of its own (`shift`, fp32). fp32 tensors lie in integer buffers, so that
    `model.to(dtype)` cannot round them.

    Args:
        like: a tensor of the matrix's shape [m, n] and dtype; its numbers are not read.
        codes: uint8 [m n], row by row; with `packed`, the bytes of `pack`.
        scales: fp32 [groups], groups = ceil(m n / group).
        table: the 2^k values of the codes.
        zero: uint8 [groups], integer zero points; the table then counts 0, 1, 2, ...
        shift: fp32 [groups], in place of `zero`.
        nested, offset: uint8 [groups] and a fp32 number, of scales that are codes already;
            `scales` then has those of their blocks.
    """

    packed: Tensor
    absmax: Tensor
    nested: Tensor | None
    offset: Tensor | None
    zero: Tensor | None
    shifts: Tensor | None

    def __init__(
        self,
        like: Tensor,
        codes: Tensor,
        scales: Tensor,
        table: tuple[float, ...],
        group: int,
        *,
        double: bool = False,
        zero: Tensor | None = None,
        shift: Tensor | None = None,
        packed: bool = False,
        nested: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> None:
        super().__init__(like)
        m, n = self.shape
        self.table, self.group = table, group
        self.k = len(table).bit_length() - 1
        if double:
            offset = scales.mean()
            nested, scales = encode_scales(scales - offset)
        count, size = PACKED[self.k]
        groups = -(-m * n // group)
        wanted = {
            "codes": (codes, -(-m * n // count) * size if packed else m * n),
            "scales": (scales if nested is None else nested, groups),
            "zero points": (zero, groups),
            "shifts": (shift, groups),
        }
        for name, (tensor, length) in wanted.items():
            if tensor is not None and tensor.numel() != length:
                raise Incompatible(
                    f"group={group}: a [{m}, {n}] matrix of {self.k} bits in groups of {group} "
                    f"numbers has {length} {name}, not {tensor.numel()}"
                )
        self.register_buffer("packed", _alone(codes if packed else pack(codes, self.k)))
        self.register_buffer("nested", nested)
        self.register_buffer("offset", None if offset is None else offset.view(torch.int32))
        self.register_buffer("absmax", scales.view(torch.int32))
        self.register_buffer("zero", zero)
        self.register_buffer("shifts", None if shift is None else shift.view(torch.int32))

    @property
    def codes(self) -> Tensor:
        """uint8 [m n], unpacked."""
        return unpack(self.packed, self.k, self.shape[0] * self.shape[1])

    @property
    def scales(self) -> Tensor:
        """fp32 [groups]."""
        absmax = self.absmax.view(torch.float32)
        if self.nested is None or self.offset is None:
            return absmax
        return decode(self.nested, absmax, dynamic_map(), NESTED) + self.offset.view(torch.float32)

    @property
    def shift(self) -> Tensor | None:
        """fp32 [groups], or None."""
        if self.zero is not None:
            return -self.zero.float() * self.scales
        return None if self.shifts is None else self.shifts.view(torch.float32)

    def decode_into(self, out: Tensor) -> None:
        """Writes the matrix into `out` [m, n], contiguous, of any floating dtype; fp32 inside."""
        scales, shift = self.scales, self.shift
        _decode.decode(self.packed, self.k, self.table, scales, shift, self.group, out)

    @contextmanager
    def decoded(self, dtype: torch.dtype) -> Iterator[Tensor]:
        with _decode.workspace(self.shape, dtype, self.packed.device) as W:
            if dtype == self.dtype or self.dtype.itemsize >= 4:
                self.decode_into(W)
            else:  # rounded to what `dense` gives, as every other use of the matrix is
                with _decode.workspace(self.shape, self.dtype, self.packed.device) as rounded:
                    self.decode_into(rounded)
                    W.copy_(rounded)
            yield W

    def to_bitsandbytes(self, name: str = "weight") -> dict[str, Tensor]:
        """The tensors of bitsandbytes' serialised form, by key; `name` is the weight's own."""
        from ._bitsandbytes import write

        return write(self, name)

    @classmethod
    def from_bitsandbytes(cls, tensors: Mapping[str, Tensor], name: str = "weight") -> Self:
        """The matrix of that name among tensors of bitsandbytes' serialised form."""
        from ._bitsandbytes import read

        return read(cls, tensors, name)

    def dense(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, device=self.packed.device)
        self.decode_into(out)
        return out

    def histogram(self) -> Tensor:
        counts = torch.bincount(self.codes, minlength=len(self.table))
        return counts[torch.tensor(self.table, device=counts.device).argsort()]

    @property
    def bits(self) -> int:
        """The stored tensors, without the table and the one offset, which no matrix scales with."""
        return super().bits - (0 if self.offset is None else 32)


def _alone(t: Tensor) -> Tensor:
    """A tensor that keeps no more memory than its own: not the start of one filled up to groups."""
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


def nearest(W: Tensor, table: tuple[float, ...], group: int, double: bool = False) -> Blocks:
    """W with each group divided by its largest absolute value, as the nearest codes of a table."""
    codes, absmax = encode(W, table, group)
    _refuse_infinite(absmax)
    k = len(table).bit_length() - 1
    rest = torch.zeros(-codes.numel() % PACKED[k][0], device=W.device)
    packed = pack(torch.cat((codes, _nearest(rest, table))), k)  # zeros to the end of a byte
    return Blocks(W, packed, absmax, table, group, double=double, packed=True)


def rounded(
    W: Tensor, bits: int, group: int, symmetric: bool = True, double: bool = False
) -> Blocks:
    """W as integers of `bits` bits on an even grid.

    Symmetric: -q..q times absmax / q, q = 2^(bits-1) - 1. Asymmetric, as GPTQ has it: from the
    least number or 0 to the largest or 0 in 2^bits - 1 steps, with a zero point.
    """
    groups, top = _grouped(W, group), 2**bits - 1
    absmax = groups.abs().amax(1)
    _refuse_infinite(absmax)
    if symmetric:
        half, zero = top // 2, None
        scales, steps = absmax / half, (half / absmax).nan_to_num(0.0, posinf=0.0)  # of zeros: 0
        places = (groups * steps[:, None]).round() + (half + 1)
        table = tuple(float(i - half - 1) for i in range(top + 1))
    else:
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        scales = (high - low) / top
        scales[scales == 0] = 1.0
        zero = (-low / scales).round()
        places = (groups / scales[:, None]).round() + zero[:, None]
        table, zero = tuple(float(i) for i in range(top + 1)), zero.to(torch.uint8)
    codes = places.clamp(0, top).to(torch.uint8).view(-1)[: W.numel()]
    return Blocks(W, codes, scales, table, group, double=double, zero=zero)


def check_group(part: Any, setting: str) -> None:
    """Refuses a part whose setting is no number of numbers."""
    if getattr(part, setting) < 1:
        raise Incompatible(
            f"{part}: {setting}={getattr(part, setting)}: 1 or more numbers share a scale"
        )


def _refuse_infinite(absmax: Tensor) -> None:
    if not torch.isfinite(absmax).all():
        raise Incompatible("a weight with numbers that are not finite cannot be quantized")
