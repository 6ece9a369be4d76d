"""torch.compile over an adapted model: the same numbers, and no compilation in every step."""

from typing import Any

import models
import pytest
import torch
from models import seeded
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import variants
from variants._contract import Case, _inputs

torch.set_num_threads(1)
# of torch's own look at what crosses a cut between two graphs
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

STEPS = 6
SAMPLE = ("lora", "dora", "qlora", "vera")
# a step has another shape: a graph for each number of directions that is drawn, or grown to
RESHAPED = {"dylora", "increlora"}
EVERY = [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow)
         for name in variants.names()]  # fmt: skip


def trained(model: Any, adapter: variants.Adapter, inputs: dict[str, Any], compiled: bool) -> Any:
    """Losses, the gradients of the last step, graphs made by the end of each step, and why they
    were cut."""
    torch._dynamo.reset()
    counters.clear()
    backend = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=backend) if compiled else model
    optimizer = adapter.optimizer(lr=1e-2, steps=2 * STEPS)
    losses, made, gradients = [], [], []
    torch.manual_seed(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        out = run(**inputs)
        penalty = adapter.penalty()
        (out["loss"] if penalty is None else out["loss"] + penalty).backward()
        gradients = [t.grad.clone() for t in adapter.parameters() if t.grad is not None]
        optimizer.step()
        losses.append(out["loss"].detach())
        made.append(backend.frame_count)
    return losses, gradients, made, dict(counters["graph_break"])


def toy(preset: str, **axes: Any) -> tuple[Any, variants.Adapter, dict[str, Any]]:
    case = Case(preset, axes=axes)
    adapter = case.attach(**({"dropout": 0.1} if case.drops else {}))
    labels = torch.randn(32, 5, generator=torch.Generator().manual_seed(4))
    return adapter.model.train(), adapter, {"x": _inputs(), "labels": labels}


def same(made: list[int], *pairs: tuple[list[torch.Tensor], list[torch.Tensor]]) -> None:
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert made[0] > 0


@pytest.mark.parametrize("preset", EVERY)
def test_no_step_compiles_anew(preset: str) -> None:
    """Against the same without torch.compile, with dropout; DoRA's row norms are computed in the
    first step, so that the second one has another graph."""
    losses, gradients, *_ = trained(*toy(preset), compiled=False)
    model, adapter, inputs = toy(preset)
    found, others, made, cuts = trained(model, adapter, inputs, compiled=True)
    same(made, (found, losses), (others, gradients))
    coded = any(layer.frozen.stored.group for layer in adapter.layers.values())
    if preset not in RESHAPED:
        assert len(set(made[1:])) == 1, made
    elif not cuts:
        assert made[-1] <= adapter.choice.rank
    if preset != "increlora":  # which notes in backward what grows
        assert all("function _apart" in why for why in cuts), cuts
        assert bool(cuts) == coded


@pytest.mark.parametrize("detach_norm", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_row_that_is_cancelled(detach_norm: bool) -> None:
    """DoRA: the graph has no branch, and the row its digits."""

    def cancelled() -> Any:
        model, adapter, inputs = toy("dora", form={"name": "dora", "detach_norm": detach_norm})
        layer = adapter.layers["first"]
        with torch.no_grad():
            for t in layer.params.values():
                torch.nn.init.normal_(t, generator=torch.Generator().manual_seed(0))
        B, A = (layer.params[k].detach() for k in "BA")
        W = layer.W0.clone()
        W[:7] = -layer.s * (B @ A)[:7] * (1 - 1e-3)
        layer.move_to(W)
        return model, adapter, inputs

    losses, gradients, *_ = trained(*cancelled(), compiled=False)
    found, others, made, cuts = trained(*cancelled(), compiled=True)
    same(made, (found, losses), (others, gradients))
    assert not cuts


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["lora", "dora", "qlora"])
def test_a_language_model(preset: str) -> None:
    """What transformers does around the layers is in the same graph."""
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))

    def built() -> Any:
        model = seeded(models.llama).train()
        adapter = variants.attach(model, preset, rank=4, dropout=0.1)
        return model, adapter, {"input_ids": ids, "labels": ids}

    losses, gradients, *_ = trained(*built(), compiled=False)
    found, others, made, _ = trained(*built(), compiled=True)
    same(made, (found, losses), (others, gradients))
    assert len(set(made[1:])) == 1 and (preset == "qlora" or made[-1] <= 2), made
