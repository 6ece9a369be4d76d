"""AdaLoRA's allocator against the published schedules and against its definition in float64."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import variants
from variants import triplet
from variants.adalora import AdaLoRABudget

# (script, total steps, init rank, target rank, warm-up, final, interval), 72 matrices:
# QingruZhang/AdaLoRA, NLU/scripts; total = epochs x batches of 32 of the GLUE training set
PUBLISHED = [
    ("mnli", 7 * 12272, 3, 1, 8000, 50000, 100),
    ("cola", 25 * 268, 3, 1, 800, 3500, 10),
    ("mrpc", 30 * 115, 2, 1, 600, 1800, 1),
    ("qnli", 5 * 3274, 2, 1, 2000, 8000, 100),
    ("qqp", 5 * 11371, 2, 1, 8000, 25000, 100),
    ("rte", 50 * 78, 2, 1, 600, 1800, 1),
    ("sst2", 24 * 2105, 2, 1, 6000, 22000, 100),
    ("stsb", 25 * 180, 2, 1, 800, 2000, 10),
]


@pytest.mark.parametrize(
    ("script", "total", "init", "target", "warmup", "final", "every"), PUBLISHED
)
def test_budget_at_every_step(
    script: str, total: int, init: int, target: int, warmup: int, final: int, every: int
) -> None:
    """The rule of the official `schedule_threshold`, written out here a second time."""
    rule = AdaLoRABudget(target_rank=target, warmup=warmup, final=final, every=every)
    start, end = 72 * init, 72 * target
    for step in range(1, total + 1):
        if step <= warmup:
            wanted = (start, False)
        elif step > total - final:
            wanted = (end, True)
        else:
            left = 1 - (step - warmup) / (total - final - warmup)
            wanted = (int(end + (start - end) * left**3), step % every == 0)
        assert rule.budget(step, total, start, 72) == wanted


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8)).double()


def _train(steps: int, **settings: float) -> tuple[variants.Adapter, list[int], list[dict]]:
    adapter = variants.attach(_net(), "adalora", rank=6, allocation={"name": "adalora", **settings})
    optimizer = adapter.optimizer(2e-2, steps=steps)
    x = torch.randn(64, 12, dtype=torch.float64)
    y = torch.randn(64, 8, dtype=torch.float64)
    kept, masked, grads = [], [], []
    for _ in range(steps):
        penalty = adapter.penalty()
        assert penalty is not None
        ((adapter.model(x) - y).square().mean() + penalty).backward()
        before = {n: {k: t.grad.clone() for k, t in la.p.items()}  # type: ignore[union-attr]
                  for n, la in adapter.layers.items()}  # fmt: skip
        optimizer.step()
        after = {n: {k: t.detach().clone() for k, t in la.p.items()}
                 for n, la in adapter.layers.items()}  # fmt: skip
        grads.append({n: (before[n], after[n]) for n in before})
        optimizer.zero_grad()
        kept.append(sum(int((la.p["E"] != 0).sum()) for la in adapter.layers.values()))
        masked.append(sum(adapter.ranks().values()))
    assert masked[0] == 12 and masked[-1] == kept[-1]  # between masks, those of the last one
    assert all(after <= before for before, after in pairwise(masked))
    return adapter, kept, grads


def test_masks_keep_the_budget_and_triplets_may_return() -> None:
    adapter, kept, _ = _train(60, target_rank=2.0, warmup=10.0, final=20.0, every=5.0)
    rule = adapter.choice.allocation
    for step, count in enumerate(kept):  # the official scripts count from 0
        budget, masked = rule.budget(step, 60, 12, 2)  # type: ignore[attr-defined]
        if masked:
            assert count == budget, step
    assert kept[9] == 12 and kept[-1] == 4
    assert any(after > before for before, after in pairwise(kept)), (
        "between two masks Adam revives masked triplets"
    )


def test_importance_is_its_definition() -> None:
    """S = s(E) + mean s(P) + mean s(Q) with both averages, from the recorded numbers alone.

    Steps 1 to 7 count; step 8, the last, masks by what they gave.
    """
    adapter, _, grads = _train(8, target_rank=4.0, warmup=6.0, final=1.0, every=1.0)
    mean: dict = {}
    spread: dict = {}
    for row in grads[:-1]:
        for name, (grad, value) in row.items():
            for key in "PEQ":
                ident = (name, key)
                sensitivity = (value[key] * grad[key]).abs()
                mean[ident] = 0.85 * mean.get(ident, 0.0) + 0.15 * sensitivity
                spread[ident] = (
                    0.85 * spread.get(ident, 0.0) + 0.15 * (sensitivity - mean[ident]).abs()
                )
    state = adapter.allocation_state
    assert state is not None
    idents = [(name, key) for name in adapter.layers for key in "PEQ"]
    for kept, wanted in ((state["mean"], mean), (state["uncertainty"], spread)):
        flat = torch.cat([wanted[ident].flatten() for ident in idents])
        torch.testing.assert_close(kept, flat, rtol=1e-12, atol=1e-18)
    scores = {k: mean[k] * spread[k] for k in mean}
    importance = torch.cat([
        scores[name, "E"] + scores[name, "P"].mean(0) + scores[name, "Q"].mean(1)
        for name in adapter.layers
    ])  # fmt: skip
    dropped = importance <= importance.sort().values[12 - 8 - 1]
    E = torch.cat([layer.p["E"] for layer in adapter.layers.values()])
    assert torch.equal(E == 0, dropped)


def test_target_equal_to_start_is_no_error() -> None:
    _, kept, _ = _train(20, target_rank=6.0)
    assert kept[-1] == 12


def test_penalty_is_not_in_the_evaluation_loss_and_its_absence_is_said() -> None:
    adapter = variants.attach(_net(), "adalora", rank=4)
    optimizer = adapter.optimizer(1e-3, steps=10)
    adapter.model(torch.randn(2, 12, dtype=torch.float64)).mean().backward()
    with pytest.warns(UserWarning, match=r"add adapter\.penalty"):
        optimizer.step()


def test_missing_length_of_the_run_is_said() -> None:
    adapter = variants.attach(_net(), "adalora", rank=4)
    with pytest.warns(UserWarning, match="number of steps"):
        adapter.optimizer(1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": 30.0, "final": 80.0}, "leave nothing of 100"),
        ({"target_rank": 9.0}, "the initial rank gives"),
        ({"beta1": 1.0}, "between 0 and 1"),
        ({"every": -1.0}, "negative"),
    ],
)
def test_impossible_schedules_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(variants.Incompatible, match=message):
        adapter = variants.attach(
            _net(), "adalora", rank=4, allocation={"name": "adalora", **settings}
        )
        adapter.optimizer(1e-3, steps=100)


def test_a_second_run_of_the_same_adapter_counts_its_own_steps() -> None:
    adapter, _, _ = _train(20)
    assert sum(adapter.ranks().values()) == 8
    optimizer = adapter.optimizer(1e-2, steps=20)
    adapter.penalty()
    adapter.model(torch.randn(4, 12, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert adapter.step == 1 and sum(adapter.ranks().values()) == 12


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_too_short_to_measure_anything_is_refused(steps: int) -> None:
    adapter = variants.attach(_net(), "adalora", rank=6)
    with pytest.raises(variants.Incompatible, match="leave nothing of"):
        adapter.optimizer(1e-2, steps=steps)


def test_a_budget_of_nothing_is_refused() -> None:
    adapter = variants.attach(
        _net(), "adalora", rank=6, allocation={"name": "adalora", "target_rank": 0.1}
    )
    with pytest.raises(variants.Incompatible, match="leaves no triplet"):
        adapter.optimizer(1e-2, steps=100)


def test_the_penalty_s_gradient_is_that_of_its_definition() -> None:
    """By finite differences in float64, of layers of unlike ranks; 0 where all is orthogonal."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(5, 2), (7, 3), (5, 2), (2, 4), (3, 6), (2, 8)]
    some = [torch.randn(s, generator=draw, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *t: triplet.distance(t[:3], t[3:]), some)
    whole = [torch.eye(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    triplet.distance(whole[:3], whole[3:]).backward()
    assert all(t.grad is not None and not t.grad.any() for t in whole)


def test_the_penalty_is_the_same_under_autocast() -> None:
    torch.manual_seed(0)
    adapter = variants.attach(nn.Sequential(nn.Linear(12, 10)), "adalora", rank=6)
    outside = adapter.penalty()
    with torch.autocast("cpu", torch.bfloat16):
        inside = adapter.penalty()
    assert outside is not None and inside is not None and torch.equal(outside, inside)
