"""One run, from settings to result.json: prepare, score the base, train, score what came of it."""

import contextlib
import gc
import json
import math
import os
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.utils._pytree import tree_leaves

import variants
from variants._adapter import Adapter, Choice, Planned, build, choose, needs, plan
from variants._api import Stored
from variants._layer import Frozen
from variants._registry import Incompatible, find_preset, outside_of, said_by

from . import batches, provenance, record
from .config import Settings, fill, run_hash, stamp
from .evaluate import Scorer, Scores, write_predictions
from .measure import resident_bytes, storage_bytes
from .model import Loaded, Source
from .parallel import ALONE, Team
from .record import Folder, Log, NotHere
from .screen import Screen
from .tasks import BadInput, Example, Splits, Task
from .tasks.lm import LanguageModelling
from .track import Tracker
from .train import Diverged, Trainer

REFERENCE_WIDTH = 4096  # of the 7B models for which papers give their learning rates
ALL_THREADS = torch.get_num_threads()
# width x tokens of a step: below, a second thread gains nothing on a quiet machine, and on a busy
# one each product waits for it (docs/log.md)
WORTH_A_THREAD = 2**17


@dataclass(frozen=True)
class Prepared:
    """A run that is known in full, before anything heavy is loaded."""

    settings: Settings
    splits: Splits
    source: Source
    choice: Choice
    lr: float
    lr_origin: str
    folder: Folder

    @property
    def name(self) -> str:
        return self.folder.path.name


def prepare(settings: Settings, inputs: "Inputs | None" = None) -> Prepared:
    """Resolves every default and names the run; raises on what cannot be.

    `inputs` remembers data and models between the runs of a sweep.
    """
    inputs = inputs or Inputs()
    axes = {axis: settings.variant[axis] for axis in variants.parts()}
    choice = choose(settings.variant["name"], settings.rank, settings.alpha, **axes)
    splits, data = inputs.data(settings.task)
    fill(settings, len(splits.train))
    source = inputs.source(settings.model)
    lr, origin = learning_rate(settings, source.width)
    identity = {"preset": choice.preset, "axes": choice.axes(), "rank": choice.rank,
                "alpha": choice.alpha}  # fmt: skip
    code = sorted(map(said_by, outside_of(choice.preset, choice.parts)))
    if code:  # the project's own makes a run stale; another file of that name is another variant
        identity["code"] = code
    settings.rank, settings.alpha = choice.rank, choice.alpha
    if choice.alpha_per_rank is not None and (settings.rank_pattern or choice.allocation.rescales):
        # at a layer's own rank a multiple of the rank is not what the same number is
        settings.alpha = f"{choice.alpha_per_rank:g}r"
    if settings.targets is None:
        settings.targets = find_preset(choice.preset).targets
    data += _text_digest(settings.eval.forgetting) or ""
    digest = run_hash(settings, identity, lr, source.digest, data)
    rank = f"-r{choice.rank}" if choice.rank is not None else ""
    path = Path(settings.out_dir) / (settings.study or "single") / f"{choice.preset}{rank}-{digest}"
    return Prepared(settings, splits, source, choice, lr, origin, Folder(path))


class Inputs:
    """Data and models, read and hashed once for as long as their files stay as they are."""

    def __init__(self) -> None:
        self._data: dict[Any, tuple[Splits, str]] = {}
        self._sources: dict[Any, Source] = {}

    def data(self, task: Task) -> tuple[Splits, str]:
        """The items of a task and their hash."""
        key = _key(task)
        if key not in self._data:
            splits = task.splits()
            if len(self._data) == 4:  # a text may be large
                del self._data[next(iter(self._data))]
            self._data[key] = splits, splits.digest()
        return self._data[key]

    def source(self, model: Any) -> Source:
        """A model that is not loaded yet."""
        return self._sources.setdefault(_key(model), Source(model))


def _key(settings: Any) -> str:
    """One data set or model, in the state in which its files are."""
    return f"{settings!r} {stamp(asdict(settings))}"


def _text_digest(path: str | None) -> str | None:
    if path is None:
        return None
    digest = provenance.file_digest(Path(path).expanduser())
    if digest is None:
        raise BadInput(f"eval.forgetting={path}: no such file")
    return digest


