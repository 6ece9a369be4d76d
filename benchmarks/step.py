"""Forward and backward of an adapted model beside PEFT's same method: one process, in turns.

    python -m benchmarks.step [--only WORD] [--threads N] [--rounds N] [--clock process]
                              [--width N] [--tokens N] [--layers N] [--json FILE]

A Llama of random weights, all its linear layers adapted. PEFT's contender is the adapter as this
project exports it, read by PEFT, so both compute the same, but for DoRA's dropout on the low-rank
path only, which PEFT lacks: its own stands beside it. PEFT keeps its default, adapters in fp32
under a bf16 model. `floor` is the frozen model with the gradient of its inputs alone. A ratio is
the median of the rounds' own, with the 95 % interval of a median; `*` marks one over its bound.
Bytes are all that autograd keeps for backward; they and FLOPs are exact.
"""

import argparse
import gc
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import variants
from experiments.measure import measure

from .clock import ratio, rounds
from .sheet import Sheet, marked

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VOCABULARY = 512


class Method(NamedTuple):
    """A variant in a dtype, and what its ratios to PEFT should not exceed."""

    variant: str
    dtype: str
    dropout: float = 0.0
    time: float | None = None
    kept: float | None = None
    settings: dict[str, Any] = {}  # noqa: RUF012  (of attach)
    note: str = ""

    @property
    def name(self) -> str:
        return " ".join([self.variant, self.dtype, *([f"dropout {self.dropout}"] if self.dropout
                                                     else []), self.note]).strip()  # fmt: skip


METHODS = [
    Method("lora", "bf16", time=0.80, kept=0.42),
    Method("lora", "bf16", 0.05, time=0.68, kept=0.45),
    Method("lora", "fp32", time=0.95, kept=0.72),
    Method("dora", "bf16", time=0.65, kept=0.33),
    Method("dora", "bf16", 0.05, time=0.60, kept=0.30),
    Method("dora", "fp32", time=0.87, kept=0.48),
    Method("dora", "fp32", 0.05, time=0.85, kept=0.45),
    *(
        Method(
            "dora",
            dtype,
            0.05,
            time=time,
            note="low-rank path only",
            settings={"form": {"name": "dora", "dropout_on": "low_rank"}},
        )
        for dtype, time in (("bf16", 0.35), ("fp32", 0.55))
    ),
    Method("vera", "bf16", time=0.70, kept=0.70, settings={"rank": 256}),
    Method("loha", "bf16", time=0.70, kept=0.70),
    Method("lokr", "bf16", time=0.70, kept=0.70),
    Method("oft", "bf16", time=0.70, kept=0.70, settings={"rank": 32}),
    Method(
        "boft",
        "bf16",
        time=0.70,
        kept=0.70,  # PEFT has one factor without its CUDA extension
        settings={"form": {"name": "boft", "depth": 1}},
    ),
    Method("randlora", "bf16", time=0.70, kept=0.70),
    Method("hira", "bf16", time=0.70, kept=0.70),
]


def llama(dtype: torch.dtype, width: int, layers: int) -> Any:
    """The benchmark's base, the same each time."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=(width * 43 // 16) // 8 * 8,
        num_hidden_layers=layers, num_attention_heads=max(1, width // 64),
    )  # fmt: skip
    built: Any = transformers.LlamaForCausalLM(config)
    return built.to(dtype).train()


def peft_s(adapter: variants.Adapter, base: Any) -> Any:
    """The same adapter on `base`, as PEFT reads it, to train on."""
    import peft

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = adapter.save_peft(folder)
        return peft.PeftModel.from_pretrained(base, str(path), is_trainable=True).train()


def step(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward; gradients are given back."""

    def run() -> None:
        model(input_ids=ids).logits.float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return run


def compare(method: Method, given: argparse.Namespace) -> dict[str, Any]:
    """Time, bytes and FLOPs of one method here, in PEFT, and at the floor."""
    dtype, size = DTYPES[method.dtype], (given.width, given.layers)
    ids = torch.randint(VOCABULARY, (4, given.tokens // 4),
                        generator=torch.Generator().manual_seed(1))  # fmt: skip
    floor, ours = llama(dtype, *size), llama(dtype, *size)
    floor.requires_grad_(False)
    # gradients flow, no layer learns
    floor.get_input_embeddings().weight.requires_grad_(True)
    settings: dict[str, Any] = {"rank": 16} | method.settings
    adapter = variants.attach(ours, method.variant, dropout=method.dropout, **settings)
    models = {"here": ours, "PEFT": peft_s(adapter, llama(dtype, *size)), "floor": floor}
    calls = {name: step(model, ids) for name, model in models.items()}
    exact = {name: measure(calls[name], model) for name, model in models.items()}
    gc.collect()
    seconds = rounds(calls, given.rounds, given.clock)
    kept = {k: found["saved_bytes"] for k, found in exact.items()}
    middle, low, high = ratio(seconds["here"], seconds["PEFT"])
    return {
        "method": method.name, "ms": {k: 1e3 * statistics.median(v) for k, v in seconds.items()},
        "time": middle, "interval": [low, high], "time_bound": method.time,
        "floor": ratio(seconds["floor"], seconds["PEFT"])[0],
        "kept": kept, "kept_ratio": kept["here"] / kept["PEFT"], "kept_bound": method.kept,
        "flops": exact["here"]["flops"] / exact["PEFT"]["flops"],
    }  # fmt: skip


def rows(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a method."""
    for method in METHODS:
        if given.only in method.name:
            yield compare(method, given)


def cells(row: dict[str, Any]) -> list[str]:
    """The row as it is shown."""
    return [
        row["method"], *(f"{row['ms'][k]:.1f}" for k in ("here", "PEFT", "floor")),
        marked(row["time"], row["time_bound"], row["interval"]), f"{row['floor']:.2f}",
        *(f"{row['kept'][k] / 2**20:.1f}" for k in ("here", "PEFT")),
        marked(row["kept_ratio"], row["kept_bound"]), f"{row['flops']:.2f}",
    ]  # fmt: skip


def main() -> None:
    """The command."""
    sheet = Sheet("step", __doc__, rounds=11)
    sheet.flag("--only", default="", help="methods whose name has this")
    sheet.flag("--width", type=int, default=512)
    sheet.flag("--layers", type=int, default=2)
    sheet.flag("--tokens", type=int, default=1024)
    given = sheet.begin()
    found = []
    for row in rows(given):
        found.append(row)
        print(f"{row['method']}: {row['time']:.2f}", flush=True)
    sheet.table(
        f"width {given.width}, {given.layers} layers, {given.tokens} tokens, {sheet.timed}",
        ("method", "here ms", "PEFT ms", "floor ms", "time / PEFT", "floor / PEFT", "MiB here",
         "MiB PEFT", "bytes / PEFT", "FLOPs / PEFT"),
        map(cells, found),
    )  # fmt: skip
    sheet.write(found)


if __name__ == "__main__":
    main()
