"""Counts trained parameters without weights, by the plan that `attach` follows.

    python -m analysis.params --model llama-7b --variant dora --rank 32 --targets q,v --json
    python -m analysis.params --model llama-7b --variant vblora --with form.vectors=90 init=default
    python -m analysis.params --model gpt2 --variant lora,dora,vera --rank 8       (or all)

`trainable` is what the adapter trains, `total` the base and the adapter (what an adapter
replaces is not counted twice), `fraction` their ratio, `notes` what the count leaves open.
`--with` takes the keys of a run: a part (init=pissa) or a setting (form.k=4).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import variants
from variants import Incompatible
from variants._registry import overrides

NAMES = variants.names()
LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
         "num_hidden_layers": 32, "num_attention_heads": 32}  # fmt: skip
# Published sizes, as settings of the model type of transformers.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-7b": ("llama", LLAMA),
    "llama-13b": ("llama", LLAMA | {"hidden_size": 5120, "intermediate_size": 13824,
                                    "num_hidden_layers": 40, "num_attention_heads": 40}),
    "llama2-7b": ("llama", LLAMA),
    "llama3-8b": ("llama", LLAMA | {"vocab_size": 128256, "intermediate_size": 14336,
                                    "num_key_value_heads": 8}),
    "mistral-7b": ("mistral", LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8}),
    "gemma-7b": ("gemma", {"vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576,
                           "num_hidden_layers": 28, "num_attention_heads": 16,
                           "num_key_value_heads": 16, "head_dim": 256}),
    "qwen3-0.6b": ("qwen3", {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
                             "num_hidden_layers": 28, "num_attention_heads": 16,
                             "num_key_value_heads": 8, "head_dim": 128,
                             "tie_word_embeddings": True}),
    "roberta-base": ("roberta", {"vocab_size": 50265, "max_position_embeddings": 514,
                                 "type_vocab_size": 1}),
    "roberta-large": ("roberta", {"vocab_size": 50265, "max_position_embeddings": 514,
                                  "type_vocab_size": 1, "hidden_size": 1024,
                                  "intermediate_size": 4096, "num_hidden_layers": 24,
                                  "num_attention_heads": 16}),
    "deberta-v3-base": ("deberta-v2", {"vocab_size": 128100, "hidden_size": 768,
                                       "intermediate_size": 3072, "num_hidden_layers": 12,
                                       "num_attention_heads": 12, "max_position_embeddings": 512,
                                       "type_vocab_size": 0, "relative_attention": True,
                                       "position_buckets": 256, "norm_rel_ebd": "layer_norm",
                                       "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
                                       "position_biased_input": False,
                                       "max_relative_positions": -1}),
    "t0-3b": ("t5", {"vocab_size": 32128, "d_model": 2048, "d_kv": 64, "d_ff": 5120,
                     "num_layers": 24, "num_heads": 32, "feed_forward_proj": "gated-gelu",
                     "tie_word_embeddings": False}),
    "gpt2": ("gpt2", {}),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt3-175b": ("gpt2", {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048}),
}  # fmt: skip
# Models whose published totals count a body without a head for text.
BODIES = ("roberta", "deberta-v2")


def meta_model(name: str) -> Any:
    """A named shape, a folder with a config.json, or a name on the hub, on the meta device."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    if name in SHAPES:
        kind, sizes = SHAPES[name]
        settings = transformers.AutoConfig.for_model(kind, **sizes)
    elif Path(name).expanduser().is_dir() and (Path(name).expanduser() / "config.json").is_file():
        settings = transformers.AutoConfig.from_pretrained(Path(name).expanduser())
    else:
        from experiments.model import hub_is_online

        local = not hub_is_online()
        try:
            settings = transformers.AutoConfig.from_pretrained(name, local_files_only=local)
        except (OSError, ValueError):
            raise Incompatible(
                f"--model {name}: no folder with a config.json, nothing of that name from the hub, "
                f"and no named shape; shapes: {', '.join(SHAPES)}"
            ) from None
    kinds = settings.architectures or []
    cls = transformers.AutoModelForCausalLM
    if settings.is_encoder_decoder:
        cls = transformers.AutoModelForSeq2SeqLM
    if settings.model_type in BODIES or any(k.endswith("Classification") for k in kinds):
        cls = transformers.AutoModel
    with torch.device("meta"):
        return cls.from_config(settings)


