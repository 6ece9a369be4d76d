"""Runs for the tests of several processes, one after another: torchrun tests/members.py JSON.

JSON: a list of runs, each the words of one command. A run that is refused is said, and the next one
begins; one process alone does the same. How many bytes the base takes in the first process, before
and after it was spread over all, is said too.
"""

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch.distributed as dist
from hydra import compose, initialize_config_dir

from experiments import attempt, config, parallel

ROOT = Path(__file__).parents[1]


def held(model: Any) -> int:
    """Bytes of what is frozen, in this process."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    return sum(getattr(t, "_local_tensor", t).nbytes for t in tensors)


def main() -> None:
    config.register()
    groups = []
    with (
        initialize_config_dir(str(ROOT / "conf"), version_base="1.3"),
        parallel.team() as members,
    ):
        if members.size > 1:
            groups.append(weakref.ref(dist.group.WORLD))
        spread = members.spread

        def noted(adapter: Any, device: Any) -> None:
            before = held(adapter.model)
            spread(adapter, device)
            if members.rank == 0:
                print(f"held: {before} {held(adapter.model)}", flush=True)

        members.spread = noted
        for words in json.loads(sys.argv[1]):
            try:
                attempt.alone(compose("config", overrides=words), members)
            except (*attempt.EXPECTED, SystemExit) as error:
                if members.rank == 0:
                    print(f"refused: {words[0]}: {attempt.one_line(error)}", flush=True)
    assert not any(group() for group in groups), "its threads would outlive the interpreter"


if __name__ == "__main__":
    main()
