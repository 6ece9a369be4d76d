"""Hydra's door to experiments/sweep.py: a plugin is found in this package and nowhere else."""

from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class LabSweeper(Sweeper):
    """Every combination of the values given, in Hydra's grammar; only what is missing is run."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = params or {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from experiments.sweep import Sweep  # here, since Hydra reads this file at every start

        self.loader = hydra_context.config_loader
        self.work = Sweep(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Any:
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        words = [f"{key}={value}" for key, value in self.params.items()] + arguments
        asked = [word.partition("=")[2] for word in words if word.startswith("study=")]
        if asked:
            from experiments import study

            spec = study.find(asked[-1])
            if spec is not None:
                return study.Study(self.work, study.name_of(asked[-1]), spec, words).run()
            if not any("," in word or "(" in word for word in words):
                raise study.missing(asked[-1])
        parser = OverridesParser.create(config_loader=self.loader)
        (combinations,) = BasicSweeper.split_arguments(parser.parse_overrides(words), None)
        return self.work.finish(combinations)
