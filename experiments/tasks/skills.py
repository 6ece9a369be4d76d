"""Small string skills, generated: what the tiny model knows (OLD) and what it may learn (NEW).

A skill is a function from a string of small letters to a string. An item is one line of text,
`<reverse>abcd=dcba`: the prompt up to `=`, then the response; whoever trains on it appends the
tokenizer's end-of-sequence token. Every character is one token, and so is every skill's name.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice
from string import ascii_lowercase
from typing import Any

from ._task import BadInput, Item, Splits, Task, exact_match

Skill = Callable[[str], str]


def shift(x: str, by: int) -> str:
    """Move every small letter `by` places along the alphabet, from z on to a."""
    return "".join(ascii_lowercase[(ord(c) - ord("a") + by) % 26] for c in x)


def mask_vowels(x: str) -> str:
    """Put a star in the place of every vowel."""
    return "".join("*" if c in "aeiou" else c for c in x)


def swap_pairs(x: str) -> str:
    """Exchange the first and second letter, the third and fourth, ...; an odd last one stays."""
    return "".join(x[i : i + 2][::-1] for i in range(0, len(x), 2))


# The skills that pretraining teaches (experiments/pretrain.py).
OLD: dict[str, Skill] = {
    "copy": lambda x: x,
    "reverse": lambda x: x[::-1],
    "sort": lambda x: "".join(sorted(x)),
    "upper": lambda x: x.upper(),
    "capitalize": lambda x: x.capitalize(),
    "first": lambda x: x[0],
    "last": lambda x: x[-1],
    "length": lambda x: str(len(x)),
    "max": lambda x: max(x),
    "min": lambda x: min(x),
    "next": lambda x: shift(x, 1),
    "previous": lambda x: shift(x, -1),
    "rotate": lambda x: x[1:] + x[0],
    "rotate_back": lambda x: x[-1] + x[:-1],
    "drop_first": lambda x: x[1:],
    "drop_last": lambda x: x[:-1],
    "every_other": lambda x: x[::2],
    "exchange_ends": lambda x: x[-1] + x[1:-1] + x[0],
    "mask_vowels": mask_vowels,
}

# The skills that fine-tuning may teach. Their tokens are in the vocabulary but untrained.
NEW: dict[str, Skill] = {
    "next2": lambda x: shift(x, 2),
    "opposite": lambda x: "".join(ascii_lowercase[25 - ascii_lowercase.index(c)] for c in x),
    "reverse_next": lambda x: shift(x[::-1], 1),
    "rotate2": lambda x: x[2:] + x[:2],
    "swap_pairs": swap_pairs,
    "sort_descending": lambda x: "".join(sorted(x, reverse=True)),
    # Not in MIXTURE: the first is much like reverse_next, the others are slow beside the six.
    "rotate_next": lambda x: shift(x[1:] + x[0], 1),
    "drop_vowels": lambda x: "".join(c for c in x if c not in "aeiou"),
    "drop_repeats": lambda x: "".join(dict.fromkeys(x)),
    "next_by_position": lambda x: "".join(shift(c, i) for i, c in enumerate(x)),
}

# What fine-tuning learns by default: together the six need more than a low rank can hold.
MIXTURE = ("next2", "opposite", "reverse_next", "rotate2", "swap_pairs", "sort_descending")

SPECIAL = {"pad_token": "<pad>", "eos_token": ";", "unk_token": "<unk>"}
LENGTHS = (3, 6)  # shortest and longest input; the tiny model has met no other
SPLITS = {"test": (0,), "validation": (1,), "train": range(2, 10)}  # tenths of all inputs


def prompt(skill: str, x: str) -> str:
    """Return the text that asks for `skill` of `x`."""
    return f"<{skill}>{x}="


def tenth(x: str) -> int:
    """Return which tenth of all inputs `x` is in. The input alone decides, whatever the skill
    and the seed, so no input of one split is ever seen in another, nor was it in pretraining."""
    return int.from_bytes(hashlib.blake2b(x.encode(), digest_size=8).digest()) % 10


def stream(
    skills: Sequence[str],
    seed: int,
    split: str = "train",
    lengths: tuple[int, int] = LENGTHS,
    replay: float = 0.0,
) -> Iterator[Item]:
    """Yield items of `skills` in turn, without end; about a share `replay` of them is of a
    random OLD skill instead. Inputs are random letters, of a length uniform over `lengths`."""
    known, rng, turns = OLD | NEW, random.Random(seed), cycle(skills)
    while True:
        skill = rng.choice(tuple(OLD)) if rng.random() < replay else next(turns)
        x = ""
        while not x or tenth(x) not in SPLITS[split]:
            x = "".join(rng.choices(ascii_lowercase, k=rng.randint(*lengths)))
        text = prompt(skill, x)
        yield Item(text, text, known[skill](x), group=skill)


def items(skills: Sequence[str], count: int, seed: int, **options: Any) -> list[Item]:
    """Return the first `count` items of `stream(skills, seed, **options)`."""
    hashable = ((k, tuple(v) if isinstance(v, list) else v) for k, v in options.items())
    return list(_first(tuple(skills), count, seed, tuple(hashable)))


@lru_cache(maxsize=8)  # those of a task: jobs of one process share their data
def _first(
    skills: tuple[str, ...], count: int, seed: int, options: tuple[tuple[str, Any], ...]
) -> tuple[Item, ...]:
    return tuple(islice(stream(skills, seed, **dict(options)), count))


@dataclass(frozen=True)
class Skills(Task):
    """The default: a few new skills at once, with some old ones among them.

    `exact_match` is that of the new skills alone; the old ones stand in `forgetting`.
    """

    skills: str = "mixture"
    """`mixture`, or names joined by + (easy to hard: rotate2, next2, next_by_position)"""
    items: int = 16000
    """training items, all different draws"""
    replay: float = 0.125
    """share of old skills among them"""
    seed: int = 0
    """of the data; the same for every run that is to be compared"""

    name = "skills"
    scoring = "generate"
    primary = "exact_match"
    steps = 500
    batch_size = 32
    seq_len = 64
    max_new_tokens = 8

    def splits(self) -> Splits:
        chosen = MIXTURE if self.skills == "mixture" else tuple(self.skills.split("+"))
        for skill in chosen:
            if skill not in NEW:
                raise BadInput(
                    f"task.skills={self.skills}: {skill} is no new skill; "
                    f"choices: mixture, {', '.join(NEW)}"
                )
        if not 0 <= self.replay < 1 or self.items < 1:
            raise BadInput(f"task.replay={self.replay}, task.items={self.items}: a share, a count")
        held = 64 * len(chosen)
        return Splits(
            items(chosen, self.items, self.seed, replay=self.replay),
            items(chosen, held, self.seed, split="validation"),
            items(chosen, held, self.seed, split="test"),
            items(tuple(OLD), 20 * len(OLD), self.seed, split="validation"),
        )

    def metrics(self, items: Sequence[Item], predictions: Sequence[str]) -> dict[str, float]:
        return {"exact_match": exact_match(items, predictions)}
