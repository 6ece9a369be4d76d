"""8-bit Optimizers via Block-wise Quantization (Dettmers et al., ICLR 2022), arXiv:2110.02861;
paged optimizers: QLoRA (Dettmers et al., NeurIPS 2023), arXiv:2305.14314, Section 3.

    m, v: codes of the dynamic type in blocks of 256, each with an fp32 scale;    the step: AdamW's

AdamW by bitsandbytes' CUDA kernels: `adamw8bit` keeps the moments of a tensor in two bytes a number
where plain AdamW takes eight (small tensors keep fp32); `paged_adamw` keeps them in fp32 in memory
that CUDA moves to the host when the GPU is full, as QLoRA trained. The extra `quant` installs
bitsandbytes. Where it or a CUDA device is missing the part is refused, as it would be for a pair
that cannot be. A tensor's moments are paged from 100,000 numbers on, and a run that is resumed has
them on the GPU.

What a number's moments cost, against the 64 bits of AdamW:

>>> AdamW8bit().bits(4096), AdamW8bit().bits(4095)
(16.25, 64.0)

Whether a machine can run it, it says itself:

>>> import variants
>>> why = PagedAdamW().unavailable()
>>> try:
...     _ = variants.choose("lora", update="paged_adamw")
... except Incompatible as error:
...     print(str(error) == f"update paged_adamw needs CUDA and bitsandbytes: {why}")
... else:
...     print(why is None)
True
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ._api import Update, trained
from ._layer import Adapted
from ._registry import Incompatible


def missing() -> str | None:
    """What this machine lacks of the two."""
    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed here (pip install -e '.[quant]')"
    return None if torch.cuda.is_available() else "there is no CUDA device here"


def built(part: Update, kind: str, tensors: list[Tensor], settings: dict[str, Any]) -> Any:
    """bitsandbytes' optimizer of that name over the tensors, which must lie on its device."""
    import bitsandbytes as bnb

    outside = {t.device.type for t in tensors} - {part.device}
    if outside:
        raise Incompatible(f"{part} needs its tensors on {part.device}, not on {outside.pop()}")
    for advice in ("foreach", "fused"):  # about the speed of torch's own AdamW
        settings.pop(advice, None)
    return getattr(bnb.optim, kind)(tensors, **settings)


@dataclass(frozen=True)
class AdamW8bit(Update, name="adamw8bit"):
    """AdamW with its moments in 8 bits, by bitsandbytes on CUDA."""

    paged: bool = False
    """moments in memory that moves to the host when the GPU is full"""
    smallest: int = 4096
    """numbers from which a tensor's moments take 8 bits"""

    requires = "CUDA and bitsandbytes"
    device = "cuda"

    def unavailable(self) -> str | None:
        return missing()

    def bits(self, count: int) -> float:
        """What the moments of one of `count` numbers take; blocks have 256 and an fp32 scale."""
        return 64.0 if count < self.smallest else 2 * (8 + 32 * math.ceil(count / 256) / count)

    def optimizer(
        self, layers: Mapping[str, Adapted], others: Sequence[Tensor], lr: float, **settings: Any
    ) -> torch.optim.Optimizer:
        kind = "PagedAdamW8bit" if self.paged else "AdamW8bit"
        settings |= {"lr": lr, "min_8bit_size": self.smallest}
        return built(self, kind, [*trained(layers), *others], settings)


@dataclass(frozen=True)
class PagedAdamW(Update, name="paged_adamw"):
    """AdamW with its fp32 moments in pages that leave a full GPU, by bitsandbytes on CUDA."""

    requires = "CUDA and bitsandbytes"
    device = "cuda"

    def unavailable(self) -> str | None:
        return missing()

    def optimizer(
        self, layers: Mapping[str, Adapted], others: Sequence[Tensor], lr: float, **settings: Any
    ) -> torch.optim.Optimizer:
        return built(self, "PagedAdamW32bit", [*trained(layers), *others], settings | {"lr": lr})
