"""GSM8K: grade-school maths (Cobbe et al., 2021, arXiv:2110.14168), exact match of the number."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ._task import Item, Splits, Task, column, cut, files, filled, final_number, read_rows, require


@dataclass(frozen=True)
class GSM8K(Task):
    """A folder with train.jsonl and test.jsonl: `question`, and `answer` that ends `#### n`."""

    path: str | None = None
    """the folder"""
    template: str = "Question: {question}\nAnswer: "
    """what the model reads"""

    name = "gsm8k"
    scoring = "generate"
    primary = "exact_match"
    batch_size = 8
    seq_len = 512
    max_new_tokens = 256

    def splits(self) -> Splits:
        found = files(require(self.path, "gsm8k"), (".jsonl",))
        split = {name: self._items(name, file) for name, file in found.items()}
        return cut(split["train"], split.get("validation"), split.get("test"))

    def _items(self, split: str, file: Path) -> list[Item]:
        return [
            Item(
                f"{split}/{i}",
                filled(self.template, {"question": column(row, "question", file)}),
                column(row, "answer", file),
            )
            for i, row in enumerate(read_rows(file))
        ]

    def metrics(self, items: Sequence[Item], predictions: Sequence[str]) -> dict[str, float]:
        """An answer counts where its number is the reference's; one without a number is wrong."""
        hits = [
            final_number(text) is not None and final_number(text) == final_number(item.response)
            for item, text in zip(items, predictions, strict=True)
        ]
        return {"exact_match": sum(hits) / len(hits)}