def learning_rate(settings: Settings, width: int | None) -> tuple[float, str]:
    """`optim.lr`, or the preset's own carried to the model's width; and where it comes from."""
    if settings.optim.lr is not None:
        return settings.optim.lr, "optim.lr"
    preset = find_preset(settings.variant["name"])
    exponent = settings.optim.width_exponent
    if exponent is None:
        exponent = preset.width_exponent
    if width is None or exponent == 0:
        return preset.lr, f"{preset.lr:g}: {preset.lr_origin}"
    factor = (preset.width / width) ** exponent
    return preset.lr * factor, (
        f"{preset.lr:g} ({preset.lr_origin}) at width {preset.width}, "
        f"x{factor:.3g} at width {width}"
    )


class Held(BadInput):
    """Another process has this very run."""


class Ground:
    """What a run stands on. One that several share (packed.py) remembers both."""

    several = False  # runs of this process that are open at once

    def load(self, prepared: Prepared) -> Loaded:
        """The untouched model, the same each time."""
        task = prepared.settings.task
        torch.manual_seed(prepared.settings.seed)  # a new head draws from here
        return prepared.source.load(task.num_labels, regression=task.num_labels == 1)

    def scores(self, score: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the untouched model reaches, as `score` finds it."""
        return score()


# A run is a generator: it gives its trainer out where the training belongs, goes on when that is
# done, and returns result.json's content; what the training raises is raised in it.
Work = Generator[Trainer, None, dict[str, Any]]


def run(
    prepared: Prepared, screen: Screen, group: str = "single", team: Team = ALONE
) -> dict[str, Any]:
    """Runs, or resumes, or reports what is finished; returns result.json's content."""
    return alone(work(prepared, screen, group, team))


def alone(job: Work, trainer: Trainer | None = None) -> dict[str, Any]:
    """To the end of a run that no other trains beside, or of what holds one; what it returns.

    `trainer`: what it gave out already.
    """
    try:
        trainer = trainer or next(job)
        while True:
            try:
                trainer.train()
            except BaseException as error:
                trainer = job.throw(error)
            else:
                trainer = next(job)
    except StopIteration as end:
        return end.value


def work(
    prepared: Prepared, screen: Screen, group: str, team: Team = ALONE, ground: Ground | None = None
) -> Work:
    """The run of these settings."""
    folder, settings, ground = prepared.folder, prepared.settings, ground or Ground()
    notes = team.together(lambda: team.take(prepared))
    finished = team.tell(lambda: folder.result)
    if finished is not None and not settings.rerun:
        _say_finished(prepared, finished, screen, group, team, ground)
        return finished
    with contextlib.ExitStack() as held:
        team.together(lambda: team.first(_hold, folder, held))
        finished = team.tell(lambda: folder.result)  # since then
        if finished is not None and not settings.rerun:
            screen.finished(finished, folder.path)
            return finished
        if finished is not None:
            screen.say(f"the finished run was set aside as {team.first(folder.set_aside)}")
        return (yield from _run(prepared, screen, group, team, notes, ground))


def _hold(folder: Folder, held: contextlib.ExitStack) -> None:
    if not held.enter_context(folder.locked()):
        raise Held(f"{folder.path}: another process is running this very run ({folder.holder})")


def _say_finished(
    prepared: Prepared,
    finished: dict[str, Any],
    screen: Screen,
    group: str,
    team: Team,
    ground: Ground,
) -> None:
    folder = prepared.folder
    changed = folder.changed_sources()
    if changed:
        screen.say(
            f"finished with other code ({record.some(changed)} changed since): kept; rerun=true "
            f"runs it again beside the old one"
        )
    joined = team.first(_regroup, prepared, finished, screen, group, ground.several)
    screen.say("finished before; rerun=true runs it again beside the old one")
    if not (folder.path / "adapter" / "adapter.json").is_file():
        screen.say(f"its adapter is gone from {folder.path}: rerun=true makes it again")
    if not (joined and screen.brief):  # a sweep says what it runs
        screen.finished(finished, folder.path)


def _run(
    prepared: Prepared,
    screen: Screen,
    group: str,
    team: Team,
    notes: list[str],
    ground: Ground,
) -> Work:
    """The run itself, its folder being held; how it ends is in status.json."""
    folder, settings = prepared.folder, prepared.settings
    device = team.together(lambda: team.device(pick_device(settings.device)))
    began = time.perf_counter()
    loaded = team.together(lambda: ground.load(prepared))
    if not gc.isenabled():  # off since run.py; what is there by now stays, and is not walked again
        gc.freeze()
        gc.enable()
    asked = settings.targets, settings.rank_pattern, settings.alpha_pattern
    planned = team.together(lambda: plan(loaded.model, prepared.choice, *asked))
    log = Log(folder.path / "run.log" if team.rank == 0 else Path(os.devnull))
    screen.log = log.write
    own = settings.track.group or settings.study or group
    team.first(folder.sweep_up)
    own = own if settings.track.mode != "disabled" else None
    team.first(folder.set_status, "running", group=own)
    job = team.together(
        lambda: Run(prepared, loaded, planned, device, screen, group, began, team, ground)
    )
    try:
        result = yield from job.result(notes)
    except KeyboardInterrupt as error:
        if folder.result is None:  # else there was no more to do
            team.first(folder.set_status, "interrupted", error=record.interrupted(error))
        log.write(record.interrupted(error))
        job.tracker.finish(None, failed=True)
        raise
    except Exception as error:
        told = team.explain(error)
        if isinstance(told, BadInput | Incompatible):  # seen where the layers were made
            how, said, trace = "refused", record.one_line(told), {}
        else:
            how, said = "failed", f"{type(told).__name__}: {told}"
            trace = {"traceback": traceback.format_exc()}
        team.first(folder.set_status, how, error=said, sources=provenance.sources(), **trace)
        log.write(trace.get("traceback", said))
        job.tracker.finish(None, failed=True)
        if told is not error:
            raise told from error
        raise
    finally:
        screen.log = lambda text: None
        log.close()
    screen.finished(result, folder.path)
    return result


def _regroup(
    prepared: Prepared, result: Mapping[str, Any], screen: Screen, group: str, beside: bool
) -> bool:
    """A finished run that a later sweep asks for joins that sweep's W&B group; whether it did."""
    settings, folder = prepared.settings, prepared.folder
    group = settings.track.group or settings.study or group
    if settings.track.mode == "disabled" or group in ("single", folder.group):
        return False
    with folder.locked() as held:
        if not held:
            return False
        config = OmegaConf.to_container(OmegaConf.load(folder.path / "config.yaml"))
        tracker = Tracker(
            settings.track,
            folder.path,
            name=prepared.name,
            group=group,
            tags=_tags(prepared),
            config=config,  # type: ignore[arg-type]
            say=screen.say,
            beside=beside,
        )
        tracker.finish(summary(result))
        folder.set_status(result["status"], group=group)
    return True


def _tags(prepared: Prepared) -> list[str]:
    """Of a run in W&B."""
    settings = prepared.settings
    named = [prepared.choice.preset, prepared.source.name, settings.task.name]
    return [*named, *filter(None, [settings.track.stage, settings.track.frozen])]


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """What W&B shows of a finished run, and `result`: result.json, for analysis.compare --wandb."""
    scores = {f"{when}/{k}": v for when in ("base", "tuned")
              for k, v in result["metrics"][when].items()}  # fmt: skip
    return scores | {"status": result["status"], "result": json.dumps(result)}


def pick_device(name: str) -> torch.device:
    """`auto`: CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise NotHere(f"device={name}: no CUDA device here; choices: auto, cpu")
    if device.index is not None and device.index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise NotHere(f"device={name}: no such device here; the last one is cuda:{last}")
    return device


class Run:
    """The work of one run, in the order in which it happens."""

    def __init__(
        self,
        prepared: Prepared,
        loaded: Loaded,
        planned: list[Planned],
        device: torch.device,
        screen: Screen,
        group: str,
        began: float,
        team: Team,
        ground: Ground,
    ) -> None:
        settings = prepared.settings
        self.prepared, self.settings, self.loaded = prepared, settings, loaded
        self.planned, self.device, self.screen, self.began = planned, device, screen, began
        self.path, self.checkpoints = prepared.folder.path, prepared.folder.path / "checkpoint"
        self.team, self.home, self.ground = team, team.home(device), ground
        self._settled(loaded.model)
        codes = [m.shape for m in loaded.model.modules() if isinstance(m, Stored)]  # of its files
        self.numbers = sum(p.numel() for p in loaded.model.parameters())  # before the adapter
        self.numbers += sum(m * n for m, n in codes)
        self.scorer = Scorer(
            task=settings.task,
            loaded=loaded,
            device=device,
            batch_size=settings.eval.batch_size,
            seq_len=min(settings.train.seq_len or 0, loaded.positions),
            max_new_tokens=settings.eval.max_new_tokens or 0,
            autocast=settings.train.autocast == "bf16",
            tick=screen.tick,
            team=team,
        )
        config = self._config()
        team.first(OmegaConf.save, OmegaConf.create(config), self.path / "config.yaml")
        self.environment = provenance.environment() | {"processes": team.size}
        self.tracker = Tracker(
            settings.track,
            self.path,
            name=prepared.name,
            group=settings.track.group or settings.study or group,
            tags=_tags(prepared),
            config=config,
            say=screen.say,
            beside=ground.several,
        )

    def _settled(self, model: Any) -> Any:
        """A model as it was loaded, where it belongs and as the settings want it."""
        model.to(self.home)
        if self.settings.train.activation_checkpointing:
            model.gradient_checkpointing_enable()
        return model

    def _config(self) -> dict[str, Any]:
        """The resolved settings, as config.yaml and W&B have them."""
        settings, choice = self.settings, self.prepared.choice
        plain = asdict(settings)
        plain["variant"] = {"name": choice.preset, **choice.axes()}
        plain["task"] = {"name": settings.task.name, **asdict(settings.task)}
        plain["optim"]["lr"] = self.prepared.lr
        return plain

    def result(self, notes: list[str]) -> Work:
        """All of it; writes result.json last."""
        settings, prepared, screen = self.settings, self.prepared, self.screen
        self.changed = self.team.tell(self._changed)
        train = self.scorer.examples(prepared.splits.train)
        self._choose_threads(train)
        screen.say(f"{prepared.name}: {prepared.source.name}, {settings.task.name}, "
                   f"{self.environment['device']}; {self.path}")  # fmt: skip
        for note in (*prepared.choice.notes, *notes):
            screen.say(note)
        scored = self.scorer.examples(getattr(prepared.splits, settings.eval.split))
        scored = scored[: settings.eval.limit]
        self._say_cut(train)
        self.eval_s = 0.0
        base = self._base(scored, train)
        adapter = self.team.together(lambda: self._attach(train))
        self.team.together(lambda: self.team.spread(adapter, self.device))
        init_s = time.perf_counter() - self.began - self.eval_s
        trainer = self.team.together(lambda: Trainer(self, adapter, train, scored))
        diverged = None
        try:
            yield trainer
        except Diverged as error:
            diverged = str(error)
            screen.say(f"diverged: {error}")
        tuned, forgetting = self._tuned(scored, base, adapter) if diverged is None else (None, None)
        if tuned is not None and not math.isfinite(tuned.metrics["loss"]):
            diverged = f"the loss after step {trainer.step} is not finite"
        self.team.agree(adapter.parameters())
        peak = self.team.most(peak_bytes(self.device))

        def written() -> dict[str, Any]:
            adapter.save(self.path / "adapter")
            found = self._assemble(
                base, tuned, forgetting, adapter, trainer, init_s, diverged, peak
            )
            after = [None] * len(scored) if tuned is None else tuned.predictions
            write_predictions(self.path / "predictions.jsonl", scored, base["predictions"], after)
            prepared.folder.set_status(found["status"])
            record.write_json(self.path / "result.json", found)
            self.tracker.finish(summary(found))
            return found

        return self.team.tell(written)

    def _changed(self) -> list[str]:
        """The files that changed since the run was begun, or since any attempt that it goes on."""
        before = (record.read_json(self.path / "env.json") or {}).get("changed", [])
        return sorted({*before, *self.prepared.folder.changed_sources()})

    def _choose_threads(self, train: list[Example]) -> None:
        tokens = sum(len(e.ids) for e in train) / len(train)
        tokens *= self.settings.train.batch_size / self.settings.train.accumulate  # type: ignore[operator]
        self.share_out(tokens)
        self.note_environment()

    def share_out(self, tokens: float) -> None:
        """One thread for steps too small to share; OMP_NUM_THREADS, where set, has been heard."""
        if self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            width = self.prepared.source.width or REFERENCE_WIDTH
            torch.set_num_threads(1 if width * tokens < WORTH_A_THREAD else ALL_THREADS)

    def note_environment(self, **more: Any) -> None:
        """Where the run runs, into its folder and its result."""
        self.environment |= {"device": _name(self.device), **more}
        self.team.first(record.write_json, self.path / "env.json", self.environment)

    def _say_cut(self, examples: list[Example]) -> None:
        count = sum(e.cut for e in examples)
        if count:
            self.screen.say(
                f"{count} of {len(examples)} training items are longer than "
                f"{self.scorer.seq_len} tokens and were cut (train.seq_len)"
            )

    def _forgetting(self) -> tuple[Scorer, list[Example]] | None:
        """What the base could do before: the task's old items, or a text file of your own."""
        limit = self.settings.eval.limit
        if self.settings.eval.forgetting is not None:
            task = LanguageModelling(path=self.settings.eval.forgetting)
            items = task.splits().validation + task.splits().test
            scorer = Scorer(task, self.loaded, self.device, self.scorer.batch_size,
                            self.scorer.seq_len, 0, self.scorer.autocast,
                            team=self.team)  # fmt: skip
            return scorer, scorer.examples(items)[:limit]
        if self.prepared.splits.forgetting:
            return self.scorer, self.scorer.examples(self.prepared.splits.forgetting)[:limit]
        return None

    def _base(self, scored: list[Example], train: list[Example]) -> dict[str, Any]:
        """The untouched model's scores and what one training step keeps; kept for a resume."""
        file = self.checkpoints / "base.json"
        kept = self.team.tell(record.read_json, file)
        if kept is not None and kept.get("old") == self._count_old():
            return kept
        began = time.perf_counter()
        found = self.ground.scores(lambda: self._scores(scored))
        self.eval_s += time.perf_counter() - began
        self.team.first(self.checkpoints.mkdir, exist_ok=True)
        self.team.first(record.write_json, file, found)
        self.loaded.model = self.team.renewed(
            self.loaded.model, lambda: self._settled(self.ground.load(self.prepared).model)
        )
        return found

    def _scores(self, scored: list[Example]) -> dict[str, Any]:
        self.team.shard(self.loaded.model, self.device, ())
        self.screen.phase("scoring the base", self._portions(scored))
        scores = self.scorer.full(scored)
        old = self._forgetting()
        return {"metrics": scores.metrics, "predictions": scores.predictions,
                "forgetting": old[0].full(old[1]).metrics if old else None,
                "old": self._count_old()}  # fmt: skip

    def _count_old(self) -> int:
        """How many old items are scored: of the base as of the result."""
        old = self._forgetting()
        return len(old[1]) if old else 0

    def _portions(self, scored: list[Example]) -> int:
        """The batches that this process scores."""
        count = math.ceil(len(scored) / self.scorer.batch_size)
        return len(self.team.turns(range(count)))

    def _attach(self, train: list[Example]) -> Adapter:
        settings, choice = self.settings, self.prepared.choice
        size: int = settings.train.batch_size  # type: ignore[assignment]
        pad_id = self.loaded.tokenizer.pad_token_id
        if needs(choice):
            self.screen.say(f"measuring the {' and the '.join(needs(choice))} of each layer")
        heads = self.loaded.heads if settings.task.scoring == "classify" else []
        adapter = build(
            self.loaded.model,
            choice,
            self.planned,
            targets=settings.targets,
            dropout=settings.dropout,
            seed=settings.seed,
            calibration=batches.calls(
                train, size, settings.seed, pad_id, self.home, settings.task.num_labels > 1
            ),
            modules_to_save=tuple(heads),
            notes=choice.notes,
        )
        for note in adapter.notes[len(choice.notes) :]:
            self.screen.say(note)
        self.screen.say(
            f"{choice.preset}: {adapter.num_trainable:,} trained numbers in {len(adapter.layers)} "
            f"matrices; lr {self.prepared.lr:.3g} ({self.prepared.lr_origin})"
        )
        return adapter

    def _tuned(
        self, scored: list[Example], base: Mapping[str, Any], adapter: Adapter
    ) -> tuple[Scores, dict[str, Any] | None]:
        began = time.perf_counter()
        self.screen.phase("scoring the result", self._portions(scored))
        scores = self.scorer.full(scored)
        old = self._forgetting()
        forgetting = None
        if old is not None:
            after = old[0].full(old[1]).metrics
            forgetting = {"base": base["forgetting"], "tuned": after}
        self.eval_s += time.perf_counter() - began
        return scores, forgetting

    def _assemble(
        self,
        base: Mapping[str, Any],
        tuned: Scores | None,
        forgetting: dict[str, Any] | None,
        adapter: Adapter,
        trainer: Trainer,
        init_s: float,
        diverged: str | None,
        peak: int,
    ) -> dict[str, Any]:
        """result.json."""
        settings, prepared = self.settings, self.prepared
        choice = prepared.choice
        trained = adapter.num_trainable
        total = self.numbers + trained - adapter.num_replaced
        heads = sum(p.numel() for m in adapter.saved_modules.values() for p in m.copy.parameters())
        return {
            "schema": record.SCHEMA,
            "run_id": prepared.name.rpartition("-")[2],
            "status": "done" if diverged is None else "diverged",
            "config": {
                "variant": choice.preset,
                "axes": choice.axes(),
                "rank": choice.rank,
                "alpha": choice.alpha,
                "scale": sorted({layer.acting_s for layer in adapter.layers.values()}),
                "targets": settings.targets,
                "model": prepared.source.name,
                "task": settings.task.name,
                "seed": settings.seed,
                "lr": prepared.lr,
                "lr_origin": prepared.lr_origin,
                "steps": settings.train.steps,
                "batch_size": settings.train.batch_size,
                "split": settings.eval.split,
            },
            "metrics": {
                "primary": settings.task.primary,
                "base": base["metrics"],
                "tuned": tuned.metrics if tuned else dict.fromkeys(base["metrics"]),
            },
            "learning": trainer.learning(),
            "diverged": diverged,
            "forgetting": forgetting,
            "notes": list(adapter.notes),
            "fresh_head": self.loaded.fresh_head,
            "params": {
                "trainable": trained,
                "head": heads,
                "total": total,
                "fraction": trained / total,
            },
            "ranks": adapter.ranks() if choice.rank is not None else None,
            "time": {
                "init_s": init_s,
                "train_s": trainer.seconds,
                "eval_s": self.eval_s + trainer.eval_s,
                "step_ms": 1000 * statistics.median(trainer.durations)
                if trainer.durations
                else None,
            },
            "memory": self._memory(adapter, trainer, peak),
            "tokens": trainer.tokens,
            "flops": trainer.measured["flops_per_token"] * trainer.tokens["seen"],
            "provenance": {
                "model": prepared.source.digest,
                "data": prepared.splits.digest(),
                **{k: v for k, v in self.environment.items() if k != "sources"},
            },
        }

    def _memory(self, adapter: Adapter, trainer: Trainer, peak: int) -> dict[str, Any]:
        """Bytes of the run, and bits of the numbers that the base stores, in all and by format."""
        frozen = [m for m in self.loaded.model.modules() if isinstance(m, Frozen)]
        formats: dict[str, dict[str, int]] = {}
        for layer in frozen:
            found = formats.setdefault(layer.base.name, {"numbers": 0, "bits": 0})
            found["numbers"] += layer.out_features * layer.in_features
            found["bits"] += layer.stored.bits
        states = tree_leaves(list(trainer.optimizer.state.values()))
        return {
            "peak_bytes": peak,
            "peak_of": "tensors on the GPU" if self.device.type == "cuda" else "the process",
            "step_peak_bytes": trainer.measured.get("step_peak_bytes"),
            "resident_bytes": resident_bytes(self.loaded.model),
            "decoded_bytes": max(layer.stored.decoded_bytes for layer in frozen),
            "optimizer_bytes": storage_bytes(t for t in states if isinstance(t, torch.Tensor)),
            "saved_activation_bytes": trainer.measured["saved_activation_bytes"],
            "stored_bits": sum(f["bits"] for f in formats.values())
            / sum(f["numbers"] for f in formats.values()),
            "formats": formats,
            "restoring_bytes": sum(
                t.nbytes
                for layer in adapter.layers.values()
                for t in (*(layer.subtracted or ()), *(layer.own_restoring or ()), layer.kept)
                if t is not None
            ),
        }


def peak_bytes(device: torch.device) -> int:
    """CUDA: the most that tensors took; CPU: the most that the process took since it began, with
    all that it has imported and, in a sweep of sweep.isolate=false, the runs before."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}"
