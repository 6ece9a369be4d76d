"""Cross-entropy at the labelled positions beside that of all logits: one process, in turns.

    python -m benchmarks.loss [--threads N] [--rounds N] [--clock process] [--width N] [--tokens N]
                              [--dtype fp32] [--json FILE]

Forward and backward from the hidden states, with a frozen head. `plain` is what transformers and
PEFT compute: logits of every token, in fp32, and `cross_entropy` with the prompt's ignored.
`chosen` reads the labelled positions from the logits of all (the way of heads that are adapted or
biased). `floor` is the two products of labelled positions with the head, and nothing else. A ratio
is the median of the rounds' own, with the 95 % interval of a median; `*` marks one over its bound.
Peak memory is what lives beyond hidden states and head, exact.
"""

import argparse
import gc
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.loss import LOGITS, labelled, loss_of, token_nats
from experiments.measure import Live, storage_bytes
from experiments.tasks._task import IGNORED

from .clock import ratio, rounds
from .sheet import Sheet, marked

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# vocabulary, share of the tokens that is labelled; bounds of time and peak memory
CASES = [(32_000, 0.25, None, None), (32_000, 1.0, None, None), (128_256, 0.25, 0.25, 0.05),
         (128_256, 1.0, None, None)]  # fmt: skip


def contenders(
    vocabulary: int, share: float, given: argparse.Namespace
) -> tuple[dict[str, Callable[[], Any]], list[Tensor]]:
    """Loss and gradient of the hidden states, in each way; and what all of them are given."""
    g = torch.Generator().manual_seed(0)
    dtype = DTYPES[given.dtype]
    h = torch.randn(4, given.tokens // 4, given.width, generator=g).to(dtype).requires_grad_()
    W = (torch.randn(vocabulary, given.width, generator=g) / given.width**0.5).to(dtype)
    labels = torch.randint(vocabulary, h.shape[:2], generator=g)
    labels[:, : round((1 - share) * h.shape[1])] = IGNORED  # a prompt, then a response
    count = int((labels[:, 1:] != IGNORED).sum())

    def plain() -> Tensor:
        logits = (h @ W.mT).float()[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)

    def here() -> Tensor:
        return labelled(lambda x, y: token_nats(x, W, y), h, labels).sum() / count

    def floor() -> None:
        x = h.detach()[:, :-1][labels[:, 1:] != IGNORED]
        for part in x.split(max(1, LOGITS // vocabulary)):
            _ = (part @ W.mT) @ W

    def learn(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            loss().backward()
            h.grad = None

        return run

    chosen = learn(lambda: loss_of(h @ W.mT, labels, count))
    calls = {"here": learn(here), "plain": learn(plain), "chosen": chosen, "floor": floor}
    return calls, [h, W, labels]


def peak(run: Callable[[], Any], held: Sequence[Tensor]) -> int:
    """Bytes that live at most while it runs, beyond what is held."""
    gc.collect()
    with Live(held) as live:
        run()
    return live.peak - storage_bytes(held)


def compare(case: tuple[Any, ...], given: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    vocabulary, share, time, memory = case
    calls, held = contenders(vocabulary, share, given)
    bytes_ = {name: peak(calls[name], held) for name in ("here", "plain", "chosen")}
    seconds = rounds(calls, given.rounds, given.clock)
    middle, low, high = ratio(seconds["here"], seconds["plain"])
    return {
        "vocabulary": vocabulary, "labelled": share,
        "ms": {k: 1e3 * statistics.median(v) for k, v in seconds.items()},
        "time": middle, "interval": [low, high], "time_bound": time,
        "floor": ratio(seconds["floor"], seconds["plain"])[0],
        "chosen": ratio(seconds["chosen"], seconds["plain"])[0],
        "peak": bytes_, "memory": bytes_["here"] / bytes_["plain"], "memory_bound": memory,
    }  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """The row as it is shown."""
    return [
        f"{row['vocabulary']:,}", f"{row['labelled']:g}",
        *(f"{row['ms'][k]:.0f}" for k in ("here", "plain", "chosen", "floor")),
        marked(row["time"], row["time_bound"], row["interval"], digits=3),
        f"{row['chosen']:.2f}", f"{row['floor']:.2f}",
        *(f"{row['peak'][k] / 2**20:.1f}" for k in ("here", "plain")),
        marked(row["memory"], row["memory_bound"], digits=3),
    ]  # fmt: skip


def main() -> None:
    """The command."""
    sheet = Sheet("loss", __doc__, rounds=11)
    sheet.flag("--width", type=int, default=512)
    sheet.flag("--tokens", type=int, default=1024)
    sheet.flag("--dtype", choices=list(DTYPES), default="bf16")
    given = sheet.begin()
    found = []
    for case in CASES:
        row = compare(case, given)
        found.append(row)
        print(f"{row['vocabulary']}, {row['labelled']}: {row['time']:.3f}", flush=True)
    sheet.table(
        f"{given.tokens} tokens, width {given.width}, {given.dtype}, {sheet.timed}",
        ("vocabulary", "labelled", "here ms", "plain ms", "chosen ms", "floor ms", "time / plain",
         "chosen / plain", "floor / plain", "MiB here", "MiB plain", "peak / plain"),
        map(cells, found),
    )  # fmt: skip
    sheet.write(found)


if __name__ == "__main__":
    main()
