"""Where a change dW points: against another one, and against the weight W0 that it adds to.

Of the same directions phi is 1 on the diagonal; random ones meet as often as chance has it:

>>> U = random_directions(400, 8, seed=0)
>>> bool(torch.allclose(similarity(U, U).diagonal(), torch.ones(8, dtype=torch.float64)))
True
>>> V = random_directions(400, 40, seed=1)
>>> found, expected = similarity(U, V)[-1, -1].item(), chance(400, 8, 40)
>>> abs(found - expected) < 0.03, expected
(True, 0.1)

A change along W0's first direction is all in its top subspace, and is not amplified:

>>> W0 = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]))
>>> from analysis.spectra import Factors
>>> dW = Factors(torch.eye(4)[:1], torch.eye(4)[:, :1], 4.0)
>>> found = alignment(torch.linalg.svd(W0), dW, 1)
>>> found["both_top"], found["left_bottom"], round(amplification(W0, dW)["factor"], 6)
(1.0, 0.0, 1.0)
"""

import torch
from torch import Tensor

from variants import Incompatible
from variants._api import wide

from .spectra import Change, Triplets, coordinates, frobenius, root, row_norms, triplets

SIDES = ("left", "right")


def directions(dW: Change, side: str = "right") -> Tensor:
    """The left [m, k] or right [n, k] singular vectors of dW, largest first; or of a factor A or B
    itself, as LoRA's Figure 3 has it."""
    if side not in SIDES:
        raise Incompatible(f"side={side}: no such side; choices: {', '.join(SIDES)}")
    U, _, Vh = triplets(dW)
    return U if side == "left" else Vh.mT


def random_directions(d: int, k: int, seed: int = 0) -> Tensor:
    """k orthonormal directions [d, k] of a Gaussian matrix: the control."""
    draws = torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(draws).Q


def similarity(U: Tensor, V: Tensor) -> Tensor:
    """phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j), of the first i columns of U [d, k] and the first j
    of V [d, l], as [k, l] in float64 (LoRA, Section 7.2, Eq. 4). 0: orthogonal; 1: one holds the
    other."""
    squares = (U.mT.double() @ V.double()).square()
    sums = squares.cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, device=sums.device) for n in sums.shape)
    return sums / torch.minimum(i[:, None], j[None, :])


def chance(d: int, i: int, j: int) -> float:
    """What phi(i, j) of independent random subspaces of d dimensions is on average: the squared
    cosines of i and j directions have the sum i j / d."""
    return max(i, j) / d


def amplification(
    W0: Tensor, dW: Change, r: int | None = None, seed: int = 0
) -> dict[str, float | None]:
    """How much more there is of dW than W0 had in its directions (LoRA, Section 7.3, Table 7).

    Args:
        W0: [m, n].
        r: the first r directions of dW; None: all.

    Returns:
        `change` ||dW||_F; `inside` ||U^T W0 V||_F with U, V the top r singular vectors of dW;
        `factor`, the first over the second; `random`, ||U^T W0 V||_F of random directions; `base`
        ||W0||_F. A change that is zero has no directions (None).
    """
    U, S, Vh = triplets(dW)
    r = len(S) if r is None else min(r, len(S))
    W0 = W0.detach().to(wide(W0.dtype))
    change = torch.linalg.vector_norm(S.double()).item()
    inside = random = None
    if change and r:
        drawn, V = (random_directions(d, r, seed + i).to(W0) for i, d in enumerate(W0.shape))
        both = torch.cat((U[:, :r].to(W0), drawn), dim=1).mT @ W0  # W0 is read once for the two
        inside, random = (
            torch.linalg.vector_norm(part @ right, dtype=torch.float64).item()
            for part, right in zip(both.split(r), (Vh[:r].mT.to(W0), V), strict=True)
        )
    return {
        "change": change,
        "inside": inside,
        "factor": change / inside if inside else None,
        "random": random,
        "base": torch.linalg.vector_norm(row_norms(W0)).item(),
    }


def energies(base: Triplets, dW: Change, side: str = "left") -> Tensor:
    """The share of ||dW||_F^2 along each singular vector of W0, largest first [min(m, n)].

    left: ||u_i^T dW||^2, right: ||dW v_i||^2. `base` are W0's triplets, which the caller has once
    for any number of changes.
    """
    if side not in SIDES:
        raise Incompatible(f"side={side}: no such side; choices: {', '.join(SIDES)}")
    own = base[0] if side == "left" else base[2].mT
    if isinstance(dW, Tensor):
        moved = own.mT @ (dW if side == "left" else dW.mT).detach().to(own)
    else:
        U, S, Vh = triplets(dW)
        moved = own.mT @ ((U if side == "left" else Vh.mT) * S).to(own)
    squares, total = moved.double().square().sum(1), frobenius(dW) ** 2
    return squares / total if total else squares


def alignment(base: Triplets, dW: Change, k: int) -> dict[str, float | None]:
    """The share of ||dW||_F^2 in the top k and the bottom k singular subspaces of W0 (the question
    of MiLoRA, arXiv:2406.09044).

    left: ||U_k^T dW||_F^2, right: ||dW V_k||_F^2, both: ||U_k^T dW V_k||_F^2, each over
    ||dW||_F^2; `chance`: what a random change has there, on the left and in both. `base` are W0's
    triplets. A change that is zero has no shares (None).

    Raises:
        Incompatible: k above the rank that W0 can have.
    """
    U0, S0, Vh0 = base
    if not 1 <= k <= len(S0):
        raise Incompatible(f"k={k}: W0 has {len(S0)} singular vectors")
    m, n = dW.shape
    if not isinstance(dW, Tensor):
        dW = coordinates(dW)  # between whose factors nothing cancels in fp32
        A, B, R = dW.A.to(U0), dW.B.to(U0), root(dW.B.mT)  # ||dW X|| = ||B A X|| = ||R A X||
    total = frobenius(dW if isinstance(dW, Tensor) else R) ** 2
    found: dict[str, float | None] = {"chance": k / m, "chance_both": k * k / (m * n)}
    for name, cut in (("top", slice(0, k)), ("bottom", slice(len(S0) - k, len(S0)))):
        Uk, Vk = U0[:, cut], Vh0[cut].mT
        if isinstance(dW, Tensor):
            own = dW.detach().to(Uk)
            left, right = Uk.mT @ own, own @ Vk
            both = left @ Vk
        else:
            inner = A @ Vk
            left, right = Uk.mT @ B, R @ inner.double()
            both = left @ inner
        for side, t in (("left", left), ("right", right), ("both", both)):
            found[f"{side}_{name}"] = t.double().square().sum().item() / total if total else None
    return found
