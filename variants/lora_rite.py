"""LoRA-RITE: LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization
(Yen et al., ICLR 2025), arXiv:2410.20625.

    a = A^T = U_a R_a,    b = B = U_b R_b,    u = g_a R_b^-1,    P = U_b^T U_b(before)
    V = b2 P V P^T + (1 - b2) u^T u / n,    M = b1 M P^T + (1 - b1) u (V + rho I)^(-1/2)
    a <- a - lr M R_b^-T,    and likewise b with the other factor's U_a, R_a

The gradient is taken without the other factor's magnitude, in its orthonormal basis; the moments
follow that basis; so the step of B A does not depend on how A and B share it. rho gathers what V
loses when the basis turns (the paper's escaped mass). Official code: gkevinyen5418/LoRA-RITE,
lora_rite.py, the authors' port to torch. From it: QR in place of the polar decomposition, the decay
rates that contain Adam's bias correction, u^T u over its rows, and the global norm of all u cut to
`clip`. It leaves rho out unless `apply_escape` is given; here it is in, as in the paper. It leaves
out a u whose root mean square exceeds 1, which the paper does not: V then falls towards zero, and
the first u that is let in again makes too long a step (a setting here, `skip`). Its eigenvalues
below zero turn a whole update into zeros (a NaN replaced); here they count as zero. PEFT has no
such optimizer.

At first V is the gradient's own, so that u V^(-1/2) has orthogonal columns of its rows' length:

>>> import torch
>>> u, V, U = torch.randn(1, 9, 2).double(), torch.zeros(1, 2, 2).double(), torch.eye(4, 2)[None]
>>> zero, U = V[:, :1, :1], U.double()
>>> V, M, rho = moved(u, V, 0 * u, zero, U, U, zero, zero, zero, escape=True)
>>> torch.allclose(M[0].T @ M[0], 9 * torch.eye(2).double()), [decay(0.9, t) for t in (1, 2)]
(True, [0.0, 0.4736842105263158])

Another basis of the same product moves it alike, momentum included:

>>> import variants
>>> def end(R):
...     model = torch.nn.Sequential(torch.nn.Linear(5, 4, bias=False)).double()
...     torch.nn.init.ones_(model[0].weight)
...     adapter = variants.attach(model, "lora_rite", rank=2, targets=["0"])
...     p, g = adapter.layers["0"].params, torch.Generator().manual_seed(0)
...     A, B, x = (torch.randn(*n, generator=g).double() for n in ((2, 5), (4, 2), (6, 5)))
...     p["A"].data, p["B"].data = R.inverse() @ A, B @ R
...     optimizer = adapter.optimizer(lr=0.1)
...     for _ in range(5):
...         optimizer.zero_grad()
...         model(x).square().mean().backward()
...         optimizer.step()
...     return (p["B"] @ p["A"]).detach()
>>> R = torch.tensor([[3.0, 1.0], [0.0, -0.2]]).double()
>>> torch.allclose(end(R), end(torch.eye(2).double()), atol=1e-6)
True

What escaped fades by b2; a small gradient is not drawn out to `clip`:

>>> one = torch.ones(1, 1, 1).double()
>>> moved(u, 0 * V, M, one, U, U, zero, 0.9 * one, zero, escape=True)[2].item()
0.9
>>> model = torch.nn.Sequential(torch.nn.Linear(5, 4)).double()
>>> adapter = variants.attach(model, "lora_rite", rank=2, targets=["0"])
>>> optimizer, B = adapter.optimizer(lr=0.1), adapter.layers["0"].params["B"]
>>> _ = (1e-6 * model(torch.ones(3, 5).double()).sum()).backward(), optimizer.step()
>>> bool(optimizer.state[B]["V"].abs().max() < 1e-9)
True
>>> V = torch.diag(torch.tensor([2.0, 1.0])).double()[None]  # of which the new basis has nothing
>>> moved(0 * u, V, M, zero, U, U.flip(1), zero, one, zero, escape=True)[2].item()
2.0
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._api import Update
from ._factors import Pair, Paired, batched, need_factors
from ._layer import Adapted
from ._registry import preset

if TYPE_CHECKING:
    from ._adapter import Choice


def basis(t: Tensor) -> tuple[Tensor, Tensor]:
    """(U, R^+) of t [..., k, r] = U R."""
    U, R = torch.linalg.qr(t)
    return U, torch.linalg.pinv(R)


def moved(
    u: Tensor, V: Tensor, M: Tensor, rho: Tensor, before: Tensor, U: Tensor,
    b1: Tensor, b2: Tensor, eps: Tensor, escape: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(V, M, rho) after a step, from those before it and the unmagnified gradient u [L, k, r]."""
    P = U.mT @ before
    carried = symmetric(P @ V @ P.mT)
    if escape:
        lost = (torch.linalg.eigvalsh(V) - torch.linalg.eigvalsh(carried)).amax(-1)
        trace = (V - carried).diagonal(dim1=-2, dim2=-1).sum(-1)
        rho = b2 * (rho + torch.minimum(lost, trace).clamp_min(0)[:, None, None])
    V = symmetric(b2 * carried + (1 - b2) * u.mT @ u / u.shape[-2])
    values, vectors = torch.linalg.eigh(V)
    root = ((values.clamp_min(0)[:, None] + rho).sqrt() + eps).reciprocal()
    u = u @ symmetric((vectors * root) @ vectors.mT)
    return V, b1 * M @ P.mT + (1 - b1) * u, rho


