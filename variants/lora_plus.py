"""LoRA+: Efficient Low Rank Adaptation of Large Models (Hayou, Ghosh & Yu, ICML 2024),
arXiv:2402.12354.

    lr of B = ratio * lr of A

As the width grows, one rate for both factors leaves A or B behind (Section 4); B, which is zero at
the start, wants the larger one. Official code: nikhil-ghosh-berkeley/loraplus, lora_plus.py. There,
and in PEFT's `create_loraplus_optimizer`, every tensor of one dimension takes B's rate as well, so
that DoRA's m learns `ratio` times too fast; the paper's argument is about the factors alone, so
here m, biases and heads keep the rate that was asked for (`vectors=true` for theirs). PEFT also
puts weight decay to zero unless `loraplus_weight_decay` is given; here the run's decay holds.

Only B learns faster:

>>> import torch, variants
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
>>> adapter = variants.attach(model, "lora_plus", rank=2, targets=["0"], form="dora")
>>> own = {id(t): k for k, t in adapter.layers["0"].params.items()}
>>> groups = adapter.optimizer(lr=1.0).param_groups
>>> {own[id(t)]: group["lr"] for group in groups for t in group["params"]}
{'A': 1.0, 'm': 1.0, 'B': 16.0}
>>> groups = LoRAPlus(vectors=True).optimizer(adapter.layers, [], 1.0).param_groups
>>> sorted((own[id(t)], group["lr"]) for group in groups for t in group["params"])
[('A', 1.0), ('B', 16.0), ('m', 16.0)]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._api import Update, trained
from ._layer import Adapted
from ._registry import Incompatible, preset

if TYPE_CHECKING:
    from ._adapter import Choice


@dataclass(frozen=True)
class LoRAPlus(Update, name="lora_plus"):
    """AdamW with a larger learning rate for B."""

    ratio: float = 16.0
    """learning rate of B over that of A; the paper advises about 2^4; below 1 A learns faster"""
    vectors: bool = False
    """give B's rate to tensors of one dimension as well (DoRA's m), as the official code does"""

    def __post_init__(self) -> None:
        if self.ratio <= 0:
            raise Incompatible(f"update lora_plus: ratio={self.ratio} must be positive")

    def fits(self, choice: "Choice") -> None:
        tensors = choice.form.shapes(8, 8, 2)
        if not (choice.form.low_rank and {"A", "B"} <= set(tensors)):
            raise self.refuse(choice.form, "a form with factors A and B")
        if set(choice.init.frozen) & {"A", "B"}:
            raise self.refuse(choice.init, "an init that leaves A and B to train")

    def optimizer(
        self, layers: Mapping[str, Adapted], others: Sequence[Tensor], lr: float, **settings: Any
    ) -> torch.optim.Optimizer:
        settings.setdefault("fused", not settings.get("foreach"))
        fast = {id(layer.params["B"]) for layer in layers.values()}
        if self.vectors:
            fast |= {id(t) for t in (*trained(layers), *others) if t.ndim == 1}
        every = [*trained(layers), *others]
        groups = [
            {"params": [t for t in every if id(t) not in fast], "lr": lr},
            {"params": [t for t in every if id(t) in fast], "lr": lr * self.ratio},
        ]
        return torch.optim.AdamW(groups, **settings)


preset(
    "lora_plus",
    update="lora_plus",
    rank=16,
    alpha="2r",
    lr=1e-4,
    lr_origin="A's; half of LoRA's, as the official README advises",
)
