"""Bytes that autograd keeps for backward, beside PEFT's, in one process: exact, no timing.

    python -m benchmarks.memory [--json FILE]

A Llama of random weights, width 512, two layers, 1,024 tokens, rank 16 on all linear layers.
All that the model keeps, not the adapter's part of it: an adapter can make the model keep less than
it keeps when frozen, which stands beside. What the model holds anyway does not count; memory that
several nodes keep counts once.
"""

from typing import Any

import torch

import variants
from experiments.measure import measure

from .sheet import Sheet

SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 1376,
                         "num_hidden_layers": 2, "num_attention_heads": 8}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def model(dtype: torch.dtype) -> Any:
    """The benchmark's base."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES)
    built: Any = transformers.LlamaForCausalLM(config)
    return built.to(dtype).train()


def kept(adapted: Any) -> int:
    """What one forward of the model keeps."""
    ids = torch.randint(0, 512, (4, 256), generator=torch.Generator().manual_seed(1))
    return int(measure(lambda: adapted(input_ids=ids).logits.float().mean().backward(), adapted)[
        "saved_bytes"
    ])  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """One row a method, dtype and dropout: bytes of the frozen model alone (the gradient of its
    embedding flows through it), here, in PEFT, in PEFT without autocast."""
    import peft

    found = []
    for name, dtype in DTYPES.items():
        base = model(dtype)
        base.requires_grad_(False)
        base.model.embed_tokens.weight.requires_grad_(True)  # gradients flow, no layer learns
        frozen = kept(base)
        for preset in ("lora", "dora"):
            for dropout in (0.0, 0.05):
                ours = model(dtype)
                variants.attach(ours, preset, rank=16, dropout=dropout)
                theirs = []
                for upcast in (True, False):
                    config = peft.LoraConfig(
                        r=16, lora_alpha=32, lora_dropout=dropout, use_dora=preset == "dora",
                        target_modules=TARGETS,
                    )  # fmt: skip
                    adapted = peft.get_peft_model(
                        model(dtype), config, autocast_adapter_dtype=upcast
                    )
                    theirs.append(kept(adapted))
                own = kept(ours)
                found.append({
                    "variant": preset, "dtype": name, "dropout": dropout,
                    "frozen": frozen, "ours": own, "peft": theirs[0], "peft_no_autocast": theirs[1],
                    "ratio": own / theirs[0], "ratio_no_autocast": own / theirs[1],
                })  # fmt: skip
    return found


def main() -> None:
    """The command."""
    sheet = Sheet("memory", __doc__)
    sheet.begin()
    found = rows()
    sheet.table(
        "MiB kept for backward",
        ("variant", "dtype", "dropout", "frozen", "here", "PEFT", "ratio",
         "PEFT without autocast", "ratio"),
        (
            (row["variant"], row["dtype"], str(row["dropout"]),
             *(f"{row[k] / 2**20:.1f}" for k in ("frozen", "ours", "peft")), f"{row['ratio']:.2f}",
             f"{row['peft_no_autocast'] / 2**20:.1f}", f"{row['ratio_no_autocast']:.2f}")
            for row in found
        ),
    )  # fmt: skip
    sheet.write(found)


if __name__ == "__main__":
    main()
