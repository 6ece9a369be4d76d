"""What a task is: items in three splits, how an item becomes tokens, how predictions are scored.

Task files import neither torch nor a model: their names, settings and defaults are read by the
command line, and their data are hashed before anything heavy is loaded.
"""

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

IGNORED = -100  # a label that carries no loss


class BadInput(ValueError):
    """A setting or a file that a run cannot use; the message names the key and the choices."""


@dataclass(frozen=True)
class Item:
    """One item of a data set."""

    id: str
    prompt: str
    response: str = ""  # what is learned; its tokens alone carry loss
    choices: tuple[str, ...] = ()  # responses to choose from, `response` among them
    label: float | None = None  # of a classification or regression
    group: str = ""  # a name to report by


@dataclass(frozen=True)
class Splits:
    """Train, validation and test; and what the base could already do, to see it forgotten."""

    train: list[Item]
    validation: list[Item]
    test: list[Item]
    forgetting: list[Item] = field(default_factory=list)

    def digest(self) -> str:
        """A hash of every item: the data, wherever they lie."""
        digest = hashlib.sha256()
        for name in ("train", "validation", "test", "forgetting"):
            rows = [(i.id, i.prompt, i.response, i.choices, i.label) for i in getattr(self, name)]
            digest.update(json.dumps([name, rows]).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Example:
    """An item in tokens. `labels` are IGNORED where there is no loss."""

    item: Item
    ids: list[int]
    labels: list[int]
    cut: bool = False  # did not fit, and was shortened


class Task:
    """One data set and how it is scored; a frozen dataclass whose fields are keys under `task.`"""

    name: ClassVar[str]
    scoring: ClassVar[str]  # generate | choose | language | classify
    primary: ClassVar[str]  # the metric that decides
    # what a run takes when `train.*` leaves it open
    steps: ClassVar[int] = 200
    batch_size: ClassVar[int] = 16
    seq_len: ClassVar[int] = 256
    max_new_tokens: ClassVar[int] = 64

    def splits(self) -> Splits:
        """The items. What a data set lacks is cut from train."""
        raise NotImplementedError  # abstract

    def examples(self, items: Sequence[Item], tokenizer: Any, seq_len: int) -> list[Example]:
        """Items in tokens: prompt, then response and the end of sequence."""
        return pairs(items, [item.response for item in items], tokenizer, seq_len)

    def metrics(self, items: Sequence[Item], predictions: Sequence[Any]) -> dict[str, float]:
        """The scores of one prediction for each item; loss is added elsewhere."""
        raise NotImplementedError  # abstract

    @property
    def num_labels(self) -> int:
        """Outputs of a classifier's head; 1 is a regression."""
        return 0


def pairs(
    items: Sequence[Item], responses: Sequence[str], tokenizer: Any, seq_len: int
) -> list[Example]:
    """Prompts and responses in tokens, each on its own so that generation sees the same prompt.

    What exceeds `seq_len` is cut: the prompt on its left, then the response on its right.
    """
    if not items:
        return []
    end = tokenizer.eos_token_id
    prompts = token_ids(tokenizer, [item.prompt for item in items])
    answers = token_ids(tokenizer, responses, special=False)
    found = []
    for item, prompt, answer in zip(items, prompts, answers, strict=True):
        if len(prompt) > 1 and prompt[-1] == end:
            prompt = prompt[:-1]  # some tokenizers close every text
        if end is not None:
            answer = [*answer, end]
        answer = answer[: seq_len - 1]
        kept = prompt[-(seq_len - len(answer)) :]
        cut = len(kept) < len(prompt) or len(answer) == seq_len - 1
        found.append(Example(item, kept + answer, [IGNORED] * len(kept) + answer, cut))
    return found


def token_ids(tokenizer: Any, texts: Sequence[str], special: bool = True) -> list[list[int]]:
    """The tokens of many texts, without the masks that take transformers most of the time."""
    if getattr(tokenizer, "is_fast", False):
        # A tokenizer.json may ask for padding or a longest text; transformers overrules it too.
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
        found = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=special)
        return [encoding.ids for encoding in found]
    return tokenizer(list(texts), add_special_tokens=special).input_ids


