"""Several processes of one run, under `torchrun`: data in parallel, the base whole or in shards.

Each process takes its share of every batch and weights its loss by the tokens of the whole batch,
so that gradients need a sum, not a mean, and steps are those of one process to rounding. The
adapter is whole on every process (it is small), so that updates and allocations, which look at
whole A and B and at gradients, need not know; with FSDP (`torch.distributed.fsdp.fully_shard`) only
the frozen base lies in shards, block by block, its codes where it is quantized.

The sum is one call a step over all gradients, not torch's DistributedDataParallel: that hides its
sums behind a long backward and needs each tensor to get its gradient once a step, from one
backward; here penalties have a backward of their own, tensors are shared or out of use in turns,
and an adapter's sum is short.

What is small and must not hang (flags, rows, numbers) goes through gloo, with a time-out.
"""

import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import debug

from variants import Adapter, Incompatible
from variants._api import Stored

from .parallel import Team
from .record import pack, unpack
from .tasks import BadInput

T = TypeVar("T")

PATIENCE = 600  # seconds that a process waits for the others; LORA_PATIENCE says otherwise
BUCKET = 2**23  # numbers that are summed at once: the copy is as large
LOST = ("gloo", "Connection", "Timed out", "timed out", "Broken pipe", "Socket")


class Several(Team):
    """This process among those of torchrun."""

    def __init__(self) -> None:
        patience = timedelta(seconds=float(os.environ.get("LORA_PATIENCE", PATIENCE)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=patience)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.sharded = False

    def together(self, work: Callable[[], T]) -> T:
        value, error = _tried(work)
        said = self.gather(None if error is None else str(error))
        if any(text is not None for text in said):
            rank, text = next((r, text) for r, text in enumerate(said) if text is not None)
            self.leave(error or BadInput(f"process {rank} of {self.size}: {text}"))
        return value

    def first(self, work: Callable[..., T], *args: Any, **settings: Any) -> Any:
        return work(*args, **settings) if self.rank == 0 else None

    def tell(self, work: Callable[..., Any], *args: Any) -> Any:
        value, error = _tried(work, *args) if self.rank == 0 else (None, None)
        tensors: dict[str, Tensor] = {}
        plain = pack(value, "value", tensors)
        about = {k: [list(t.shape), str(t.dtype).removeprefix("torch.")]
                 for k, t in tensors.items()}  # fmt: skip
        said: Any = self.gather([error is not None, plain, about])[0]
        failed, plain, about = said
        if failed:
            self.leave(error or SystemExit(0))
        for name, (shape, dtype) in about.items():
            t = tensors.get(name, torch.empty(shape, dtype=getattr(torch, dtype))).cpu()
            data = t.contiguous().reshape(-1).view(torch.uint8)
            dist.broadcast(data, 0)
            tensors[name] = data.view(t.dtype).view(shape)
        return value if self.rank == 0 else unpack(plain, tensors)

    def gather(self, value: T) -> list[T]:
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(own)]))
        longest = max(int(n) for n in lengths)
        found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(found, nn.functional.pad(own, (0, longest - len(own))))
        texts = (t[: int(n)].numpy().tobytes() for t, n in zip(found, lengths, strict=True))
        return [json.loads(text) for text in texts]

    def most(self, number: int) -> int:
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def sum(self, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @torch.no_grad()
    def reduce(self, adapter: Adapter) -> None:
        tensors = adapter.parameters()
        has = torch.tensor([float(t.grad is not None) for t in tensors], device=tensors[0].device)
        missing = [(i, t) for i, t in enumerate(tensors) if t.grad is None]
        for _, t in missing:
            t.grad = torch.zeros_like(t)
        _sum_all([has, *(t.grad for t in tensors if t.grad is not None), *adapter.noted()])
        for i, t in missing:
            if not has[i]:  # no process had one: the optimizer leaves it alone
                t.grad = None

    def agree(self, tensors: Sequence[Tensor]) -> None:
        """Compares sums of the bits taken for whole numbers: exact, on any device."""
        flat = (t.detach().reshape(-1).view(torch.int32) for t in tensors)
        bits = [t.sum(dtype=torch.int64) for t in flat]
        own = hashlib.sha256(str([int(b) for b in bits]).encode()).hexdigest()
        if len(set(self.gather(own))) > 1:
            raise RuntimeError("the processes no longer have the same adapter: a part of the "
                               "variant does on one what it does not on another")  # fmt: skip

    def part(self, items: Sequence[T]) -> Sequence[T]:
        return items[self.rank :: self.size]

    def turns(self, portions: Sequence[T]) -> Sequence[T]:
        """Under FSDP a forward needs every process, so one with less to do repeats a portion."""
        own = list(portions[self.rank :: self.size])
        short = len(portions) > 0 and len(own) < -(-len(portions) // self.size)
        return [*own, (own or portions)[0]] if short else own

    def seed(self, seed: int, step: int) -> None:
        if self.rank:
            text = f"dropout {seed} {self.rank} {step}"
            torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))

    def leave(self, error: BaseException) -> NoReturn:
        if self.rank == 0:
            raise error
        raise SystemExit(0)  # torchrun reports the first process

    def explain(self, error: Exception) -> Exception:
        return _lost(error)

    def take(self, prepared: Any) -> list[str]:
        """All processes must mean one run, with items enough for each."""
        settings, choice, notes = prepared.settings, prepared.choice, []
        names = self.gather(prepared.name)
        for rank, name in enumerate(names):
            if name != names[0]:
                raise BadInput(f"process {rank} of {self.size} would run {name}, not {names[0]}: "
                               f"the model or the data there are others")  # fmt: skip
        portion = settings.train.batch_size // settings.train.accumulate
        if portion < self.size:
            raise BadInput(
                f"train.batch_size={settings.train.batch_size}: in {settings.train.accumulate} "
                f"portion(s) it has {portion} items at once, fewer than the {self.size} processes"
            )
        if self.rank:
            settings.track.mode = "disabled"
        self.sharded = settings.train.parallel == "fsdp"
        if self.sharded:
            notes = _refuse_shards(choice)
        return [*notes, f"{self.size} processes, {settings.train.parallel}"]

    def device(self, device: torch.device) -> torch.device:
        if device.type != "cuda":
            return device
        local, count = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
        if device.index is not None:
            raise BadInput(f"device={device}: under torchrun each process has its own; give cuda")
        if local >= count:
            raise BadInput(f"device=cuda: {local + 1} processes or more on a machine with {count} "
                           f"device(s); see torchrun --nproc-per-node")  # fmt: skip
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def home(self, device: torch.device) -> torch.device:
        return torch.device("cpu") if self.sharded else device

    def shard(self, model: nn.Module, device: torch.device, whole: Sequence[Tensor]) -> None:
        if not self.sharded:
            return
        for module in model.modules():
            if isinstance(module, Stored):  # codes are buffers, which FSDP leaves whole
                for name, buffer in list(module.named_buffers(recurse=False)):
                    if torch.__version__ < "2.13":
                        raise BadInput("train.parallel=fsdp: a quantized base needs torch 2.13 or "
                                       "later, which can shard codes")  # fmt: skip
                    if buffer.ndim:  # a single number cannot be cut
                        delattr(module, name)
                        setattr(module, name, nn.Parameter(buffer, requires_grad=False))
        mesh, ignored = init_device_mesh(device.type, (self.size,)), set(whole)
        for module in (*_blocks(model), model):
            fully_shard(module, mesh=mesh, ignored_params=ignored)  # type: ignore[arg-type]

    def renewed(self, loaded: T, load: Callable[[], T]) -> T:
        return load() if self.sharded else loaded

    @torch.no_grad()
    def spread(self, adapter: Adapter, device: torch.device) -> None:
        mine: list[nn.Module] = [layer.params for layer in adapter.layers.values()]
        mine += adapter.saved_modules.values()
        whole = list({id(p): p for module in mine for p in module.parameters()}.values())
        for t in adapter.tensors().values():
            told = t.contiguous()
            dist.broadcast(told, 0)
            t.copy_(told)
        for t in whole:
            t.data = t.data.to(device)
        self.shard(adapter.model, device, whole)


