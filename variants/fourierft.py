"""FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform
(Gao et al., ICML 2024), arXiv:2405.03003.

    W = W0 + s Re(IFFT2(F)),    F[E_i] = c_i, zero elsewhere,    s = 300

n coefficients c are trained in each layer; their places E are drawn once from `entries`, which is
no run's seed, and are the same for all layers of a shape. Here the rank is n: rank=8 trains 8
numbers a layer, the paper's count. The scale axis gives the paper's alpha, which has no n in it:
alpha = 300 n, so that s = alpha / n = 300 at any rank. Official code: Chaos96/fourierft,
peft/src/peft/tuners/fourier/layer.py: c ~ N(0, 1), so the start is not the base, and a square
matrix of places, which its llama-2-7b.sh draws anew for each layer (no `--share_entry`); its
forward adds the transpose of what its merge adds. PEFT has the same start (zero only where
`init_weights` asks for it: `zero`), s = 150 and other places (seed 777: `entries`).

One coefficient is one plane wave over rows and columns, divided by m n:

>>> import torch
>>> p = {"c": torch.tensor([5.0]), "places": torch.tensor([[2], [1]])}
>>> W = FourierFT().weight(torch.zeros(4, 6), p, 12.0)
>>> i, j = torch.arange(4.0)[:, None], torch.arange(6.0)
>>> wave = torch.cos(2 * torch.pi * (2 * i / 4 + 1 * j / 6))
>>> torch.allclose(W, 12 * 5 / 24 * wave, atol=1e-5)
True
>>> places = FourierFT().start_shared(4, 6, 24, torch.Generator(), torch.empty(0))["places"]
>>> len({tuple(e) for e in places.T.tolist()}), places.amax(1).tolist()  # each place once
(24, [3, 5])
>>> own = torch.randperm(24, generator=torch.Generator().manual_seed(2024))
>>> torch.equal(places[0] * 6 + places[1], own)
True
>>> c = FourierFT().start(torch.zeros(40, 60), 2000, 1.0, torch.Generator())["c"]
>>> abs(c.std().item() - 1) < 0.05, abs(c.mean().item()) < 0.1
(True, True)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors
from ._registry import Incompatible, preset


@dataclass(frozen=True)
class FourierFT(Form, name="fourierft"):
    """A few coefficients of the change's spectrum."""

    zero: bool = False
    """start at zero (PEFT's `init_weights=True`) and not at N(0, 1)"""
    entries: int = 2024
    """seed of the places; the authors' is 2024, PEFT's 777"""

    rank_means = "n, the number of spectral coefficients of every adapted matrix"
    parameters = "r"
    constants = ("places",)
    shared = ("places",)
    redrawn = ("places",)
    starts_at_base = False
    rank_is_bounded = False

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"c": (r,)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        c = torch.randn(r, generator=generator).to(W0)
        return {"c": torch.zeros_like(c) if self.zero else c}

    def start_shared(
        self, m: int, n: int, r: int, generator: torch.Generator, like: Tensor
    ) -> Tensors:
        own = torch.Generator().manual_seed(self.entries)
        places = torch.randperm(m * n, generator=own)[:r]
        return {"places": torch.stack([places // n, places % n]).to(like.device)}

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        if r > m * n:
            raise Incompatible(
                f"rank={r}: {where} is {m} x {n}, so it has {m * n} spectral coefficients; "
                f"choose a smaller rank or leave the layer out of targets"
            )
        return r

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        rows, columns = p["places"]
        F = p["c"].new_zeros(W0.shape).index_put((rows, columns), p["c"])
        return W0 + s * torch.fft.ifft2(F).real


preset(
    "fourierft",
    form="fourierft",
    rank=1000,
    alpha="300r",
    lr=5e-2,
    lr_origin="the official experiments/Instruction_Tuning/llama-2-7b.sh, n = 1000, scale 300",
    width_exponent=0.0,  # its own effect already grows as 1 / (m n) where layers are narrow
)
