"""AdaLoRA's allocator and penalty beside PEFT's, of one model: one process, in turns.

    python -m benchmarks.allocation [--threads N] [--rounds N] [--clock process] [--width N]
                                    [--layers N] [--rank N] [--json FILE]

A Llama of random weights, all linear layers adapted (seven in each block), and gradients of random
numbers. `penalty` is the orthogonality with its backward. A ratio is the median of the rounds' own,
with the 95 % interval of a median; `*` marks one over its bound. Calls of the dispatcher are exact.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import variants

from .clock import ratio, rounds
from .memory import TARGETS
from .sheet import Sheet, marked
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
    sheet = Sheet("allocation", __doc__, rounds=31)
    sheet.flag("--width", type=int, default=512)
    sheet.flag("--layers", type=int, default=8)
    sheet.flag("--rank", type=int, default=12)
    given = sheet.begin()
    made = [here(given), theirs(given)]
    parts = {"importance": ("importance",), "importance and mask": ("both",),
             "penalty": ("penalty",), "a step with a mask": ("penalty", "both"),
             "a step without": ("penalty", "importance")}  # fmt: skip
    found = [row(name, own, made, given) for name, own in parts.items()]
    sheet.table(
        f"{7 * given.layers} modules, width {given.width}, rank {given.rank}, {sheet.timed}",
        ("", "here ms", "PEFT ms", "time / PEFT", "calls here", "calls PEFT"),
        (
            (one["part"], *(f"{one['ms'][k]:.2f}" for k in ("here", "PEFT")),
             marked(one["time"], BOUND, one["interval"]),
             *(str(one["calls"][k]) for k in ("here", "PEFT")))
            for one in found
        ),
    )  # fmt: skip
    sheet.write(found)


if __name__ == "__main__":
    main()
