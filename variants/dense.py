"""Dense bases: the frozen weight as numbers, in the dtype of the model or in one that is named.

    stored = W0            (`dense`: as the model was loaded; `fp32`, `bf16`: rounded to that)

The plain storage of every paper before QLoRA. Products run in the dtype of the input; a base that
is stored otherwise is cast for the product and the cast copy is dropped at once.

>>> import torch
>>> W = torch.tensor([[1.0, 1.0 + 2**-10]])
>>> BF16().store(W).dense().tolist(), BF16().store(W).bits     # 8 bits of mantissa: rounded
([[1.0, 1.0]], 32)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._api import Base, Stored


class Dense(Stored):
    """A matrix kept as it is: `dense()` costs nothing and shares its memory."""

    def __init__(self, W: Tensor, kept: torch.dtype) -> None:
        super().__init__(W)
        self.W = nn.Parameter(W.detach().to(kept), requires_grad=False)

    def dense(self) -> Tensor:
        return self.W.to(self.dtype)

    @property
    def decoded_bytes(self) -> int:
        return 0 if self.W.dtype == self.dtype else super().decoded_bytes

    def set(self, W: Tensor) -> None:
        self.W = nn.Parameter(W.to(self.W.dtype), requires_grad=False)

    def resident(self, dtype: torch.dtype) -> Tensor | None:
        return self.W if self.W.dtype == dtype else None

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.W.dtype != x.dtype:
            return super().product(x, bias)
        return F.linear(x, self.W, bias)


@dataclass(frozen=True)
class AsLoaded(Base, name="dense"):
    """The dtype of the model as loaded; codes, where its files have them."""

    def store(self, W: Tensor) -> Stored:
        return Dense(W, W.dtype)

    def take(self, stored: Stored) -> Stored:
        return stored


@dataclass(frozen=True)
class FP32(Base, name="fp32"):
    """32 bits a number."""

    def store(self, W: Tensor) -> Stored:
        return Dense(W, torch.float32)


@dataclass(frozen=True)
class BF16(Base, name="bf16"):
    """16 bits a number, 8 of them mantissa."""

    lossy = True

    def store(self, W: Tensor) -> Stored:
        return Dense(W, torch.bfloat16)
