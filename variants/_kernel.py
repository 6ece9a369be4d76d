"""Decoding 4 bits in C, where a compiler is at hand: what `_decode.py` computes, to the bit.

A group's 16 numbers are scaled and rounded once. Their first bytes are one register, their second
bytes another, and so on; 16 looks into a register are one instruction, of x86 (SSSE3) and of ARM,
and what they find is laced into numbers. Compiled when a matrix of a million numbers or more is
first decoded, in less than a second, for this machine and this process alone. `LORA_DECODE` is
`auto` (unset), `torch` (never compile) or `compiled` (any size; a missing compiler is an error).
Why C and not torch.compile: docs/adr/0008.
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
from typing import Any

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
#if defined(__SSSE3__)
#include <tmmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#define VECTOR __attribute__((vector_size(16)))
typedef float floats VECTOR;
typedef uint32_t words VECTOR;
typedef uint8_t bytes VECTOR;
typedef uint16_t halves VECTOR;
typedef uint64_t doubles VECTOR;
typedef struct { bytes of[4]; } planes; /* the first bytes of the 16 numbers, their second, .. */

#if defined(__clang__)
#define mix(kind, a, b, ...) (bytes)__builtin_shufflevector((kind)(a), (kind)(b), __VA_ARGS__)
#else
#define mix(kind, a, b, ...) (bytes)__builtin_shuffle((kind)(a), (kind)(b), (kind){__VA_ARGS__})
#endif
#define LOW(a, b) mix(bytes, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) mix(bytes, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define LOW_HALVES(a, b) mix(halves, a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH_HALVES(a, b) mix(halves, a, b, 4, 12, 5, 13, 6, 14, 7, 15)

static inline bytes look(bytes plane, bytes at) {
#if defined(__SSSE3__)
    return (bytes)_mm_shuffle_epi8((__m128i)plane, (__m128i)at);
#elif defined(__aarch64__)
    return (bytes)vqtbl1q_u8((uint8x16_t)plane, (uint8x16_t)at);
#else
    bytes found;
    for (int i = 0; i < 16; i++) found[i] = plane[at[i]];
    return found;
#endif
}

/* table * scale + shift; for bf16 rounded to the nearest, ties to even */
static inline planes scaled(const float *table, float scale, const float *shift, int narrow) {
    bytes four[4];
    for (int i = 0; i < 4; i++) {
        floats values;
        memcpy(&values, table + 4 * i, 16);
        values = values * scale;
        words own = (words)(shift ? values + *shift : values);
        own = narrow ? own + 0x7fff + (own >> 16 & 1) : own;
        four[i] = mix(bytes, own, own, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    }
    bytes a = mix(words, four[0], four[1], 0, 4, 1, 5);
    bytes b = mix(words, four[2], four[3], 0, 4, 1, 5);
    bytes c = mix(words, four[0], four[1], 2, 6, 3, 7);
    bytes d = mix(words, four[2], four[3], 2, 6, 3, 7);
    return (planes){{mix(doubles, a, b, 0, 2), mix(doubles, a, b, 1, 3),
                     mix(doubles, c, d, 0, 2), mix(doubles, c, d, 1, 3)}};
}

static inline void put(bytes found, void *out, int at) {
    memcpy((uint8_t *)out + 16 * at, &found, 16);
}

/* 16 codes */
static inline void to_float32(bytes at, planes numbers, uint32_t *out) {
    bytes a = look(numbers.of[0], at), b = look(numbers.of[1], at);
    bytes c = look(numbers.of[2], at), d = look(numbers.of[3], at);
    put(LOW_HALVES(LOW(a, b), LOW(c, d)), out, 0);
    put(HIGH_HALVES(LOW(a, b), LOW(c, d)), out, 1);
    put(LOW_HALVES(HIGH(a, b), HIGH(c, d)), out, 2);
    put(HIGH_HALVES(HIGH(a, b), HIGH(c, d)), out, 3);
}

static inline void to_bfloat16(bytes at, planes numbers, uint16_t *out) {
    bytes c = look(numbers.of[2], at), d = look(numbers.of[3], at);
    put(LOW(c, d), out, 0);
    put(HIGH(c, d), out, 1);
}

/* Runs of 32 codes, `per_group` to a group and `span` (a divisor of it) to a turn of a thread; the
   first code of a byte is in its high half. */
#define DECODER(name, type, to, narrow)                                                         \
    void name(const uint8_t *in, const float *table, const float *scale, const float *shift,    \
              int64_t runs, int64_t per_group, int64_t span, int threads, type *out) {          \
        int64_t turns = (runs + span - 1) / span;                                               \
        _Pragma("omp parallel for num_threads(threads)")                                        \
        for (int64_t turn = 0; turn < turns; turn++) {                                          \
            int64_t start = turn * span, end = start + span < runs ? start + span : runs;       \
            int64_t group = span == per_group ? turn : start / per_group; /* it is slow */      \
            planes numbers = scaled(table, scale[group], shift ? shift + group : 0, narrow);    \
            for (int64_t run = start; run < end; run++) {                                       \
                bytes at;                                                                       \
                memcpy(&at, in + 16 * run, 16);                                                 \
                to(LOW(at >> 4, at & 15), numbers, out + 32 * run);                             \
                to(HIGH(at >> 4, at & 15), numbers, out + 32 * run + 16);                       \
            }                                                                                   \
        }                                                                                       \
    }

DECODER(decode_to_float32, uint32_t, to_float32, 0)
DECODER(decode_to_bfloat16, uint16_t, to_bfloat16, 1)
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
    numbers = torch.tensor(table, dtype=torch.float32, device="cpu")
    given = [packed.contiguous(), numbers, scales.contiguous()]
    given.append(numbers[:0] if shift is None else shift.contiguous())  # empty: a null pointer
    runs, per_group = out.numel() // RUN, group // RUN
    counts = runs, per_group, math.gcd(per_group, SPAN)
    function = library[f"decode_to_{str(out.dtype).removeprefix('torch.')}"]
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
    own: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
    packed = torch.arange(256, dtype=torch.uint8, device="cpu")
    table = tuple((i / 7 - 1) * 1.1**i for i in range(16))
    scales, shift = torch.linspace(0.3, 2.0, 8, **own), torch.linspace(-1.0, 1.0, 8, **own)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(8, 64).int()
    wanted = torch.tensor(table, **own)[codes] * scales[:, None] + shift[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        found = torch.empty(8, 64, dtype=dtype, device="cpu")
        _fill(library, packed, table, scales, shift, 64, found)
        if not torch.equal(found, wanted.to(dtype)):
            return False
    return True
