"""EVA: Parameter Efficient Fine-tuning via Explained Variance Adaptation (Paischer et al.,
NeurIPS 2025), arXiv:2410.07170.

    X - mean(X) = U S V^T,    A = V_r^T,    B = 0,    W = W0 + s B A,    sum of r_i = r L

X holds the inputs of a layer, a row a token. The r L directions, of all L matrices together, that
explain most of their own layer's variance (S_j^2 over the sum of S^2) are kept, at most rho r in
one matrix: the ranks r_i. A matrix that gets none is not adapted. Official code: ml-jku/EVA,
src/svd.py (`compute_svd`), an incremental PCA, batch after batch until the components stand still
(cosine 0.99), so the inputs are centred (`centered`), as in PEFT's. Its scripts take every token
but padding, as here; PEFT leaves out those without a label (`use_label_mask`). Here the moments of
a fixed number of batches are summed, and decomposed once. s stays that of the rank asked for, as
with PEFT's `adjust_scaling_factors` (there off by a root under rslora); the official train.py keeps
alpha, so that s falls as a rank grows.

Two layers, of which the first has all its variance in one direction:

>>> import torch
>>> spread = {"a": torch.tensor([8.0, 0.0, 0.0, 0.0]), "b": torch.tensor([3.0, 2.5, 2.0, 0.5])}
>>> rule, W = ExplainedVariance(), torch.zeros(4, 4)
>>> found = {k: rule.reduce(W, {"covariance": v.diag() + 1, "mean": torch.ones(4)}, 2)
...          for k, v in spread.items()}
>>> rule.shared_out({"a": 2, "b": 2}, {k: own["ratios"] for k, own in found.items()})
{'a': 1, 'b': 3}
>>> own = rule.reduce(W, {"covariance": spread["b"].diag(), "mean": torch.zeros(4)}, 1)
>>> own["ratios"].tolist(), rule.keeps_scale
([0.375, 0.3125], True)

A finds the second input, which varies most; about zero the mean would have drawn it to the third:

>>> moments = {"covariance": torch.tensor([1.0, 5.0, 9.1]).diag(),
...            "mean": torch.tensor([0.0, 0.0, 3.0])}
>>> start = PrincipalInputs().start(W[:, :3], 1, 1.0, torch.Generator(),
...                                 PrincipalInputs().reduce(W[:, :3], moments, 1))
>>> [round(v, 4) for v in start.A.abs()[0].tolist()], start.B.abs().max().item()
([0.0, 1.0, 0.0], 0.0)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._api import Allocation, Init, Start, Tensors
from ._registry import Incompatible, preset
from ._svd import leading

if TYPE_CHECKING:
    from ._adapter import Choice, Planned


def variance(found: Tensors, centered: bool) -> Tensor:
    """The covariance [n, n] of the inputs, about their mean or about zero."""
    C, mean = found["covariance"], found["mean"]
    return C - torch.outer(mean, mean) if centered else C


@dataclass(frozen=True)
class PrincipalInputs(Init, name="eva"):
    """A is the directions in which the layer's inputs vary most."""

    batches: int = 8
    """of the inputs"""
    centered: bool = True
    """about their mean, as the official code; False: a plain SVD of the inputs"""

    needs = ("covariance", "mean")

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise Incompatible(f"init eva: batches={self.batches} must be positive")

    def reduce(self, W0: Tensor, found: Tensors, r: int) -> Tensors:
        return {"A": leading(variance(found, self.centered), r)[2].contiguous()}

    def start(
        self, W0: Tensor, r: int, s: float, generator: torch.Generator, found: Tensors
    ) -> Start:
        return Start(found["A"][:r].to(W0, copy=True), W0.new_zeros(W0.shape[0], r))


@dataclass(frozen=True)
class ExplainedVariance(Allocation, name="eva"):
    """Ranks by explained variance, at an equal total."""

    rho: float = 2.0
    """no matrix gets more than rho times the rank asked for; 1: no redistribution"""
    batches: int = 8
    """of the inputs"""
    centered: bool = True
    """about their mean, as the official code; False: a plain SVD of the inputs"""

    needs = ("covariance", "mean")
    keeps_scale = True

    def __post_init__(self) -> None:
        if self.rho < 1 or self.batches < 1:
            raise Incompatible(f"allocation eva: rho={self.rho} and batches={self.batches} must be "
                               f"1 or more")  # fmt: skip

    def fits(self, choice: "Choice") -> None:
        if not choice.form.low_rank:
            raise self.refuse(choice.form, "a low-rank form")

    def most(self, m: int, n: int, r: int) -> int:
        return min(round(self.rho * r), m, n)

    def reduce(self, W0: Tensor, found: Tensors, r: int) -> Tensors:
        C, (m, n) = variance(found, self.centered), W0.shape
        largest = leading(C, self.most(m, n, r))[1]
        return {"ratios": largest / C.trace().clamp_min(torch.finfo(C.dtype).tiny)}

    def static(
        self, planned: "Sequence[Planned]", found: Mapping[str, Tensors]
    ) -> Mapping[str, int]:
        asked = {item.site.name: item.rank for item in planned}
        return self.shared_out(asked, {name: found[name]["ratios"] for name in asked})

    def shared_out(self, asked: Mapping[str, int], ratios: Mapping[str, Tensor]) -> dict[str, int]:
        """The ranks: as many of the largest ratios, of all layers, as were asked for in all."""
        owner = [name for name in asked for _ in ratios[name]]
        order = torch.cat([ratios[name].cpu() for name in asked]).argsort(
            descending=True, stable=True
        )
        ranks = dict.fromkeys(asked, 0)
        for i in order[: sum(asked.values())].tolist():
            ranks[owner[i]] += 1
        return ranks


preset(
    "eva",
    init="eva",
    allocation="eva",
    rank=16,
    alpha=1,
    lr=5e-4,
    lr_origin="the official bash/run_train.sh and train.py, Llama 2-7B: alpha 1, rank 16",
)
