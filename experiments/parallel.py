"""The processes of one run: this one alone, or those that `torchrun` started (several.py).

Every process takes the same way through the code, with the whole adapter and the settings of one
process; where they must differ or meet, they ask the team. A team of one has nobody to ask: its
methods give back what they were given, so that no other file has a branch.

No torch in here: what the command line says of mistakes comes before it.

>>> team = Team()
>>> team.part([1, 2, 3]), team.turns([1, 2, 3]), team.gather("row"), team.most(4)
([1, 2, 3], [1, 2, 3], ['row'], 4)
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from .tasks import BadInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from variants import Adapter

    from .job import Prepared

T = TypeVar("T")


class Team:
    """One process, and what it would ask the others."""

    rank = 0  # the number of this process; the first one alone writes, says and tracks
    size = 1

    def together(self, work: Callable[[], T]) -> T:
        """work() on every process. What the user got wrong on any ends all, said once."""
        return work()

    def first(self, work: Callable[..., T], *args: Any, **settings: Any) -> T:
        """work(...) on the first process alone; None on the others."""
        return work(*args, **settings)

    def tell(self, work: Callable[..., T], *args: Any) -> T:
        """What work(...) gives on the first process, tensors and all, on every one."""
        return work(*args)

    def gather(self, value: T) -> list[T]:
        """The value (of what json can hold) of each process, in their order, on every one."""
        return [value]

    def merge(self, rows: Sequence[tuple[int, T]]) -> list[T]:
        """The rows of all processes, by their numbers."""
        found: dict[int, T] = {}
        for own in self.gather(list(rows)):
            for i, row in own:
                found.setdefault(i, row)
        return [found[i] for i in sorted(found)]

    def most(self, number: int) -> int:
        """The largest number of any process."""
        return number

    def sum(self, value: "Tensor") -> "Tensor":
        """The sum over the processes."""
        return value

    def reduce(self, adapter: "Adapter") -> None:
        """Puts the sum over the processes in place of each gradient, and of what an allocation
        notes while gradients are made."""

    def agree(self, tensors: "Sequence[Tensor]") -> None:
        """Raises where the tensors are not the same, to the bit, on every process."""

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of a batch."""
        return items

    def turns(self, portions: Sequence[T]) -> Sequence[T]:
        """The portions that are this process's to score: equally many on each."""
        return portions

    def seed(self, seed: int, step: int) -> None:
        """Before each step. The first process's stream of dropout is that of one process; each of
        the others draws from one of its own, which depends on seed, process and step alone."""

    def leave(self, error: BaseException) -> NoReturn:
        """Ends every process, all of which agree on why; the first one says it."""
        raise error

    def explain(self, error: Exception) -> Exception:
        """The error, or what is behind it where another process was lost."""
        return error

    def take(self, prepared: "Prepared") -> list[str]:
        """Looks at the run before it begins; raises on what several processes cannot do, and
        returns what there is to say of it."""
        if prepared.settings.train.parallel == "fsdp":
            return ["train.parallel=fsdp has no meaning for one process: start it with torchrun"]
        return []

    def device(self, device: "torch.device") -> "torch.device":
        """The device of this process, of those that `device` names."""
        return device

    def home(self, device: "torch.device") -> "torch.device":
        """Where the model stands until the variant sits in it."""
        return device

    def shard(self, model: "nn.Module", device: "torch.device", whole: "Sequence[Tensor]") -> None:
        """FSDP: each process keeps its part of every tensor of the model but those in `whole`."""

    def renewed(self, loaded: T, load: Callable[[], T]) -> T:
        """The model without shards again: FSDP loads it anew."""
        return loaded

    def spread(self, adapter: "Adapter", device: "torch.device") -> None:
        """Gives every process the first one's adapter, and each its part of the base (FSDP)."""


ALONE = Team()


def processes() -> int:
    """How many torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def who() -> str:
    """Whose line it is, where it is not the first process's."""
    rank = int(os.environ.get("RANK", "0"))
    return f"process {rank} of {processes()}: " if rank else ""


def complain(text: str) -> int:
    """One line for a mistake that every process finds by itself; the exit code.

    The others leave with 0, so that torchrun waits for the first one's line and reports its end.
    """
    if who():
        return 0
    print(text, file=sys.stderr)
    return 1


def refuse_sweep(words: Sequence[str]) -> None:
    """A sweep gives each run processes of its own."""
    if processes() > 1 and {"-m", "--multirun"} & set(words):
        raise BadInput(f"-m: torchrun's {processes()} processes share one run; a sweep starts its "
                       f"own: leave torchrun or -m out")  # fmt: skip


@contextmanager
def team() -> Iterator[Team]:
    """The processes of this run, for as long as the context lasts."""
    if processes() == 1:
        yield ALONE
        return
    from .several import joined

    with joined() as several:
        yield several
