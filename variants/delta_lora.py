"""Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices
(Zi et al., 2023), arXiv:2309.02411.

    W0 <- W0 + lambda s (B' A' - B A)    after a step from (A, B) to (A', B'), once t > K

A and B learn by AdamW; the base follows their product, so that W in all moves by any rank without a
gradient or a moment of its own. No official code. The paper's Algorithm 1 counts t from 0 and
leaves the first K + 1 steps to the factors; it takes dropout out of the adapter's branch, which is
the default here as well. K is the laboratory's choice: below 1 a share of the run, which must be
longer than it. The original weight is kept, and the moved one is saved with the adapter. A base of
coded or rounded weights cannot take the small steps and is refused; a model that is loaded in bf16
rounds them. PEFT has no such rule.

What the layer gains by a step is 1 + lambda times what its factors gain, up to K just that:

>>> import torch, variants
>>> def gain(K):
...     model = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False)).double()
...     update = {"name": "delta_lora", "start": K}
...     adapter = variants.attach(model, "delta_lora", rank=2, targets=["0"], update=update)
...     layer, optimizer = adapter.layers["0"], adapter.optimizer(lr=0.1)
...     torch.nn.init.normal_(layer.params["B"])
...     W, before = layer.weight.detach(), (layer.params["B"] @ layer.params["A"]).detach()
...     model(torch.ones(3, 8).double()).sum().backward()
...     optimizer.step()
...     gained = layer.s * (layer.params["B"] @ layer.params["A"] - before)
...     return round(((layer.weight - W) / gained).median().item(), 6)
>>> gain(-1), gain(0)
(3.0, 1.0)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._api import Update
from ._factors import Paired, need_factors
from ._layer import Adapted
from ._registry import Incompatible, preset

if TYPE_CHECKING:
    from ._adapter import Choice


class Following(Paired):
    """AdamW, after which each base moves with the product of its factors."""

    ratio, begin = 0.0, 0

    def move(self, group: dict[str, Any]) -> None:
        known = self.learning()
        tensors = [t for pair in known for t in (pair.A, pair.B)]
        before = [t.clone() for t in tensors]
        self.adamw(group, tensors, [t.grad for t in tensors])
        for i, pair in enumerate(known):
            if self.state[pair.A]["step"] - 1 > self.begin:
                A, B = before[2 * i : 2 * i + 2]
                change = torch.cat([pair.B, -B], 1) @ torch.cat([pair.A, A])
                pair.layer.move(self.ratio * pair.s * change)


@dataclass(frozen=True)
class DeltaLoRA(Update, name="delta_lora"):
    """AdamW on A and B; the base moves by lambda times what their product moved."""

    ratio: float = 2.0
    """lambda, the base's step over the product's"""
    start: float = 0.1
    """K: the base rests while t <= K, t the step from 0; below 1 a share of the run"""

    scheduled = True
    moves_base = True

    def __post_init__(self) -> None:
        if self.ratio <= 0:
            raise Incompatible(f"update delta_lora: ratio={self.ratio} must be positive")

    def fits(self, choice: "Choice") -> None:
        need_factors(self, choice)

    def optimizer(
        self, layers: Mapping[str, Adapted], others: Sequence[Tensor], lr: float, **settings: Any
    ) -> torch.optim.Optimizer:
        steps, start = settings.pop("steps", None), self.start
        if 0 < start < 1:
            if steps is None:
                raise Incompatible(
                    f"update delta_lora: start={start} is a share of a run whose length is not "
                    f"known: give optimizer(lr, steps=...)"
                )
            start = round(start * steps)
        if steps is not None and start >= steps - 1:
            raise Incompatible(
                f"update delta_lora: start={start:g} leaves the base at rest in a run of {steps} "
                f"steps"
            )
        optimizer = Following(layers, others, lr, **settings)
        optimizer.ratio, optimizer.begin = self.ratio, int(start)
        return optimizer


preset(
    "delta_lora",
    update="delta_lora",
    rank=8,
    alpha=16,
    lr=2e-4,
    lr_origin="LoRA's, which the paper's comparison keeps",
)
