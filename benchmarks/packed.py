"""Steps of K adapters on one base, packed, beside K steps one after another, here and in PEFT.

    python -m benchmarks.packed [--rounds N] [--threads N] [--clock process] [--caps] [--json FILE]

A Llama of random weights, LoRA of rank 16 on all linear layers, K = 8 slices of 16 tokens each; a
step is forward, loss, backward, clipping and AdamW of each slice. `--caps`: instead, as many slices
as the launcher's cap on rows allows, at several widths and tokens, and of DoRA as well.

Every round runs each contender once, in turns that begin elsewhere each time. A ratio is the median
of the rounds' own ratios, with its 95 % interval; `*` marks one over its bound.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import variants
from variants._packed import Pack, twin
from variants._targets import HEADS

from .clock import ratio, rounds
from .memory import DTYPES, TARGETS
from .sheet import Sheet, marked

VOCABULARY = 512
NAMES = ("width", "layers", "dtype", "base", "tokens", "slices", "preset")
# the numbers of those names, tokens being a slice's; the bound of packed / PEFT
ASKED = (
    ((256, 2, "fp32", "dense", 16, 8, "lora"), 0.32),
    ((2048, 1, "bf16", "dense", 16, 8, "lora"), 0.42),
    ((2048, 1, "bf16", "nf4", 16, 8, "lora"), 0.20),
)
# where the launcher stops: 1,000 tokens of all slices together, a quarter of them one slice's
CAPPED = tuple(
    ((width, layers, "fp32", "dense", tokens, slices, preset), None)
    for preset in ("lora", "dora")
    for width, layers in ((96, 2), (512, 1), (1024, 1))
    for slices, tokens in ((7, 140), (4, 250), (2, 250))
)


def model(width: int, layers: int, dtype: str) -> Any:
    """The base."""
    import transformers

    torch.manual_seed(0)
    sizes: Any = {
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 43 * width // 16,
        "num_hidden_layers": layers, "num_attention_heads": max(4, width // 128),
    }  # fmt: skip
    built: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return built.to(DTYPES[dtype])


def theirs(base: Any, stored: str) -> tuple[Any, list[Tensor]]:
    """PEFT's LoRA on the base, and what it trains."""
    import peft

    if stored == "nf4":
        import bitsandbytes

        kernels: Any = bitsandbytes.nn
        for path, layer in list(base.named_modules()):
            if isinstance(layer, nn.Linear) and path not in HEADS:
                new = kernels.Linear4bit(
                    layer.in_features, layer.out_features, bias=False,
                    compute_dtype=layer.weight.dtype, quant_type="nf4", compress_statistics=False,
                )  # fmt: skip
                new.weight = kernels.Params4bit(
                    layer.weight.data, requires_grad=False, quant_type="nf4",
                    compress_statistics=False,
                )  # fmt: skip
                parent, _, leaf = path.rpartition(".")
                setattr(base.get_submodule(parent), leaf, new.to("cpu"))
        base.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)
    adapted: Any = peft.get_peft_model(base, config)
    return adapted.train(), [p for p in adapted.parameters() if p.requires_grad]


def learn(optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor]) -> None:
    torch.nn.utils.clip_grad_norm_(tensors, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def contenders(
    width: int, layers: int, dtype: str, stored: str, tokens: int, slices: int, preset: str
) -> dict[str, Callable[[], Any]]:
    """A step of all slices, in each way."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, VOCABULARY, (1, tokens), generator=generator) for _ in range(slices)]
    base = model(width, layers, dtype)
    pack, kept = Pack(base), []
    solo = variants.attach(twin(base), preset, rank=16, base=stored)
    own = solo.optimizer(1e-4)
    for seed in range(slices):
        adapter = variants.attach(twin(base), preset, rank=16, seed=seed, base=stored)
        pack.add(adapter)
        kept.append((adapter.optimizer(1e-4), adapter.parameters()))

    def packed() -> None:
        out = pack.outputs(range(slices), [{"input_ids": one} for one in ids])
        torch.stack([loss_of(y, one) for y, one in zip(out, ids, strict=True)]).sum().backward()
        for optimizer, tensors in kept:
            learn(optimizer, tensors)

    def sequential() -> None:
        for one in ids:
            loss_of(solo.model.train()(input_ids=one).logits, one).backward()
            learn(own, solo.parameters())

    found = {"packed": packed, "sequential": sequential}
    if preset == "lora":
        adapted, tensors = theirs(model(width, layers, dtype), stored)
        other = torch.optim.AdamW(tensors, lr=1e-4, fused=True)

        def peft() -> None:
            for one in ids:
                loss_of(adapted(input_ids=one).logits, one).backward()
                learn(other, tensors)

        found["PEFT"] = peft
    return found


def rows(asked: Sequence[Any], count: int, clock: str) -> list[dict[str, Any]]:
    """A row a shape: seconds of a step of all slices, and ratios."""
    found = []
    for shape, bound in asked:
        seconds = rounds(contenders(*shape), count, clock)
        row: dict[str, Any] = dict(zip(NAMES, shape, strict=True))
        row["ms"] = {name: 1000 * sorted(own)[count // 2] for name, own in seconds.items()}
        row["packed / sequential"] = [*ratio(seconds["packed"], seconds["sequential"]), 1.03]
        if "PEFT" in seconds:
            row["packed / PEFT"] = [*ratio(seconds["packed"], seconds["PEFT"]), bound]
        found.append(row)
    return found


def cells(row: dict[str, Any]) -> list[str]:
    """The row as it is shown."""
    shape = (f"{row['preset']} {row['dtype']} {row['base']} width {row['width']} x "
             f"{row['layers']}, {row['slices']} x {row['tokens']}")  # fmt: skip
    found = [shape, f"{row['ms']['packed']:.1f}"]
    for name in ("packed / sequential", "packed / PEFT"):
        middle, low, high, bound = row.get(name, [None] * 4)
        found.append("" if middle is None else marked(middle, bound, (low, high), digits=3))
    return found


def main() -> None:
    """The command."""
    sheet = Sheet("packed", __doc__, rounds=21)
    sheet.flag("--caps", action="store_true", help="at the launcher's cap on rows")
    given = sheet.begin()
    found = rows(CAPPED if given.caps else ASKED, given.rounds, given.clock)
    sheet.table(
        f"K slices of one base, {sheet.timed}",
        ("shape", "packed ms", "packed / sequential", "packed / PEFT"),
        map(cells, found),
    )
    sheet.write({"threads": given.threads, "clock": given.clock, "rows": found})


if __name__ == "__main__":
    main()
