"""Instruction data of your own: rows with `prompt` and `response`, through a template."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ._task import Item, Splits, Task, column, cut, exact_match, files, filled, read_rows, require


@dataclass(frozen=True)
class Jsonl(Task):
    """A .jsonl file, or a folder with train.jsonl and maybe validation.jsonl, test.jsonl."""

    path: str | None = None
    """a file or folder"""
    template: str = "{prompt}"
    """what the model reads; `{key}` stands for a key of the row"""

    name = "jsonl"
    scoring = "generate"
    primary = "exact_match"

    def splits(self) -> Splits:
        found = files(require(self.path, "jsonl"), (".jsonl", ".json"))
        split = {name: self._items(name, file) for name, file in found.items()}
        return cut(split["train"], split.get("validation"), split.get("test"))

    def _items(self, split: str, file: Path) -> list[Item]:
        items = []
        for i, row in enumerate(read_rows(file)):
            response = column(row, "response", file)
            column(row, "prompt", file)
            prompt = filled(self.template, row)
            items.append(Item(str(row.get("id", f"{split}/{i}")), prompt, response))
        return items

    def metrics(self, items: Sequence[Item], predictions: Sequence[str]) -> dict[str, float]:
        return {"exact_match": exact_match(items, predictions)}
