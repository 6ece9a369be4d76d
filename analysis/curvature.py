"""The top eigenvalue of a loss's Hessian, by Lanczos, and the learning-rate ratio it predicts.

Learning Rate Matters (Lee et al., arXiv:2602.04998) finds that the best learning rates of variants
differ as the inverses of the largest eigenvalues of their Hessians at the start.

Of a quadratic the eigenvalues are known, and the sign of the largest counts:

>>> H, x = torch.diag(torch.tensor([1.0, 3.0, -7.0])), torch.zeros(3, requires_grad=True)
>>> found = top_eigenvalue(lambda: 0.5 * x @ H @ x, [x])
>>> round(found.value, 4), round(found.least, 4), found.steps
(3.0, -7.0, 3)
>>> learning_rate_ratio(reference=2.0, value=20.0)
0.1
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Top:
    """What Lanczos found."""

    value: float  # the largest eigenvalue
    least: float  # the smallest
    error: float  # bound on the error of `value`: ||H v - value v||
    steps: int  # products with H


def top_eigenvalue(
    loss: Callable[[], Tensor],
    tensors: Sequence[Tensor],
    steps: int = 40,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> Top:
    """The largest eigenvalue of the Hessian of `loss()` over all `tensors` together.

    The graph is built once; each step is a product with the Hessian by a second backward pass.
    Attention runs by its plain formula, since the fused kernels have no second derivative.

    Args:
        tensors: fp32 or wider, as adapters are kept; with gradients.
        steps: at most.
        tolerance: of `error`, relative to the largest eigenvalue; then it stops. The eigenvalue
            itself is off by about the square of that.
    """
    tensors = list(tensors)
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        first = torch.autograd.grad(loss(), tensors, create_graph=True, allow_unused=True)
    flat = _flat([torch.zeros_like(t) if g is None else g for t, g in zip(tensors, first)])

    def product(v: Tensor) -> Tensor:
        if not flat.requires_grad:  # linear in every tensor
            return torch.zeros_like(v)
        found = torch.autograd.grad(flat, tensors, v, retain_graph=True, allow_unused=True)
        return _flat([torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found)])

    return lanczos(product, flat.detach(), steps, tolerance, seed)


def lanczos(
    product: Callable[[Tensor], Tensor], like: Tensor, steps: int, tolerance: float, seed: int
) -> Top:
    """Lanczos' iteration on vectors like `like` [d], each new one held orthogonal to all before.

    The small matrix is in float64; the vectors are as `like`.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(like.numel(), generator=generator, dtype=torch.float64).to(like)
    basis = [v / torch.linalg.vector_norm(v)]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        w = product(basis[-1])
        diagonal.append((w @ basis[-1]).item())
        known = torch.stack(basis)
        for _ in range(2):  # once more takes away what rounding left
            w = w - known.mT @ (known @ w)
        beside.append(torch.linalg.vector_norm(w).item())
        found = _ritz(diagonal, beside, len(diagonal))
        size = max(abs(found.value), abs(found.least))
        if (
            len(basis) in (steps, like.numel())
            or found.error <= tolerance * abs(found.value)
            or (beside[-1] <= 1e-6 * size)
        ):
            return found
        basis.append(w / beside[-1])


def _ritz(diagonal: Sequence[float], beside: Sequence[float], steps: int) -> Top:
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i, b in enumerate(beside[:-1]):
        T[i, i + 1] = T[i + 1, i] = b
    values, vectors = torch.linalg.eigh(T)
    error = beside[-1] * abs(vectors[-1, -1].item())
    return Top(values[-1].item(), values[0].item(), error, steps)


def learning_rate_ratio(reference: float, value: float) -> float:
    """How much lower (below 1) or higher the best learning rate is than the reference's, by the
    inverse of the top eigenvalues."""
    return reference / value


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
