"""Jobs of a sweep that train side by side on one base in this process (hydra/launcher=packed).

A run is a generator (job.py) that gives out its trainer where the training belongs. Here the
trainers of several runs are collected, each in a twin of the one base, and take their steps
together: one forward and one backward over the rows of all, then the optimizer, schedule, clipping,
validation and checkpoint of each, as it would have them alone. One that ends, or diverges, leaves;
the others go on.
"""

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from variants import Incompatible
from variants._packed import Pack, mixing, refusal, twin

from . import batches
from .attempt import attempting
from .job import Ground, Prepared, Work, alone, pick_device
from .loss import head_gives, loss_of, plain_head, token_nats
from .measure import resident_bytes
from .model import Loaded
from .record import Terminated
from .tasks._task import IGNORED
from .train import Trainer, stopping

WORTH = 4  # steps of a job's size, which a pack must have room for (docs/log.md)
LOOKED_AT = 8  # steps, for how many rows a step of several jobs has


class OneBase(Ground):
    """The model that all jobs here stand on, loaded and scored once."""

    several = True

    def __init__(self) -> None:
        self.loaded: Loaded | None = None
        self.found: dict[str, Any] | None = None

    def load(self, prepared: Prepared) -> Loaded:
        if self.loaded is None:
            self.loaded = super().load(prepared)
            self.loaded.model.to(pick_device(prepared.settings.device))
        return replace(self.loaded, model=twin(self.loaded.model))

    def scores(self, score: Any) -> dict[str, Any]:
        found = self.found = self.found or score()
        return found


@dataclass
class Slice:
    """One job at its training."""

    place: int  # in the list of jobs
    job: Work
    trainer: Trainer
    stream: torch.Tensor  # the state of torch's global generator
    index: int = -1  # in its pack

    @property
    def name(self) -> str:
        return self.trainer.run.prepared.name

    def finish(self, error: BaseException | None = None) -> dict[str, Any]:
        """Its line: what comes after the training, or after what that raised."""
        self.trainer.end()
        try:
            if error is None:
                next(self.job)
            else:
                self.job.throw(error)
        except StopIteration as end:
            return end.value
        raise AssertionError("a run trains once")

    def alone(self) -> dict[str, Any]:
        """Its line, after a training that is its own."""
        torch.set_rng_state(self.stream)
        return alone(self.job, self.trainer)

    @property
    def own_bytes(self) -> int:
        """What it adds at most, in a step and with what its optimizer keeps, to the base."""
        trained = self.trainer.adapter.parameters()
        states = 2 * sum(t.nbytes for t in trained)
        most = self.trainer.measured["step_peak_bytes"]
        return most + states - resident_bytes(self.trainer.model)


class Stopped(Exception):
    """A job was interrupted, and with it all."""


def attempt_all(jobs: Sequence[dict[str, Any]], rows: int, memory: float) -> dict[str, Any]:
    """Runs the jobs, which stand on one base; {"status", "lines": that of each}.

    `rows`: of tokens in a step, at most; `memory`: the share of what is free that a pack may take.
    """
    return Jobs(jobs, rows, memory).run()


