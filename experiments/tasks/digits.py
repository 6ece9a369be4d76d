"""Handwritten digits of one parity: which of five (the digit halved).

As in PiSSA's Figure 2a (arXiv:2404.02948), where a small network has learned odd digits and is
fine-tuned on even ones; 0 and 1 share an output, 2 and 3, and so on. An image is a row of pixels,
and a pixel stands where a text has a token.
"""

import gzip
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._task import BadInput, Example, Item, Splits, Task, require

PARITIES = ("even", "odd")
CLASSES = ["0-1", "2-3", "4-5", "6-7", "8-9"]


@dataclass(frozen=True)
class Digits(Task):
    """scikit-learn's 1,797 bundled digits (8 x 8), or a folder of MNIST's idx files.

    Of four images of a parity two are for training, one for validation, one for test. The other
    parity's validation is what may be forgotten.
    """

    path: str | None = None
    """a folder with ...-images-idx3-ubyte and ...-labels-idx1-ubyte (.gz or not); null: bundled"""
    parity: str = "even"
    """even, odd"""

    name = "digits"
    scoring = "classify"
    primary = "accuracy"
    steps = 100
    batch_size = 64
    seq_len = 784
    labels = CLASSES
    num_labels = len(CLASSES)  # type: ignore[assignment]

    def splits(self) -> Splits:
        if self.parity not in PARITIES:
            raise BadInput(f"task.parity={self.parity}: choices: {', '.join(PARITIES)}")
        images = read(self.path)
        own, other = (self._items(images, p) for p in (self.parity == "odd", self.parity != "odd"))
        train = [item for i, item in enumerate(own) if i % 4 < 2]
        return Splits(train, own[2::4], own[3::4], forgetting=other[2::4])

    def _items(self, images: Sequence[tuple[bytes, int]], odd: bool) -> list[Item]:
        return [
            Item(str(i), pixels.hex(), CLASSES[digit // 2], label=float(digit // 2))
            for i, (pixels, digit) in enumerate(images)
            if digit % 2 == odd
        ]

    def examples(self, items: Sequence[Item], tokenizer: Any, seq_len: int) -> list[Example]:
        if not isinstance(tokenizer, Pixels):
            raise BadInput("task=digits: images are for model=mlp, other models read text")
        found = [Example(item, list(bytes.fromhex(item.prompt)), []) for item in items]
        if any(len(example.ids) > seq_len for example in found):
            raise BadInput(f"train.seq_len={seq_len}: less than the pixels of an image")
        return found

    def metrics(self, items: Sequence[Item], predictions: Sequence[str]) -> dict[str, float]:
        from ._scores import classification

        return classification([item.response for item in items], list(predictions), CLASSES)


class Pixels:
    """What a model of images has where others have a tokenizer."""

    pad_token_id = 0
    eos_token_id = None

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise BadInput("model=mlp: sees images and reads no text; its task is task=digits")


def read(path: str | None) -> list[tuple[bytes, int]]:
    """(pixels, digit) of every image, in the order of the files."""
    if path is None:
        return _bundled()
    folder = require(path, "digits", "a folder of idx files")
    found = sorted(folder.glob("*images-idx3-ubyte*")) if folder.is_dir() else []
    if not found:
        raise BadInput(f"task.path={path}: no ...-images-idx3-ubyte(.gz) in such a folder")
    images: list[tuple[bytes, int]] = []
    for file in found:
        stem = file.name.removesuffix(".gz").replace("images-idx3", "labels-idx1")
        beside = file.with_name(stem)
        beside = beside if beside.is_file() else file.with_name(stem + ".gz")
        shape, pixels = _idx(file, 3)
        (count,), labels = _idx(beside, 1)
        if count != shape[0]:
            raise BadInput(f"task.path={path}: {shape[0]} images in {file.name}, {count} labels")
        size = shape[1] * shape[2]
        images += [(pixels[i * size : (i + 1) * size], labels[i]) for i in range(count)]
    return images


def _bundled() -> list[tuple[bytes, int]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise BadInput(
            "task.path: null means scikit-learn's digits, and it is not installed: "
            "pip install -c constraints.txt -e '.[digits]'"
        ) from None
    pixels, digits = load_digits(return_X_y=True)
    return [(bytes(row), int(d)) for row, d in zip(pixels.astype("uint8"), digits, strict=True)]


def _idx(file: Path, dimensions: int) -> tuple[tuple[int, ...], bytes]:
    """Shape and bytes of an idx file of unsigned bytes (yann.lecun.com/exdb/mnist)."""
    try:
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
    except (OSError, EOFError) as error:
        raise BadInput(f"task.path={file.parent}: {file.name}: {error}") from None
    head = 4 + 4 * dimensions
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(raw) < head:
        raise BadInput(f"task.path={file}: no idx file of bytes in {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", raw[4:head])
    numbers = 1
    for size in shape:
        numbers *= size
    if len(raw) != head + numbers:
        raise BadInput(f"task.path={file}: {len(raw) - head} bytes where {numbers} should be")
    return shape, raw[head:]
