"""The contract over every preset and every pair."""

import itertools

import pytest
import torch

import variants
from variants._contract import CLAUSES, Case, check
from variants._registry import AXES, find_part

torch.set_num_threads(1)


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("preset", variants.names())
def test_preset(preset: str, clause: str) -> None:
    CLAUSES[clause](Case(preset))


def _pairs() -> list[dict[str, str]]:
    """Every two parts of different axes, the others as LoRA has them."""
    parts = variants.parts()
    return [
        {a: x, b: y}
        for a, b in itertools.combinations(AXES, 2)
        for x, y in itertools.product(parts[a], parts[b])
    ]


def _valid(axes: dict[str, str]) -> Case:
    """The pair on LoRA; where the form has no scale, without one."""
    if not find_part("form", axes.get("form", "lora")).traits["scaled"]:
        axes = {"scale": "none"} | axes
    if axes.get("allocation") == "adalora":
        axes = {"form": "triplet"} | axes
    return Case("lora", axes=axes)


@pytest.mark.parametrize("axes", _pairs(), ids=lambda axes: "-".join(axes.values()))
def test_pair_passes_or_is_refused(axes: dict[str, str]) -> None:
    case = _valid(axes)
    try:
        case.attach()
    except variants.Incompatible as refusal:
        assert any(name in str(refusal) for name in axes.values())
        return
    check("lora", **case.axes)
