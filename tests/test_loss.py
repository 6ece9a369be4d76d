"""The loss without all logits, against torch's cross-entropy of all; and what has no such head."""

from typing import Any

import pytest
import torch
from models import GROUPED, causal, gpt2, seeded
from torch import Tensor
from torch.nn import functional as F

import variants
from experiments import loss
from experiments.loss import loss_of, plain_head, ranked, token_nats, training_loss
from experiments.model import Loaded, output_head
from experiments.tasks._task import IGNORED

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def loaded(model: Any) -> Loaded:
    return Loaded(model, None, fresh_head=False, output_head=output_head(model))


def batch(share: float, rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    """Right-padded rows, of whose labels about a share is known."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 64, (rows, length), generator=g)
    mask = (torch.arange(length) < torch.tensor([[12], [7], [9]])).long()
    known = (torch.rand(rows, length, generator=g) < share) & (mask == 1)
    return {"ids": ids, "mask": mask, "labels": ids.where(known, IGNORED)}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("count", [0, 1, 23])
@pytest.mark.parametrize("trains", [True, False])
def test_nats_and_gradients_are_cross_entropy_s(
    dtype: torch.dtype, count: int, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each nat with a weight of its own; five positions at a time."""
    monkeypatch.setattr(loss, "LOGITS", 5 * 40)
    g = torch.Generator().manual_seed(0)
    h, W = (torch.randn(n, 16, generator=g, dtype=dtype) for n in (count, 40))
    labels, weight = torch.randint(40, (count,), generator=g), torch.rand(count, generator=g)
    found = []
    for nats in (token_nats, lambda h, W, y: F.cross_entropy(h @ W.mT, y, reduction="none")):
        own = h.clone().requires_grad_(), W.clone().requires_grad_(trains)
        value = nats(*own, labels)
        (value * weight.to(dtype)).sum().backward()
        found.append((value, own[0].grad, own[1].grad))
    near = {"rtol": TOLERANCE[dtype], "atol": 10 * TOLERANCE[dtype]}
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **near)


def test_gradients_by_finite_differences() -> None:
    h = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    W = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, W: token_nats(h, W, torch.arange(5)), (h, W))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_training_loss_is_that_of_all_logits(dtype: torch.dtype, share: float) -> None:
    """Loss and gradients of an adapter under the frozen head of a Llama."""
    model = seeded(causal, kind="llama", **GROUPED).to(dtype)
    adapter = variants.attach(model, "lora", rank=2)
    for layer in adapter.layers.values():
        layer.params["B"].data.normal_(generator=torch.Generator().manual_seed(0))
    given, found = batch(share), []
    own = loaded(model)
    assert plain_head(model, own.output_head) is model.lm_head
    inputs = {"input_ids": given["ids"], "attention_mask": given["mask"]}
    after = given["labels"][:, 1:].flatten()

    def plain() -> Tensor:
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, after, ignore_index=IGNORED, reduction="sum") / 7

    for run in (lambda: training_loss(own, given, 7), plain):
        value = run()
        value.backward()
        found.append([value, *(p.grad.clone() for p in adapter.parameters())])
        adapter.optimizer(1.0).zero_grad()
    near = TOLERANCE[dtype]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=10 * near, atol=near)
    assert isinstance(model(**inputs).logits, Tensor) and model(**inputs).logits.shape[-1] == 64
    nats, misses = ranked(own, inputs, given["labels"]).unbind(-1)
    torch.testing.assert_close((nats.sum() / 7).to(found[0][0]), found[0][0])
    logits = model(**inputs).logits
    wrong = (logits[:, :-1].argmax(-1) != given["labels"][:, 1:]).to(misses)
    assert torch.equal(misses[:, :-1], wrong * (given["labels"][:, 1:] != IGNORED))


def test_nothing_is_made_of_prompt_tokens() -> None:
    """Autograd keeps one [N, d] of the N labelled positions, and no logits."""
    h = torch.randn(2, 8, 16, requires_grad=True)
    W = torch.randn(1000, 16)
    labels = torch.full((2, 8), IGNORED)
    labels[:, 5:] = 1
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        loss.labelled(lambda x, y: token_nats(x, W, y), h, labels)
    assert 6 * 16 in sizes and max(sizes) == 6 * 16


@pytest.mark.parametrize(
    "make",
    [
        lambda: causal("gemma2", **GROUPED, final_logit_softcapping=5.0, query_pre_attn_scalar=8),
        lambda: causal("cohere", **GROUPED, logit_scale=0.3),
        lambda: causal("granite", **GROUPED, logits_scaling=3.0),
        lambda: causal("phi", **GROUPED),
    ],
    ids=["capped", "scaled", "divided", "biased"],
)
def test_other_heads_take_the_plain_path(make: Any) -> None:
    """Their loss is that of their own logits."""
    model = seeded(make)
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    own, given = loaded(model), batch(0.5)
    assert plain_head(model, own.output_head) is None
    logits = model(input_ids=given["ids"], attention_mask=given["mask"]).logits
    assert torch.equal(training_loss(own, given, 7), loss_of(logits, given["labels"], 7))


def test_an_adapted_head_takes_the_plain_path() -> None:
    model = seeded(gpt2, tie_word_embeddings=False)
    own, given = loaded(model), batch(0.5)
    assert plain_head(model, own.output_head) is model.lm_head
    adapter = variants.attach(model, "lora", rank=2, targets=["lm_head"])
    assert plain_head(model, own.output_head) is None
    training_loss(own, given, 7).backward()
    assert adapter.layers["lm_head"].params["B"].grad.abs().sum() > 0


def test_under_autocast_it_is_the_plain_loss_to_bf16_s_rounding() -> None:
    model = seeded(causal, kind="llama", **GROUPED)
    own, given = loaded(model), batch(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = training_loss(own, given, 7)
        logits = model(input_ids=given["ids"], attention_mask=given["mask"]).logits
    assert logits.dtype == torch.bfloat16 and found.dtype == torch.float32
    torch.testing.assert_close(found, loss_of(logits, given["labels"], 7), rtol=1e-3, atol=0)
