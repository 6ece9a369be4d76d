"""RoAd: 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability
(Liao and Monz, NeurIPS 2024), arXiv:2409.00119.

    W = R W0 and bias = R b0,    R of 2 x 2 blocks    a11 cos(t11)   -a12 sin(t12)
                                                      a21 sin(t21)    a22 cos(t22)

Pairs of outputs are turned and stretched, from a = 1 and t = 0. In RoAd_1 one angle and one length
serve a pair, in RoAd_2 a row each, in RoAd_4 each entry. The paper pairs neighbours (Section 3);
its authors published no code. PEFT pairs the halves of groups of 64 outputs, as rotary embeddings
do, which is another order of the outputs: `group=64`. Where `group` does not divide the outputs,
the largest even size below that does is taken. The bias turns with the output. There is no rank.

An angle of 90 degrees carries the first half of a group to the second, a length stretches it:

>>> import torch
>>> form, W0 = RoAd(), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
>>> p = {"t": torch.tensor([[[0.0, torch.pi / 2]]]), "a": torch.tensor([[[5.0, 1.0]]])}
>>> [round(v, 4) for v in form.weight(W0, p, 1.0)[:, 0].tolist()]  # pairs (0, 2) and (1, 3)
[5.0, -4.0, 15.0, 2.0]
>>> [round(v, 4) for v in form.bias(W0[:, 0], p).tolist()]
[5.0, -4.0, 15.0, 2.0]
>>> form.rank_of(128, 8, 1, "here"), RoAd(group=64).rank_of(172, 8, 1, "here")
(2, 4)
>>> p = {"a": torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])}  # RoAd_4: a11, a22, a12, a21
>>> p["t"] = torch.tensor([[[0.0], [torch.pi], [torch.pi / 2], [-torch.pi / 2]]])
>>> [round(v, 4) for v in RoAd(variant=4).weight(W0[:2], p, 1.0)[:, 0].tolist()]
[-5.0, -8.0]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors
from ._layer import Adapted
from ._registry import Incompatible, preset


def change(h: Tensor, p: Tensors) -> Tensor:
    """(R - I) h over the last axis [m]."""
    own = {k: p[k] if p[k].shape[1] > 1 else p[k].expand(-1, 2, -1) for k in "at"}
    c, s = own["a"][:, :2] * own["t"][:, :2].cos(), own["a"][:, -2:] * own["t"][:, -2:].sin()
    halves = h.unflatten(-1, (len(c), 2, -1))  # [..., group, half, place]
    crossed = torch.stack([-halves[..., 1, :], halves[..., 0, :]], dim=-2)
    return ((c - 1).to(h.dtype) * halves + s.to(h.dtype) * crossed).flatten(-3)


@dataclass(frozen=True)
class RoAd(Form, name="road"):
    """Turns and stretches pairs of outputs."""

    variant: int = 1
    """angles and lengths of a pair: 1, 2 or 4"""
    group: int = 2
    """outputs whose halves are paired; 2: neighbours (the paper); 64: PEFT's default"""

    rank_means = None
    parameters = "m"  # of RoAd_1; r is the size of the groups
    parameters_in_words = "m in RoAd_1, 2*m in RoAd_2, 4*m in RoAd_4"
    scaled = False

    def __post_init__(self) -> None:
        if self.variant not in (1, 2, 4):
            raise Incompatible(f"form road: variant={self.variant}; choices: 1, 2, 4")
        if self.group < 2 or self.group % 2:
            raise Incompatible(f"form road: group={self.group}; an even number, 2 or more")
        if self.variant > 1:
            object.__setattr__(self, "parameters", f"{self.variant}*m")

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        for size in range(min(self.group, m), 1, -1):
            if size % 2 == 0 and m % size == 0:
                return size
        raise Incompatible(f"form road pairs outputs, and {where} has {m}; leave it out of targets")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        r = max(r, 2)
        return dict.fromkeys("at", (m // r, self.variant, r // 2))

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        shape = self.shapes(m, n, r)["a"]
        return {"a": W0.new_ones(shape), "t": W0.new_zeros(shape)}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + change(W0.mT.to(p["a"].dtype), p).mT

    def bias(self, b0: Tensor | None, p: Tensors) -> Tensor | None:
        return None if b0 is None else b0 + change(b0.to(p["a"].dtype), p)

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        product = layer.frozen.stored.product
        if not layer.drops:
            h = layer.frozen(x)
            return h + change(h, layer.p)
        return product(x, layer.bias_like(x)) + change(product(layer.dropout(x)), layer.p)


preset(
    "road",
    form="road",
    scale="none",
    rank=None,
    alpha=None,
    lr=3e-3,
    lr_origin="the paper's Appendix C.2, RoAd_1 on LLaMA",
)
