"""Hydra's door to experiments/packs.py: a plugin is found in this package and nowhere else."""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class PackedLauncher(Launcher):
    """Compatible jobs train side by side on one base in one process; the others as with `basic`."""

    def __init__(self, rows: int, memory: float) -> None:
        self.settings = {"rows": rows, "memory": memory}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from hydra._internal.core_plugins.basic_launcher import BasicLauncher

        from experiments.packs import Packs  # here, since Hydra reads this file at every start

        basic = BasicLauncher()
        basic.setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.work = Packs(basic, **self.settings)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        return self.work.launch(job_overrides, initial_job_idx)
