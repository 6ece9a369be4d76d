"""python run.py variant=dora rank=16   (python run.py --help)"""

import gc
import sys
from typing import Any

gc.disable()  # imports take a fifth less; on again once the model is loaded (experiments/job.py)

import hydra
from omegaconf import DictConfig

from experiments import attempt, command


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(cfg: DictConfig) -> Any:
    """One run. Torch and all that is slow to import comes from here on."""
    return attempt.job(cfg)


if __name__ == "__main__":
    sys.exit(command.guarded(job))
