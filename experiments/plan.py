"""What a sweep consists of: every combination, composed once, and the folder of its run.

Composing takes Hydra some 80 ms, so that a thousand jobs would keep a driver busy for minutes:
combinations that differ in plain values share one composition, what was planned before is kept in
a manifest, and launchers take the configuration of a job from the sweep's plan.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from variants import Incompatible

from .config import OUTSIDE, check_outside, restored, settings_of, stamp
from .provenance import ROOT, digest_now, tree
from .record import Folder, make, read_json, write_json
from .tasks import BadInput

OF_THE_SWEEP = ("sweep", "dry", "rerun")  # keys that are one for all runs of a sweep


@dataclass
class Job:
    """One combination of a sweep."""

    words: list[str]  # its overrides
    config: dict[str, Any] = field(repr=False)
    path: str | None  # of the run's folder; None: refused before it had one
    error: str = ""  # why refused
    name: str = ""  # for people: its overrides less those that all jobs of the sweep have
    line: dict[str, Any] | None = None  # what came of it in this sweep
    before: int = 0  # when its status had last changed before it was launched

    @property
    def folder(self) -> Folder:
        assert self.path is not None
        return Folder(Path(self.path))

    @property
    def state(self) -> str:
        """The folder's, as it is now."""
        return "refused" if self.path is None else self.folder.state

    @property
    def why(self) -> str:
        """The first line of what it failed of."""
        text = (self.line or {}).get("error") or self.error
        if not text and self.path is not None:
            text = self.folder.status.get("error", "")
        return text.strip().partition("\n")[0][:300]


def key(words: Iterable[str]) -> str:
    """Names a combination, in whichever order it is given, and whatever its sweep does with it."""
    return "\n".join(sorted(word for word in words if not is_the_sweep_s(word)))


def is_the_sweep_s(word: str) -> bool:
    """Whether it says what a sweep does with its runs, and nothing of them."""
    name = word.partition("=")[0]
    return name in OF_THE_SWEEP or name.startswith("sweep.")


def _is_outside(word: str) -> bool:
    return re.split(r"[.=@]", word.lstrip("+~"))[0] in OUTSIDE


class Composer:
    """Hydra's composition of a sweep's jobs, one for all that differ in plain values alone."""

    def __init__(self, loader: Any, master: DictConfig) -> None:
        self.loader, self.master = loader, master
        self.parser = OverridesParser.create(config_loader=loader)
        self.made: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, words: Sequence[str]) -> DictConfig:
        choices, values = [], []
        for override in self.parser.parse_overrides(list(words)):
            is_group = self.loader.repository.group_exists(override.key_or_group)
            chooses = is_group and not isinstance(override.value(), dict)
            (choices if chooses or override.package else values).append(override)
        given = tuple(str(override.input_line) for override in choices)
        if given not in self.made:
            config = self.loader.load_sweep_config(self.master, list(given))
            with open_dict(config):
                del config["hydra"]
            self.made[given] = config
        return self._put(values, self.made[given])

    def outside(self, words: Sequence[str]) -> DictConfig:
        """The command's configuration with these words, none of which chooses a group."""
        return self._put(self.parser.parse_overrides(list(words)), self.master)

    def _put(self, values: list[Override], into: DictConfig) -> DictConfig:
        config = copy.deepcopy(into)
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        return config


