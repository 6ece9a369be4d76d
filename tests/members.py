"""Runs for the tests of several processes, one after another: torchrun tests/members.py JSON.

JSON: a list of runs, each the words of one command. A run that is refused is said, and the next one
begins; one process alone does the same.
"""

import json
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir

from experiments import config, parallel, sweep

ROOT = Path(__file__).parents[1]


def main() -> None:
    config.register()
    with (
        initialize_config_dir(str(ROOT / "conf"), version_base="1.3"),
        parallel.team() as members,
    ):
        for words in json.loads(sys.argv[1]):
            try:
                sweep._run(compose("config", overrides=words), "single", members)
            except (*sweep.EXPECTED, SystemExit) as error:
                if members.rank == 0:
                    print(f"refused: {words[0]}: {sweep.one_line(error)}", flush=True)


if __name__ == "__main__":
    main()