def count(
    model: Any, variant: str, rank: int | None = None, targets: Any = None, **axes: Any
) -> dict[str, Any]:
    """trainable, total, fraction, matrices, rank and notes of a variant on `model`."""
    from variants._adapter import count_trained

    choice = variants.choose(variant, rank, **axes)
    planned = variants.plan(model, choice, targets)
    trainable = count_trained(choice, planned)
    total = sum(p.numel() for p in model.parameters()) + trainable
    if choice.form.replaces:
        total -= sum(item.shape[0] * item.shape[1] for item in planned)
    return {
        "trainable": trainable,
        "total": total,
        "fraction": trainable / total,
        "matrices": len(planned),
        "rank": choice.rank,
        "notes": [*choice.notes, *_open(choice)],
    }


def _open(choice: Any) -> list[str]:
    """What the shapes alone do not tell of a variant's count."""
    from variants._api import Allocation

    rule = choice.allocation
    if rule.needs:
        return [f"{rule} gives each matrix its rank after calibration: counted at {choice.rank}"]
    if type(rule).ranks is not Allocation.ranks:
        return [f"{rule} changes how many directions are in use while training: counted as stored"]
    return []


def compare(
    model: Any, names: list[str], rank: int | None, targets: Any, words: list[str]
) -> list[dict[str, Any]]:
    """The counts of several variants, fewest first; those that are refused, with the reason."""
    counted, refused = [], []
    for name in names:
        try:
            ranked = variants.describe(name)["rank"] is not None
            axes = overrides(name, words)
            found = count(model, name, rank if ranked else None, targets, **axes)
            counted.append({"variant": name} | found)
        except Incompatible as error:
            refused.append({"variant": name, "refused": str(error)})
    return sorted(counted, key=lambda row: row["trainable"]) + refused


def table(rows: list[dict[str, Any]]) -> None:
    """Prints the rows of `compare`."""
    print(f"{'variant':<12} {'rank':>5} {'trained':>15} {'share':>10}  notes")
    for row in rows:
        if "refused" in row:
            print(f"{row['variant']:<12} {'-':>5} {'refused':>15} {'':>10}  {row['refused']}")
        else:
            print(
                f"{row['variant']:<12} {row['rank'] or '-':>5} {row['trainable']:>15,} "
                f"{row['fraction']:>10.4%}  {'; '.join(row['notes'])}".rstrip()
            )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.params",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help=f"folder, hub name, or {', '.join(SHAPES)}")
    parser.add_argument(
        "--variant", required=True, help=f"one, several with commas, or all: {', '.join(NAMES)}"
    )
    parser.add_argument("--rank", type=int, help="default: the variant's")
    parser.add_argument("--targets", help="roles or names, with commas; default: the variant's")
    parser.add_argument("--with", dest="words", nargs="+", action="extend", default=[],
                        metavar="KEY=VALUE", help="AXIS=PART or AXIS.SETTING=VALUE")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one json object; a list for several")
    given = parser.parse_args()
    several = NAMES if given.variant == "all" else given.variant.split(",")
    try:
        for name in several:
            variants.describe(name)  # one that does not exist is an error, not a row
        model = meta_model(given.model)
        if len(several) > 1:
            rows = compare(model, several, given.rank, given.targets, given.words)
            named = {"model": given.model, "targets": given.targets}
            print(json.dumps([named | row for row in rows])) if given.json else table(rows)
            return 0
        axes = overrides(given.variant, given.words)
        found = count(model, given.variant, given.rank, given.targets, **axes)
    except Incompatible as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    named = {"model": given.model, "variant": given.variant, "targets": given.targets}
    if given.json:
        print(json.dumps(named | found))
    else:
        print(
            f"{given.variant} on {given.model}: {found['trainable']:,} trained of "
            f"{found['total']:,} ({found['fraction']:.4%}), {found['matrices']} matrices"
        )
        for note in found["notes"]:
            print(f"  {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
