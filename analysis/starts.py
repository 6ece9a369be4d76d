"""Where a variant starts: its loss, its gradients, and how near its first step is to full tuning's.

PiSSA (arXiv:2404.02948) is said to start with larger gradients, LoRA-GA (arXiv:2407.05000) and
LoRA-Pro (arXiv:2407.18242) to move W as full fine-tuning would. Nothing is trained: the one step is
taken on a model that is thrown away.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from variants._adapter import Adapter


def cosine(X: Tensor, Y: Tensor) -> float:
    """<X, Y> / (||X||_F ||Y||_F); 0 where either is zero.

    >>> cosine(torch.eye(2), 3 * torch.eye(2)), cosine(torch.eye(2), torch.zeros(2, 2))
    (1.0, 0.0)
    """
    X, Y = X.double(), Y.double()
    size = torch.linalg.vector_norm(X) * torch.linalg.vector_norm(Y)
    return ((X * Y).sum() / size).item() if size > 0 else 0.0


def first_order(layer: Any) -> Tensor:
    """How W [m, n] moves, to first order, when each trained tensor moves along minus its gradient:
    s (B dA + dB A) with dA = -g_A, dB = -g_B of LoRA (LoRA-Pro's equivalent gradient, Eq. 6)."""
    own = {k: t.detach() for k, t in layer.params.items()}
    along = {
        k: torch.zeros_like(t) if t.grad is None or k in layer.untrained else -t.grad
        for k, t in layer.params.items()
    }
    moving = {k: t for k, t in own.items() if t.is_floating_point()}

    def weight(p: Mapping[str, Tensor]) -> Tensor:
        return layer.form.weight(layer.W0, {**own, **p}, layer.full_s)

    return jvp(weight, (moving,), ({k: along[k] for k in moving},))[1]


def start(
    adapter: Adapter,
    loss: Callable[[], Tensor],
    gradients: Mapping[str, Tensor],
    lr: float,
    steps: int | None = None,
) -> dict[str, Any]:
    """Diagnostics of an adapter that has not learned yet, whose weights are moved by one step.

    Args:
        loss: of one batch, by the model that the adapter sits in.
        gradients: dL/dW [m, n] of the untouched model on that batch, by layer.
        lr, steps: of the optimizer whose first step is taken.

    Returns:
        `loss` at the start and `base` with the adapter disabled; `layers`: by name the norm of each
        tensor's gradient (`norms`), the full gradient's (`full`), and the cosines of minus the full
        gradient with the first step of dW, to first order along the tensors' gradients (`gradient`)
        and as the variant's own optimizer takes it, penalty included (`optimizer`).
    """
    adapter.model.eval()
    with torch.no_grad(), adapter.disabled():
        base = loss().item()
    optimizer = adapter.optimizer(lr, steps=steps)
    value = loss()
    value.backward()
    found: dict[str, dict[str, Any]] = {}
    before = {}
    for name, layer in adapter.layers.items():
        G = gradients[name].to(layer.W0.device)
        norms = {k: 0.0 if t.grad is None else t.grad.norm().item()
                 for k, t in layer.params.items() if k not in layer.untrained}  # fmt: skip
        found[name] = {"norms": norms, "full": G.norm().item(),
                       "gradient": cosine(first_order(layer), -G)}  # fmt: skip
        before[name] = layer.weight.detach().clone()
    penalty = adapter.penalty()
    if penalty is not None:
        penalty.backward()
    optimizer.step()
    for name, layer in adapter.layers.items():
        moved = layer.weight.detach() - before[name]
        found[name]["optimizer"] = cosine(moved, -gradients[name].to(moved.device))
    return {"loss": value.item(), "base": base, "layers": found}
