"""The loss of a model: over classes, or over response tokens without the logits of all others.

A causal model's logits are [B, T, V] and mostly of tokens that no loss reads. Where its output
head is a plain linear layer (`plain_head`), the head gives the nats of each token instead
(`head_gives`): labelled positions alone are projected, `LOGITS` numbers at a time, and what the
backward needs is made on the way (`Nats`). Any other head, with an adapter, a bias, or something
that the model does to its output, has its logits computed whole and read after it.

Three tokens, of which the last predicts nothing and the first one's label is not asked for:

>>> h, W = torch.randn(1, 3, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
>>> found = labelled(lambda h, labels: token_nats(h, W, labels), h, torch.tensor([[3, IGNORED, 5]]))
>>> wanted = -(h @ W.mT).log_softmax(-1)[0, 1, 5]
>>> found[0, 0].item(), torch.allclose(found[0, 1], wanted), found[0, 2].item()
(0.0, True, 0.0)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .model import Loaded
from .tasks import Example
from .tasks._task import IGNORED

LOGITS = 2**23  # at a time: with fewer, products are slower; more take more memory


def training_loss(loaded: Loaded, batch: dict[str, Tensor], tokens: int) -> Tensor:
    """The summed loss of the response tokens over `tokens`, those of the whole batch."""
    model, labels = loaded.model, batch["labels"]
    inputs = {"input_ids": batch["ids"], "attention_mask": batch["mask"]}
    head = plain_head(model, loaded.output_head) if labels.ndim == 2 else None
    if head is None:
        return loss_of(model(**inputs).logits, labels, tokens)
    with head_gives(head, token_nats, labels):
        return model(**inputs).logits.sum() / tokens


def ranked(loaded: Loaded, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """[B, T, 2] of a causal model: the nats of the label [B, T] that comes after each position, and
    1 where it is not the most probable token; 0 where there is none."""
    model, head = loaded.model, plain_head(loaded.model, loaded.output_head)
    if head is None:
        return labelled(_scores, model(**inputs).logits, labels)
    with head_gives(head, nats_and_misses, labels):
        return model(**inputs).logits


def loss_of(logits: Tensor, labels: Tensor, tokens: int) -> Tensor:
    """The same from logits, [B, T, V] or [B, classes]."""
    if labels.ndim == 1:
        return classifier_loss(logits.float(), labels, "sum") / tokens
    labels = labels[:, 1:]
    known = labels != IGNORED
    return F.cross_entropy(logits[:, :-1][known].float(), labels[known], reduction="sum") / tokens


def classifier_loss(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """Cross-entropy over classes; mean squared error where there is one output."""
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels, reduction=reduction)
    return F.cross_entropy(logits, labels.long(), reduction=reduction)


def count_tokens(batch: Sequence[Example]) -> int:
    """What the loss is averaged over: response tokens that are predicted, or items."""
    return sum(sum(label != IGNORED for label in e.labels[1:]) if e.labels else 1 for e in batch)


def plain_head(model: nn.Module, path: str | None) -> nn.Linear | None:
    """The module at `path` (`Loaded.output_head`) where it is W h and nothing more: no adapter, no
    bias, no hook."""
    head = None if path is None else model.get_submodule(path)
    hooks = head is not None and (head._forward_hooks or head._forward_pre_hooks)
    return head if type(head) is nn.Linear and head.bias is None and not hooks else None


@contextmanager
def head_gives(
    head: nn.Linear, read: Callable[[Tensor, Tensor, Tensor], Tensor], labels: Tensor
) -> Iterator[None]:
    """Within it the model's `logits` are what `read` finds of hidden states [N, d], the head's
    weight and labels [N] (see `labelled`), of `labels` [B, T].

    Inside the model's own forward, so that a base in shards has the weight at hand.
    """

    def forward(hidden: Tensor) -> Tensor:
        W, device = head.weight, hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, W = hidden.to(dtype), W.to(dtype)
        return labelled(lambda x, y: read(x, W, y), hidden, labels)

    head.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward


def labelled(read: Callable[[Tensor, Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """[B, T, ...] of x [B, T, k] and labels [B, T]: at each position what `read` finds of x and the
    label that comes after it; 0 where that is IGNORED."""
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    known = following != IGNORED
    found = read(x[known], following[known])
    out = found.new_zeros(*known.shape, *found.shape[1:])
    return out.index_put((known,), found)


def token_nats(hidden: Tensor, W: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(W h)[label], [N], in fp32 or better."""
    return Nats.apply(hidden, W, labels)  # type: ignore[return-value]


@torch.no_grad()
def nats_and_misses(hidden: Tensor, W: Tensor, labels: Tensor) -> Tensor:
    """[N, 2]: the nats of each label, and 1 where it is not the most probable token."""
    found = hidden.new_empty(len(labels), 2, dtype=_wide(hidden))
    for part in _parts(hidden, W):
        found[part] = _scores(hidden[part] @ W.mT, labels[part])
    return found


def _scores(logits: Tensor, labels: Tensor) -> Tensor:
    """See `nats_and_misses`; the logits [N, V] are used up."""
    misses = logits.argmax(-1) != labels
    nats, _ = _nats(logits, labels)
    return torch.stack((nats, misses.to(nats.dtype)), dim=1)


class Nats(torch.autograd.Function):
    """See `token_nats`. With z = W h and p = softmax(z), d nats / d z = p - onehot(label):

        d nats / d h = W^T (p - onehot),    d nats / d W = (p - onehot) h^T

    The first is made in the forward, while p is at hand, in the memory that h would take; the
    second, where W trains, in the backward, from logits computed once more.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, W: Tensor, labels: Tensor) -> Tensor:
        learns, trains = ctx.needs_input_grad[:2]
        nats = hidden.new_empty(len(labels), dtype=_wide(hidden))
        slope = torch.empty_like(hidden) if learns else None
        for part in _parts(hidden, W):
            nats[part], p = _nats(hidden[part] @ W.mT, labels[part])
            if slope is not None:
                error = _error(p, labels[part]).to(W.dtype)
                del p
                torch.mm(error, W, out=slope[part])
                del error  # before there are other logits
        ctx.save_for_backward(slope, *((hidden, W, labels) if trains else ()))
        return nats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        slope, *kept = ctx.saved_tensors
        to_hidden = None if slope is None else (slope * g[:, None]).to(slope.dtype)
        if not kept:
            return to_hidden, None, None
        hidden, W, labels = kept
        to_W = torch.zeros_like(W, dtype=_wide(W))
        for part in _parts(hidden, W):
            _, p = _nats(hidden[part] @ W.mT, labels[part])
            error = _error(p, labels[part]).mul_(g[part, None]).to(W.dtype)
            to_W += error.mT @ hidden[part]
        return to_hidden, to_W.to(W.dtype), None


def _parts(hidden: Tensor, W: Tensor) -> Iterator[slice]:
    """The N positions, as many at a time as `LOGITS` allows."""
    size = max(1, LOGITS // len(W))
    for start in range(0, len(hidden), size):
        yield slice(start, start + size)


def _nats(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of the labels [N], and p of all [N, V], in the memory of the logits where it fits."""
    z = logits.to(_wide(logits))
    z.sub_(z.amax(-1, keepdim=True))
    own = z.gather(1, labels[:, None])[:, 0]
    total = z.exp_().sum(-1)
    return total.log() - own, z.div_(total[:, None])


def _error(p: Tensor, labels: Tensor) -> Tensor:
    """p - onehot(label), in the memory of p."""
    p[torch.arange(len(labels), device=labels.device), labels] -= 1
    return p


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
