"""What torch.compile is told apart; imported when it traces, since its tools are slow to import.

>>> places(1000, 700, 0.5, torch.tensor(3), torch.device("cpu")).shape
torch.Size([700])
"""

from typing import Any

import torch
from torch import Tensor

from ._dropout import drawn


@torch.library.custom_op("lora_variants::places", mutates_args=())
def places(count: int, most: int, p: float, seed: Tensor, device: torch.device) -> Tensor:
    """`_dropout.drawn`, whose generator no graph can hold."""
    return drawn(count, most, p, int(seed.item()), device)


@places.register_fake
def _(count: int, most: int, p: float, seed: Tensor, device: torch.device) -> Tensor:
    return torch.empty(most, dtype=torch.int64, device=device)


def directly(squared: Tensor, cancelled: Tensor, W0: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """`squared`, where `cancelled` ||W0 + B A||^2 of the row itself.

    >>> one, rows = torch.ones(2), torch.tensor([True, False])
    >>> directly(one, rows, torch.ones(2, 3), torch.ones(1, 3), torch.ones(2, 1)).tolist()
    [12.0, 1.0]
    """
    if torch.is_grad_enabled():  # of a norm that is no constant: densely, as a derivative needs it
        return torch.where(cancelled, (W0 + B @ A).square().sum(1), squared)
    return _directly(squared, cancelled, W0, A, B)


@torch.library.custom_op("lora_variants::directly", mutates_args=())
def _directly(squared: Tensor, cancelled: Tensor, W0: Tensor, A: Tensor, B: Tensor) -> Tensor:
    found = squared.clone()
    if cancelled.any():  # a branch that no graph has
        found[cancelled] = (W0[cancelled] + B[cancelled] @ A).square().sum(1)
    return found


@_directly.register_fake
def _(squared: Tensor, cancelled: Tensor, W0: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return torch.empty_like(squared)


def _apart(layer: Any, x: Tensor) -> Tensor:
    return layer.run(x)


# the layer as it runs without torch.compile, between two graphs: a coded base is decoded into
# memory that layers share
apart: Any = torch.compiler.disable(_apart)
