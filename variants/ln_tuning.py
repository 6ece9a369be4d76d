"""LN tuning: Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning
(Zhao et al., ICLR 2024), arXiv:2312.11420.

    y = gain * normalized(x) + bias,    gain [m] and, where there is one, bias [m] train

This is the paper's LayerNorm-simple, with nothing else trained (its main setting trains the
embeddings, the head and the connector of a multi-modal model too). All norms are targets, the last
one of the model included, as in PEFT; the paper names those of the attention blocks. The gain is W
[m, 1], in whatever way the layer uses it (Gemma's norms multiply by 1 + gain). The bias is kept as
a change: the same steps, and a weight decay draws it to its start. There is no rank. No official
code was found.

Gain and bias move, what normalizes does not:

>>> import torch, variants
>>> norm, x = torch.nn.LayerNorm(4), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
>>> adapter = variants.attach(torch.nn.Sequential(norm), "ln_tuning")
>>> p = adapter.layers["0"].params
>>> tuple(p["gain"].shape), tuple(p["b"].shape)
((4, 1), (4,))
>>> before = norm(x)
>>> _ = p["gain"].data.fill_(2.0), p["b"].data.fill_(7.0)
>>> torch.allclose(adapter.model(x), 2 * before + 7)
True
>>> mixed = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.RMSNorm(4))
>>> found = variants.attach(mixed, "ln_tuning", targets="0,1").layers
>>> {name: list(layer.params) for name, layer in found.items()}
{'1': ['gain']}
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._api import Form, Tensors
from ._registry import preset


@dataclass(frozen=True)
class LNTuning(Form, name="ln_tuning"):
    """It trains gains and biases of norms: targets=norms."""

    rank_means = None
    parameters = "m*(1 + r)"  # r is 1 where there is a bias
    parameters_in_words = "m, and m for a bias"
    scaled = False

    def applies(self, kind: Any, has_bias: bool) -> bool:
        return not kind.matrices

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"gain": (m, 1)} | ({"b": (m,)} if r else {})

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        return {"gain": W0.clone()} | ({"b": W0.new_zeros(W0.shape[0])} if r else {})

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return p["gain"]

    def bias(self, b0: Tensor | None, p: Tensors) -> Tensor | None:
        return None if b0 is None else b0 + p["b"]


preset(
    "ln_tuning",
    form="ln_tuning",
    scale="none",
    rank=None,
    alpha=None,
    lr=3e-4,
    lr_origin="LayerNorm of T-Few (arXiv:2205.05638) on T0-3B, configs/layernorm.json",
    width=2048,
    targets="norms",
)
