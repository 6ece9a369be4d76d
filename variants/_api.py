"""The six axes: what a part of each must say.

Legend: a layer maps x [..., n] to y [..., m] by W [m, n] (m = out, n = in features). W0 is the
frozen weight, p the trained tensors by name, s the scale, r the rank. A and B are a low-rank
form's factors, A [r, n] and B [m, r]; the layer then moves by s B A.

Parts are frozen dataclasses: their fields are hyper-parameters. What changes while training lives
in the layers (p) and in an allocation's state.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ._product import frozen_product
from ._registry import Incompatible

if TYPE_CHECKING:
    from ._layer import Adapted

Tensors = Mapping[str, Any]  # of tensors; an nn.ParameterDict is one in all but its type


class Part:
    """One choice on one axis. `class DoRA(Form, name="dora")` names it."""

    axis: ClassVar[str]
    name: ClassVar[str]

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name = name

    def __str__(self) -> str:
        return f"{self.axis} {self.name}"


class Form(Part):
    """What is W, given W0 and the trained tensors p?"""

    axis = "form"
    rank_means: ClassVar[str | None] = "r, the number of directions of every adapted matrix"
    parameters: ClassVar[str] = ""  # trained numbers in one [m, n] matrix, as Python of r, m, n
    constants: ClassVar[tuple[str, ...]] = ()  # tensors of p that are kept and never trained
    low_rank: ClassVar[bool] = False  # has factors: an init may give A and B
    scaled: ClassVar[bool] = True  # s enters its equation
    replaces: ClassVar[bool] = False  # what it trains stands in place of W, not beside it
    starts_at_base: ClassVar[bool] = True  # weight(W0, start(W0), s) == W0

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        """The trained tensors of one matrix, by name. Computes nothing: used on any device."""
        raise NotImplementedError  # abstract

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        """Where p begins when the init axis leaves it to the form."""
        raise NotImplementedError  # abstract

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        """The paper's equation. Everything else is held to it."""
        raise NotImplementedError  # abstract

    def forward(self, x: Tensor, layer: "Adapted") -> Tensor:
        """y = W0 x + (W - W0) dropout(x), by way of the dense W. Override only to be faster."""
        W0 = layer.W0
        W = self.weight(W0, layer.p, layer.s)  # type: ignore[arg-type]
        if not layer.drops:
            return F.linear(x, W.to(x.dtype), layer.bias_like(x))
        return layer.frozen(x) + F.linear(layer.dropout(x), (W - W0).to(x.dtype))

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        """The rank of one matrix; one that the matrix cannot have is refused."""
        if r > min(m, n):
            raise Incompatible(
                f"rank={r}: {where} is {m} x {n}, so its rank is at most {min(m, n)}; "
                f"choose a smaller rank or leave the layer out of targets"
            )
        return r


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

    With `subtract` = (A0, B0) the stored base becomes W0 - s B0 A0. The factors are kept, so that
    the original stays at hand; an init that moves the base by what it trains gives (A, B) itself.
    """

    A: Tensor
    B: Tensor
    subtract: tuple[Tensor, Tensor] | None = None


class Init(Part):
    """Where do p and W0 begin?"""

    axis = "init"
    needs: ClassVar[tuple[str, ...]] = ()  # statistics of a calibration batch
    moves_base: ClassVar[bool] = False

    def fits(self, form: Form) -> None:
        """Raises `Incompatible`, naming both, where the form has no place for this start."""

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Start | None:
        """The factors for W0 (fp32 or wider), or None: the form's own start."""
        raise NotImplementedError  # abstract


class Scale(Part):
    """How large is s?"""

    axis = "scale"
    has_alpha: ClassVar[bool] = True

    def value(self, alpha: float, r: int) -> float:
        """s of a matrix of rank r."""
        raise NotImplementedError  # abstract


class Allocation(Part):
    """How many directions does each layer get, and when does that change?

    `state` is made by `begin` and holds tensors and numbers only: it goes into the checkpoint.
    """

    axis = "allocation"
    scheduled: ClassVar[bool] = False  # changes during the run, so it must know the run's length
    penalized: ClassVar[bool] = False  # adds a term to the training loss

    def fits(self, form: Form) -> None:
        """Raises `Incompatible`, naming both, where the form lacks what this changes."""

    def begin(self, layers: Mapping[str, "Adapted"], steps: int) -> dict[str, Any]:
        """The state before the first step of a run of `steps` optimizer steps."""
        return {}

    def penalty(self, layers: Mapping[str, "Adapted"]) -> Tensor | None:
        """A term of the training loss, and of no other; None: no term."""
        return None

    def after_step(
        self, layers: Mapping[str, "Adapted"], state: dict[str, Any], step: int
    ) -> Sequence[Tensor]:
        """Runs after step `step` (from 1) of the optimizer, before gradients are cleared.

        Returns the tensors whose optimizer state went stale.
        """
        return ()

    def ranks(
        self, layers: Mapping[str, "Adapted"], state: dict[str, Any] | None
    ) -> dict[str, int]:
        """The directions in use, by layer; without a state (a loaded adapter) by its tensors."""
        return {name: layer.rank for name, layer in layers.items()}


class Update(Part):
    """Which tensors learn, how fast, with which gradient?"""

    axis = "update"

    def optimizer(
        self, layers: Mapping[str, "Adapted"], others: Sequence[Tensor], lr: float, **settings: Any
    ) -> torch.optim.Optimizer:
        """An optimizer over each trained tensor once; `others` are modules trained in full."""
        raise NotImplementedError  # abstract


class Base(Part):
    """How is the frozen weight stored?"""

    axis = "base"
    lossy: ClassVar[bool] = False  # the stored weight differs from the one given

    def store(self, W: Tensor) -> "Stored":
        """Stores W [m, n]."""
        raise NotImplementedError  # abstract


class Stored(torch.nn.Module):
    """A frozen [m, n] matrix in some storage, which moves with the model."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.shape, self.dtype = (W.shape[0], W.shape[1]), W.dtype

    def dense(self) -> Tensor:
        """The matrix [m, n] in `dtype`; decoded where the storage is a code."""
        raise NotImplementedError  # abstract

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., n] -> x W^T + bias [..., m], keeping for backward nothing but the storage."""
        return frozen_product(x, self.dense, bias)

    @property
    def bits(self) -> int:
        """What the storage holds, in bits, all its tensors counted."""
        return 8 * sum(t.nbytes for t in (*self.buffers(), *self.parameters()))


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for an fp64 model: what trained tensors are kept in."""
    return torch.promote_types(dtype, torch.float32)


def kaiming(r: int, n: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """[r, n] from U(-1/sqrt(n), 1/sqrt(n)), torch's `kaiming_uniform_(a=sqrt(5))` of loralib.

    Drawn on the CPU in fp32, so that every device and dtype gets the same numbers.
    """
    unit = torch.rand(r, n, generator=generator, dtype=torch.float32)
    return ((2 * unit - 1) / math.sqrt(n)).to(like)
