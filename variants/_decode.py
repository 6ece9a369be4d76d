"""Codes to numbers by table, in one pass, straight into a tensor that is there already.

    out[i] = table[code[i]] * scale[i // group] + shift[i // group],    in fp32, rounded once to out

A byte holds two codes of 4 bits: a table of its 256 pairs gives both at once, as one number of 8
bytes. Likewise four codes of 2 bits in a byte, and four of 3 bits in 12. It goes by pieces that fit
a cache, and on a CPU, where a C compiler is at hand, 4 bits of a large matrix in a few lines of C
(`_kernel.py`): the same numbers, several times sooner.

>>> table, scales = (-1.0, 0.0, 0.5, 1.0), torch.tensor([2.0, 10.0])
>>> packed = torch.tensor([0b00011011, 0b11001001], dtype=torch.uint8)
>>> decode(packed, 2, table, scales, None, 4, torch.empty(2, 4)).tolist()
[[-2.0, 0.0, 1.0, 2.0], [10.0, -10.0, 5.0, 0.0]]
>>> decode(packed, 2, table, scales, torch.tensor([0.5, 7.0]), 4, torch.empty(2, 4)).tolist()
[[-1.5, 0.5, 1.5, 2.5], [17.0, -3.0, 12.0, 7.0]]

The workspace in which a layer is decoded is one for all layers of a thread, as large as the largest
so far. Whoever holds it holds it alone:

>>> with workspace((2, 3), torch.float32, packed.device) as W:
...     with workspace((2, 3), torch.float32, packed.device) as other:
...         first, apart = W.data_ptr(), W.data_ptr() != other.data_ptr()
>>> with workspace((3,), torch.bfloat16, packed.device) as V:
...     apart, V.data_ptr() == first, V.shape
(True, True, torch.Size([3]))
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from . import _kernel

PIECE = 2**19  # numbers: a piece in fp32 and its places fit a cache
WIDE = {1: torch.float32, 2: torch.int64, 4: torch.complex128}  # so many fp32 numbers as one
WORD = {2: (1, 4), 3: (3, 8), 4: (1, 2), 8: (1, 1)}  # bits -> bytes that are whole codes, codes


def decode(
    packed: Tensor,
    bits: int,
    table: tuple[float, ...],
    scales: Tensor,
    shift: Tensor | None,
    group: int,
    out: Tensor,
) -> Tensor:
    """Fills and returns `out`.

    Args:
        packed: uint8, codes of 2, 3, 4 or 8 bits, the first in the highest bits; the last byte (of
            3 bits: the last three) is whole.
        table: the 2^bits values.
        scales, shift: fp32 [groups], one for `group` numbers; the last group may be short.
        out: contiguous, any shape and floating dtype.
    """
    flat, (size, count) = out.view(-1), WORD[bits]
    if _kernel.decode(packed, bits, table, scales, shift, group, flat):
        return out
    numbers = _numbers(table, bits, packed.device)
    step = math.lcm(group, count)
    step = PIECE // step * step or PIECE
    scratch = None
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step]
        words = -(-piece.numel() // count)
        values = piece
        if flat.dtype != torch.float32 or words * count != piece.numel():
            if scratch is None:  # the first piece is the largest, up to a word's end
                scratch = torch.empty(words * count, dtype=torch.float32, device=flat.device)
            values = scratch[: words * count]
        first = start // count * size
        _look(packed[first : first + words * size], bits, numbers, values)
        values = values[: piece.numel()]
        _each(values, Tensor.mul_, scales, start, group)
        if shift is not None:
            _each(values, Tensor.add_, shift, start, group)
        if values is not piece:
            piece.copy_(values)
    return out


@cache
def _numbers(table: tuple[float, ...], bits: int, device: torch.device) -> Tensor:
    """What a byte (of 3 bits: 12 bits) stands for, its numbers read as one wide one, in order."""
    together = 4 if bits == 3 else WORD[bits][1]
    with torch.inference_mode(False):  # or later calls outside of it could not use it
        values = torch.tensor(table, dtype=torch.float32)
        sets = torch.cartesian_prod(*[values] * together).view(-1, together)
        return sets.view(WIDE[together]).view(-1).to(device)


def _look(packed: Tensor, bits: int, numbers: Tensor, values: Tensor) -> None:
    """values[i] = table[code[i]] of whole words."""
    out, rows = values.view(numbers.dtype), torch.get_num_threads()
    spread = values.device.type == "cpu" and rows > 1 and out.numel() % rows == 0
    places = packed.to(torch.int64 if spread else torch.int32)
    if bits == 3:
        a, b, c = places.view(-1, 3).unbind(1)
        places = torch.stack((a << 4 | b >> 4, (b & 15) << 8 | c), dim=1).view(-1)
    if spread:  # the same as below, on all threads
        table = numbers.expand(rows, -1)
        torch.gather(table, 1, places.view(rows, -1), out=out.view(rows, -1))
    else:
        torch.index_select(numbers, 0, places, out=out)


def _each(values: Tensor, apply: Callable[..., Tensor], by: Tensor, start: int, group: int) -> None:
    """values (op)= by[i // group], i counted from `start`."""
    first, last = start // group, (start + values.numel() - 1) // group
    if first == last:
        apply(values, by[first])
    elif start % group == 0 and values.numel() % group == 0:
        apply(values.view(-1, group), by[first : last + 1, None])
    else:  # a piece that begins or ends within a group
        places = torch.arange(start, start + values.numel(), device=by.device) // group
        apply(values, by[places])


class _Spare(threading.local):
    bytes: Tensor | None = None


_spare = _Spare()


@contextmanager
def workspace(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """An uninitialized tensor that is the caller's until the block ends, and nobody's after.

    On a CPU fresh memory costs more than decoding into it, so a thread keeps what it had last; who
    asks while that is out gets another. Elsewhere torch's own allocator keeps it, by stream.
    """
    if device.type != "cpu":
        yield torch.empty(shape, dtype=dtype, device=device)
        return
    size = math.prod(shape) * dtype.itemsize
    held, _spare.bytes = _spare.bytes, None
    if held is None or held.numel() < size:
        held = None  # let go before more is asked for
        with torch.inference_mode(False):
            held = torch.empty(size, dtype=torch.uint8)
    try:
        yield held[:size].view(dtype).view(shape)
    finally:
        if _spare.bytes is None or _spare.bytes.numel() <= held.numel():
            _spare.bytes = held
