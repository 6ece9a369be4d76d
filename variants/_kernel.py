"""Decoding 4 bits in C, where a compiler is at hand: what `_decode.py` computes, to the bit.

Sixteen numbers are one register: a group's 16 values are scaled and rounded once, and a look into
them is one instruction where the processor has it. Compiled when a matrix of a million numbers or
more is first decoded, in less than a second, for this machine and this process alone. `LORA_DECODE`
is `auto` (unset), `torch` (never compile) or `compiled` (any size, and a missing compiler is an
error). Why C and not torch.compile: docs/adr/0008.
"""

import ctypes
import logging
import math
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ._registry import Incompatible

LARGE = 2**20  # numbers: from here on a second of compiling is won back within a run
RUN = 32  # codes, 16 bytes: what is decoded at once
SPAN = 64  # runs, at most, that a thread takes at a time
CHOICES = ("auto", "torch", "compiled")

SOURCE = r"""
#include <stdint.h>
#include <string.h>
typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef int32_t places __attribute__((vector_size(64)));
static const places FIRST = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};

#if defined(__clang__)
static inline words mix(words a, words b, places at) {
    words found;
    for (int i = 0; i < 16; i++) found[i] = at[i] & 16 ? b[at[i] & 15] : a[at[i] & 15];
    return found;
}
#define look(table, at) mix(table, table, (places)(at))
#else
#define mix(a, b, at) __builtin_shuffle(a, b, at)
#define look(table, at) __builtin_shuffle(table, (places)(at))
#endif

static inline words load(const uint8_t *bytes) {
    uint32_t wide[16];
    words found;
    for (int i = 0; i < 16; i++) wide[i] = bytes[i];
    memcpy(&found, wide, 64);
    return found;
}

static inline words scaled(const float *table, const float *scale, const float *shift, int64_t g) {
    floats values;
    memcpy(&values, table, 64);
    values = values * scale[g];
    return (words)(shift ? values + shift[g] : values);
}

/* Runs of 32 codes, `per_group` to a group and `span` (a divisor of it) to a turn of a thread; the
   first code of a byte is in its high half. */
#define TURNS                                                               \
    _Pragma("omp parallel for num_threads(threads)")                        \
    for (int64_t start = 0; start < runs; start += span) {                     \
        words values = scaled(table, scale, shift, start / per_group);      \
        int64_t end = start + span < runs ? start + span : runs;
#define GIVEN const uint8_t *in, const float *table, const float *scale, const float *shift, \
              int64_t runs, int64_t per_group, int64_t span, int threads

void to_float32(GIVEN, float *out) {
    TURNS
        for (int64_t r = start; r < end; r++) {
            words at = load(in + 16 * r), even = look(values, at >> 4), odd = look(values, at);
            words first = mix(even, odd, FIRST), second = mix(even, odd, FIRST + 8);
            memcpy(out + 32 * r, &first, 64);
            memcpy(out + 32 * r + 16, &second, 64);
        }
    }
}

void to_bfloat16(GIVEN, uint16_t *out) {
    TURNS
        values += 0x7fff + (values >> 16 & 1); /* to the nearest, ties to even */
        words low = values >> 16, high = values & 0xffff0000u;
        for (int64_t r = start; r < end; r++) {
            words at = load(in + 16 * r), pairs = look(low, at >> 4) | look(high, at);
            memcpy(out + 32 * r, &pairs, 64);
        }
    }
}
"""

log = logging.getLogger("variants")


def decode(
    packed: Tensor,
    bits: int,
    table: tuple[float, ...],
    scales: Tensor,
    shift: Tensor | None,
    group: int,
    out: Tensor,
) -> bool:
    """Fills the flat `out`, where it can; whether it did."""
    choice = os.environ.get("LORA_DECODE") or "auto"
    if choice not in CHOICES:
        raise Incompatible(f"LORA_DECODE={choice}: one of {', '.join(CHOICES)}")
    if (
        choice == "torch"
        or bits != 4
        or out.device.type != "cpu"
        or out.dtype not in (torch.float32, torch.bfloat16)
        or out.numel() % RUN
        or group % RUN
        or (choice == "auto" and out.numel() < LARGE)
    ):
        return False
    library = compiled()
    if library is None:
        if choice == "compiled":
            raise Incompatible("LORA_DECODE=compiled: no C compiler that works was found")
        return False
    _fill(library, packed, table, scales, shift, group, out)
    return True


def _fill(
    library: ctypes.CDLL,
    packed: Tensor,
    table: tuple[float, ...],
    scales: Tensor,
    shift: Tensor | None,
    group: int,
    out: Tensor,
) -> None:
    given = [packed.contiguous(), torch.tensor(table), scales.contiguous()]
    given.append(torch.empty(0) if shift is None else shift.contiguous())  # empty: a null pointer
    runs, per_group = out.numel() // RUN, group // RUN
    counts = runs, per_group, math.gcd(per_group, SPAN)
    function = library.to_float32 if out.dtype == torch.float32 else library.to_bfloat16
    function(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in given),
        *(ctypes.c_int64(count) for count in counts),
        ctypes.c_int(torch.get_num_threads()),
        ctypes.c_void_p(out.data_ptr()),
    )


@cache
def compiled() -> ctypes.CDLL | None:
    """The library, compiled for this machine and tried, or None after a line in the log."""
    names = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))
    commands = (shlex.split(name) for name in names)
    compiler = next((words for words in commands if shutil.which(words[0])), None)
    if compiler is None:
        log.warning("no C compiler (CC, cc, gcc, clang): 4-bit codes are decoded by torch, slower")
        return None
    problem = ""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "decode.c"), Path(folder, "decode.so")
        source.write_text(SOURCE)
        flags = ["-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC"]
        for threads in (["-fopenmp"], []):
            command = [*compiler, *flags, *threads, str(source), "-o", str(target)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
                library = ctypes.CDLL(str(target))
            except (OSError, subprocess.SubprocessError) as error:
                problem = (getattr(error, "stderr", None) or str(error)).strip().split("\n")[0]
                continue
            if _right(library):
                return library
            problem = "it computes other numbers"
    log.warning("no compiled decoder (%s): 4-bit codes are decoded by torch, slower", problem)
    return None


def _right(library: ctypes.CDLL) -> bool:
    """Whether every byte gives the two numbers it stands for, in both dtypes."""
    packed = torch.arange(256, dtype=torch.uint8)
    table = tuple((i / 7 - 1) * 1.1**i for i in range(16))
    scales, shift = torch.linspace(0.3, 2.0, 8), torch.linspace(-1.0, 1.0, 8)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(8, 64).int()
    wanted = torch.tensor(table)[codes] * scales[:, None] + shift[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        found = torch.empty(8, 64, dtype=dtype)
        _fill(library, packed, table, scales, shift, 64, found)
        if not torch.equal(found, wanted.to(dtype)):
            return False
    return True