class Planner:
    """Plans sweeps into one out_dir."""

    def __init__(self, loader: Any, master: DictConfig) -> None:
        self.composer = Composer(loader, master)
        self.file = Path(master.hydra.sweep.dir) / "manifest.json"
        self.out_dir = master.out_dir
        self.base = _base(master)
        found = read_json(self.file) or {}
        self.known: dict[str, Any] = found["jobs"] if found.get("base") == self.base else {}
        self.stamps: dict[str, Any] = {}
        chosen: Any = OmegaConf.to_container(OmegaConf.masked_copy(master, list(OF_THE_SWEEP)))
        self.chosen: dict[str, Any] = chosen
        self.inputs: Any = None

    def plan(self, combinations: Iterable[Sequence[str]]) -> list[Job]:
        """The job of each combination. What Hydra cannot compose ends it all, here."""
        combinations, count = list(combinations), len(self.known)
        ours = {tuple(sorted(filter(is_the_sweep_s, words))) for words in combinations}
        if len(ours) > 1:
            raise BadInput(f"{', '.join(OF_THE_SWEEP)}: one value for all runs of a sweep")
        for words in dict.fromkeys(tuple(filter(_is_outside, words)) for words in combinations):
            check_outside(self.composer.outside(words))
        common = set.intersection(*map(set, combinations)) if len(combinations) > 1 else set()
        try:
            jobs = [self._job(list(words)) for words in combinations]
            for job in jobs:
                job.name = " ".join(word for word in job.words if word not in common)
            return jobs
        finally:
            if len(self.known) != count:
                make(self.file.parent, self.out_dir)
                try:
                    write_json(self.file, {"base": self.base, "jobs": self.known})
                except OSError as error:
                    raise BadInput(f"out_dir={self.out_dir}: {error.strerror}") from None

    def _job(self, words: list[str]) -> Job:
        entry = self.known.get(key(words))
        if entry is not None and entry["stamp"] == self._stamp(entry["config"]):
            return Job(words, entry["config"] | self.chosen, entry["path"])
        composed = self.composer.compose(words)
        config: Any = OmegaConf.to_container(composed, resolve=True)
        before = self._stamp(config)
        try:
            path = self._path(composed)
        except (BadInput, Incompatible, OSError) as error:
            return Job(words, config, None, error=" ".join(str(error).split()))
        self.known[key(words)] = {"path": path, "config": config, "stamp": before}
        return Job(words, config, path)

    def _path(self, composed: DictConfig) -> str:
        from . import job  # torch, where something is new

        self.inputs = self.inputs or job.Inputs()
        return str(job.prepare(settings_of(composed), self.inputs).folder.path)

    def _stamp(self, config: dict[str, Any]) -> Any:
        """Of all files that the configuration names."""
        values = {f"{group}.{name}": value for group in ("model", "task", "eval")
                  for name, value in config[group].items()}  # fmt: skip
        name = repr(values)
        if name not in self.stamps:
            self.stamps[name] = stamp(values)
        return self.stamps[name]


def _base(master: DictConfig) -> str:
    """A hash of what decides a run's name besides its words and its data: code and conf/."""
    folders = [source.path for source in master.hydra.runtime.config_sources
               if source.schema == "file"]  # fmt: skip
    pages = {file for folder in {*folders, str(ROOT / "conf")} for file in Path(folder).rglob("*")
             if file.suffix == ".yaml"}  # fmt: skip
    yaml = {str(file): digest_now(file) for file in sorted(pages)}
    given = [master.hydra.job.config_name, *master.hydra.overrides.hydra]
    text = json.dumps([os.getcwd(), tree(), yaml, given])
    return hashlib.sha256(text.encode()).hexdigest()


class PlannedLoader:
    """Hydra's loader for launchers; what the sweep has composed it takes from the sweep's plan."""

    def __init__(self, loader: Any, file: Path) -> None:
        self.loader, self.file = loader, file

    def load_sweep_config(
        self, master_config: DictConfig, sweep_overrides: list[str]
    ) -> DictConfig:
        planned = _planned(self.file, self.file.stat().st_mtime_ns)
        job = planned.get(key(sweep_overrides))
        if job is None:
            return self.loader.load_sweep_config(master_config, sweep_overrides)
        made = restored(job["config"])
        with open_dict(made):
            made.hydra = copy.deepcopy(master_config.hydra)
            made.hydra.overrides.task = list(sweep_overrides)
            made.hydra.job.override_dirname = job["name"]
        return made


@lru_cache(maxsize=2)
def _planned(file: Path, mtime_ns: int) -> dict[str, Any]:
    return {key(job["words"]): job for job in (read_json(file) or {}).get("jobs", [])}


def write_plan(file: Path, name: str, command: list[str], jobs: list[Job]) -> None:
    """For launchers' workers, and for `python -m experiments.status`."""
    rows = [{"words": job.words, "name": job.name, "path": job.path, "config": job.config,
             "error": job.error} for job in jobs]  # fmt: skip
    write_json(file, {"name": name, "command": command, "jobs": rows})
