"""Optimizers over pairs of factors: what the files of the update axis have in common.

AdamW as torch has it, and the inverse of a Gram matrix with its damping:

>>> class Plain(Factored):
...     def move(self, group):
...         self.adamw(group, group["params"], [t.grad for t in group["params"]])
>>> t, like = torch.ones(3, 2), torch.ones(3, 2)
>>> both = (Plain({}, [], [t], 0.1, weight_decay=0.2, betas=(0.8, 0.95)),
...         torch.optim.AdamW([like], lr=0.1, weight_decay=0.2, betas=(0.8, 0.95)))
>>> for step in range(3):
...     t.grad = like.grad = torch.arange(6.0).view(3, 2) - step
...     _ = [optimizer.step() for optimizer in both]
>>> torch.allclose(t, like)
True
>>> damped_inverse(2 * torch.eye(1), 0.5).item()
0.4000000059604645
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._api import Part, trained
from ._layer import Adapted

if TYPE_CHECKING:
    from ._adapter import Choice


@dataclass(frozen=True, eq=False)
class Pair:
    """The factors of one layer, A [r, n] and B [m, r], whose W0 moves by s B A."""

    A: Tensor
    B: Tensor
    layer: Adapted

    @property
    def s(self) -> float:
        return self.layer.full_s


def need_product(part: Part, choice: "Choice") -> None:
    """Refuses a form whose A and B are multiplied by anything on the way to s B A.

    DoRA's magnitude m scales what they make, so their gradients are those of s B A still.
    """
    form = choice.form
    if not form.low_rank or not {"A", "B"} <= set(form.shapes(8, 8, 2)) <= {"A", "B", "m"}:
        raise part.refuse(form, "a form that adds s B A, with tensors A and B")


def need_factors(part: Part, choice: "Choice") -> None:
    """Refuses a choice where the gradients of A and B are not those of a whole s B A."""
    need_product(part, choice)
    if choice.init.frozen:
        raise part.refuse(choice.init, "an init that leaves A and B to train")
    if choice.allocation.partial:
        raise part.refuse(choice.allocation, "an allocation that shows A and B whole")


def pairs(layers: Mapping[str, Adapted]) -> list[Pair]:
    """The factors of every layer."""
    return [Pair(layer.params["A"], layer.params["B"], layer) for layer in layers.values()]


class Factored(torch.optim.Optimizer):
    """AdamW, but for the tensors of `own`, which `move` changes by a rule of its own.

    A subclass says what `move` does with those of them that have a gradient. States are numbers
    and tensors, kept by tensor. `foreach` and `fused` are taken for AdamW's sake; they are advice
    about speed, and every step here works on many tensors at once anyhow.
    """

    def __init__(
        self,
        layers: Mapping[str, Adapted],
        others: Sequence[Tensor],
        own: Sequence[Tensor],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        fused: bool | None = None,
        rest_lr: float | None = None,
    ) -> None:
        self.own = {id(t) for t in own}
        rest = [t for t in (*trained(layers), *others) if id(t) not in self.own]
        rates = (lr, lr if rest_lr is None else rest_lr)
        both = zip((list(own), rest), rates, strict=True)
        groups = [{"params": p, "lr": rate} for p, rate in both if p]
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay})  # fmt: skip

    def move(self, group: dict[str, Any]) -> None:
        """Changes the tensors of `own` by the rule of the paper."""
        raise NotImplementedError  # abstract

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if id(group["params"][0]) in self.own:
                self.move(group)
            else:
                tensors = [t for t in group["params"] if t.grad is not None]
                self.adamw(group, tensors, [t.grad for t in tensors])
        return loss

    def moments(self, tensor: Tensor, like: Tensor) -> dict[str, Any]:
        """The state of `tensor`, with the step that begins counted and Adam's two moments."""
        state = self.state[tensor]
        if "step" not in state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(like), torch.zeros_like(like)
        state["step"] += 1
        return state

    def direction(
        self, group: dict[str, Any], tensors: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        """Adam's mean / (deviation + eps) of `grads`, whose moments are the states of `tensors`."""
        if not tensors:
            return []
        states = [self.moments(t, g) for t, g in zip(tensors, grads, strict=True)]
        first, second = ([s[k] for s in states] for k in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(first, list(grads), 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, list(grads), list(grads), 1 - beta2)
        deviation = torch._foreach_sqrt(second)
        torch._foreach_div_(deviation, [math.sqrt(1 - beta2 ** s["step"]) for s in states])
        torch._foreach_add_(deviation, group["eps"])
        mean = torch._foreach_div(first, [1 - beta1 ** s["step"] for s in states])
        torch._foreach_div_(mean, deviation)
        return list(mean)

    def descend(
        self, group: dict[str, Any], tensors: Sequence[Tensor], along: Sequence[Tensor]
    ) -> None:
        """t <- (1 - lr decay) t - lr d."""
        if tensors:
            torch._foreach_mul_(list(tensors), 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(list(tensors), list(along), alpha=-group["lr"])

    def adamw(self, group: dict[str, Any], tensors: Sequence[Tensor], grads: Sequence[Any]) -> None:
        """A step of AdamW along `grads`."""
        self.descend(group, tensors, self.direction(group, tensors, grads))


class Paired(Factored):
    """A `Factored` whose own tensors are the factors of every layer."""

    def __init__(
        self, layers: Mapping[str, Adapted], others: Sequence[Tensor], lr: float, **settings: Any
    ) -> None:
        self.pairs = pairs(layers)
        own = [t for pair in self.pairs for t in (pair.A, pair.B)]
        super().__init__(layers, others, own, lr, **settings)

    def learning(self) -> list[Pair]:
        """The pairs that have gradients; a layer that no token reached has none."""
        return [p for p in self.pairs if p.A.grad is not None and p.B.grad is not None]


def batched(
    rule: Callable[..., tuple[Tensor, ...]], *columns: Sequence[Tensor | float]
) -> list[tuple[Tensor, ...]]:
    """`rule` of each row of `columns`, layers of equal shapes in one stack [L, ...].

    Numbers become tensors [L, 1, 1].
    """
    rows = list(zip(*columns, strict=True))
    places: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        key = tuple((t.shape, t.dtype, t.device) for t in row if isinstance(t, Tensor))
        places.setdefault(key, []).append(i)
    found: dict[int, tuple[Tensor, ...]] = {}
    for same in places.values():
        like = next(t for t in rows[same[0]] if isinstance(t, Tensor))
        stacks = [
            torch.stack([rows[i][k] for i in same])  # type: ignore[arg-type]
            if isinstance(rows[same[0]][k], Tensor)
            else like.new_tensor([rows[i][k] for i in same])[:, None, None]
            for k in range(len(columns))
        ]
        made = zip(*(part.unbind() for part in rule(*stacks)), strict=True)
        found |= dict(zip(same, made, strict=True))
    return [found[i] for i in range(len(rows))]


def damped_inverse(gram: Tensor, damping: float) -> Tensor:
    """(gram + damping I)^-1 of symmetric [..., r, r]; its pseudo-inverse where it is singular."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.pinv(gram + damping * eye, hermitian=True)


def seed_of(layers: Mapping[str, Adapted]) -> int:
    """A seed for an allocation's own draws: the bits of the first A, which the adapter's drew."""
    A = next(iter(layers.values())).params["A"].detach().float().cpu().contiguous()
    return int(A.view(torch.int32).long().sum()) % 2**31
