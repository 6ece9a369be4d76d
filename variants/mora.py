"""MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning (Jiang et al., 2024),
arXiv:2405.12130.

    W = W0 + up(M down(.)),    M [q, q] = 0,    q = floor(sqrt((m + n) r) + 1/2)

One square matrix with the parameters of LoRA at rank r, between two maps that have none. `down`
cuts the n inputs into groups of q, the last filled up with inputs from the front. Type `sharing`
sums the groups and repeats the output until m is full (Eq. 6); type `rope` turns group i by the
angles of rotary position i, q even, and puts out the groups side by side (Eq. 9). No scale.
Official code: kongds/MoRA, peft-mora/src/peft/tuners/lora/layer.py (`_apply_mora`, types 1 and 6;
types 2 to 4, which group neighbours, are not here). The README wants `sharing` for large r and
`rope` for small. Where q is above 2 n, which the code cannot fill up, the inputs go round again.
PEFT has no such form.

Rotation leaves group 0 as it is; a group of inputs reaches its own group of outputs alone:

>>> import torch
>>> form, q = MoRA(), MoRA().side(12, 12, 2)
>>> q, MoRA(type="sharing").side(17, 12, 2)  # roots of 48 and 58
(6, 8)
>>> M = torch.randn(q, q, generator=torch.Generator().manual_seed(0))
>>> change = form.weight(torch.zeros(12, 12), {"M": M}, 1.0)
>>> bool(torch.allclose(change[:6, :6], M)), change[6:, :6].abs().max().item()
(True, 0.0)
>>> for at, turn in ((0, torch.tensor(1.0)), (1, torch.tensor(10000 ** (-2 / 6)))):  # in group 1
...     wanted = turn.cos() * M[:, at] + turn.sin() * M[:, at + 3]
...     print(bool(torch.allclose(change[6:, 6 + at], wanted, atol=1e-6)))
True
True
>>> shared = MoRA(type="sharing").weight(torch.zeros(8, 9), {"M": M}, 1.0)
>>> bool(torch.allclose(shared[7], torch.cat([M[1, :3] + M[1, 3:], M[1, 3:], M[1, :3]])))
True
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ._api import Form, Tensors
from ._layer import Adapted
from ._registry import Incompatible, preset


@dataclass(frozen=True)
class MoRA(Form, name="mora"):
    """A square matrix between maps without parameters."""

    type: str = "rope"
    """`sharing` (type 1 of the code), or `rope` (type 6)"""

    rank_means = "r of the LoRA with as many parameters; the change has up to their square root"
    parameters = "(int(math.sqrt((m + n)*r) + 0.5)//2*2)**2"
    parameters_in_words = "q*q, q = floor(sqrt((m + n)*r) + 1/2), made even for type `rope`"
    scaled = False

    def __post_init__(self) -> None:
        if self.type not in ("sharing", "rope"):
            raise Incompatible(f"form mora: type={self.type}; choices: sharing, rope")
        if self.type == "sharing":
            object.__setattr__(self, "parameters", "int(math.sqrt((m + n)*r) + 0.5)**2")

    def side(self, m: int, n: int, r: int) -> int:
        """q of an [m, n] matrix."""
        q = int(math.sqrt((m + n) * r) + 0.5)
        return q // 2 * 2 if self.type == "rope" else q

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        q = self.side(m, n, r)
        return {"M": (q, q)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        q = self.side(W0.shape[0], W0.shape[1], r)
        return {"M": W0.new_zeros(q, q)}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + self.change(W0, p, s)

    def change(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        (m, n), M, q = W0.shape, p["M"], p["M"].shape[0]
        groups = -(-n // q)
        place = torch.arange(groups * q, device=M.device)
        down = torch.zeros(n, groups * q, dtype=M.dtype, device=M.device)
        down[place % n, place] = 1.0
        X = down.unflatten(1, (groups, q))  # of each input alone
        X = rotated(X) if self.type == "rope" else X.sum(1)
        rows = (X @ M.mT).reshape(n, -1).mT
        return rows[torch.arange(m, device=M.device) % len(rows)]

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        M, m = layer.p["M"].to(x.dtype), layer.out_features
        q, n = M.shape[0], x.shape[-1]
        groups, filled = -(-n // q), layer.dropout(x)
        missing = groups * q - n
        if missing > n:
            filled = filled[..., torch.arange(groups * q, device=x.device) % n]
        elif missing:
            filled = torch.cat([filled, filled[..., :missing]], dim=-1)
        X = filled.unflatten(-1, (groups, q))
        X = rotated(X).flatten(-2) if self.type == "rope" else X.sum(-2)
        y = F.linear(X.unflatten(-1, (-1, q)), M).flatten(-2)
        repeats = -(-m // y.shape[-1])
        return layer.frozen(x) + (torch.cat([y] * repeats, -1) if repeats > 1 else y)[..., :m]


def rotated(X: Tensor) -> Tensor:
    """Row i of X [..., groups, q] turned by rotary position i, entry j paired with j + q/2."""
    groups, q = X.shape[-2:]
    frequency = 10000.0 ** (-torch.arange(0, q, 2, device=X.device, dtype=torch.float32) / q)
    angle = torch.outer(torch.arange(groups, device=X.device), frequency).repeat(1, 2)
    first, second = X.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return X * angle.cos().to(X.dtype) + turned * angle.sin().to(X.dtype)


preset(
    "mora",
    form="mora",
    scale="none",
    rank=8,
    alpha=None,
    lr=3e-4,
    lr_origin="the official README's command for MetaMath, rank 8, type 6",
)
