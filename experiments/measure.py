"""Exact costs of a training step: bytes that autograd keeps, and floating-point operations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def measure(backward: Callable[[], Any], model: nn.Module) -> dict[str, float]:
    """Runs `backward` once and counts. Memory that several nodes keep counts once; what the model
    holds anyway (parameters and buffers) does not count."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        FlopCounterMode(display=False) as flops,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        backward()
    return {"saved_bytes": sum(s.nbytes() for s in kept.values()), "flops": flops.get_total_flops()}
