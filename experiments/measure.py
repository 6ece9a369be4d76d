"""Exact costs: bytes that tensors take, now and at most, bytes that autograd keeps, FLOPs.

What a model takes at rest, storages that several tensors share counted once; and the most at once
while it works, which no allocator of the CPU tells:

>>> model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False))
>>> model[1].weight = model[0].weight
>>> resident_bytes(model)
40000
>>> with Live() as live:
...     x = torch.zeros(1000)
...     y = x + 1
...     del x
...     z = y + 1
...     del y
>>> live.now, live.peak
(4000, 8000)

A product that adds to what is there counts as every product does, two FLOPs for each of its
multiplications:

>>> y, a, b = torch.zeros(3, 5), torch.ones(3, 4), torch.ones(4, 5)
>>> measure(lambda: y.addmm_(a, b), nn.Module())["flops"]
120
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary


class Live(TorchDispatchMode):
    """While it is on: the bytes of all storages that it saw made and that still live.

    Read after every operation; what a kernel takes for itself and gives back is not seen.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        """`held`: tensors that live already and count as well."""
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()
        for tensor in held:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known and not tensor.is_meta:
            size = storage.nbytes()
            self._known[storage] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, size).atexit = False

    def _drop(self, size: int) -> None:
        self.now -= size


def _product(_: Any, a: torch.Size, b: torch.Size, **more: Any) -> int:
    """FLOPs of y += a b, from the shapes."""
    return 2 * prod(a) * b[-1]


# PyTorch's counter knows the products that make a new tensor, and not these
_IN_PLACE = {torch.ops.aten.addmm_: _product, torch.ops.aten.baddbmm_: _product}


def measure(backward: Callable[[], Any], model: nn.Module) -> dict[str, float]:
    """Runs `backward` once and counts. Memory that several nodes keep counts once; what the model
    holds anyway (parameters and buffers) does not count."""
    own: dict[int, torch.UntypedStorage] = {}  # held, as the others are, so that no address is
    kept: dict[int, torch.UntypedStorage] = {}  # used twice

    def note(module: nn.Module, args: Any = None) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            storage = _local(tensor).untyped_storage()
            own[storage._cdata] = storage

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    note(model)
    with (
        _before_each(note) if _in_shards(model) else nullcontext(),
        FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as flops,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        backward()
    return {"saved_bytes": sum(s.nbytes() for s in kept.values()), "flops": flops.get_total_flops()}


@contextmanager
def _before_each(note: Callable[..., None]) -> Iterator[None]:
    """Within it, before each module's forward: shards are made whole block by block."""
    hook = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()


def _in_shards(model: nn.Module) -> bool:
    return any(_local(p) is not p for p in model.parameters())


def most_bytes(backward: Callable[[], Any], model: nn.Module) -> int | None:
    """Runs `backward` once: the most that live tensors took at once, the model's own included.

    None for a model in shards: their storages grow and shrink where no operation shows it.
    """
    if _in_shards(model):
        return None
    with Live((*model.parameters(), *model.buffers())) as live:
        backward()
    return live.peak


def resident_bytes(model: nn.Module) -> int:
    """What the parameters and buffers take in this process, each storage once."""
    return storage_bytes(_local(t) for t in (*model.parameters(), *model.buffers()))


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor in shards, which has no storage itself; else the tensor."""
    return getattr(tensor, "_local_tensor", tensor)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """What the tensors take, those that share a storage once."""
    found = {id(s): s for s in (t.untyped_storage() for t in tensors)}
    return sum({s.data_ptr(): s.nbytes() for s in found.values()}.values())
