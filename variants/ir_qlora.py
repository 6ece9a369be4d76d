"""IR-QLoRA: Accurate LoRA-Finetuning Quantization of LLMs via Information Retention (Qin et al.,
ICML 2024), arXiv:2402.05445.

    W = Q + s (B + beta2 E2) (A + beta1 E1),    Q = nf4(W0 - tau) + tau,    beta1 = beta2 = 0

Information calibration (ICQ, the base): before a block is put into NF4's codes, tau is taken from
its numbers and kept: of 2n + 1 values, at even steps of up to lambda sigma around the median, the
first whose codes have the largest entropy. Information elastic connection (IEC, the form): E1
[r, n] means the inputs by r runs of neighbours, E2 [m, r] repeats each hidden number for a run of
outputs; beside them two numbers train. Both are linear, so they fold into A and B, which is exact.

Official code: htqin/IR-QLoRA, utils.py. There and here sigma is the block's largest distance from
the median over NF4's largest quantile, scales are double quantized and tau is stored in 8 bits of
the dynamic type, 256 blocks a scale, after the codes were made by the unrounded one. There r must
divide both sides; runs differ by one here where it does not (the paper takes greatest common
divisors). There dropout leaves the means alone; here it is on all that the change sees. Its second
quantizer, for GPTQ's integers, shifts nothing but widens the range; it is not here.

The forward of the official code, run by run; and no tau of the search has codes of more entropy:

>>> import torch
>>> from ._quantize import nearest
>>> g = torch.Generator().manual_seed(0)
>>> p = {"A": torch.randn(4, 24, generator=g), "B": torch.randn(20, 4, generator=g)}
>>> p |= {"beta1": torch.tensor([0.5]), "beta2": torch.tensor([-2.0])}
>>> x = torch.randn(3, 24, generator=g)
>>> h = x @ p["A"].T + 0.5 * x.view(3, 4, 6).mean(-1)
>>> y = ((h @ p["B"].T).view(3, 4, 5) - 2.0 * h[..., None]).flatten(1)
>>> torch.allclose(x @ IEC().weight(torch.zeros(20, 24), p, 0.7).T, 0.7 * y, atol=1e-5)
True
>>> def entropy(stored):
...     codes = torch.nn.functional.one_hot(stored.codes.view(-1, 64).long(), 16)
...     return torch.special.entr(codes.double().mean(1)).sum(1)
>>> W = 0.02 * torch.randn(8, 128, generator=g) + 0.005
>>> ours, middle = ICQ().store(W), W.view(-1, 64).median(1, keepdim=True).values
>>> reach = 0.1 * SIGMA * (W.view(-1, 64) - middle).abs().amax(1, keepdim=True)
>>> every = [nearest((W.view(-1, 64) - middle - f * reach).view_as(W), NF4_VALUES, 64)
...          for f in torch.linspace(-1, 1, 201)]
>>> torch.allclose(entropy(ours), torch.stack([entropy(stored) for stored in every]).amax(0))
True
>>> bool(entropy(ours).mean() > entropy(nearest(W, NF4_VALUES, 64)).mean() + 0.03)
True

A tau is put back, so that numbers far from zero lose little; it costs what a scale in 8 bits costs:

>>> far = W + 1.0
>>> plain, shifted = ((base.dense() - far).norm() for base in (nearest(far, NF4_VALUES, 64),
...                                                            ICQ().store(far)))
>>> bool(shifted < plain / 10)
True
>>> big = torch.randn(512, 512, generator=g)
>>> round(ICQ(n=1).store(big).bits / big.numel(), 6)  # 4 + 2 (8 / 64 + 32 / (64 256))
4.253906
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ._api import Base, LowRank, Stored, Tensors
from ._quantize import AT_ONCE, NESTED, Blocks, decode, dynamic_map, encode
from ._registry import Incompatible, preset
from .nf4 import NF4_VALUES

SIGMA = 1 / torch.special.ndtri(torch.tensor(0.9677083, dtype=torch.float64)).item()


@dataclass(frozen=True)
class ICQ(Base, name="icq"):
    """4-bit NormalFloat, each block shifted to where its codes have the most entropy."""

    block: int = 64
    """numbers that share a scale and a shift"""
    reach: float = 0.1
    """lambda, the farthest shift from the median in units of sigma"""
    n: int = 100
    """shifts that are tried on each side of the median"""

    lossy = True

    def __post_init__(self) -> None:
        if self.block < 2 or self.n < 1 or self.reach <= 0:
            raise Incompatible(
                f"base icq: block={self.block} from 2, n={self.n} from 1, reach={self.reach} above "
                f"0"
            )

    def store(self, W: Tensor) -> Stored:
        flat = W.detach().reshape(-1).float()
        if not torch.isfinite(flat).all():
            raise Incompatible("a weight with numbers that are not finite cannot be quantized")
        rest = -flat.numel() % self.block  # a short block ends in its last number, which adds none
        blocks = F.pad(flat[None], (0, rest), mode="replicate").view(-1, self.block)
        at_once = max(1, AT_ONCE // ((2 * self.n + 1) * len(NF4_VALUES)))
        tau = torch.cat([self.shift(part) for part in blocks.split(at_once)])
        shifted = (blocks - tau[:, None]).view(-1)[: flat.numel()]
        return Shifted(W, shifted, tau, self.block)

    def shift(self, blocks: Tensor) -> Tensor:
        """tau [blocks] of numbers [blocks, block]."""
        ordered, middle = blocks.sort(1).values, blocks.median(1, keepdim=True).values
        steps = torch.linspace(-self.reach * SIGMA, self.reach * SIGMA, 2 * self.n + 1)
        tau = middle + (blocks - middle).abs().amax(1, keepdim=True) * steps.to(blocks)
        absmax = torch.maximum(ordered[:, -1:] - tau, tau - ordered[:, :1])
        table = torch.tensor(NF4_VALUES, device=blocks.device)
        bounds = tau[..., None] + absmax[..., None] * (table[1:] + table[:-1]) / 2
        below = torch.searchsorted(ordered, bounds.flatten(1), right=True, out_int32=True)
        below = F.pad(below.view(bounds.shape), (1, 0))
        counts = below.diff(append=torch.full_like(below[..., :1], self.block))
        best = torch.special.entr(counts / self.block).sum(-1).argmax(1, keepdim=True)
        return tau.gather(1, best)[:, 0]


class Shifted(Blocks):
    """Blocks whose shifts are 8-bit codes of the dynamic type, as double quantized scales are."""

    tau: Tensor
    tau_absmax: Tensor

    def __init__(self, like: Tensor, shifted: Tensor, tau: Tensor, block: int) -> None:
        codes, scales = encode(shifted, NF4_VALUES, block)
        super().__init__(like, codes, scales, NF4_VALUES, block, double=True)
        codes, absmax = encode(tau, dynamic_map(), NESTED)
        self.register_buffer("tau", codes)
        self.register_buffer("tau_absmax", absmax.view(torch.int32))

    @property
    def shift(self) -> Tensor:
        return decode(self.tau, self.tau_absmax.view(torch.float32), dynamic_map(), NESTED)


@dataclass(frozen=True)
class IEC(LowRank, name="iec"):
    """LoRA beside means of the inputs, and repeats of what is hidden, each with one factor."""

    parameters = "r*(m + n) + 2"

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"A": (r, n), "B": (m, r), "beta1": (1,), "beta2": (1,)}

    def embed(self, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensors:
        return {"A": A, "B": B, "beta1": A.new_zeros(1), "beta2": A.new_zeros(1)}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        A, B = self.factors(p)
        return W0 + s * B @ A

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        A, B = p["A"], p["B"]
        E1, E2 = runs(len(A), A.shape[1], A), runs(len(A), len(B), B).mT
        return A + p["beta1"] * E1 / E1.sum(1, keepdim=True), B + p["beta2"] * E2


def runs(r: int, n: int, like: Tensor) -> Tensor:
    """[r, n] of 0 and 1: each row has a run of columns, one after another."""
    columns = torch.arange(n, device=like.device) * r // n
    return (columns == torch.arange(r, device=like.device)[:, None]).to(like.dtype)


preset(
    "ir_qlora",
    form="iec",
    base="icq",
    rank=64,
    alpha=16,
    lr=2e-4,
    lr_origin="the official irlora.py and scripts/finetune.sh, LLaMA-7B, batch 16",
)
