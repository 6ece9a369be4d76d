"""The contract over every preset, every pair of parts, and samples of the whole product."""

import random
import re

import pytest
import torch

import variants
from variants._contract import CLAUSES, Case, check
from variants._matrix import Pair, joined, page, pairs
from variants._registry import AXES, index

torch.set_num_threads(1)

# what a pair is put to in the default suite; `-m slow` puts every pair to every clause
SHORT = ("starts_at_base", "forward_equals_weight", "merged_equals_unmerged",
         "only_the_adapter_trains", "saves_and_loads", "disabled_is_the_original",
         "resumes_in_mid_schedule")  # fmt: skip
PAIRS = list(pairs())
# the contract's models lie on the CPU: a part of another device is put to tests of its own
ELSEWHERE = {(axis, name) for axis, found in index()[0].items()
             for name, part in found.items() if part.traits.get("device")}  # fmt: skip
JOINED = [p for p in PAIRS if p.axes is not None and not {p.first, p.second} & ELSEWHERE]
SAMPLE = random.Random(0).sample(JOINED, k=45)


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("preset", variants.names())
def test_preset(preset: str, clause: str) -> None:
    CLAUSES[clause](Case(preset))


def _names(pair: Pair) -> str:
    return "-".join((*pair.first, *pair.second))


@pytest.mark.parametrize("pair", SAMPLE, ids=_names)
def test_a_pair_passes(pair: Pair) -> None:
    for clause in SHORT:
        CLAUSES[clause](Case("lora", axes=pair.axes or {}))


def test_a_refused_pair_names_both() -> None:
    for pair in PAIRS:
        if pair.axes is None:
            for axis, name in (pair.first, pair.second):
                assert re.search(rf"\b{name}\b", pair.reason), (axis, pair)


def test_a_part_that_cannot_run_here_says_what_it_needs() -> None:
    """On a machine that has it, the pairs above run it."""
    for axis, found in index()[0].items():
        for name, part in found.items():
            why, needs = part.load().unavailable(), part.traits.get("requires", "")
            assert why is None or needs, (axis, name)
            if why is None:
                continue
            print(f"not run here: {axis} {name} needs {needs}: {why}")
            with pytest.raises(variants.Incompatible) as caught:
                variants.choose("lora", **{axis: name})
            assert str(caught.value) == f"{axis} {name} needs {needs}: {why}"
            pairs_of = [p for p in PAIRS if (axis, name) in (p.first, p.second)]
            assert pairs_of and all(p.axes is None for p in pairs_of)


def _product(count: int, seed: int) -> list[dict[str, str]]:
    """Choices of a part on each axis, so that rare parts come as often as common ones."""
    draw = random.Random(seed)
    parts = {a: [n for n in names if (a, n) not in ELSEWHERE]
             for a, names in variants.parts().items()}  # fmt: skip
    return [{axis: draw.choice(parts[axis]) for axis in AXES} for _ in range(count)]


def _passes_or_is_refused(choice: dict[str, str], clauses: tuple[str, ...]) -> bool:
    try:
        axes = joined(*choice.items())
    except variants.Incompatible as refusal:
        assert any(re.search(rf"\b{name}\b", str(refusal)) for name in choice.values())
        return False
    for clause in clauses:
        try:
            CLAUSES[clause](Case("lora", axes=axes))
        except AssertionError as error:
            raise AssertionError(f"{choice}: {clause}: {error}") from error
    return True


def test_a_sample_of_the_product_passes_or_is_refused() -> None:
    """Any choice on all six axes at once; most are refused, so many are drawn."""
    passed = 0
    for choice in _product(1000, seed=1):
        passed += _passes_or_is_refused(choice, SHORT if passed < 15 else ())
    assert passed >= 15


@pytest.mark.slow
@pytest.mark.parametrize("pair", JOINED, ids=_names)
def test_every_pair_passes_all_of_it(pair: Pair) -> None:
    check("lora", **(pair.axes or {}))


@pytest.mark.slow
def test_the_product_passes_or_is_refused() -> None:
    passed = 0
    for choice in _product(100_000, seed=2):
        passed += _passes_or_is_refused(choice, SHORT if passed < 1500 else ())


def test_every_part_has_a_home() -> None:
    """A part that no preset has would be in no one's run; one that needs more than every machine
    has can be in no preset."""
    inside = {(a, p["name"]) for info in index()[1].values() for a, p in info.axes.items()}
    missing = {(a, n) for a, names in variants.parts().items() for n in names} - inside
    missing -= {(a, n) for a, n in missing if index()[0][a][n].traits.get("requires")}
    assert {axis for axis, _ in missing} <= {"base", "scale", "init"}, missing


@pytest.mark.slow
def test_the_page_of_the_matrix_is_in_step() -> None:
    from pathlib import Path

    kept = Path(__file__).parents[1] / "docs" / "matrix.md"
    assert kept.read_text() == page(), "run `python -m variants --matrix > docs/matrix.md`"