def exact_match(items: Sequence[Item], predictions: Sequence[str]) -> float:
    """The share of predictions that are the response, white space around them aside."""
    hits = [p.strip() == i.response.strip() for i, p in zip(items, predictions, strict=True)]
    return sum(hits) / len(hits)


def final_number(text: str) -> float | None:
    """The number after the last `####`, or the last number of the text; None: there is none."""
    marked = text.rpartition("####")[2] if "####" in text else text
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", marked) or re.findall(
        r"-?\d[\d,]*(?:\.\d+)?", text
    )
    return float(numbers[-1].replace(",", "")) if numbers else None


def cut(train: list[Item], validation: list[Item] | None, test: list[Item] | None) -> Splits:
    """Fills what is missing from train: a tenth of it, or 500 items; always the same ones."""
    order = list(range(len(train)))
    random.Random(0).shuffle(order)
    size = min(500, len(train) // 10)
    taken = 0
    if validation is None:
        validation, taken = [train[i] for i in order[:size]], size
    if test is None:
        test, taken = [train[i] for i in order[taken : taken + size]], taken + size
    kept = [train[i] for i in sorted(order[taken:])]
    for name, items in (("train", kept), ("validation", validation), ("test", test)):
        if not items:
            raise BadInput(f"task.path: too few items, nothing is left for {name}")
    return Splits(kept, validation, test)


def require(path: str | None, task: str, what: str = "a file or folder") -> Path:
    """The path that a task reads; one that is missing is named."""
    if path is None:
        raise BadInput(f"task.path: task {task} needs {what}, give task.path=...")
    found = Path(path).expanduser()
    if not found.exists():
        raise BadInput(f"task.path={path}: no such file or folder")
    return found


def files(path: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """{"train", "validation" or "test": file} of a folder; a single file is train."""
    if path.is_file():
        return {"train": path}
    names = {"train": "train", "validation": "validation", "valid": "validation",
             "dev": "validation", "test": "test"}  # fmt: skip
    found = {
        names[file.stem]: file
        for file in sorted(path.iterdir())
        if file.suffix in suffixes and file.stem in names
    }
    if "train" not in found:
        endings = ", ".join(f"train{suffix}" for suffix in suffixes)
        raise BadInput(f"task.path={path}: no training file in this folder; looked for {endings}")
    return found


def read_text(path: Path) -> str:
    """The text of a file; a folder or binary data is named."""
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise BadInput(f"task.path={path}: no text in UTF-8 ({error.reason})") from None
    except OSError as error:
        raise BadInput(f"task.path={path}: {error.strerror}") from None


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, or of a .json file that holds a list."""
    try:
        if file.suffix == ".json":
            rows = json.loads(read_text(file))
        else:
            rows = [json.loads(line) for line in read_text(file).splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise BadInput(f"task.path={file}: not json ({error})") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise BadInput(f"task.path={file}: expected one object a row, and at least one row")
    return rows


def column(row: dict[str, Any], key: str, file: Path) -> str:
    """The text or number under row[key]; what is missing, or neither, is named."""
    if key not in row:
        raise BadInput(f"task.path={file}: no key {key!r} in a row; its keys: {_names(row)}")
    if not isinstance(row[key], str | int | float):
        raise BadInput(f"task.path={file}: {key!r} is {json.dumps(row[key])} in a row, not a text")
    return str(row[key])


def filled(template: str, values: Mapping[str, Any]) -> str:
    """The template with a row's values in its braces."""
    try:
        return template.format(**values)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInput(
            f"task.template={template}: cannot be filled from a row ({type(error).__name__}: "
            f"{error}); its keys: {_names(values)}"
        ) from None


def _names(row: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, row))
