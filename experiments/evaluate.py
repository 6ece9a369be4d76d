"""Scores a model on a task; as a command, a saved run on other data, base and tuned side by side.

python -m experiments.evaluate RUN [task=NAME task.path=FILE eval.split=test ...]
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batches import by_length, collate
from .generate import generate
from .loss import classifier_loss, ranked
from .model import Loaded
from .parallel import ALONE, Team
from .record import complaining, write_json
from .tasks import BadInput, Example, Item, Task
from .tasks._task import IGNORED, pairs


@dataclass(frozen=True)
class Scores:
    """What a model reached on a list of examples."""

    metrics: dict[str, float]  # always with `loss`, in nats per response token (or per item)
    predictions: list[Any]  # one for each example, in their order


@dataclass(frozen=True)
class Scorer:
    """How a run scores: everything but the model's weights."""

    task: Task
    loaded: Loaded
    device: torch.device
    batch_size: int
    seq_len: int
    max_new_tokens: int
    autocast: bool = False
    tick: Callable[[], None] = lambda: None  # called after each portion
    team: Team = ALONE  # each process scores its portions

    def examples(self, items: Sequence[Item]) -> list[Example]:
        """The items in tokens, as long as the run allows."""
        return self.task.examples(items, self.loaded.tokenizer, self.seq_len)

    def quick(self, examples: Sequence[Example]) -> dict[str, float]:
        """Loss, and the share of items whose whole response is the model's greedy choice: what
        generation would give, from one pass."""
        rows = self._rows(examples)
        found = {"loss": _mean_loss(rows)}
        if self.task.scoring == "generate":
            found["exact"] = sum(row.greedy for row in rows) / len(rows)
        return found

    def full(self, examples: Sequence[Example]) -> Scores:
        """Loss, the task's own metrics, and a prediction for each example."""
        rows = self._rows(examples)
        predict = {
            "generate": self._generated,
            "choose": self._chosen,
            "language": lambda _, rows: [(row.nats, row.tokens) for row in rows],
            "classify": lambda _, rows: [self._label(row.value) for row in rows],
        }[self.task.scoring]
        predictions = predict(examples, rows)
        own = self.task.metrics([e.item for e in examples], predictions)
        if self.task.scoring == "language":
            predictions = [nats / tokens for nats, tokens in predictions]
        return Scores({"loss": _mean_loss(rows), **own}, predictions)

    @torch.no_grad()
    def _rows(self, examples: Sequence[Example]) -> list["Row"]:
        rows: list[tuple[int, Row]] = []
        model = self.loaded.model.eval()
        for indices in self.team.turns(list(by_length(examples, self.batch_size))):
            batch = collate(
                [examples[i] for i in indices], self.loaded.tokenizer.pad_token_id, self.device
            )
            inputs = {"input_ids": batch["ids"], "attention_mask": batch["mask"]}
            with self.cast():
                if self.task.scoring == "classify":
                    found = _classified(model(**inputs).logits, batch["labels"])
                else:
                    found = _causal(ranked(self.loaded, inputs, batch["labels"]), batch["labels"])
            rows += zip(indices, found, strict=True)
            self.tick()
        return [Row(*row) for row in self.team.merge(rows)]

    def cast(self) -> Any:
        """The context in which the model computes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def _generated(self, examples: Sequence[Example], rows: Sequence["Row"]) -> list[str]:
        """The greedy text. Where each token of the response is the greedy choice, that is it."""
        tokenizer = self.loaded.tokenizer
        texts = [
            tokenizer.decode([t for t in e.labels if t != IGNORED], skip_special_tokens=True)
            for e in examples
        ]
        open_ = [i for i, row in enumerate(rows) if not row.greedy or examples[i].cut]
        prompts = [
            [t for t, label in zip(examples[i].ids, examples[i].labels, strict=True)
             if label == IGNORED]
            for i in open_
        ]  # fmt: skip
        with self.cast():
            found = generate(
                self.loaded,
                prompts,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
                tick=self.tick,
                team=self.team,
            )
        for i, text in zip(open_, found, strict=True):
            texts[i] = text
        return texts

    def _chosen(self, examples: Sequence[Example], rows: Sequence["Row"]) -> list[str]:
        """The response with the highest probability; of equal ones the first."""
        others = [
            (i, choice)
            for i, example in enumerate(examples)
            for choice in example.item.choices
            if choice != example.item.response
        ]
        asked = [examples[i].item for i, _ in others]
        candidates = pairs(asked, [c for _, c in others], self.loaded.tokenizer, self.seq_len)
        nats = {(i, examples[i].item.response): row.nats for i, row in enumerate(rows)}
        nats |= {key: row.nats for key, row in zip(others, self._rows(candidates), strict=True)}
        return [
            min(example.item.choices, key=lambda choice, i=i: nats[i, choice])
            for i, example in enumerate(examples)
        ]

    def _label(self, value: list[float]) -> Any:
        if self.task.num_labels == 1:
            return value[0]
        return self.task.labels[int(torch.tensor(value).argmax())]  # type: ignore[attr-defined]


class Row(NamedTuple):
    """One example under the model."""

    nats: float  # summed over its response tokens
    tokens: int
    greedy: bool  # every response token is the most probable one
    value: list[float]  # a classifier's outputs


def _causal(found: Tensor, labels: Tensor) -> list[Row]:
    """Of nats and misses [B, T, 2], 0 where there is no label."""
    sums = found.cpu().double().sum(1).tolist()
    counts = (labels[:, 1:] != IGNORED).sum(1).tolist()
    return [Row(n, t, w == 0, []) for (n, w), t in zip(sums, counts, strict=True)]


def _classified(logits: Tensor, labels: Tensor) -> list[Row]:
    logits = logits.float()
    nats = classifier_loss(logits, labels, "none")
    return [Row(n, 1, False, v) for n, v in zip(nats.tolist(), logits.tolist(), strict=True)]


def _mean_loss(rows: Sequence[Row]) -> float:
    return sum(row.nats for row in rows) / sum(row.tokens for row in rows)


def evaluate_run(run: str | Path, words: Sequence[str]) -> dict[str, Any]:
    """Scores a saved run and its untouched base on a task; keeps it in RUN/evaluations/."""
    from .saved import load_adapter, load_model, settings_of_run

    trained, settings = settings_of_run(run), settings_of_run(run, *words)
    task = settings.task
    if (task.scoring == "classify", task.num_labels) != (
        trained.task.scoring == "classify",
        trained.task.num_labels,
    ):
        raise BadInput(f"task={task.name}: the run has the head of task={trained.task.name}")
    splits = task.splits()
    items = getattr(splits, settings.eval.split)
    loaded = load_model(trained)
    scorer = Scorer(
        task=task,
        loaded=loaded,
        device=next(loaded.model.parameters()).device,
        batch_size=settings.eval.batch_size,
        seq_len=min(settings.train.seq_len or task.seq_len, loaded.positions),
        max_new_tokens=settings.eval.max_new_tokens or task.max_new_tokens,
    )
    examples = scorer.examples(items)
    examples = examples[: settings.eval.limit]
    base = scorer.full(examples)
    load_adapter(loaded, run)
    tuned = scorer.full(examples)
    digest = splits.digest()
    found = {
        "run": Path(run).name,
        "task": task.name,
        "split": settings.eval.split,
        "items": len(examples),
        "data": digest,
        "settings": {
            "task": asdict(task),
            "seq_len": scorer.seq_len,
            "limit": settings.eval.limit,
            "max_new_tokens": scorer.max_new_tokens,
        },
        "metrics": {"primary": task.primary, "base": base.metrics, "tuned": tuned.metrics},
    }
    named = hashlib.sha256(json.dumps([digest, found["settings"]], sort_keys=True).encode())
    name = f"{task.name}-{settings.eval.split}-{named.hexdigest()[:10]}"
    folder = Path(run) / "evaluations" / name
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / "predictions.jsonl", examples, base.predictions, tuned.predictions)
    write_json(folder / "result.json", found)
    return found | {"folder": str(folder)}


def write_predictions(
    path: Path, examples: Sequence[Example], base: Sequence[Any], tuned: Sequence[Any]
) -> None:
    """One row an item: id, reference, base, tuned."""
    rows = []
    for example, before, after in zip(examples, base, tuned, strict=True):
        item = example.item
        reference = item.label if item.label is not None and not item.response else item.response
        row = {"id": item.id, "reference": reference, "base": before, "tuned": after}
        rows.append(json.dumps(row) + "\n")
    part = path.with_name(path.name + ".part")
    part.write_text("".join(rows))
    part.replace(path)


@complaining
def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="the folder of a finished run")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="task=, task.*=, eval.*=, train.seq_len=; what is not given is as in the run",
    )
    parser.add_argument("--json", action="store_true", help="one json object")
    given = parser.parse_args()
    found = evaluate_run(given.run, given.settings)
    if given.json:
        print(json.dumps(found))
        return 0
    from rich.console import Console
    from rich.table import Table

    metrics = found["metrics"]
    table = Table(
        title=f"{found['run']}: {found['task']}, {found['split']}, {found['items']} items"
    )
    for name in ("", "base", "tuned"):
        table.add_column(name)
    for key, value in metrics["base"].items():
        mark = " *" if key == metrics["primary"] else ""
        table.add_row(key + mark, f"{value:.4f}", f"{metrics['tuned'][key]:.4f}")
    Console().print(table)
    print(found["folder"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
