"""C3A: Parameter-Efficient Fine-Tuning via Circular Convolution (Chen et al., ACL 2025),
arXiv:2407.19342.

    W = W0 + [C(w_ij)]_ij / n,    C(w)[a, c] = w[(c - a) mod b],    w ~ U(-u, u)

W0 is cut into b x b blocks, each changed by a circulant matrix: m n / b numbers, and any rank. By
the Fourier transform it costs (m + n) log b + m n / b. There is no rank to choose but a side of
blocks, which must divide both sides of W0: the largest such divisor that is not above `block_size`
is taken (PEFT refuses). Official code: PEFT, peft/tuners/c3a, named by the paper, whence the 1/n.
Its outputs are equal; its gradient by the input is not that of its matrix (0.21.2: the backward of
`BlockCircularConvolution` fails torch's `gradcheck`), so layers below learn otherwise there. The
paper starts w uniform (Xavier: u = sqrt(6 / (m + n))), so the model starts off the base, by about
1/n of the usual size of a weight; it finds zero no worse.

Rows of a block are shifts of the first one, to the right; and the fast path is a convolution:

>>> import torch
>>> form, w = C3A(block_size=3), torch.tensor([[[1.0, 2.0, 4.0]]])
>>> (form.weight(torch.zeros(3, 3), {"w": w}, 1.0) * 3).int().tolist()
[[1, 2, 4], [4, 1, 2], [2, 4, 1]]
>>> form.shapes(172, 64, 0), C3A().shapes(96, 256, 0), C3A().shapes(512, 1024, 0)
({'w': (86, 32, 2)}, {'w': (3, 8, 32)}, {'w': (2, 4, 256)})
>>> w = form.start(torch.zeros(30, 24), 0, 1.0, torch.Generator().manual_seed(0))["w"]
>>> 0.9 < w.abs().max().item() * 3 <= 1.0
True
>>> def change(n):  # of y, once every w has moved by 0.3
...     return (form.change(torch.zeros(6, n), {"w": torch.full((2, n // 3, 3), 0.3)}, 1.0)).sum(1)
>>> torch.allclose(change(12), change(48))
True
>>> w = C3A(kernel="kaiming").start(torch.zeros(30, 600), 0, 1.0, torch.Generator())["w"]
>>> round(w.abs().max().item() * 600**0.5, 1)
1.0
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors, wide
from ._layer import Adapted
from ._registry import Incompatible, preset


@dataclass(frozen=True)
class C3A(Form, name="c3a"):
    """W0 plus circulant blocks."""

    block_size: int = 256
    """the side of the blocks, or the next divisor of both sides of W0 below"""
    kernel: str = "xavier"
    """how the kernels start: `xavier`, `kaiming` (both uniform), `gaussian`, or `zero`"""

    rank_means = None
    parameters = (
        "m*n//(lambda d: d(d, math.gcd(m, n), min(256, m, n)))"
        "(lambda d, x, k: k if x % k == 0 else d(d, x, k - 1))"
    )
    parameters_in_words = "m*n/b, b the side of the blocks"
    scaled = False
    starts_at_base = False

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise Incompatible(f"form c3a: block_size={self.block_size}; a whole number from 1")
        if self.kernel not in ("xavier", "kaiming", "gaussian", "zero"):
            raise Incompatible(
                f"form c3a: kernel={self.kernel}; choices: xavier, kaiming, gaussian, zero"
            )
        most = C3A.parameters.replace("256", str(self.block_size))
        object.__setattr__(self, "parameters", most)

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        common = math.gcd(m, n)
        b = next(k for k in range(min(self.block_size, common), 0, -1) if common % k == 0)
        return {"w": (m // b, n // b, b)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        shape = self.shapes(m, n, r)["w"]
        if self.kernel == "zero":
            return {"w": W0.new_zeros(shape)}
        if self.kernel == "gaussian":
            return {"w": torch.randn(shape, generator=generator).to(W0)}
        bound = math.sqrt(6 / (m + n)) if self.kernel == "xavier" else 1 / math.sqrt(n)
        return {"w": (bound * (2 * torch.rand(shape, generator=generator) - 1)).to(W0)}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return W0 + self.change(W0, p, s)

    def change(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        w = p["w"]
        at = torch.arange(w.shape[-1], device=w.device)
        blocks = w[:, :, (at - at[:, None]) % w.shape[-1]]  # [m/b, n/b, b, b]
        return blocks.transpose(1, 2).flatten(2).flatten(0, 1) / W0.shape[1]

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        w, b = layer.p["w"], layer.p["w"].shape[-1]
        X = layer.dropout(x).to(wide(x.dtype)).unflatten(-1, (-1, b))  # bf16 has no transform
        product = torch.einsum("...jf,ijf->...if", torch.fft.rfft(X), torch.fft.rfft(w).conj())
        y = torch.fft.irfft(product, n=b).flatten(-2) / x.shape[-1]
        return layer.frozen(x) + y.to(x.dtype)

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        return r


preset(
    "c3a",
    form="c3a",
    scale="none",
    rank=None,
    alpha=None,
    lr=0.3,
    lr_origin="the paper's Table A6, LLaMA-2-7B and LLaMA-3-8B on commonsense reasoning, b = 128",
    width_exponent=0.0,  # n inputs, each times w / n: the same change of y at every width
)