class Jobs:
    """The jobs of one process: pack after pack, each as large as its steps may be."""

    def __init__(self, jobs: Sequence[dict[str, Any]], rows: int, memory: float) -> None:
        self.jobs, self.rows, self.memory = jobs, rows, memory
        self.ground = OneBase()
        self.lines: list[dict[str, Any] | None] = [None] * len(jobs)
        self.open: list[Slice] = []  # at their training, none of which is over
        self.pack: Pack | None = None

    def run(self) -> dict[str, Any]:
        try:
            for place in range(len(self.jobs)):
                self._start(place)
            self._train()
        except (Stopped, KeyboardInterrupt) as error:
            self._stop(error)
        stopped = {"status": "interrupted", "error": "stopped"}
        lines = [line or stopped for line in self.lines]
        over = all(line["status"] != "interrupted" for line in lines)
        return {"status": "done" if over else "interrupted", "error": "stopped", "lines": lines}

    def _start(self, place: int) -> None:
        """One more job, up to its training."""
        job: Any = attempting(self.jobs[place], ground=self.ground)
        try:
            trainer = next(job)
        except StopIteration as end:
            self._over(place, end.value)
            return
        new = Slice(place, job, trainer, torch.get_rng_state())
        try:
            trainer.begin()
        except BaseException as error:
            self._over(place, new.finish(error))
            return
        why = self._refusal(new)
        if why is None and self.open and not self._fits(new):
            self._train()
        if why is None:
            self.pack = self.pack or Pack(self.ground.loaded.model)  # type: ignore[union-attr]
            try:
                new.index = self.pack.add(trainer.adapter)
            except Incompatible as error:
                why = str(error)
        if why is None:
            self.pack.rows.streams[new.index] = new.stream  # type: ignore[union-attr]
            self.open.append(new)
        else:
            self._solo(new, why)

    def _refusal(self, new: Slice) -> str | None:
        """Why a job goes alone, before it is tried with others."""
        settings = new.trainer.settings
        if settings.activation_checkpointing:
            return "train.activation_checkpointing computes again what other jobs have drawn"
        own = self._tokens([new])
        if own * WORTH > self.rows:
            return f"{own:.0f} tokens in a step, with which packing gains nothing ({WORTH} such " \
                   f"steps would have to fit into {self.rows})"  # fmt: skip
        assert self.ground.loaded is not None
        return mixing(self.ground.loaded.model) or refusal(new.trainer.adapter.choice)

    def _fits(self, new: Slice) -> bool:
        """Whether the open jobs have room for one more."""
        together = [*self.open, new]
        own = sum(one.own_bytes for one in together)
        free = self.memory * free_bytes(new.trainer.device)
        return self._tokens(together) <= self.rows and own <= free

    def _tokens(self, slices: Sequence[Slice]) -> float:
        """Rows of a step of these together, with what fills up the shorter ones."""
        found = 0
        for step in range(LOOKED_AT):
            items = [e for one in slices for e in batches.split(
                one.trainer.items(one.trainer.step + step), one.trainer.settings.accumulate)[0]
            ]  # fmt: skip
            found += len(items) * max(len(e.ids) for e in items)
        return found / LOOKED_AT

    def _solo(self, one: Slice, why: str) -> None:
        print(f"solo: {one.name}: {why}", file=sys.stderr, flush=True)
        self._over(one.place, one.alone())

    def _over(self, place: int, line: dict[str, Any]) -> None:
        self.lines[place] = line
        if line["status"] == "interrupted":
            raise Stopped

    def _train(self) -> None:
        """The open jobs to their ends; then there are none."""
        if len(self.open) == 1:
            self._solo(self.open.pop(), "no other job of the sweep fits beside it")
        for one in self.open:
            one.trainer.run.share_out(self._tokens(self.open))
            one.trainer.run.note_environment(packed=len(self.open))
        pack: Any = self.pack
        self.open.sort(key=lambda one: not pack.by_factors(one.index))
        while self.open:
            with stopping(patient=False) as stop:
                ended = {one.place: (one, None) for one in self.open
                         if one.trainer.step >= one.trainer.steps}  # fmt: skip
                while not ended and not stop:
                    ended = step(pack, self.open)
            for one, error in ended.values():
                self.open.remove(one)
                self._over(one.place, one.finish(error))
            if stop:
                raise Terminated if stop[0] == signal.SIGTERM else KeyboardInterrupt
        self.pack = None

    def _stop(self, error: BaseException) -> None:
        """The open jobs leave, with a checkpoint of the step that they are at."""
        signum = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        for one in self.open:
            assert self.pack is not None
            try:
                with self.pack.rows.stream(one.index):
                    one.trainer.leave(signum)
            except BaseException as left:
                self.lines[one.place] = one.finish(left)


def step(pack: Pack, live: Sequence[Slice]) -> dict[int, tuple[Slice, BaseException | None]]:
    """One step of each; those that are over after it, with what ended them."""
    began = time.perf_counter()
    trainers = [one.trainer for one in live]
    drawn = [trainer.batch() for trainer in trainers]
    losses = torch.zeros(len(live), device=trainers[0].device)
    portions = [batches.split(items, t.settings.accumulate)
                for (items, _), t in zip(drawn, trainers, strict=True)]  # fmt: skip
    for parts in zip(*portions, strict=True):
        with trainers[0].run.scorer.cast():
            together = torch.stack(_losses(pack, live, parts, [tokens for _, tokens in drawn]))
        together.sum().backward()
        losses += together.detach()
    share = (time.perf_counter() - began) / len(live)
    over: dict[int, tuple[Slice, BaseException | None]] = {}
    for one, (items, tokens), loss in zip(live, drawn, losses, strict=True):
        began, trainer = time.perf_counter(), one.trainer
        try:
            with pack.rows.stream(one.index):
                loss_value, norm = trainer.learn(items, tokens, loss)
                seconds = share + time.perf_counter() - began
                trainer.follow(seconds, loss_value, norm)
        except Exception as error:  # such as Diverged
            over[one.place] = one, error
            continue
        if trainer.step >= trainer.steps:
            over[one.place] = one, None
    return over


def _losses(
    pack: Pack, live: Sequence[Slice], parts: Sequence[Any], tokens: Sequence[int]
) -> list[torch.Tensor]:
    """The training loss of each slice on its part of a batch, from one pass."""
    loaded, device = live[0].trainer.run.loaded, live[0].trainer.device
    pad_id = loaded.tokenizer.pad_token_id
    made = [batches.collate(part, pad_id, device) for part in parts]
    inputs = [{"input_ids": own["ids"], "attention_mask": own["mask"]} for own in made]
    labels = [own["labels"] for own in made]
    run = partial(pack.outputs, [one.index for one in live], inputs, {"input_ids": pad_id})
    head = plain_head(pack.model(), loaded.output_head) if labels[0].ndim == 2 else None
    if head is None:
        return [loss_of(*own) for own in zip(run(), labels, tokens, strict=True)]
    longest = max(own.shape[1] for own in labels)
    filled = [F.pad(own, (0, longest - own.shape[1]), value=IGNORED) for own in labels]
    with head_gives(head, token_nats, torch.cat(filled)):
        return [nats.sum() / count for nats, count in zip(run(), tokens, strict=True)]


def free_bytes(device: torch.device) -> int:
    """What a pack could take now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
