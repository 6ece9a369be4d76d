"""Examples as tensors: padding, and an order of training data that needs no state."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .tasks import Example
from .tasks._task import IGNORED


def order(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The items of batch `step` (from 0): epoch after epoch, each in its own permutation.

    A function of its arguments alone, so that a run resumed at any step sees the same data.
    """
    found: list[int] = []
    position = step * batch_size
    while len(found) < batch_size:
        epoch, offset = divmod(position, count)
        found += _permutation(count, seed, epoch)[offset : offset + batch_size - len(found)]
        position = step * batch_size + len(found)
    return found


_permutations: dict[tuple[int, int, int], list[int]] = {}


def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    key = (count, seed, epoch)
    if key not in _permutations:
        _permutations.clear()
        items = list(range(count))
        random.Random(f"data {seed} {epoch}").shuffle(items)
        _permutations[key] = items
    return _permutations[key]


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """[rows, longest], filled with `value` on one side."""
    longest = max(len(row) for row in rows)
    filled = [
        [value] * (longest - len(row)) + list(row)
        if left
        else [*row, *[value] * (longest - len(row))]
        for row in rows
    ]
    return torch.tensor(filled)


def collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """ids, mask and labels [B, T], padded on the right; a classification has labels [B]."""
    ids = pad([e.ids for e in examples], pad_id)
    mask = pad([[1] * len(e.ids) for e in examples], 0)
    if examples[0].labels:
        labels = pad([e.labels for e in examples], IGNORED)
    else:
        labels = torch.tensor([e.item.label for e in examples], dtype=torch.float32)
    return {"ids": ids.to(device), "mask": mask.to(device), "labels": labels.to(device)}


def calls(
    examples: Sequence[Example],
    size: int,
    seed: int,
    pad_id: int,
    device: torch.device,
    classes: bool = False,
) -> Iterator[dict[str, Any]]:
    """Batch after batch of the training data, without an end, as `model(**batch)` takes them.

    `classes`: labels as whole numbers, since the model's own loss takes others for a regression.
    """
    for step in itertools.count():
        batch = collate(
            [examples[i] for i in order(len(examples), size, step, seed)], pad_id, device
        )
        labels = batch["labels"].long() if classes else batch["labels"]
        yield {"input_ids": batch["ids"], "attention_mask": batch["mask"], "labels": labels}


def by_length(examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Indices in portions of about equal length, the longest first: little padding."""
    indices = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def split(batch: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """The batch in `parts` equal portions."""
    size = len(batch) // parts
    return [batch[i * size : (i + 1) * size] for i in range(parts)]
