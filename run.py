"""python run.py variant=dora rank=16   (python run.py --help)"""

import gc
import sys

gc.disable()  # imports take a fifth less; on again once the model is loaded (experiments/job.py)

import hydra
from omegaconf import DictConfig

from experiments import sweep


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(cfg: DictConfig) -> None:
    """One run. Torch and all that is slow to import comes from here on."""
    sweep.job(cfg)


if __name__ == "__main__":
    sys.exit(sweep.guarded(job))