def symmetric(t: Tensor) -> Tensor:
    return (t + t.mT) / 2


class RITE(Paired):
    """The paper's Algorithm 1; each factor's state is that of its own moments."""

    clip, skip, escape, eps = 1.0, 0.0, True, 1e-6

    def move(self, group: dict[str, Any]) -> None:
        known = self.learning()
        if not known:
            return
        sides = [side for pair in known for side in (self._side(pair, "A"), self._side(pair, "B"))]
        bases = batched(basis, [side["partner"] for side in sides])
        for side, (U, inverse) in zip(sides, bases, strict=True):
            u = side["grad"] @ inverse
            if self.skip > 0:
                u = u * (u.square().mean().sqrt() <= self.skip)
            side |= {"u": u, "U": U, "inverse": inverse}
        norm = torch.stack([side["u"].square().sum().to(sides[0]["u"].device) for side in sides])
        norm = norm.sum().sqrt()
        cut = (self.clip / norm.clamp_min(self.clip)) if self.clip > 0 else torch.ones_like(norm)
        beta1, beta2 = group["betas"]
        states = [side["state"] for side in sides]
        for state in states:
            state["step"] += 1
        found = batched(
            lambda *row: moved(*row, escape=self.escape),
            [side["u"] * cut.to(side["u"].device) for side in sides],
            *([state[k] for state in states] for k in ("V", "M", "rho", "U")),
            [side["U"] for side in sides],
            *([decay(beta, state["step"]) for state in states] for beta in (beta1, beta2)),
            [self.eps] * len(sides),
        )
        along = []
        for side, (V, M, rho) in zip(sides, found, strict=True):
            side["state"] |= {"V": V, "M": M, "rho": rho, "U": side["U"]}
            d = M @ side["inverse"].mT
            along.append(d.mT if side["name"] == "A" else d)
        self.descend(group, [side["tensor"] for side in sides], along)

    def _side(self, pair: Pair, name: str) -> dict[str, Any]:
        """One factor as a column [k, r], with its state and the other factor as a column."""
        a, b = (pair.A, pair.B) if name == "A" else (pair.B, pair.A)
        turn = (lambda t: t.mT) if name == "A" else (lambda t: t)
        partner = b if name == "A" else b.mT
        state, r = self.state[a], pair.A.shape[0]
        if not state:
            state |= {"step": 0, "V": a.new_zeros(r, r), "M": torch.zeros_like(turn(a)),
                      "rho": a.new_zeros(1, 1), "U": torch.zeros_like(partner)}  # fmt: skip
        return {"name": name, "tensor": a, "grad": turn(a.grad), "partner": partner, "state": state}


def decay(beta: float, step: int) -> float:
    """beta (1 - beta^(t-1)) / (1 - beta^t): with it a moment needs no bias correction."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


@dataclass(frozen=True)
class LoRARITE(Update, name="lora_rite"):
    """Adam in the factors' own bases: steps of B A that do not depend on how A and B share it."""

    clip: float = 1.0
    """largest norm of all unmagnified gradients together; 0: any"""
    skip: float = 0.0
    """an unmagnified gradient whose root mean square is larger counts as zero; 0: none does"""
    eps: float = 1e-6
    """added to the root of V + rho, unless the optimizer is given another"""
    escape: bool = True
    """add rho, what V lost as the bases turned (the paper); the official port's default is not"""

    def fits(self, choice: "Choice") -> None:
        need_factors(self, choice)

    def optimizer(
        self, layers: Mapping[str, Adapted], others: Sequence[Tensor], lr: float, **settings: Any
    ) -> torch.optim.Optimizer:
        optimizer = RITE(layers, others, lr, **settings)
        optimizer.eps = settings.get("eps", self.eps)
        optimizer.clip, optimizer.skip, optimizer.escape = self.clip, self.skip, self.escape
        return optimizer


preset(
    "lora_rite",
    update="lora_rite",
    rank=16,
    alpha="2r",
    lr=3e-4,
    lr_origin="the default of the official LLM-Adapters/finetune.py, for AdamW and this alike",
)
