"""GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning (Jung et al., NeurIPS
2025), arXiv:2505.20355.

    W = W0 + s [B_ij A_ij]_(i, j < k),    s = alpha / r,    A_ij [r/k, n/k],    B_ij [m/k, r/k] = 0

W0 is cut into k x k blocks, each with a LoRA of rank r/k of its own: as many numbers as LoRA at
rank r, and a rank of up to k r. A ~ U(-sqrt(k/n), sqrt(k/n)): a block's inputs set the bound.
`hybrid_r` of the r directions go to one plain LoRA over the whole matrix. Official code:
SqueezeBits/GraLoRA, peft/src/peft/tuners/gralora/layer.py, which cannot merge. There r and both
sides must be multiples of k; here the sides need not be (blocks then differ by one). In PEFT `r`
does not count the hybrid part, and s = alpha / (r + hybrid_r), the same s.

A [r, n] and B [m, r] are laid out as LoRA's. Rows i of A and columns j of B meet in block (i, j):

>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> p = {"A": torch.randn(4, 12, generator=g), "B": torch.randn(10, 4, generator=g)}
>>> W = GraLoRA(k=2).weight(torch.zeros(10, 12), p, 3.0)
>>> bool(torch.allclose(W[:5, 6:], 3 * p["B"][:5, 2:] @ p["A"][:2, 6:], atol=1e-5))
True
>>> int(torch.linalg.matrix_rank(W)), GraLoRA(k=2).rank_of(10, 12, 4, "here")
(8, 4)
>>> p = GraLoRA(k=2).start(torch.zeros(8, 200), 4, 1.0, g)
>>> 0.098 < p["A"].abs().max().item() <= 0.1
True
>>> p = {"A": torch.zeros(2, 12), "B": torch.zeros(10, 2)}
>>> p |= {"A_hybrid": torch.ones(1, 12), "B_hybrid": torch.ones(10, 1)}
>>> GraLoRA(k=2, hybrid_r=1).weight(torch.zeros(10, 12), p, 3.0)[0, 0].item()
3.0
>>> GraLoRA(k=2, hybrid_r=1).rank_of(10, 12, 5, "here")  # 4 for the grid
5
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ._api import Form, Tensors, kaiming
from ._layer import Adapted
from ._registry import Incompatible, preset


@dataclass(frozen=True)
class GraLoRA(Form, name="gralora"):
    """A grid of k x k blocks, each a LoRA of rank r/k."""

    k: int = 2
    """blocks in each direction"""
    hybrid_r: int = 0
    """directions of r that go to a plain LoRA beside the grid"""

    rank_means = "r, with the parameters of LoRA at rank r: each of the blocks has r/k"
    parameters = "r*(m + n)"

    def __post_init__(self) -> None:
        if self.k < 1 or self.hybrid_r < 0:
            raise Incompatible(f"form gralora: k={self.k} from 1, hybrid_r={self.hybrid_r} from 0")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        h = self.hybrid_r
        plain = {"A_hybrid": (h, n), "B_hybrid": (m, h)} if h else {}
        return {"A": (r - h, n), "B": (m, r - h)} | plain

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        h = self.hybrid_r
        widths = [len(block) for block in torch.arange(n).tensor_split(self.k)]
        A = torch.cat([kaiming(r - h, width, W0, generator) for width in widths], dim=1)
        plain = {"A_hybrid": kaiming(h, n, W0, generator), "B_hybrid": W0.new_zeros(m, h)}
        return {"A": A, "B": W0.new_zeros(m, r - h)} | (plain if h else {})

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + self.change(W0, p, s)

    def change(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        k = self.k
        A = [rows.tensor_split(k, dim=1) for rows in p["A"].chunk(k)]  # A[i][j], B[i][j]
        B = [rows.chunk(k, dim=1) for rows in p["B"].tensor_split(k)]
        grid = [torch.cat([B[i][j] @ A[i][j] for j in range(k)], dim=1) for i in range(k)]
        change = s * torch.cat(grid)
        return change + s * p["B_hybrid"] @ p["A_hybrid"] if self.hybrid_r else change

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        k, dropped = self.k, layer.dropout(x)
        p = {name: t.to(x.dtype) for name, t in layer.p.items()}
        pairs = zip(dropped.tensor_split(k, -1), p["A"].tensor_split(k, 1), strict=True)
        down = torch.stack([F.linear(xj, Aj).unflatten(-1, (k, -1)) for xj, Aj in pairs], dim=-2)
        up = [F.linear(h.flatten(-2), Bi) for h, Bi in
              zip(down.unbind(-3), p["B"].tensor_split(k), strict=True)]  # fmt: skip
        y = torch.cat(up, dim=-1)
        if self.hybrid_r:
            y = y + F.linear(F.linear(dropped, p["A_hybrid"]), p["B_hybrid"])
        return layer.frozen(x) + layer.s * y

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        grid = r - self.hybrid_r
        if grid < self.k or grid % self.k:
            raise Incompatible(
                f"rank={r}: {where} in {self.k} x {self.k} blocks needs a multiple of k={self.k} "
                f"directions beside hybrid_r={self.hybrid_r}; form gralora"
            )
        if self.k > min(m, n):
            raise Incompatible(f"form gralora: k={self.k}: {where} is {m} x {n}")
        return super().rank_of(m, n, r, where)


preset(
    "gralora",
    form="gralora",
    rank=32,
    alpha="2r",
    lr=2e-4,
    lr_origin="PEFT's MetaMathQA benchmark with AdamW; the official scripts have 2e-4 to "
    "4e-4 with Lion",
    width=3072,
)
