"""QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models (Xu et al., ICLR 2024),
arXiv:2309.14717.

    W = Q + s B A P,    P [n/g, n]: the mean of each g inputs,    A [r, n/g],    B [m, r] = 0

A and B see one number for each group of g inputs, so the change is one number for each group of
each row of W; where those are the groups of an integer base, W = (code - zero) scale, the change
goes into the zero points, zero - (s B A / g) / scale, and no code and no scale changes: what was
trained in 4 bits is used in 4 bits, exact up to the rounding of that one difference. `absorbed` is
that merge; `merge()` alone gives decoded weights, as for every form.

Official code: yuhuixu1993/qa-lora, peft_utils.py and merge.py: bases of GPTQ with g = 32, A from
Xavier's uniform distribution, s = 16 / 64. Its zero points are then real numbers, as here. Its
dropout acts on the means, here on the inputs. PEFT's `use_qalora` multiplies the means by n / g, so
that its change is n / g times this one for the same A and B, and merges nowhere. A width that g
does not divide, which both refuse, has a shorter last group here, and no exact merge.

One number for each group of a row, the mean of their inputs times A; absorbed to the last bit:

>>> import torch
>>> from ._quantize import rounded
>>> g = torch.Generator().manual_seed(0)
>>> p = {"A": torch.randint(-4, 5, (2, 3), generator=g) / 4, "B": torch.randint(-4, 5, (5, 2)) / 2}
>>> x, zeros = torch.randn(7, 12, generator=g), torch.zeros(5, 12)
>>> y = x.view(7, 3, 4).mean(-1) @ p["A"].T @ p["B"].T
>>> torch.allclose(x @ QALoRA(group=4).weight(zeros, p, 0.5).T, 0.5 * y, atol=1e-6)
True
>>> W = torch.randint(-6, 10, (5, 12), generator=g) / 8.0
>>> W[:, 0::4], W[:, 3::4] = -0.75, 1.125  # so that a step is 1/8, and nothing rounds
>>> stored = rounded(W, 4, 4, symmetric=False)
>>> merged = QALoRA(group=4).absorbed(stored, p, 0.5)
>>> torch.equal(merged.dense(), QALoRA(group=4).weight(W, p, 0.5)), torch.equal(stored.dense(), W)
(True, True)
>>> torch.equal(merged.codes, stored.codes), torch.equal(merged.scales, stored.scales)
(True, True)
>>> QALoRA(group=4).absorbed(rounded(W, 4, 6), p, 0.5) is None  # these groups lie across
True

A short group has its own mean; Xavier's bound is sqrt(6 / (r + n/g)):

>>> ones = {"A": torch.ones(1, 2), "B": torch.ones(1, 1)}
>>> QALoRA(group=4).weight(torch.zeros(1, 6), ones, 1.0).tolist()
[[0.25, 0.25, 0.25, 0.25, 0.5, 0.5]]
>>> A = QALoRA(group=2).start(torch.zeros(9, 400), 200, 1.0, g)["A"]
>>> A.shape, 0.122 < A.abs().max().item() < 0.0151**0.5
(torch.Size([200, 200]), True)
"""

import math
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ._api import Form, Stored, Tensors
from ._layer import Adapted
from ._quantize import Blocks
from ._registry import Incompatible, preset


@dataclass(frozen=True)
class QALoRA(Form, name="qa_lora"):
    """LoRA on means of groups of inputs, which zero points take up exactly."""

    group: int = 32
    """g, inputs that share a number; that of the base, or a multiple of it"""

    parameters = "r*(m - (-n // 32))"
    parameters_in_words = "r*(m + n/group)"

    def __post_init__(self) -> None:
        if self.group < 1:
            raise Incompatible(f"form qa_lora: group={self.group}, from 1")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"A": (r, -(-n // self.group)), "B": (m, r)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        shape = self.shapes(m, n, r)["A"]
        bound = math.sqrt(6 / sum(shape))  # Xavier's
        A = (bound * (2 * torch.rand(shape, generator=generator) - 1)).to(W0)
        return {"A": A, "B": W0.new_zeros(m, r)}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + self.change(W0, p, s)

    def change(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        n = W0.shape[1]
        groups = s * p["B"] @ (p["A"] / self.sizes(n, p["A"]))  # P has 1/g
        return groups.repeat_interleave(self.group, 1)[:, :n]

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        n, dropped = x.shape[-1], layer.dropout(x)
        A, B = layer.p["A"].to(x.dtype), layer.p["B"].to(x.dtype)
        sums = F.pad(dropped, (0, -n % self.group)).unflatten(-1, (-1, self.group)).sum(-1)
        means = sums / self.sizes(n, x)
        return layer.frozen(x) + layer.s * F.linear(F.linear(means, A), B)

    def sizes(self, n: int, like: Tensor) -> Tensor:
        """Inputs in each group [n/g]; the last one may have fewer."""
        ends = torch.arange(0, n, self.group, device=like.device) + self.group
        return (self.group - (ends - n).clamp_min(0)).to(like.dtype)

    def absorbed(self, stored: Stored, p: Tensors, s: float) -> Stored | None:
        """Codes and scales as they are, the shift of each group of a row moved by the change."""
        n = stored.shape[1]
        if type(stored) is not Blocks or n % self.group or self.group % stored.group:
            return None
        change = s * p["B"] @ (p["A"] / self.group)
        change = change.repeat_interleave(self.group // stored.group, 1).reshape(-1).float()
        merged = deepcopy(stored)
        shift = change if stored.shift is None else stored.shift + change
        merged.zero, merged.shifts = None, shift.view(torch.int32)
        return merged


preset(
    "qa_lora",
    form="qa_lora",
    base={"name": "int4", "group": "32", "symmetric": False},
    rank=64,
    alpha=16,
    lr=2e-4,
    lr_origin="the official qalora.py's default, batch 16",
)
