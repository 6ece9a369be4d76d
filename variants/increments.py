"""The form of IncreLoRA (Zhang et al., 2023), arXiv:2308.12043: triplets that come one by one.

    W = W0 + (alpha / k) sum over j <= k + h of E_j P_j Q_j,    P, Q ~ N(0, 0.02^2),    E = 0

P_j [m, 1], E_j [1] and Q_j [1, n] are tensors of their own. A part of them is in use, `share` of
their number; those after them are learned in advance. Official code: FeiyuZhang98/IncreLoRA,
loralib/loralib/increlora.py (`SVDLinear`).

The scale follows the triplets in use, the reserve counts for nothing:

>>> import torch
>>> p = {"P0": torch.ones(2, 1), "E0": torch.ones(1), "Q0": torch.ones(1, 3)}
>>> p |= {"P1": torch.ones(2, 1), "E1": torch.full((1,), 0.5), "Q1": torch.ones(1, 3)}
>>> def entry(used):                                                     # r = 2, alpha = 8
...     share = {"share": torch.tensor(used / 2)}
...     A, B = Increments().factors(p | share)
...     W = Increments().weight(torch.zeros(2, 3), p | share, s=8 / 2)
...     return W[0, 0].item(), (8 / 2 * B @ A)[0, 0].item()
>>> entry(1) == (8 / 1 * (1 + 0.5),) * 2, entry(2) == (8 / 2 * (1 + 0.5),) * 2
(True, True)

Of three triplets two are seen, of which the second is learned in advance; the score is |D dL/dD|:

>>> import variants
>>> model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False))
>>> layer = variants.attach(model, "increlora", rank=3, alpha=3, targets=["0"]).layers["0"]
>>> for k, t in layer.params.items():
...     t.data = torch.full_like(t, {"P": 2.0, "E": 1.0, "Q": 1.0, "s": 1 / 3}[k[0]])
>>> change(layer.params, 1.0)[0].tolist()  # three times 2, over a share of 1/3
[18.0, 18.0, 18.0]
>>> scores = {}
>>> p = shown("0", layer, 1, 2, scores)(layer.params)
>>> (-5 * p["D"]).sum().backward()
>>> p["D"][0].tolist(), scores["0"].abs().sum().item()  # 9 entries of 12 * 5, over sqrt(9)
([12.0, 12.0, 12.0], 180.0)
>>> [layer.params[f"E{j}"].grad is None for j in range(3)]
[False, True, True]

One of three in use, a reserve of one, whose E rests:

>>> settle({"0": layer}, {"used": {"0": 1}, "target": 3, "score": {}}, add=1)
>>> [round(layer.params[k].item(), 5) for k in ("share", "E0", "E1", "E2")]
[0.33333, 1.0, 1e-05, 1.0]

The penalty's parts:

>>> p = {"P0": torch.ones(3, 1), "E0": torch.ones(1), "Q0": torch.ones(1, 2)}
>>> p |= {"P1": 2 * p["P0"], "E1": p["E0"], "Q1": 0 * p["Q0"]}
>>> [t.tolist() for t in off_orthogonal(p, angles=False)]
[[2.0, 11.0], [1.0, 1.0]]
>>> [round(t.square().item(), 3) for t in off_orthogonal(p, angles=True)]
[197.0, 2.0]
>>> layer.rank, layer.params["share"].data = 6, torch.tensor(5 / 6)  # times 6 it is less than 5
>>> in_use(layer)
5
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import triplet
from ._api import Form, Layers, State, Tensors
from ._layer import Adapted


@dataclass(frozen=True)
class Increments(Form, name="increlora"):
    """Triplets one by one, `share` of their number in use."""

    rank_means = "r, the most triplets that a matrix can get; it begins with few"
    parameters = "r*(m + n + 1)"
    constants = ("share",)

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {f"{k}{j}": shape for j in range(r)
                for k, shape in (("P", (m, 1)), ("E", (1,)), ("Q", (1, n)))}  # fmt: skip

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        p = {k: W0.new_zeros(shape) if k[0] == "E"
             else (0.02 * torch.randn(shape, generator=generator)).to(W0)
             for k, shape in self.shapes(W0.shape[0], W0.shape[1], r).items()}  # fmt: skip
        return {"share": W0.new_ones(()), **p}

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor] | None:
        if "D" in p:
            return None
        P, E, Q = triplets(p)
        return Q, P * (E / p["share"])

    def acting_s(self, p: Tensors, s: float) -> float:
        return s / p["share"].item()

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + (p["D"] if "D" in p else change(p, s))

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        p = layer.p
        if "D" in p:
            return layer.frozen(x) + layer.dropout(x) @ p["D"].to(x.dtype).mT
        return layer.product(x, *self.factors(p))  # type: ignore[misc]


def triplets(p: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """P [m, k], E [k] and Q [k, n] of the triplets that p holds."""
    P, E, Q = ([p[f"{k}{j}"] for j in range(sum(k[0] == "E" for k in p))] for k in "PEQ")
    return torch.cat(P, 1), torch.cat(E), torch.cat(Q)


def change(p: Tensors, s: float) -> Tensor:
    """W - W0."""
    P, E, Q = triplets(p)
    return (s / p["share"]) * (P * E) @ Q


def shown(
    name: str, layer: Adapted, used: int, count: int, scores: dict[str, Tensor] | None
) -> Callable[[Tensors], Tensors]:
    """What training sees of p: triplets in use and, up to `count`, in reserve. With `scores` the
    dense change D as well; D times its gradient goes into the layer's score."""

    def view(p: Tensors) -> Tensors:
        seen = {k: t for k, t in p.items() if k == "share" or int(k[1:]) < count}
        seen |= {f"E{j}": seen[f"E{j}"].detach() for j in range(used, count)}
        if scores is None:
            return seen
        D = change(seen, layer.full_s)
        if D.requires_grad:
            size, kept = D.detach() / math.sqrt(D.numel()), scores

            def add(g: Tensor) -> None:  # over the portions of a batch, whose D is one
                kept[name] = kept[name] + size * g if name in kept else size * g

            D.register_hook(add)  # type: ignore[no-untyped-call]
        return seen | {"D": D}

    return view


