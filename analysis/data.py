"""What an opened model is measured on: the run's own items, or a text; and the run at its start."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import variants
from experiments import batches
from experiments.config import Settings
from experiments.evaluate import Scorer, count_tokens, training_loss
from experiments.model import Loaded
from experiments.saved import load_model
from experiments.tasks import BadInput, Example, Task
from experiments.tasks.lm import LanguageModelling
from variants._adapter import Adapter, choose, needs, plan
from variants._calibrate import statistics

from .opened import Opened

ITEMS = 256  # of a data set, at most
BATCH = 8  # pieces of a text


@dataclass(frozen=True)
class Sample:
    """Examples, and what scores them."""

    scorer: Scorer
    examples: list[Example]

    def loss(self) -> float:
        """The mean loss of the model as it is now, in nats a response token (or an item)."""
        return self.scorer.quick(self.examples)["loss"]

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """ids, mask and labels, in portions."""
        pad_id = self.scorer.loaded.tokenizer.pad_token_id
        for indices in batches.by_length(self.examples, self.scorer.batch_size):
            chosen = [self.examples[i] for i in indices]
            yield batches.collate(chosen, pad_id, self.scorer.device)


def samples(o: Opened, text: Path | None) -> dict[str, Sample]:
    """`task`: the validation items of a run; `held out`: the text, else what the run's task or
    settings have of the base's old data. Of both only what there is.

    Raises:
        BadInput: neither is there.
    """
    found, settings = {}, o.settings
    if settings is not None:
        splits = settings.task.splits()
        found["task"] = _sample(o, settings.task, splits.validation)
        if text is None and settings.eval.forgetting is not None:
            text = Path(settings.eval.forgetting)
        if text is None and splits.forgetting:
            found["held out"] = _sample(o, settings.task, splits.forgetting)
    if text is not None:
        task = _text(text)
        splits = task.splits()
        found["held out"] = _sample(o, task, splits.validation + splits.test)
    if not found:
        raise BadInput("an adapter comes without data: give --text FILE")
    return found


def _text(path: Path) -> LanguageModelling:
    if not path.expanduser().is_file():
        raise BadInput(f"--text {path}: no such file")
    return LanguageModelling(path=str(path))


def _sample(o: Opened, task: Task, items: Any) -> Sample:
    device = next(o.loaded.model.parameters()).device
    settings = o.settings
    length = (settings.train.seq_len if settings else None) or task.seq_len
    size = settings.eval.batch_size if settings else BATCH
    scorer = Scorer(task, o.loaded, device, size, min(length, o.loaded.positions), 0)
    return Sample(scorer, scorer.examples(items)[:ITEMS])


@dataclass(frozen=True)
class Batch:
    """The batch of a run's first step, or the first pieces of a text."""

    loaded: Loaded
    examples: Sequence[Example]

    def loss(self) -> Tensor:
        """The mean loss over its response tokens, as training takes it."""
        model: Any = self.loaded.model
        pad_id = self.loaded.tokenizer.pad_token_id
        batch = batches.collate(self.examples, pad_id, next(model.parameters()).device)
        return training_loss(model, batch, count_tokens(self.examples))


def first_batch(o: Opened, text: Path | None) -> Batch:
    """Of a run its first training batch, of another adapter the first pieces of the text."""
    if o.settings is not None and text is None:
        train, size = _training(o.loaded, o.settings)
        chosen = batches.order(len(train), size, 0, o.settings.seed)
        return Batch(o.loaded, [train[i] for i in chosen])
    if text is None:
        raise BadInput("an adapter comes without data: give --text FILE")
    task = _text(text)
    return Batch(o.loaded, _sample(o, task, task.splits().train).examples[:BATCH])


def _training(loaded: Loaded, settings: Settings) -> tuple[list[Example], int]:
    """All training items of a run in tokens, and how many make a batch."""
    task = settings.task
    length = min(settings.train.seq_len or task.seq_len, loaded.positions)
    examples = task.examples(task.splits().train, loaded.tokenizer, length)
    return examples, settings.train.batch_size or task.batch_size


@dataclass(frozen=True)
class Begun:
    """A run as it was before its first step."""

    adapter: Adapter
    batch: Batch
    gradients: dict[str, Tensor]  # dL/dW [m, n] of the untouched model, by matrix


def begun(settings: Settings, variant: str | None = None, device: str = "cpu",
          gradients: bool = False) -> Begun:  # fmt: skip
    """Builds a run's model and adapter anew, as they start.

    Args:
        variant: another preset in its place, at the run's rank and alpha, on its base.
        gradients: those of the untouched model on the first batch as well.
    """
    loaded = load_model(settings)
    loaded.model.to(device)
    train, size = _training(loaded, settings)
    chosen = batches.order(len(train), size, 0, settings.seed)
    batch = Batch(loaded, [train[i] for i in chosen])
    own_axes = variants.parts() if variant is None else ("base",)
    axes: dict[str, Any] = {axis: settings.variant[axis] for axis in own_axes}
    preset, alpha = variant or settings.variant["name"], settings.alpha
    choice = choose(preset, settings.rank, alpha, **axes)
    if choose(preset, settings.rank, **axes).alpha == alpha:
        alpha = None  # the preset's own, which may be a multiple of each layer's rank
    classes = settings.task.num_labels > 1
    pad_id = loaded.tokenizer.pad_token_id
    own = batches.calls(train, size, settings.seed, pad_id, torch.device(device), classes)
    patterns = (None, None) if variant else (settings.rank_pattern, settings.alpha_pattern)
    planned = plan(loaded.model, choice, settings.targets, *patterns)
    found: dict[str, Tensor] = {}
    if gradients:
        first = list(islice(own, 1))
        means = statistics(loaded.model, planned, first, ("gradient",))
        found = {item.site.name: t["gradient"] for item, t in means}
    adapter = variants.attach(
        loaded.model,
        preset,
        rank=settings.rank,
        alpha=alpha,
        targets=settings.targets,
        seed=settings.seed,
        rank_pattern=patterns[0],
        alpha_pattern=patterns[1],
        calibration=own if needs(choice) else None,
        modules_to_save=loaded.heads if settings.task.scoring == "classify" else (),
        **axes,
    )
    return Begun(adapter, batch, found)
