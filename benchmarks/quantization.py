"""Products through a 4-bit matrix beside the dense one and bitsandbytes': one process, no model.

    python -m benchmarks.quantization [--threads N] [--rounds N] [--double] [--tokens N ...]
                                      [--json FILE]

NF4 in blocks of 64, a 2048 x 2048 matrix, forward and backward apart, in fp32 and bf16. Contenders:
the dense product; `torch`, this project's decoding by torch; `compiled`, the same in C; `backend`,
this project's product over bitsandbytes' functions; `bnb`, bitsandbytes' `matmul_4bit`, which PEFT
calls; `bnb parts`, its `dequantize_4bit` and a product. Then decoding alone and quantizing, both of
4096 x 4096.

Every round runs each contender once, in turns that begin elsewhere each time. A ratio is the median
of the rounds' own ratios, with the 95 % interval of a median (order statistics); `*` marks one over
its bound. On a machine that does other work, one thread and `--clock process` (processor time).
"""

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from variants._registry import find_part

from .clock import ratio, rounds
from .sheet import Sheet, marked

TOKENS = (1, 16, 64, 256, 1024, 2048)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def decoding(way: str, call: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """call(*args), with this project's decoding done in that way."""

    def run() -> Any:
        os.environ["LORA_DECODE"] = way
        return call(*args)

    return run


def gradient(y: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> Any:
    """Backward alone, which can be repeated."""
    return torch.autograd.grad(y, x, g, retain_graph=True)


def bound(contender: str, reference: str, direction: str, tokens: int) -> float | None:
    """What the ratio should not exceed, where something is asked."""
    if reference == "dense":
        return 1.1 if contender == "torch" and tokens >= 1024 else None
    if direction == "backward":
        return 1.0 if contender in ("compiled", "backend", "torch") else None
    if tokens == 64:
        return {"torch": 1.25, "compiled": 1.0, "backend": 1.0}.get(contender)
    return None


def products(dtype: torch.dtype, double: bool, size: int = 2048) -> dict[str, Any]:
    """(how this project decodes, product of x [tokens, size]) by contender."""
    import bitsandbytes
    from bitsandbytes import functional

    generator = torch.Generator().manual_seed(0)
    W = torch.randn(size, size, generator=generator).mul_(0.02).to(dtype)
    stored, backend = (
        find_part("base", "nf4_dq" if double else "nf4").load(backend=name).store(W)
        for name in ("own", "bitsandbytes")
    )
    codes, state = functional.quantize_4bit(
        W, blocksize=64, compress_statistics=double, quant_type="nf4"
    )
    return {
        "dense": ("torch", lambda x: F.linear(x, W)),
        "torch": ("torch", stored.product),
        "compiled": ("compiled", stored.product),
        "backend": ("torch", backend.product),
        "bnb": ("torch", lambda x: bitsandbytes.matmul_4bit(x, codes, state)),
        "bnb parts": ("torch", lambda x: F.linear(x, functional.dequantize_4bit(codes, state))),
    }


def product_rows(dtype: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of tokens and direction."""
    found = []
    contenders = products(DTYPES[dtype], given.double)
    for tokens in given.tokens:
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, 2048, generator=generator).to(DTYPES[dtype]).requires_grad_()
        g = torch.randn(tokens, 2048, generator=generator).to(DTYPES[dtype])
        calls: dict[str, dict[str, Callable[[], Any]]] = {"forward": {}, "backward": {}}
        for name, (way, product) in contenders.items():
            calls["forward"][name] = decoding(way, product, x)
            calls["backward"][name] = decoding(way, gradient, product(x), x, g)
        for direction, own in calls.items():
            seconds = rounds(own, given.rounds, given.clock)
            found.append({"dtype": dtype, "tokens": tokens, "direction": direction}
                         | summary(seconds, ("dense", "bnb"), direction, tokens))  # fmt: skip
    return found


def summary(seconds: dict[str, list[float]], references: tuple[str, ...], direction: str,
            tokens: int) -> dict[str, Any]:  # fmt: skip
    """Median milliseconds, and the ratios to the references with interval and bound."""
    row: dict[str, Any] = {"ms": {k: 1000 * statistics.median(v) for k, v in seconds.items()}}
    for reference in references:
        for name in seconds:
            if name != reference:
                middle, low, high = ratio(seconds[name], seconds[reference])
                most = bound(name, reference, direction, tokens)
                row[f"{name} / {reference}"] = {"ratio": middle, "interval": [low, high],
                                                "bound": most}  # fmt: skip
    return row


def alone(dtype: str, double: bool, count: int, clock: str) -> list[dict[str, Any]]:
    """Decoding a 4096 x 4096 matrix, into a workspace or fresh memory, and quantizing it."""
    from bitsandbytes import functional

    W = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    base = find_part("base", "nf4_dq" if double else "nf4").load()
    settings: dict[str, Any] = {
        "blocksize": 64, "compress_statistics": double, "quant_type": "nf4"
    }  # fmt: skip
    stored, (codes, state) = base.store(W), functional.quantize_4bit(W, **settings)
    out = torch.empty_like(W)
    decoded = rounds({
        "torch": decoding("torch", stored.decode_into, out),
        "compiled": decoding("compiled", stored.decode_into, out),
        "torch, fresh": decoding("torch", stored.dense),
        "compiled, fresh": decoding("compiled", stored.dense),
        "bnb": lambda: functional.dequantize_4bit(codes, state),
    }, count, clock)  # fmt: skip
    quantized = rounds({
        "torch": lambda: base.store(W),
        "bnb": lambda: functional.quantize_4bit(W, **settings),
    }, count, clock)  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"dtype": dtype, "what": "decode"} | summary(decoded, ("bnb",), "", 0),
        {"dtype": dtype, "what": "quantize"} | summary(quantized, ("bnb",), "", 0),
    ]
    rows[1]["torch / bnb"]["bound"] = 2.0
    return rows


def cell(found: dict[str, Any] | None) -> str:
    """1.08 [1.06, 1.11] of 1.10, with a mark where the median is over its bound."""
    return "" if found is None else marked(found["ratio"], found["bound"], found["interval"])


def main() -> None:
    """The command."""
    sheet = Sheet("quantization", __doc__, rounds=21)
    sheet.flag("--double", action="store_true", help="quantize the scales as well")
    sheet.flag("--tokens", type=int, nargs="+", default=TOKENS, help="of the products")
    given = sheet.begin()
    found: list[dict[str, Any]] = []

    def show(title: str, rows: list[dict[str, Any]], keys: tuple[str, ...], ms: tuple[str, ...],
             ratios: tuple[str, ...]) -> None:  # fmt: skip
        found.extend(rows)
        sheet.table(
            f"{title}, {sheet.timed}",
            (keys[0], "", *(f"{name} ms" for name in ms), *ratios),
            ((*(str(row[key]) for key in keys), *(f"{row['ms'][name]:.2f}" for name in ms),
              *(cell(row.get(name)) for name in ratios)) for row in rows),
        )  # fmt: skip

    for dtype in DTYPES:
        rows = product_rows(dtype, given)
        shown = ("torch / dense", "torch / bnb", "compiled / bnb", "backend / bnb",
                 "bnb parts / bnb", "compiled / dense")  # fmt: skip
        show(f"2048 x 2048, {dtype}", rows, ("tokens", "direction"), ("dense", "bnb"), shown)
    rows = [row for dtype in DTYPES for row in alone(dtype, given.double, given.rounds,
                                                     given.clock)]  # fmt: skip
    shown = ("torch / bnb", "compiled / bnb", "torch, fresh / bnb", "compiled, fresh / bnb")
    show("4096 x 4096", rows, ("dtype", "what"), ("bnb",), shown)
    sheet.write(found)


if __name__ == "__main__":
    main()
