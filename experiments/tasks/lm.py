"""Language modelling on any text file: loss, perplexity, bits per byte."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ._task import BadInput, Example, Item, Splits, Task, read_text, require


@dataclass(frozen=True)
class LanguageModelling(Task):
    """A text, its last tenth held out: one half validation, one half test."""

    path: str | None = None
    """a text file"""

    name = "lm"
    scoring = "language"
    primary = "loss"

    def splits(self) -> Splits:
        file = require(self.path, "lm", "one text file")
        if file.is_dir():
            raise BadInput(f"task.path={self.path}: a folder; task lm reads one text file")
        text = read_text(file)
        ends = (0, int(0.9 * len(text)), int(0.95 * len(text)), len(text))
        train, validation, test = ([Item(f"{a}:{b}", "", text[a:b])] for a, b in pairwise(ends))
        return Splits(train, validation, test)

    def examples(self, items: Sequence[Item], tokenizer: Any, seq_len: int) -> list[Example]:
        """Pieces of `seq_len` tokens that overlap by one, so that each token is predicted once."""
        found = []
        for item in items:
            text = item.response
            tokens = tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            if len(tokens.input_ids) < 2:
                raise BadInput(f"task.path={self.path}: too short, a split has less than 2 tokens")
            ids, starts = tokens.input_ids, [start for start, _ in tokens.offset_mapping]
            for first in range(0, max(1, len(ids) - 1), seq_len - 1):
                piece = ids[first : first + seq_len]
                end = first + len(piece)
                predicted = text[starts[first + 1] : starts[end] if end < len(ids) else len(text)]
                found.append(Example(Item(f"{item.id}/{first}", "", predicted), piece, piece))
        return found

    def metrics(self, items: Sequence[Item], predictions: Sequence[Any]) -> dict[str, float]:
        """A prediction is the piece's (nats, tokens)."""
        nats = sum(p[0] for p in predictions)
        tokens = sum(p[1] for p in predictions)
        size = sum(len(item.response.encode()) for item in items)
        return {
            "perplexity": math.exp(min(nats / tokens, 700.0)),
            "bits_per_byte": nats / math.log(2) / size,
        }
