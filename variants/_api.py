"""The six axes: what a part of each must say.

Legend: a layer maps x [..., n] to y [..., m] by W [m, n] (m = out, n = in features). W0 is the
frozen weight, p the trained tensors by name, s the scale, r the rank. A and B are a low-rank
form's factors, A [r, n] and B [m, r]; the layer then moves by s B A.

Parts are frozen dataclasses: their fields are hyper-parameters. What changes while training lives
in the layers (p) and in an allocation's state.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ._product import frozen_product, made_product
from ._registry import Incompatible

if TYPE_CHECKING:
    from ._adapter import Choice, Planned
    from ._layer import Adapted

Tensors = Mapping[str, Any]  # of tensors; an nn.ParameterDict is one in all but its type
Layers = Mapping[str, "Adapted"]  # by name
State = dict[str, Any]  # an allocation's, saved with the adapter
Storing = Callable[[Tensor], Tensor]  # a matrix as a layer's base gives it back, in its dtype


class Part:
    """One choice on one axis. `class DoRA(Form, name="dora")` names it."""

    axis: ClassVar[str]
    name: ClassVar[str]
    requires: ClassVar[str] = ""  # what not every machine has, in words
    device: ClassVar[str] = ""  # the one type of device that it runs on

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name = name

    def fits(self, choice: "Choice") -> None:
        """Raises `Incompatible`, naming both, where another part of the choice is no match."""

    def unavailable(self) -> str | None:
        """What this machine lacks of what the part `requires`; None: it can run here."""
        return None

    def __str__(self) -> str:
        return f"{self.axis} {self.name}"

    def refuse(self, other: "Part", needs: str) -> Incompatible:
        """The error for a pair that cannot be joined: "init pissa needs ..., not form hira"."""
        return Incompatible(f"{self} needs {needs}, not {other.name}")


class Form(Part):
    """What is W, given W0 and the trained tensors p?

    `weight` is the paper's equation and all that a form must have beside `shapes` and `start`.
    Where W = W0 + s B A, `factors` gives a fast product; else `forward` may be overridden.
    """

    axis = "form"
    rank_means: ClassVar[str | None] = "r, the number of directions of every adapted matrix"
    parameters: ClassVar[str] = ""  # trained numbers in one [m, n] matrix, as Python of r, m, n
    parameters_in_words: ClassVar[str] = ""  # the same, where the expression is hard to read
    shared_parameters: ClassVar[str] = "0"  # trained numbers in one shared copy, likewise
    constants: ClassVar[tuple[str, ...]] = ()  # tensors of p that are kept and never trained
    shared: ClassVar[tuple[str, ...]] = ()  # tensors of p that layers of one `key` hold together
    redrawn: ClassVar[tuple[str, ...]] = ()  # shared constants made from the seed, so not saved
    low_rank: ClassVar[bool] = False  # has factors: an init may give A and B
    scaled: ClassVar[bool] = True  # s enters its equation
    replaces: ClassVar[bool] = False  # what it trains stands in place of W, not beside it
    drops: ClassVar[bool] = True  # it changes W, so that the change's input can be dropped out
    starts_at_base: ClassVar[bool] = True  # weight(W0, start(W0), s) == W0
    rank_is_bounded: ClassVar[bool] = True  # by the largest matrix

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        """The trained tensors of one matrix, by name; shared ones are in `shared_shapes`."""
        raise NotImplementedError  # abstract

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        """Where p begins when the init axis leaves it to the form; constants included."""
        raise NotImplementedError  # abstract

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        """The paper's equation. Everything else is held to it. It must not change W0 or p."""
        raise NotImplementedError  # abstract

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor] | None:
        """(A [r, n], B [m, r]) where W = W0 + s B A, else None."""
        return None

    def change(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        """W - W0, where the equation adds it: so that no product in few bits rounds it away."""
        raise NotImplementedError  # not every form has it

    def forward(self, x: Tensor, layer: "Adapted") -> Tensor:
        """y = W0 x + (W - W0) dropout(x), by the factors or the dense W. For `linear` kinds.

        The dense one is made here and again in backward, and not kept.
        """
        factors = self.factors(layer.p)
        if factors is not None:
            return layer.product(x, *factors)
        p, s, bias = layer.p, layer.s, layer.bias_like(x)
        has_change = type(self).change is not Form.change
        if has_change and (layer.drops or x.dtype != wide(x.dtype)):
            change = layer.made_product(x, p, lambda p: self.change(layer.W0, p, s))
            return layer.frozen(x) + change
        if not layer.drops:
            return made_product(x, p, lambda p: self.weight(layer.W0, p, s), bias)
        change = layer.made_product(x, p, lambda p: self.weight(layer.W0, p, s) - layer.W0)
        return layer.frozen.stored.product(x, bias) + change

    def absorbed(self, stored: "Stored", p: Tensors, s: float) -> "Stored | None":
        """`stored` with the change in it, exactly and without a new code (in its zero points), for
        `merge(requantize=True)`; None: the change has no place there."""
        return None

    def bias(self, b0: Tensor | None, p: Tensors) -> Tensor | None:
        """The layer's bias [m]; only a form that changes it says more."""
        return b0

    def acting_s(self, p: Tensors, s: float) -> float:
        """What the given s comes to in the equation; only a form that changes it says more."""
        return s

    def fits_layers(self, names: Sequence[str]) -> None:
        """Raises `Incompatible` where a setting of the form names none of the adapted layers."""

    def applies(self, kind: Any, has_bias: bool) -> bool:
        """Whether a layer of this kind can take the form; layers that cannot are left out."""
        return kind.matrices

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        """The rank of one matrix; one that the matrix cannot have is refused.

        For a form without rank r is 1 where the layer has a bias and 0 where it has none; what is
        returned is the r of `shapes` and `parameters`, so that a form may tell its layers apart.
        """
        if r > min(m, n):
            raise Incompatible(
                f"rank={r}: {where} is {m} x {n}, so its rank is at most {min(m, n)}; "
                f"choose a smaller rank or leave the layer out of targets"
            )
        return r

    def key(self, m: int, n: int, r: int) -> str:
        """Layers of one key hold one copy of the `shared` tensors."""
        return f"{m}x{n}-r{r}"

    def shared_shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        """The trained ones among the shared tensors; m, n: the largest of the layers of a key."""
        return {}

    def start_shared(
        self, m: int, n: int, r: int, generator: torch.Generator, like: Tensor
    ) -> Tensors:
        """The shared tensors of one key, on the device and in the dtype of `like`."""
        return {}


class LowRank(Form):
    """A form that is built on factors A [r, n] and B [m, r], so that any low-rank init fits it."""

    low_rank = True

    def embed(self, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensors:
        """The p at which the weight is W + s B A."""
        raise NotImplementedError  # abstract

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        return self.embed(W0, kaiming(r, n, W0, generator), W0.new_zeros(m, r), s)


@dataclass(frozen=True)
class Start:
    """What a low-rank init chose: the factors, and what it takes out of the base (or nothing).

    With `subtract` = (A0, B0) it is W0 - s B0 A0 that the base stores, as Q. The factors are kept,
    so that the original stays at hand; an init that moves the base by what it trains gives (A, B)
    itself. Without A and B (both None) the form's own start follows on the moved base.

    With the adapter disabled the model is Q + s B0 A0 with (A0, B0) = `restore`: what was taken
    out, unless an init that makes up for what the base loses says otherwise.
    """

    A: Tensor | None
    B: Tensor | None
    subtract: tuple[Tensor, Tensor] | None = None
    restore: tuple[Tensor, Tensor] | None = None  # None: as `subtract`


class Measuring(Part):
    """A part that may look at calibration batches before training begins.

    Statistics of a matrix W [m, n] by name: `covariance` [n, n], the mean of x x^T over the tokens
    that reach the layer, and `mean` [n], that of x; `scaled_covariance` [n, n], the mean over the
    samples of the sum of x x^T over a sample's tokens, after division by the sample's largest
    entry; `gradient` [m, n], the mean over the batches of the loss's gradient. A field `batches`
    says how many batches the part takes.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    def reduce(self, W0: Tensor, found: Tensors, r: int) -> Tensors:
        """What is kept of one layer's statistics, for `r` directions; small where it can be."""
        return found


class Init(Measuring):
    """Where do p and W0 begin?"""

    axis = "init"
    moves_base: ClassVar[bool] = False  # with the adapter disabled, the frozen weight is not all
    joint: ClassVar[bool] = False  # makes up for what the base loses, so it needs one that does
    starts_at_base: ClassVar[bool] = True  # the model's outputs are the base's before step 1
    full_rank: ClassVar[bool] = True  # A and B have r independent directions
    frozen: ClassVar[tuple[str, ...]] = ()  # tensors of p that this start leaves untrained

    def start(
        self, W0: Tensor, r: int, s: float, generator: torch.Generator, found: Tensors
    ) -> Start | None:
        """The factors for W0 (fp32 or wider), or None: the form's own start.

        `found` is what `reduce` kept of this matrix; empty without `needs`.
        """
        raise NotImplementedError  # abstract

    def start_on(
        self,
        stored: Storing,
        W0: Tensor,
        r: int,
        s: float,
        generator: torch.Generator,
        found: Tensors,
    ) -> Start | None:
        """`start` for a layer whose base gives W back as stored(W): to the bit, W = W0 - s B0 A0.

        An init that chooses factors and base together has this in place of `start`.
        """
        return self.start(W0, r, s, generator, found)

    def reduce_on(self, stored: Storing, W0: Tensor, found: Tensors, r: int) -> Tensors:
        """`reduce` for a layer whose base gives W back as stored(W)."""
        return self.reduce(W0, found, r)

    def fits(self, choice: "Choice") -> None:
        """An init gives factors, so it needs a form with a place for them."""
        if not choice.form.low_rank:
            raise self.refuse(choice.form, "a low-rank form")
        if self.joint and not choice.base.lossy:
            raise self.refuse(choice.base, "a lossy base, as it makes up for what that loses")


class Scale(Part):
    """How large is s?"""

    axis = "scale"
    has_alpha: ClassVar[bool] = True

    def value(self, alpha: float, r: int) -> float:
        """s of a matrix of rank r."""
        raise NotImplementedError  # abstract


class Allocation(Measuring):
    """How many directions does each layer get, and when does that change?

    `state` is made by `begin` and holds tensors and numbers only: it goes into the checkpoint.
    """

    axis = "allocation"
    scheduled: ClassVar[bool] = False  # changes during the run, so it must know the run's length
    penalized: ClassVar[bool] = False  # adds a term to the training loss
    moves_base: ClassVar[bool] = False  # writes into the frozen weight (`Adapted.move`)
    partial: ClassVar[bool] = False  # shows forms a part of p while training (`Adapted.seen`)
    keeps_scale: ClassVar[bool] = (
        False  # s stays that of the rank asked for, whatever `static` says
    )

    def most(self, m: int, n: int, r: int) -> int:
        """The largest rank that `static` may give to an [m, n] matrix that was asked for r."""
        return r

    @property
    def rescales(self) -> bool:
        """Whether `static` may give a layer another s with its rank."""
        return type(self).static is not Allocation.static and not self.keeps_scale

    def static(
        self, planned: "Sequence[Planned]", found: Mapping[str, Tensors]
    ) -> Mapping[str, int]:
        """The rank of each layer before training, by name; layers left out keep theirs."""
        return {}

    def begin(self, layers: Layers, steps: int) -> State:
        """The state before the first step of a run of `steps` optimizer steps."""
        return {}

    def resumed(self, layers: Layers, state: State) -> None:
        """Puts into the layers what `state` says of them (`seen`): a run continues from it."""

    def penalty(self, layers: Layers) -> Tensor | None:
        """A term of the training loss, and of no other; None: no term."""
        return None

    def after_step(self, layers: Layers, state: State, step: int) -> Sequence[Tensor]:
        """Runs after step `step` (from 1) of the optimizer, before gradients are cleared.

        Returns the tensors whose optimizer state went stale.
        """
        return ()

    def noted(self, layers: Layers, state: State) -> Sequence[Tensor]:
        """Tensors of the state that backward passes add to, one for each portion of a batch. Where
        several processes share a batch, each is summed over them, as gradients are."""
        return ()

    def ranks(self, layers: Layers, state: State | None) -> dict[str, int]:
        """The directions in use, by layer; without a state (a loaded adapter) by its tensors."""
        return {name: layer.rank for name, layer in layers.items()}


def in_steps(t: float, steps: int) -> int:
    """A time of a schedule: below 1 a fraction of the run, else steps.

    >>> in_steps(0.1, 200), in_steps(50.0, 200)
    (20, 50)
    """
    return round(t * steps) if t < 1 else int(t)


class Update(Part):
    """Which tensors learn, how fast, with which gradient?"""

    axis = "update"
    scheduled: ClassVar[bool] = False  # `optimizer` is told the run's `steps` (None: unknown)
    frozen: ClassVar[tuple[str, ...]] = ()  # tensors of p that this rule leaves untrained
    moves_base: ClassVar[bool] = False  # writes into the frozen weight (`Adapted.move`)

    def optimizer(
        self, layers: Mapping[str, "Adapted"], others: Sequence[Tensor], lr: float, **settings: Any
    ) -> torch.optim.Optimizer:
        """An optimizer over each trained tensor once; `others` are modules trained in full.

        `trained(layers)` lists the tensors. `settings` are AdamW's: weight_decay, betas and, where
        the caller asks, eps, foreach. `layer.params["A"]` and `["B"]` are a layer's factors.
        """
        raise NotImplementedError  # abstract


class Base(Part):
    """How is the frozen weight stored?"""

    axis = "base"
    lossy: ClassVar[bool] = False  # the stored weight differs from the one given
    kernels: ClassVar[tuple[str, ...]] = ("backend",)  # settings that change no number

    def store(self, W: Tensor) -> "Stored":
        """Stores W [m, n]."""
        raise NotImplementedError  # abstract

    def take(self, stored: "Stored") -> "Stored":
        """Stores what the model's files had in codes: the decoded matrix, anew."""
        return self.store(stored.dense())

    def storing(self, dtype: torch.dtype) -> Storing:
        """What this base makes of the matrices of a model in `dtype`.

        >>> from .dense import AsLoaded
        >>> AsLoaded().storing(torch.bfloat16)(torch.tensor([[1 + 2**-10]])).item()
        1.0
        """
        return lambda W: self.store(W.to(dtype)).dense().to(W.dtype)


class Stored(torch.nn.Module):
    """A frozen [m, n] matrix in some storage, which moves with the model."""

    group: int = 0  # numbers in a row that share a scale; 0: the storage is no code

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.shape, self.dtype = (W.shape[0], W.shape[1]), W.dtype

    def dense(self) -> Tensor:
        """The matrix [m, n] in `dtype`; decoded where the storage is a code."""
        raise NotImplementedError  # abstract

    @contextmanager
    def decoded(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """`with stored.decoded(dtype) as W`: the matrix [m, n], which nobody keeps after it."""
        yield self.dense().to(dtype)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., n] -> x W^T + bias [..., m], keeping for backward nothing but the storage."""
        return frozen_product(x, self.decoded, bias)

    def resident(self, dtype: torch.dtype) -> Tensor | None:
        """The matrix [m, n] in `dtype` where the storage has it as it is, not decoded."""
        return None

    def given(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x W^T + bias where it is at hand, or cheaper than by `decoded`."""
        return None

    def set(self, W: Tensor) -> None:
        """Stores another matrix in place of this one, where the storage can take any number."""
        raise Incompatible("a coded base takes no other numbers than its codes")

    def histogram(self) -> Tensor | None:
        """How often each code stands [codes], in the order of their values; None: no code."""
        return None

    @property
    def decoded_bytes(self) -> int:
        """What `dense()` takes beside the storage, for as long as a product lasts."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def bits(self) -> int:
        """What the storage holds, in bits, all its tensors counted."""
        return 8 * sum(t.nbytes for t in (*self.buffers(), *self.parameters()))


def trained(layers: "Mapping[str, Adapted]") -> list[Tensor]:
    """The trained tensors of the layers, each once, shared ones where they first occur."""
    return list({id(t): t for layer in layers.values() for t in layer.trained}.values())


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for an fp64 model: what trained tensors are kept in."""
    return torch.promote_types(dtype, torch.float32)


def kaiming(r: int, n: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """[r, n] from U(-1/sqrt(n), 1/sqrt(n)), torch's `kaiming_uniform_(a=sqrt(5))` of loralib.

    Drawn on the CPU in fp32, so that every device and dtype gets the same numbers.

    >>> A = kaiming(400, 100, torch.empty(0), torch.Generator().manual_seed(0))
    >>> tuple(A.shape), round(A.abs().max().item(), 4), round(A.std().item() * 300**0.5, 2)
    ((400, 100), 0.1, 1.0)
    """
    unit = torch.rand(r, n, generator=generator, dtype=torch.float32)
    return ((2 * unit - 1) / math.sqrt(n)).to(like)
