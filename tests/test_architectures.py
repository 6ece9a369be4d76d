"""Every variant on every architecture and kind of layer: it works as promised, or is refused."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, labelled, logits, made

import variants
from variants import _together
from variants._adapter import Adapter, choose, needs

# Beside the layers that a variant asks for by itself, on each architecture, these targets.
KINDS = [
    ("llama", "embeddings"),
    ("gemma", "embeddings"),
    ("gpt2", "wte"),
    ("gpt2", "q,v"),
    ("phi3", "q,v,up"),
    ("vit", "convolutions"),
    ("picture", "convolutions"),
    ("mixtral", "experts"),
    ("qwen3_moe", "mlp"),
]
Place = tuple[str, str | None]
PLACES: list[Place] = [(name, None) for name in MODELS if name != "picture"] + KINDS
CASES = [(preset, place) for preset in variants.names() for place in PLACES]
CORE = [(preset, place) for preset in ("lora", "dora", "pissa", "full") for place in KINDS]


def _sample(rounds: int, seed: int) -> list[tuple[str, Place]]:
    """Each preset at `rounds` places, each place with as many presets as any other."""
    draw, found = random.Random(seed), set(CORE)
    queue: list[Place] = []
    for preset in variants.names() * rounds:
        if not queue:
            queue = draw.sample(PLACES, k=len(PLACES))
        found.add((preset, queue.pop()))
    return sorted(found, key=str)


def train(adapter: Adapter, inputs: dict[str, Any], steps: int) -> None:
    """A few steps of the adapter's own optimizer: each trained tensor has a gradient."""
    optimizer = adapter.optimizer(1e-2, steps=steps)
    for _ in range(steps):
        penalty = adapter.penalty()
        loss = logits(adapter.model, inputs).square().mean()
        (loss if penalty is None else loss + penalty).backward()
        assert all(t.grad is not None and t.grad.isfinite().all() for t in adapter.parameters())
        optimizer.step()
        optimizer.zero_grad()


def refused(message: str, model: Any, choice: Any) -> None:
    """The message names a part of the choice, or a layer of the model with its sizes."""
    parts = [str(part) for part in choice.parts.values()]
    words = set(re.split(r"[ :;,]+", message))
    layers = {name for name, _ in model.named_modules() if name}
    assert any(part in message for part in parts) or (words & layers and re.search(r"\d", message))
    assert "\n" not in message


def keeps_the_promises(preset: str, name: str, targets: str | None, folder: Path) -> str | None:
    """Starts at the base, trains, disables, saves, loads, merges; or the reason of its refusal."""
    model, inputs = made(name)
    with torch.no_grad():
        before = logits(model, inputs)
    kinds = [(path, type(module)) for path, module in model.named_modules()]
    keys = list(model.state_dict())
    choice = choose(preset)
    rank = None if choice.rank is None else 4
    batches = [labelled(inputs, before)] if needs(choice) else None
    settings: dict[str, Any] = {"rank": rank, "targets": targets, "calibration": batches}
    try:
        adapter = variants.attach(model, preset, **settings)
    except variants.Incompatible as refusal:
        refused(str(refusal), model, choice)
        assert [(path, type(module)) for path, module in model.named_modules()] == kinds
        return str(refusal)
    choice, close = adapter.choice, {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        started = logits(model, inputs)
        with adapter.disabled():
            stored = logits(model, inputs)
        if not choice.base.lossy:
            torch.testing.assert_close(stored, before, **close)
        if choice.form.starts_at_base and choice.init.starts_at_base:
            torch.testing.assert_close(started, stored, **close)
    own = {id(t) for t in adapter.parameters()}
    for path, p in model.named_parameters():
        assert (id(p) in own) == p.requires_grad, path
    train(adapter, inputs, 4)
    assert all(t.grad is None and t.isfinite().all() for t in adapter.parameters())
    with torch.no_grad():
        tuned = logits(model, inputs)
        assert not torch.equal(tuned, started), "four steps changed nothing"
        with adapter.disabled():
            torch.testing.assert_close(logits(model, inputs), stored, **close)
        adapter.save(folder)
        other, _ = made(name)
        variants.load(other, folder)
        torch.testing.assert_close(logits(other, inputs), tuned, rtol=0, atol=0)
        adapter.merge()
        torch.testing.assert_close(logits(model, inputs), tuned, rtol=1e-4, atol=1e-5)
    assert [(path, type(module)) for path, module in model.named_modules()] == kinds
    assert list(model.state_dict()) == keys
    return None


def _names(case: tuple[str, Place]) -> str:
    return "-".join((case[0], *filter(None, case[1])))


SAMPLE = _sample(rounds=1, seed=0)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that layers of one input answer together for so few tokens too."""
    monkeypatch.setattr(_together, "TOKENS", 1)


@pytest.mark.parametrize("case", SAMPLE, ids=_names)
def test_a_variant_on_an_architecture(case: tuple[str, Place], tmp_path: Path) -> None:
    keeps_the_promises(case[0], *case[1], tmp_path)


def test_the_sample_has_every_variant_and_every_architecture() -> None:
    assert {preset for preset, _ in SAMPLE} == set(variants.names())
    assert {place for _, place in SAMPLE} == set(PLACES)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c not in SAMPLE], ids=_names)
def test_every_variant_on_every_architecture(case: tuple[str, Place], tmp_path: Path) -> None:
    keeps_the_promises(case[0], *case[1], tmp_path)
