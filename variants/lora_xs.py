"""LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters (Balazy et al., 2024),
arXiv:2405.17604.

    W = W0 + s B R A,    A = S_r V_r^T and B = U_r of W0, frozen,    R [r, r] ~ N(0, 1e-5^2)

Only R is trained: r^2 numbers, whatever the size of W0, which stays whole. Official code:
MohammadrezaBanaei/LoRA-XS, utils/initialization_utils.py and utils/svd_utils.py: the decomposition
is of W0^T, so the singular values stand on the side of A; alpha = r, so s = 1, in the runs of
mathematics (elsewhere alpha = 16). R is not zero at the start, so the model is off the base by 1e-5
of W0. The official decomposition is randomized (sklearn, 10 iterations); here it is exact to fp32.
A and B are saved with the adapter. PEFT has no such form.

With R = I the change is s times the best rank-r part of W0, and the values sit in A alone:

>>> import torch
>>> W0 = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
>>> p = LoRAXS().start(W0, 2, 1.0, torch.Generator().manual_seed(0))
>>> change = LoRAXS().weight(W0, p | {"R": torch.eye(2)}, 0.5) - W0
>>> [round(v, 3) for v in change.diag().tolist()]
[1.5, 1.0, 0.0]
>>> [round(v, 3) for v in (*p["A"].norm(dim=1).tolist(), *p["B"].norm(dim=0).tolist())]
[3.0, 2.0, 1.0, 1.0]
>>> 1e-6 < p["R"].std().item() < 1e-4
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors
from ._registry import Incompatible, preset
from ._svd import top


@dataclass(frozen=True)
class LoRAXS(Form, name="lora_xs"):
    """W0 + s B R A with A and B frozen."""

    deviation: float = 1e-5
    """of R at the start"""

    parameters = "r*r"
    constants = ("A", "B")
    starts_at_base = False

    def __post_init__(self) -> None:
        if not self.deviation >= 0:
            raise Incompatible(f"form lora_xs: deviation={self.deviation} is negative")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"R": (r, r)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        U, S, Vh = top(W0, r, "krylov", generator)
        R = self.deviation * torch.randn(r, r, generator=generator)
        return {"A": S[:, None] * Vh, "B": U, "R": R.to(W0)}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + s * p["B"] @ p["R"] @ p["A"]

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        return p["A"], p["B"] @ p["R"]  # in this order: with A frozen, backward keeps A x, not x


preset(
    "lora_xs",
    form="lora_xs",
    rank=32,
    alpha="r",
    lr=4e-3,
    lr_origin="the official scripts/run_math_tuning.sh, Mistral-7B at rank 64",
)
