"""AdaLoRA's allocator and penalty beside PEFT's, of one model: one process, in turns.

    python -m benchmarks.allocation [--threads N] [--rounds N] [--clock process] [--width N]
                                    [--layers N] [--rank N] [--json FILE]

A Llama of random weights, all linear layers adapted (seven in each block), and gradients of random
numbers. `penalty` is the orthogonality with its backward. A ratio is the median of the rounds' own,
with the 95 % interval of a median; `*` marks one over its bound. Calls of the dispatcher are exact.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import variants

from .clock import CLOCKS, ratio, rounds
from .memory import TARGETS
from .step import llama

BOUND, STEPS = 0.30, 100


class Calls(TorchDispatchMode):
    """Counts what is called while it is on."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def filled(tensors: Sequence[torch.Tensor]) -> None:
    """Numbers that are no edge case, in the tensors and their gradients."""
    g = torch.Generator().manual_seed(0)
    for t in tensors:
        t.data.normal_(std=0.05, generator=g)
        t.grad = torch.empty_like(t).normal_(generator=g)


def here(given: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Each part, with this project's allocator."""
    model = llama(torch.float32, given.width, given.layers)
    adapter = variants.attach(model, "adalora", rank=given.rank)
    filled(list(adapter.parameters()))
    rule: Any = adapter.choice.allocation
    state = rule.begin(adapter.layers, STEPS)
    within = STEPS // 4  # past the warm-up, before the end: importance, then a mask of it

    def penalty() -> None:
        found = adapter.penalty()
        assert found is not None
        found.backward()

    return {
        "importance": lambda: rule.after_step(adapter.layers, state, 2),
        "both": lambda: rule.after_step(adapter.layers, state, within),
        "penalty": penalty,
    }


def theirs(given: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Each part, with PEFT's."""
    import peft

    config: Any = peft.AdaLoraConfig(
        init_r=given.rank, target_r=given.rank * 2 // 3, target_modules=TARGETS, tinit=10,
        tfinal=50, total_step=STEPS, lora_alpha=32,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(torch.float32, given.width, given.layers), config)
    learned = [p for p in model.parameters() if p.requires_grad]
    filled(learned)
    allocator: Any = model.base_model.rankallocator  # type: ignore[union-attr]
    budget, _ = allocator.budget_schedule(STEPS // 4)

    def penalty() -> None:  # as AdaLoraModel.forward has it
        total: Any = 0
        pairs = [(n, p) for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
        for name, p in pairs:
            covariance = p @ p.T if "lora_A" in name else p.T @ p
            one = torch.eye(*covariance.size(), out=torch.empty_like(covariance))
            total = total + torch.norm(covariance - one, p="fro")
        (0.1 * total / len(pairs)).backward()

    def both() -> None:
        allocator.update_ipt(model)
        allocator.mask_to_budget(model, budget)

    return {"importance": lambda: allocator.update_ipt(model), "both": both, "penalty": penalty}


def row(
    name: str, parts: tuple[str, ...], made: list[dict[str, Any]], given: Any
) -> dict[str, Any]:
    """What the parts cost together, here and there."""

    def together(calls: dict[str, Any]) -> Callable[[], Any]:
        return lambda: [calls[part]() for part in parts] and None

    calls = {"here": together(made[0]), "PEFT": together(made[1])}
    counts = {}
    for who, call in calls.items():
        call()
        with Calls() as counted:
            call()
        counts[who] = counted.count
    seconds = rounds(calls, given.rounds, given.clock)
    middle, low, high = ratio(seconds["here"], seconds["PEFT"])
    return {"part": name, "ms": {k: 1e3 * statistics.median(v) for k, v in seconds.items()},
            "time": middle, "interval": [low, high], "calls": counts}  # fmt: skip


def main() -> None:
    """The command."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.allocation", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="of torch; all that it takes, by default")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=12)
    parser.add_argument("--json", help="write the rows there as well")
    given = parser.parse_args()
    torch.set_num_threads(given.threads or torch.get_num_threads())
    made = [here(given), theirs(given)]
    parts = {"importance": ("importance",), "importance and mask": ("both",),
             "penalty": ("penalty",), "a step with a mask": ("penalty", "both"),
             "a step without": ("penalty", "importance")}  # fmt: skip
    table = Table(
        title=f"{7 * given.layers} modules, width {given.width}, rank {given.rank}, "
        f"{torch.get_num_threads()} threads, {given.rounds} rounds, {given.clock} clock"
    )
    for name in ("", "here ms", "PEFT ms", "time / PEFT", "calls here", "calls PEFT"):
        table.add_column(name, justify="right")
    found = []
    for name, own in parts.items():
        one = row(name, own, made, given)
        found.append(one)
        low, high = one["interval"]
        over = "*" if one["time"] > BOUND else ""
        table.add_row(name, *(f"{one['ms'][k]:.2f}" for k in ("here", "PEFT")),
                      f"{one['time']:.2f} [{low:.2f}, {high:.2f}] of {BOUND:.2f}{over}",
                      *(str(one["calls"][k]) for k in ("here", "PEFT")))  # fmt: skip
    Console(width=120).print(table)
    if given.json:
        with open(given.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
