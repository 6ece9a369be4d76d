"""What a tuned model lost: cross-entropy on held-out text, and how far it is from its true base.

The true base is the model with the adapter disabled, whatever the init moved: PEFT's metric
measures against the residual there.

>>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
>>> round(divergence(p, q).item(), 4), divergence(p, p + 3).item()  # logits have no level
(0.1438, 0.0)
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.tasks._task import IGNORED
from variants._adapter import Adapter


def divergence(base: Tensor, tuned: Tensor) -> Tensor:
    """KL(base || tuned) of the distributions of logits [..., V], in nats [...]."""
    p, q = base.float().log_softmax(-1), tuned.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


@torch.no_grad()
def forgetting(adapter: Adapter, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Means over the labelled tokens of `batches` (ids, mask, labels [B, T], IGNORED elsewhere).

    Returns:
        `base` and `tuned`, cross-entropy in nats a token; `forgetting`, their difference; `kl`,
        KL(base || tuned) in nats a token; `tokens`.
    """
    model: Any = adapter.model.eval()
    sums, tokens = torch.zeros(3, dtype=torch.float64), 0
    for batch in batches:
        call = {"input_ids": batch["ids"], "attention_mask": batch["mask"]}
        labels = batch["labels"][:, 1:]
        known = labels != IGNORED
        with adapter.disabled():
            before = model(**call).logits[:, :-1][known].float()
        after = model(**call).logits[:, :-1][known].float()
        own = [F.cross_entropy(t, labels[known], reduction="sum") for t in (before, after)]
        sums += torch.stack([*own, divergence(before, after).sum()]).double().cpu()
        tokens += int(known.sum())
    base, tuned, kl = (sums / tokens).tolist()
    return {"base": base, "tuned": tuned, "forgetting": tuned - base, "kl": kl, "tokens": tokens}