def _tried(work: Callable[..., T], *args: Any) -> tuple[T | Any, Exception | None]:
    """(what it gives, None) or (None, what the user can mend); anything else is raised."""
    try:
        return work(*args), None
    except (BadInput, Incompatible, OSError) as error:
        return None, error


def _refuse_shards(choice: Any) -> list[str]:
    """Raises where a base in shards cannot do what the variant asks; returns what is to be said."""
    if "ignored_params" not in signature(fully_shard).parameters:
        raise BadInput("train.parallel=fsdp: needs torch 2.7 or later")
    for part in (choice.allocation, choice.update):
        if part.moves_base:
            raise BadInput(f"train.parallel=fsdp: {part} moves the base and keeps the original "
                           f"beside it, whole; use train.parallel=ddp")  # fmt: skip
    if choice.form.replaces:
        return [f"form {choice.form.name} trains numbers in place of the base: every process has "
                f"them whole, and fsdp saves little"]  # fmt: skip
    return []


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules: a transformer's blocks."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)


def _sum_all(tensors: Iterable[Tensor]) -> None:
    """Sums each tensor over the processes in place, many in one call; all in the same order."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for t in tensors:
        by_dtype.setdefault(t.dtype, []).append(t)
    for same in by_dtype.values():
        while same:
            bucket = [same.pop(0)]
            while same and sum(t.numel() for t in bucket) + same[0].numel() <= BUCKET:
                bucket.append(same.pop(0))
            flat = torch.cat([t.reshape(-1) for t in bucket])
            dist.all_reduce(flat)
            parts = flat.split([t.numel() for t in bucket])
            for t, total in zip(bucket, parts, strict=True):
                t.copy_(total.view_as(t))


@contextmanager
def joined() -> Iterator[Several]:
    """The team, and one clear error where a process of it is lost."""
    try:
        yield Several()
    except RuntimeError as error:
        told = _lost(error)
        if told is not error:
            raise told from error
        raise
    finally:
        if dist.is_initialized():  # else its threads may outlive the interpreter, which aborts
            dist.destroy_process_group()
            _let_go()


def _let_go() -> None:
    """Drops what would hold the group, and so its threads, for longer than the interpreter: a model
    in shards lies in cycles, and DTensor's caches keep its mesh."""
    gc.unfreeze()
    gc.collect()
    getattr(debug, "_clear_sharding_prop_cache", lambda: None)()  # of torch 2.13


def _lost(error: Exception) -> Exception:
    """What to say where a process has ended, or is silent for too long; else the error itself."""
    why = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and any(word in why for word in LOST):
        return ConnectionError(
            f"another of the run's processes has ended or does not answer; the same command goes "
            f"on from the last checkpoint ({why})"
        )
    return error
