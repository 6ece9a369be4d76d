"""Make the tiny model that ships with the project: a small Llama that knows the OLD skills.

    python -m experiments.pretrain [--out DIR] [--seed 0] [--steps 8000]

Writes a Hugging Face folder (configuration, weights, tokenizer) and a README.md with the exact
match that it measured on every old skill.
"""

import argparse
import math
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.tasks import Item
from experiments.tasks.skills import NEW, OLD, SPECIAL, items, stream

VOCABULARY = 112  # what skills leave free is filled with spare names, for skills to come
BATCH, PEAK_LR, WARMUP = 64, 3e-3, 200
# Strong, for small weights: a tenth of it gives the same exact match on old skills, but a model
# that needs about one and a half times the steps to learn new ones.
WEIGHT_DECAY = 0.5
TESTED = 200  # test items per skill


def vocabulary() -> list[str]:
    """Return all tokens, in the order of their numbers."""
    # Skills come last and spare names fill up, so a skill added to NEW takes a spare one's row
    # and leaves every other row of a trained embedding where it was.
    tokens = [*SPECIAL.values(), "=", "*", *ascii_letters, *digits]
    tokens += [f"<{skill}>" for skill in [*OLD, *NEW]]
    return tokens + [f"<spare{i}>" for i in range(VOCABULARY - len(tokens))]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: one token per character and per skill's name, no first token."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL["unk_token"]))
    pattern = Regex(r"<[a-z0-9_]+>|.")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # else decoding puts a space between tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL
    )


def make_model(seed: int) -> LlamaForCausalLM:
    """Build the untrained model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        intermediate_size=256,
        max_position_embeddings=64,
        # Tied, the tokens that no item holds would all be pushed the same way by the loss.
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=vocabulary().index(SPECIAL["eos_token"]),
        pad_token_id=vocabulary().index(SPECIAL["pad_token"]),
    )
    return LlamaForCausalLM(config)


def encode(batch: Sequence[Item], tokenizer: Any) -> dict[str, torch.Tensor]:
    """Return one batch for the model: only response and end token count in the loss."""
    texts = [item.prompt + item.response + SPECIAL["eos_token"] for item in batch]
    encoded = tokenizer(
        texts, padding=True, padding_side="right", return_tensors="pt", return_token_type_ids=False
    )
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    answer = tokenizer.convert_tokens_to_ids("=")
    asked = (labels == answer).int().cumsum(1) - (labels == answer).int()  # 0 up to the `=`
    return dict(encoded) | {"labels": labels.masked_fill(asked == 0, -100)}


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, tested: Sequence[Item]) -> float:
    """Return the share of items whose greedy answer is the response and nothing else."""
    prompts = [item.prompt for item in tested]
    inputs = tokenizer(
        prompts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False
    )
    # One token past the longest response, so that an answer which does not end is wrong.
    room = max(len(item.response) for item in tested) + 1
    output = model.generate(**inputs, max_new_tokens=room, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    end = SPECIAL["eos_token"]
    pairs = zip(tested, answers, strict=True)
    return sum(a.startswith(item.response + end) for item, a in pairs) / len(tested)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return PEAK_LR * min(1.0, (step + 1) / WARMUP) * (0.02 + 0.98 * cosine)


def train(model: LlamaForCausalLM, tokenizer: Any, seed: int, steps: int) -> None:
    """Train on fresh items of all old skills; every 500 steps print the loss."""
    layers = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not q for q in layers)]
    optimizer = torch.optim.AdamW(
        [{"params": layers, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    source, start = stream(tuple(OLD), seed), time.monotonic()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(**encode(list(islice(source, BATCH)), tokenizer)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 500 == 0:
            seconds = time.monotonic() - start
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)
    model.eval()


def draw_untrained(model: LlamaForCausalLM, tokenizer: Any, seed: int) -> None:
    """Draw the embeddings of new and spare names at the scale that the old ones have reached.

    Left at their small initial scale they would be nearly nothing beside what the first layer
    adds, and fine-tuning, which keeps embeddings frozen, could hardly tell one from another.
    """
    names = [token for token in vocabulary() if token.startswith("<")]
    old = [f"<{skill}>" for skill in OLD]
    new = [name for name in names if name not in old and name not in SPECIAL.values()]
    rows = model.model.embed_tokens.weight.data
    scale = rows[tokenizer.convert_tokens_to_ids(old)].std()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(new), rows.shape[1], generator=generator) * scale
    rows[tokenizer.convert_tokens_to_ids(new)] = drawn


def readme(scores: dict[str, float], seed: int, steps: int, parameters: int) -> str:
    """Return the text of the folder's README.md."""
    lines = [
        "# The tiny model",
        "",
        f"A Llama of {parameters:,} parameters, pretrained on the old skills of",
        "`experiments/tasks/skills.py`. Made, with this file, by",
        "",
        f"    python -m experiments.pretrain --seed {seed} --steps {steps}",
        "",
        f"Exact match of greedy answers on {TESTED} test items of each skill:",
        "",
        "| skill | exact match |",
        "| --- | --- |",
        *(f"| {skill} | {score:.3f} |" for skill, score in scores.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m experiments.pretrain")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--seed", type=int, default=0, help="of weights and items (default 0)")
    parser.add_argument("--steps", type=int, default=8000, help="default 8000, about 8 minutes")
    arguments = parser.parse_args()
    # Matrices this small gain little from a second thread, and sums do not depend on their number.
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_model(arguments.seed)
    train(model, tokenizer, arguments.seed, arguments.steps)
    draw_untrained(model, tokenizer, arguments.seed)
    scores = {}
    for skill in OLD:
        tested = items([skill], TESTED, arguments.seed, split="test")
        scores[skill] = exact_match(model, tokenizer, tested)
        print(f"{skill:15} {scores[skill]:.3f}", flush=True)
    model.save_pretrained(arguments.out)
    make_tokenizer().save_pretrained(arguments.out)  # anew: use leaves padding in the other one
    text = readme(scores, arguments.seed, arguments.steps, model.num_parameters())
    (arguments.out / "README.md").write_text(text)


if __name__ == "__main__":
    main()
