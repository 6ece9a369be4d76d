"""VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks (Li et al., NeurIPS 2024),
arXiv:2405.15179.

    W = W0 + B A,    every stretch of b entries of a row of A or a column of B
                     = sum over the k largest of its logits of softmax(those logits) bank[index]

One bank [h, b], trained, serves every layer; each stretch has h logits. bank ~ U(-0.02, 0.02),
logits ~ N(0, 0.01^2): the start is near W0, not at it. There is no alpha. Official code:
leo-yangli/VB-LoRA; PEFT has the authors' own port of the equation, with logits ten times as large
at the start (0.1) and 256 vectors. Both ask that b divides m and n; here the last stretch is cut
where it does not, so b = 256 holds for any layer. The paper counts what it stores, k indices and
k - 1 weights a stretch; here what is trained is counted. The bank learns ten times slower than the
logits: update `vblora`.

A stretch mixes its k best vectors by a softmax over those k alone:

>>> import torch
>>> form = VBLoRA(vectors=3, length=2, topk=2)
>>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
>>> up = torch.tensor([0.0, torch.log(torch.tensor(3.0)), -1.0])
>>> mixed = form.mixed(up.expand(1, 2, 3), bank)  # a row of two stretches
>>> [round(v, 4) for v in mixed.flatten().tolist()]
[0.25, 0.75, 0.25, 0.75]
>>> p = {"bank": bank, "logits_A": up.expand(1, 2, 3), "logits_B": up.expand(2, 1, 3)}
>>> W = form.weight(torch.zeros(4, 3), p, 1.0)  # W[i, j] = B[i] A[j], each cut to size
>>> torch.allclose(W[:, 1], 0.75 * torch.tensor([0.25, 0.75, 0.25, 0.75]))
True
>>> g = torch.Generator().manual_seed(0)
>>> bank = VBLoRA().start_shared(6, 8, 4, g, torch.empty(0))["bank"]
>>> tuple(bank.shape), round(bank.min().item(), 3), round(bank.max().item(), 3)
((2048, 256), -0.02, 0.02)
>>> round(VBLoRA().start(torch.zeros(600, 8), 4, 1.0, g)["logits_B"].std().item(), 3)
0.01
>>> import variants
>>> adapter = variants.attach(torch.nn.Sequential(torch.nn.Linear(8, 6)), "vblora", targets="0")
>>> [(len(g["params"]), g["lr"]) for g in adapter.optimizer(lr=1e-3).param_groups]
[(1, 0.001), (2, 0.01)]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._api import Form, Tensors, Update, trained
from ._layer import Adapted
from ._registry import Incompatible, preset

if TYPE_CHECKING:
    from ._adapter import Choice


@dataclass(frozen=True)
class VBLoRA(Form, name="vblora"):
    """Factors put together from the vectors of one trained bank."""

    vectors: int = 2048
    """h, vectors in the bank"""
    length: int = 256
    """b, numbers in a vector"""
    topk: int = 2
    """k, vectors that one stretch mixes"""

    parameters = "r*2048*(-(-m//256) + -(-n//256))"
    parameters_in_words = "r*h*(m/b + n/b), both rounded up, h = 2048 and b = 256"
    shared_parameters = "2048*256"
    shared = ("bank",)
    scaled = False
    starts_at_base = False

    def __post_init__(self) -> None:
        for key in ("vectors", "length", "topk"):
            if getattr(self, key) < 1:
                raise Incompatible(f"form vblora: {key}={getattr(self, key)}; 1 or more")
        if self.topk > self.vectors:
            raise Incompatible(f"form vblora: topk={self.topk}; at most vectors={self.vectors}")
        h, b = self.vectors, self.length
        object.__setattr__(self, "parameters", f"r*{h}*(-(-m//{b}) + -(-n//{b}))")
        object.__setattr__(self, "shared_parameters", f"{h}*{b}")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        h, b = self.vectors, self.length
        return {"logits_A": (r, -(-n // b), h), "logits_B": (-(-m // b), r, h)}

    def shared_shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"bank": (self.vectors, self.length)}

    def key(self, m: int, n: int, r: int) -> str:
        return "all"

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        return {
            k: (0.01 * torch.randn(*shape, generator=generator)).to(W0)
            for k, shape in self.shapes(m, n, r).items()
        }

    def start_shared(
        self, m: int, n: int, r: int, generator: torch.Generator, like: Tensor
    ) -> Tensors:
        unit = torch.rand(self.vectors, self.length, generator=generator)
        return {"bank": (0.04 * unit - 0.02).to(like)}

    def mixed(self, logits: Tensor, bank: Tensor) -> Tensor:
        """Logits [..., h] -> vectors [..., b]."""
        top = logits.topk(self.topk, dim=-1)
        return (top.values.softmax(-1)[..., None] * bank[top.indices]).sum(-2)

    def _factors(self, p: Tensors, m: int, n: int) -> tuple[Tensor, Tensor]:
        A = self.mixed(p["logits_A"], p["bank"]).flatten(1)  # [r, n and what overhangs]
        B = self.mixed(p["logits_B"], p["bank"]).mT.flatten(0, 1)  # [m and what overhangs, r]
        return A[:, :n], B[:m]

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        A, B = self._factors(p, *W0.shape)
        return W0 + B @ A

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        A, B = self._factors(layer.p, layer.out_features, layer.in_features)
        return layer.product(x, A, B)


@dataclass(frozen=True)
class BankAdamW(Update, name="vblora"):
    """AdamW with the learning rate of the bank, and a larger one for the logits."""

    ratio: float = 10.0
    """of the logits' learning rate to the bank's"""

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise Incompatible(f"update vblora: ratio={self.ratio}; above 0")

    def fits(self, choice: "Choice") -> None:
        if not isinstance(choice.form, VBLoRA):
            raise self.refuse(choice.form, "a form with a bank of vectors (vblora)")

    def optimizer(
        self, layers: Mapping[str, Adapted], others: Sequence[Tensor], lr: float, **settings: Any
    ) -> torch.optim.Optimizer:
        settings.setdefault("fused", not settings.get("foreach"))
        banks = {id(layer.params["bank"]) for layer in layers.values()}
        logits = [t for t in trained(layers) if id(t) not in banks]
        rest = [*(t for t in trained(layers) if id(t) in banks), *others]
        groups = [{"params": rest, "lr": lr}, {"params": logits, "lr": lr * self.ratio}]
        return torch.optim.AdamW([g for g in groups if g["params"]], **settings)


preset(
    "vblora",
    form="vblora",
    scale="none",
    update="vblora",
    rank=4,
    alpha=None,
    lr=1e-3,
    lr_origin="the bank's in the paper's Table 9, Llama-2-7B; the logits have 1e-2",
)
