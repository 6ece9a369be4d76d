"""Multiple choice in LLM-Adapters' format (Hu et al., 2023, arXiv:2304.01933), DoRA's benchmark."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._task import BadInput, Item, Splits, Task, column, cut, files, filled, read_rows, require

# LLM-Adapters, commonsense_evaluate.py: the instruction's own frame
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Choice(Task):
    """A folder with train.json and test.json: `instruction`, `output`, `answer`.

    The model chooses the response to which it gives the most probability (summed over tokens):
    every item gets an answer, where LLM-Adapters searches generated text for one.
    """

    path: str | None = None
    """the folder"""
    template: str = PROMPT
    """what the model reads"""

    name = "choice"
    scoring = "choose"
    primary = "accuracy"
    batch_size = 8
    seq_len = 512

    def splits(self) -> Splits:
        found = files(require(self.path, "choice"), (".json", ".jsonl"))
        split = {name: self._items(name, file) for name, file in found.items()}
        return cut(split["train"], split.get("validation"), split.get("test"))

    def _items(self, split: str, file: Path) -> list[Item]:
        return [self._item(f"{split}/{i}", row, file) for i, row in enumerate(read_rows(file))]

    def _item(self, name: str, row: dict[str, Any], file: Path) -> Item:
        instruction = column(row, "instruction", file)
        answer, output = column(row, "answer", file), column(row, "output", file)
        formats = re.search(r"Answer format: *([\w/ ]+)", instruction)
        labels = formats.group(1).strip().split("/") if formats else []
        if answer not in labels or answer not in output:
            raise BadInput(
                f"task.path={file}: row {name}: answer {answer!r} is not among the instruction's "
                f"'Answer format: a/b/...' or not in its output"
            )
        choices = tuple(output.replace(answer, label) for label in labels)
        return Item(name, filled(self.template, {"instruction": instruction}), output, choices)

    def metrics(self, items: Sequence[Item], predictions: Sequence[str]) -> dict[str, float]:
        hits = [p == item.response for item, p in zip(items, predictions, strict=True)]
        return {"accuracy": sum(hits) / len(hits)}
