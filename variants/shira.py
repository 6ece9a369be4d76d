"""SHiRA: Sparse High Rank Adapters (Bhardwaj et al., NeurIPS 2024), arXiv:2406.13175.

    W = W0 + S,    S = 0 but at r (m + n) places of W0, fixed before training

1 to 2 % of the weights are trained where they stand: a change of high rank that is cheap to take in
and out, with no scale. The paper's masks: `random` (SHiRA-Rand) and `magnitude` (SHiRA-WM: the
largest weights) are here; those by gradient and SNIP, which need data, and the structured one are
not. The official repository, Qualcomm-AI-research/SHiRA, holds no code and points to PEFT, which
takes LoRA's count r (m + n), as here, and a random mask, cut from a permutation of all places
(peft/tuners/shira); here the places are drawn one by one, from the layer's own generator, and saved
with the adapter.

As many entries as LoRA has numbers, and no other entry moves; by magnitude they are the largest:

>>> import torch
>>> W0 = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
>>> form = SHiRA(mask="magnitude")
>>> p = form.start(W0, 2, 1.0, torch.Generator().manual_seed(0))
>>> moved = form.weight(W0, p | {"entries": p["entries"] + 1.0}, 1.0) != W0
>>> int(moved.sum()), bool(W0[moved].abs().min() > W0[~moved].abs().max())
(64, True)
>>> drawn = SHiRA().start(W0, 2, 1.0, torch.Generator().manual_seed(0))["places"]
>>> len(set(drawn.tolist())), bool((drawn < 240).all()), 100 < drawn.float().mean().item() < 140
(64, True, True)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors
from ._registry import Incompatible, preset


@dataclass(frozen=True)
class SHiRA(Form, name="shira"):
    """W0 with some of its entries trained."""

    mask: str = "random"
    """which entries: `random`, or the ones of largest `magnitude`"""

    rank_means = "r of the LoRA with as many parameters; the change may have any rank"
    parameters = "r*(m + n)"
    constants = ("places",)
    scaled = False

    def __post_init__(self) -> None:
        if self.mask not in ("random", "magnitude"):
            raise Incompatible(f"form shira: mask={self.mask}; choices: random, magnitude")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"entries": (r * (m + n),)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        count = r * sum(W0.shape)
        if self.mask == "magnitude":
            places = W0.abs().flatten().topk(count).indices.sort().values
        else:
            places = drawn(W0.numel(), count, generator).to(W0.device)
        return {"entries": W0.new_zeros(count), "places": places}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + self.change(W0, p, s)

    def change(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        entries = p["entries"]
        none = torch.zeros(W0.numel(), dtype=entries.dtype, device=entries.device)
        return none.scatter(0, p["places"], entries).view(W0.shape)

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        if r * (m + n) > m * n:
            raise Incompatible(
                f"rank={r}: {where} is {m} x {n}, with fewer entries than the {r * (m + n)} of "
                f"form shira; rank {m * n // (m + n)} at most"
            )
        return r


def drawn(total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different numbers below `total`, sorted: the first ones of an endless draw."""
    if 2 * count > total:
        return torch.randperm(total, generator=generator)[:count].sort().values
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        more = torch.randint(total, (count - len(found),), generator=generator)
        found = torch.cat([found, more]).unique()
    return found


preset(
    "shira",
    form="shira",
    scale="none",
    rank=16,
    alpha=None,
    lr=5e-4,
    lr_origin="the paper's Table 9, LLaMA-7B and LLaMA-2-7B",
)