def show(layers: Layers, state: State, add: int) -> None:
    """Training sees the triplets in use and, up to the target, `add` more of each matrix."""
    grows = state["budget"] < state["target"]
    for name, layer in layers.items():
        used = state["used"][name]
        count = min(used + add, layer.rank) if grows else used
        layer.seen = shown(name, layer, used, count, state["score"] if grows else None), 1.0


@torch.no_grad()
def settle(layers: Layers, state: State, add: int) -> None:
    """Brings the layers in line with the numbers in use; a reserve's E rests at 1e-5, then at 0."""
    state["budget"] = sum(state["used"].values())
    resting = 1e-5 if state["budget"] < state["target"] else 0.0
    for name, layer in layers.items():
        used = state["used"][name]
        layer.params["share"].fill_(used / layer.rank)
        for j in range(used, min(used + add, layer.rank)):
            layer.params[f"E{j}"].fill_(resting)
    show(layers, state, add)


def off_orthogonal(p: Tensors, angles: bool) -> list[Tensor]:
    """||P^T P - I||_F and ||Q Q^T - I||_F; without angles, |P_j^T P_j - 1| and |Q_j Q_j^T - 1|."""
    P, _, Q = triplets(p)
    off = triplet.off_orthogonal(P, Q)
    return [t.norm()[None] if angles else t.diagonal().abs() for t in off]


def in_use(layer: Adapted) -> int:
    """The triplets in use; 0 where all are as they were made."""
    if not triplets(layer.params)[1].any():  # type: ignore[arg-type]
        return 0
    return round(layer.params["share"].item() * layer.rank)
