"""A multirun: finishes what is missing of its combinations, whatever happened before.

What a run came to is in its folder; a sweep plans its combinations, launches those that are due,
launches again those whose worker died, waits for those that another driver has, and sums up.
"""

import contextlib
import gc
import hashlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from variants._registry import FACTORS

from . import attempt
from .attempt import STOP
from .config import states_of
from .overview import count, runs, show, table
from .plan import Job, PlannedLoader, Planner, is_the_sweep_s, write_plan
from .record import FINISHED, NOT_AGAIN, Terminated, make, one_line
from .tasks import BadInput


class Sweep:
    """A multirun. Others that choose combinations of their own call `finish` as often as needed."""

    def __init__(
        self, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        gc.freeze()
        gc.enable()  # off since run.py; compositions are full of cycles
        self.config, self.home = config, Path(config.hydra.sweep.dir)
        self.command = list(config.hydra.overrides.task)
        # of its group in W&B, of its jobs in a queue: the same when runs are tried again
        self.name = _named(word for word in self.command if not is_the_sweep_s(word))
        self.stop = self.home / f"{_named(self.command)}-{socket.gethostname()}-{os.getpid()}.stop"
        with open_dict(config.hydra):
            config.hydra.job.name = self.name
            config.hydra.job.env_set[STOP] = str(self.stop.absolute())
        self.planner = Planner(hydra_context.config_loader, config)
        self.plan = self.home / f"{_named(self.command)}.json"
        loader: Any = PlannedLoader(hydra_context.config_loader, self.plan.absolute())
        context = HydraContext(loader, hydra_context.callbacks)
        self.launcher = _launcher(context, task_function, config)
        self.jobs: list[Job] = []
        self.asked = 0  # the signal by which the user asked to stop

    def finish(self, combinations: Sequence[Sequence[str]]) -> list[Job]:
        """Runs what is missing of these; afterwards each job has its line, unless it had no need.

        Raises KeyboardInterrupt, after the table, where the user asked to stop.
        """
        jobs = self.planner.plan(combinations)
        states = [job.state for job in jobs]
        if self.config.dry:
            show(jobs, states)
            return jobs
        self.jobs += jobs
        due, join = {}, {}
        for job, state in zip(jobs, states, strict=True):
            if job.path is not None and self._is_due(job, state):
                due[job.path] = job
            elif job.path is not None and state in FINISHED and self._is_of_another_group(job):
                join[job.path] = job
        more = f"; {len(join)} finished before, to join this sweep in W&B" if join else ""
        print(f"{count(states)}; {len(due) or 'nothing'} to run{more}", flush=True)
        due |= join
        with self._signals():
            self._work(list(due.values()))
        for job in jobs:  # given twice
            job.line = job.line or (due[job.path].line if job.path in due else None)
        ends = [_end(job) for job in jobs]
        table(jobs, ends)
        unfinished = any(end not in FINISHED for end in ends)
        attempt.exit_code = max(attempt.exit_code, int(unfinished))
        if self.asked:
            raise Terminated if self.asked == signal.SIGTERM else KeyboardInterrupt
        return jobs

    def _is_due(self, job: Job, state: str) -> bool:
        """Whether it is to be run now; what others are running is, in case they die."""
        if state in ("missing", "interrupted", "running"):
            return True
        again = states_of(self.config.sweep.retry)
        if state in FINISHED:
            if state not in again and not job.config["rerun"]:
                return False
            job.config = {**job.config, "rerun": True}
            job.words = [*job.words, "rerun=true"]
            return True
        return state in again or bool(job.folder.changed_sources())

    def _is_of_another_group(self, job: Job) -> bool:
        """A finished run, in W&B, of another sweep: it joins this one there, and is not run."""
        track = job.config["track"]
        wanted = track["group"] or job.config["study"] or self.name
        return track["mode"] != "disabled" and job.folder.group != wanted

    def _work(self, todo: list[Job]) -> None:
        """Rounds, until nothing is left that could still be done here."""
        fruitless = 0
        while todo and not self.asked:
            free = [job for job in todo if not job.folder.is_locked()]
            if not free:
                self._wait(todo)
                continue
            error = self._launch(free)
            left = [job for job in todo if not self._has_ended(job)]
            lost = [job for job in left if job.line is None or job.line["status"] == "interrupted"]
            begun = [job for job in lost if job.folder.state != "missing"]
            fruitless = fruitless + 1 if lost and len(left) == len(todo) else 0
            if fruitless and error is not None and not begun:
                print(f"error: the launcher does not start: {error}", file=sys.stderr)
                return
            if error is not None and left and not self.asked:
                print(f"workers died ({error}): {runs(len(left))} left", file=sys.stderr)
            if fruitless == 3:
                for job in begun:
                    why = f"its worker died ({error})" if error else "it was interrupted thrice"
                    job.line = {"status": "failed", "error": why, "run": job.path}
                    job.folder.ended("failed", why)
                left = [job for job in left if not self._has_ended(job)]
                fruitless = 0
            todo = sorted(left, key=lambda job: job.folder.state == "interrupted")  # suspects last

    def _launch(self, jobs: list[Job]) -> str | None:
        """Puts these before the launcher; their lines, and how it failed if it did."""
        write_plan(self.plan, self.name, self.command, self.jobs)
        with open_dict(self.config.hydra):
            self.config.hydra.job.env_set[FACTORS] = str(largest_rank(self.jobs))
        for job in jobs:
            job.line, job.before = None, job.folder.changed_at
        try:
            returned = self.launcher.launch([job.words for job in jobs], initial_job_idx=0)
        except Exception as error:  # a worker's death takes its launcher along
            return f"{type(error).__name__}: {one_line(error)[:200]}"
        for job, one in zip(jobs, returned, strict=True):
            try:
                job.line = one.return_value
            except Exception as error:  # of Hydra or a launcher, before or after the run
                why = f"{type(error).__name__}: {one_line(error)}"
                job.line = {"status": "failed", "error": why}
            if job.line is not None and "run" in job.line:
                job.path = job.line["run"]
        return None

    def _has_ended(self, job: Job) -> bool:
        """By its own word; by its folder where that was lost with its worker, or where an interrupt
        came in the run's last lines."""
        moved = job.folder.changed_at != job.before
        open_ = job.line is None or job.line["status"] == "interrupted"
        if open_ and moved and job.folder.state in (*FINISHED, *NOT_AGAIN):
            job.line = {"status": job.folder.state, "run": job.path,
                        "error": job.folder.status.get("error", "")}  # fmt: skip
        return job.line is not None and job.line["status"] in (*FINISHED, *NOT_AGAIN)

    def _wait(self, jobs: list[Job]) -> None:
        """For what other processes have; they may die, and then it falls to this one."""
        holders = sorted({job.folder.holder for job in jobs})
        print(f"waiting for {runs(len(jobs))} that other processes have (host and pid: "
              f"{', '.join(holders)})", flush=True)  # fmt: skip
        while not self.asked and all(job.folder.is_locked() for job in jobs):
            time.sleep(0.5)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal asks all jobs, wherever they are, to stop; a second one ends it here."""
        make(self.home, self.config.out_dir)
        self.stop.unlink(missing_ok=True)

        def note(signum: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = signum
            self.stop.write_text(str(signum))

        ours = self.config.sweep.isolate and threading.current_thread() is threading.main_thread()
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM) if ours}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
            self.stop.unlink(missing_ok=True)


def largest_rank(jobs: Iterable[Job]) -> int:
    """That is given to a run with an init of its own: what one factorization of a matrix serves."""
    return max((job.config["rank"] or 0 for job in jobs if _init(job) != "default"), default=0)


def _init(job: Job) -> str:
    return job.config["variant"]["init"]["name"]


def _named(words: Iterable[str]) -> str:
    return f"sweep-{hashlib.sha256(' '.join(sorted(words)).encode()).hexdigest()[:10]}"


def _launcher(context: HydraContext, task_function: TaskFunction, config: DictConfig) -> Any:
    """Hydra's launcher of that name; one that is not installed is named."""
    try:
        return Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=task_function, config=config
        )
    except (ImportError, RuntimeError) as error:
        if "Unknown plugin class" not in str(error) and not isinstance(error, ImportError):
            raise
        name = config.hydra.runtime.choices["hydra/launcher"]
        extra = name.partition("_")[0].replace("submitit", "slurm")
        raise BadInput(
            f"hydra/launcher={name}: not installed; pip install -c constraints.txt -e '.[{extra}]'"
        ) from None


def _end(job: Job) -> str:
    """How it ended, or its state: what an interrupt left waiting is missing still, what finished
    before may be stale."""
    status = job.line["status"] if job.line else "interrupted"
    return job.state if status in ("interrupted", *FINISHED) else status
