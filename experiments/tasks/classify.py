"""Classification and regression of sentences: a tsv or csv file with `sentence` and `label`."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ._task import (
    BadInput,
    Example,
    Item,
    Splits,
    Task,
    column,
    cut,
    files,
    read_text,
    require,
    token_ids,
)


@dataclass(frozen=True)
class Classify(Task):
    """A file, or a folder with train and maybe dev and test, in GLUE's layout.

    On a causal model the head is new: base then means the frozen model with the untrained head.
    """

    path: str | None = None
    """a .tsv or .csv file, or a folder of them"""
    text: str = "sentence"
    """the column to read"""
    pair: str | None = None
    """the column of a second sentence"""
    label: str = "label"
    """the column to predict"""
    regression: bool = False
    """mean squared error on numbers, in place of cross-entropy on classes"""

    name = "classify"
    scoring = "classify"
    batch_size = 32
    seq_len = 128

    @property
    def primary(self) -> str:  # type: ignore[override]
        return "pearson" if self.regression else "accuracy"

    @cached_property
    def labels(self) -> list[str]:
        """The classes, in the order of their indices."""
        file = files(require(self.path, "classify"), (".tsv", ".csv"))["train"]
        found = {column(row, self.label, file) for row in _table(file)}
        try:
            return sorted(found, key=float)
        except ValueError:
            return sorted(found)

    @property
    def num_labels(self) -> int:
        return 1 if self.regression else len(self.labels)

    def splits(self) -> Splits:
        found = files(require(self.path, "classify"), (".tsv", ".csv"))
        split = {name: self._items(name, file) for name, file in found.items()}
        if not self.regression and len(self.labels) < 2:
            raise BadInput(f"task.label={self.label}: one class only, {self.labels[0]!r}")
        return cut(split["train"], split.get("validation"), split.get("test"))

    def _items(self, split: str, file: Path) -> list[Item]:
        items = []
        for i, row in enumerate(_table(file)):
            text, given = column(row, self.text, file), column(row, self.label, file)
            if self.pair is not None:
                text = f"{text}\n{column(row, self.pair, file)}"
            items.append(Item(f"{split}/{i}", text, given, label=self._value(given, file)))
        return items

    def _value(self, given: str, file: Path) -> float:
        if not self.regression:
            if given not in self.labels:
                raise BadInput(f"task.path={file}: label {given!r} is not in the training file")
            return float(self.labels.index(given))
        try:
            value = float(given)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise BadInput(f"task.path={file}: label {given!r} is not a number")
        return value

    def examples(self, items: Sequence[Item], tokenizer: Any, seq_len: int) -> list[Example]:
        tokens = token_ids(tokenizer, [item.prompt for item in items])
        return [
            Example(item, ids[:seq_len], [], cut=len(ids) > seq_len)
            for item, ids in zip(items, tokens, strict=True)
        ]

    def metrics(self, items: Sequence[Item], predictions: Sequence[Any]) -> dict[str, float]:
        """A prediction is a class as it stands in the file, or a number."""
        from ._scores import classification, regression

        if self.regression:
            return regression([item.label for item in items], predictions)
        return classification([i.response for i in items], list(predictions), self.labels)


def _table(file: Path) -> list[dict[str, str]]:
    quoting = csv.QUOTE_NONE if file.suffix == ".tsv" else csv.QUOTE_MINIMAL  # GLUE quotes nothing
    with io.StringIO(read_text(file)) as handle:
        delimiter = "\t" if file.suffix == ".tsv" else ","
        rows = list(csv.DictReader(handle, delimiter=delimiter, quoting=quoting))
    if not rows:
        raise BadInput(f"task.path={file}: no rows")
    return rows
