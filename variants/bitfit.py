"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models
(Ben Zaken et al., ACL 2022), arXiv:2106.10199.

    W = W0,    bias = b0 + b,    b = 0

Only biases train, those of linear layers and of norms; what has none is left out, and a model
without any is refused. Official code: benzakenelad/BitFit, glue_evaluator.py, trains the bias
itself. Kept as a change it takes the same steps, and a weight decay draws it to b0, not to zero.
There is no rank. PEFT has no such tuner, only `bias=all` beside an adapter.

The weight is W0 itself, the bias moves:

>>> import torch
>>> W0, p = torch.ones(2, 3), {"b": torch.tensor([1.0, -1.0])}
>>> BitFit().weight(W0, p, 1.0) is W0, BitFit().bias(torch.tensor([5.0, 5.0]), p).tolist()
(True, [6.0, 4.0])
>>> import torch.nn as nn, variants
>>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
>>> list(variants.attach(net, "bitfit").layers)
['0', '1']
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._api import Form, Tensors
from ._layer import Adapted
from ._registry import preset


@dataclass(frozen=True)
class BitFit(Form, name="bitfit"):
    """It trains biases, of the layers that have one."""

    rank_means = None
    parameters = "m"
    scaled = False
    drops = False

    def applies(self, kind: Any, has_bias: bool) -> bool:
        return has_bias

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"b": (m,)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        return {"b": W0.new_zeros(W0.shape[0])}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0

    def bias(self, b0: Tensor | None, p: Tensors) -> Tensor | None:
        return None if b0 is None else b0 + p["b"]

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        return layer.frozen.stored.product(x, layer.bias_like(x))


preset(
    "bitfit",
    form="bitfit",
    scale="none",
    rank=None,
    alpha=None,
    lr=1e-3,
    lr_origin="the README of the official code, BERT; the paper searches 1e-4 to 1e-3",
    width=768,
    targets="all-linear,norms",
)
