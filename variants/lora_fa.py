"""LoRA-FA: Efficient and Effective Low Rank Representation Fine-tuning (Zhang et al., 2023; v1:
Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning), arXiv:2308.03303.

    W = W0 + s B A,    A frozen as drawn,    B = 0 at the start and alone trained

Backward needs x A^T [tokens, r] and not x [tokens, n], so activations shrink by the width over the
rank: the product here keeps just that. Since its second version (2026) the paper corrects the
gradient in closed form, and names PEFT as its official code: B learns along

    g_B (A A^T)^-1 / s^2

which makes s g_B A the nearest matrix to the full gradient that B alone can reach. `projected` does
so, as the preset asks; without it (`update=lora_fa`) this is the first version. PEFT's
`LoraFAOptimizer` takes the product in bf16, and eps before the bias correction where torch's AdamW
has it after; both add 1e-8 I to A A^T.

That nearest matrix is the full gradient's part in A's row space, whatever s and the size of A:

>>> import torch
>>> A, G = torch.randn(2, 8).double(), torch.randn(6, 8).double()
>>> g = projected(A, 3.0 * G @ A.mT, s=3.0)
>>> torch.allclose(3.0 * g @ A, G @ torch.linalg.pinv(A) @ A, atol=1e-6)
True

The optimizer's moments are those of that, with the layer's own s:

>>> import variants
>>> def stepped(alpha):
...     model = torch.nn.Sequential(torch.nn.Linear(8, 6)).double()
...     adapter = variants.attach(model, "lora_fa", rank=2, alpha=alpha, targets=["0"],
...                               update={"name": "lora_fa", "projected": True})
...     optimizer, B = adapter.optimizer(lr=0.1), adapter.layers["0"].params["B"]
...     (model(torch.ones(1, 8).double()) * torch.arange(6.0)).sum().backward()
...     wanted = projected(adapter.layers["0"].params["A"], B.grad, adapter.layers["0"].s)
...     optimizer.step()
...     return torch.allclose(optimizer.state[B]["exp_avg"], 0.1 * wanted)
>>> stepped(2), stepped(8)
(True, True)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._api import Update, trained
from ._factors import Factored, batched, damped_inverse, need_factors, pairs
from ._layer import Adapted
from ._registry import preset

if TYPE_CHECKING:
    from ._adapter import Choice

DAMPING = 1e-8


def projected(A: Tensor, gB: Tensor, s: float | Tensor) -> Tensor:
    """g_B (A A^T)^-1 / s^2 for A [..., r, n] and g_B [..., m, r]."""
    return gB @ damped_inverse(A @ A.mT, DAMPING) / s**2


class Projected(Factored):
    """AdamW on the projected gradient of B."""

    def __init__(
        self, layers: Mapping[str, Adapted], others: Sequence[Tensor], lr: float, **settings: Any
    ) -> None:
        self.pairs = pairs(layers)
        super().__init__(layers, others, [pair.B for pair in self.pairs], lr, **settings)

    def move(self, group: dict[str, Any]) -> None:
        known = [pair for pair in self.pairs if pair.B.grad is not None]
        rows = batched(
            lambda A, gB, s: (projected(A, gB, s),),
            [pair.A for pair in known],
            [pair.B.grad for pair in known],  # type: ignore[misc]
            [pair.s for pair in known],
        )
        self.adamw(group, [pair.B for pair in known], [row[0] for row in rows])


@dataclass(frozen=True)
class LoRAFA(Update, name="lora_fa"):
    """AdamW on B (and what else the form trains), A left as it is."""

    projected: bool = False
    """multiply B's gradient by (A A^T)^-1 / s^2, as the paper's second version and PEFT do"""

    frozen = ("A",)

    def fits(self, choice: "Choice") -> None:
        if self.projected:
            need_factors(self, choice)
        elif not (choice.form.low_rank and "A" in choice.form.shapes(8, 8, 2)):
            raise self.refuse(choice.form, "a low-rank form with a tensor A to leave untrained")

    def optimizer(
        self, layers: Mapping[str, Adapted], others: Sequence[Tensor], lr: float, **settings: Any
    ) -> torch.optim.Optimizer:
        if self.projected:
            return Projected(layers, others, lr, **settings)
        settings.setdefault("fused", not settings.get("foreach"))
        return torch.optim.AdamW([*trained(layers), *others], lr=lr, **settings)


preset(
    "lora_fa",
    update={"name": "lora_fa", "projected": True},
    parameters="r*m",
    rank=16,
    alpha="2r",
    lr=2e-4,
    lr_origin="LoRA's; the first version searches the rate anew for each task",
)
