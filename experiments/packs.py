"""Which jobs of a sweep share a process and a base (hydra/launcher=packed).

Jobs go together that have the same model, storage of it, task, portions and scoring. What differs
between them (variant, rank, alpha, rate, seed, targets, ...) is what a sweep is made of. Whether
one can share at all is seen where it is built (packed.py); a pack that dies costs its jobs an
attempt, and each of them goes on alone.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, JobStatus, env_override, setup_globals
from omegaconf import DictConfig, open_dict

from . import isolate
from .attempt import about_job, asked, attempt, complained, deaf
from .config import seconds
from .record import NOT_AGAIN
from .tasks import BadInput, tasks

SAME = ("model", "task", "eval", "device")
SAME_IN_TRAINING = ("steps", "epochs", "batch_size", "seq_len", "accumulate", "autocast",
                    "activation_checkpointing")  # fmt: skip


class Packs:
    """A launcher's work: packs first, then what is left alone."""

    def __init__(self, basic: BasicLauncher, rows: int, memory: float) -> None:
        if rows < 1 or not 0 < memory <= 1:
            raise BadInput(f"hydra.launcher: rows={rows} from 1, memory={memory} a share up to 1")
        self.basic, self.about = basic, {"rows": rows, "memory": memory}

    def launch(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Each job's line, as `attempt.job` gives it."""
        setup_globals()
        config: Any = self.basic.config
        configs = [self._config(words) for words in jobs]
        groups: dict[str, list[int]] = {}
        for place, own in enumerate(configs):
            groups.setdefault(together(own), []).append(place)
        lines: dict[int, dict[str, Any]] = {}
        with env_override(config.hydra.job.env_set):
            for places in groups.values():
                if len(places) > 1 and not asked():
                    found = self._attempt([configs[place] for place in places])
                    lines |= {p: line for p, line in zip(places, found, strict=True) if line}
        returned = []
        for place, own in enumerate(configs):
            line = lines.get(place)
            if line is None:
                if len(groups[together(own)]) == 1:
                    print(f"solo: {own.hydra.job.override_dirname}: no other job has its model, "
                          f"base, task and portions", file=sys.stderr, flush=True)  # fmt: skip
                (one,) = self.basic.launch([jobs[place]], initial_job_idx + place)
                returned.append(one)
            else:
                complained(line, own.hydra.job.override_dirname)
                returned.append(JobReturn(_return_value=line, status=JobStatus.COMPLETED))
        return returned

    def _config(self, words: Sequence[str]) -> DictConfig:
        loader: Any = self.basic.hydra_context.config_loader  # type: ignore[union-attr]
        return loader.load_sweep_config(self.basic.config, list(words))

    def _attempt(self, configs: Sequence[DictConfig]) -> list[dict[str, Any] | None]:
        """The lines of jobs that share a process; None: it is to be run alone."""
        jobs = []
        for config in configs:
            hydra = config.hydra
            with open_dict(config):
                del config["hydra"]
            jobs.append(about_job(config, hydra))
            with open_dict(config):
                config.hydra = hydra
        about = {**jobs[0], "pack": {"jobs": jobs, **self.about}}
        sweep = configs[0].sweep
        if sweep.isolate:
            limit = seconds("sweep.time_limit", sweep.time_limit)
            limit = limit and limit * len(jobs)
            with deaf():
                line = isolate.run(about, limit=limit, grace=sweep.grace, stop=asked)
        else:
            line = attempt(about)
            if line["status"] == "interrupted":
                raise KeyboardInterrupt(line["error"])
        if "lines" in line:
            return line["lines"]
        if line["status"] in NOT_AGAIN:
            print(f"solo: the {len(jobs)} jobs of a pack, as {line['error']}", file=sys.stderr,
                  flush=True)  # fmt: skip
            return [None] * len(jobs)
        return [dict(line) for _ in jobs]


def together(config: Any) -> str:
    """What jobs must have in common to share a base: equal texts go together."""
    found = {key: config[key] for key in SAME}
    found["train"] = {key: config["train"][key] for key in SAME_IN_TRAINING}
    found["base"] = config["variant"]["base"]
    if tasks()[config["task"]["name"]].scoring == "classify":  # a new head is drawn from the seed
        found["seed"] = config["seed"]
    return json.dumps(found, default=str, sort_keys=True)
