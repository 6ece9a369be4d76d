"""One layer of several slices: a product by the frozen matrix for all rows, and what each adds.

Legend: K slices, t rows of a slice (its sequences' tokens), R the largest rank. The rows of a batch
are those of the first slice, then of the second, and so on.

Two factors of other ranks are one batched product, padded with zeros, and so are their gradients:

>>> from .dense import Dense
>>> W, x = torch.randn(5, 6), torch.randn(8, 6, requires_grad=True)
>>> pairs = [(torch.randn(r, 6, requires_grad=True), torch.randn(5, r, requires_grad=True))
...          for r in (1, 3)]
>>> whole = Dense(W, W.dtype)
>>> y = beside(x, None, whole, Stacks(), 8, [2.0, 0.5], [None, None], pairs)
>>> own = [F.linear(part, W + s * B @ A) for part, s, (A, B) in zip(x.chunk(2), (2, 0.5), pairs)]
>>> torch.allclose(y, torch.cat(own), atol=1e-4)
True
>>> tensors = [x, *pairs[0], *pairs[1]]
>>> grads = [torch.autograd.grad(out.square().sum(), tensors) for out in (y, torch.cat(own))]
>>> all(torch.allclose(a, b, atol=1e-2) for a, b in zip(*grads))
True
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._api import Form, Stored
from ._layer import Adapted, Frozen
from ._product import plus_low_rank
from ._registry import Incompatible

Pair = tuple[Tensor, Tensor]


class Share(Stored):
    """A slice's sight of a matrix that others see too: W, less what the slice's init took out."""

    def __init__(self, whole: Stored, shift: Pair | None) -> None:
        nn.Module.__init__(self)
        self.shape, self.dtype, self.group = whole.shape, whole.dtype, whole.group
        self.whole, self.shift = whole, shift
        self.lent: Pair | None = None  # (x, W x), where it was computed with others'
        self.asked = False

    def dense(self) -> Tensor:
        W = self.whole.dense()
        if self.shift is None:
            return W
        A0, B0 = self.shift
        return (W - B0 @ A0).to(W.dtype)

    @contextlib.contextmanager
    def decoded(self, dtype: torch.dtype) -> Iterator[Tensor]:
        if self.shift is not None:
            yield self.dense().to(dtype)
            return
        with self.whole.decoded(dtype) as W:
            yield W

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.lent is not None and _same(x, self.lent[0]):
            self.asked = True
            y = self.lent[1] if bias is None else self.lent[1] + bias
        else:
            y = self.whole.product(x, bias)
        return y if self.shift is None else plus_low_rank(y, x, *self.shift, -1.0)

    def given(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        here = self.shift is not None or (self.lent is not None and _same(x, self.lent[0]))
        return self.product(x, bias) if here else None

    def resident(self, dtype: torch.dtype) -> Tensor | None:
        return self.whole.resident(dtype) if self.shift is None else None

    @contextlib.contextmanager
    def lend(self, x: Tensor, y: Tensor) -> Iterator[None]:
        """Within it, the product of x by W is y."""
        self.lent, self.asked = (x, y), False
        try:
            yield
        finally:
            self.lent = None

    def histogram(self) -> Tensor | None:
        return self.whole.histogram()

    @property
    def decoded_bytes(self) -> int:
        return self.whole.decoded_bytes


def _same(x: Tensor, y: Tensor) -> bool:
    """The very numbers, not equal ones: autograd may have wrapped them anew on their way."""
    steps = (
        [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in (x, y)
    )
    return (x.data_ptr(), x.shape, x.dtype) == (y.data_ptr(), y.shape, y.dtype) and (
        next(steps) == next(steps)
    )


class Rows:
    """Which rows of the present batch are whose. The layers of a pack look here."""

    def __init__(self) -> None:
        self.live: list[int] = []  # the slices in the batch, in the order of their rows
        self.counts: list[int] = []  # rows of each
        self.lengths: list[int] = []  # what each would be padded to alone
        self.longest = 0
        self.streams: dict[int, Tensor] = {}  # each slice's state of torch's global generator

    def split(self, x: Tensor, first: int = 0) -> Sequence[Tensor]:
        """The rows of the first `first` slices together, if any, then those of each other one."""
        if x.shape[0] != sum(self.counts):
            raise Incompatible("the model mixes the rows of a batch")
        counts = self.counts[first:]
        return x.split([sum(self.counts[:first]), *counts] if first else counts)

    def cut(self, x: Tensor, i: int) -> Tensor:
        """A slice's rows [rows, T, ...] as long as they would be alone."""
        timed = x.ndim == 3 or (x.ndim == 2 and not x.is_floating_point())
        short = timed and self.lengths[i] < self.longest == x.shape[1]
        return x[:, : self.lengths[i]] if short else x

    def widen(self, y: Tensor, i: int) -> Tensor:
        """The inverse of `cut`; what is filled in is nobody's token."""
        short = y.ndim == 3 and y.shape[1] == self.lengths[i] < self.longest
        return F.pad(y, (0, 0, 0, self.longest - self.lengths[i])) if short else y

    @contextlib.contextmanager
    def stream(self, k: int) -> Iterator[None]:
        """Within it torch's global generator is the slice's own."""
        others = torch.get_rng_state()
        torch.set_rng_state(self.streams[k])
        try:
            yield
        finally:
            self.streams[k] = torch.get_rng_state()
            torch.set_rng_state(others)


class Layer(nn.Module):
    """What stands where slices have layers of their own, `parts`; `frozen`: what they share.

    The parts are no submodules: each belongs to the model of its slice.
    """

    def __init__(self, rows: Rows, parts: Sequence[nn.Module], frozen: Frozen | None) -> None:
        super().__init__()
        self.rows, self.parts, self.frozen, self.stacks = rows, tuple(parts), frozen, Stacks()
        self.ways: dict[int, str] = {}
        self.draws = [any(isinstance(m, Adapted) and m.p_drop > 0 for m in part.modules())
                      for part in parts]  # fmt: skip

    @property
    def weight(self) -> Any:
        """Of the first slice: code of a model that asks for its dtype or device finds it."""
        return self.parts[0].weight

    def forward(self, x: Tensor) -> Tensor:
        if self.frozen is None:
            parts = zip(self.rows.live, self.rows.split(x), strict=True)
            return torch.cat([self._own(i, k, own, None) for i, (k, own) in enumerate(parts)])
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return self._shared(x)
        if x.is_floating_point() and x.dtype != torch.float64:  # as `Adapted` has it
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return self._shared(x)

    def _own(self, i: int, k: int, x: Tensor, y: Tensor | None) -> Tensor:
        """A slice's own forward on its rows x, whose product by the base is y (None: unknown)."""
        part: Any = self.parts[k]
        x = self.rows.cut(x, i)
        with contextlib.ExitStack() as within:
            if self.draws[k]:
                within.enter_context(self.rows.stream(k))
            if y is not None:
                within.enter_context(part.frozen.stored.lend(x, self.rows.cut(y, i)))
            return self.rows.widen(part(x), i)

    def _shared(self, x: Tensor) -> Tensor:
        """The factors of those that come first in one product; the others one by one."""
        assert self.frozen is not None
        live = self.rows.live
        ways = [self._way(k, x) for k in live]
        low = next((i for i, way in enumerate(ways) if way != "factors"), len(live))
        parts: list[Any] = [self.parts[k] for k in live[:low]]
        pairs = [part.form.factors(part.p) for part in parts]
        shifts = [part.frozen.stored.shift for part in parts]
        scales = [part.s for part in parts]
        first = sum(self.rows.counts[:low])
        simple = all(way == "base" for way in ways[low:])
        bias = self.frozen.bias if simple else None
        pieces = [] if low == len(live) else list(self.rows.split(x, low))
        alone = [i for i in range(low, len(live)) if ways[i] == "own"]
        shared = x
        if alone:
            offset = 1 if low else 0
            shared = [p for j, p in enumerate(pieces) if j - offset + low not in alone]
            shared = torch.cat(shared) if shared else None
        y = None
        if shared is not None:
            y = beside(shared, bias, self.frozen.stored, self.stacks, first, scales, shifts, pairs)
        if simple:
            assert y is not None
            return y
        return self._mixed(y, first, low, ways, pieces)

    def _mixed(
        self, y: Tensor | None, first: int, low: int, ways: list[str], pieces: list[Tensor]
    ) -> Tensor:
        """All rows again: those of the product `y` [shared rows, ..., m], and those it lacks."""
        live, counts, out = self.rows.live, self.rows.counts, []
        sizes = [counts[i] for i in range(low, len(live)) if ways[i] != "own"]
        products = iter(()) if y is None else iter(y.split([first, *sizes] if low else sizes))
        if low:
            out.append(self._biased(next(products)))
            pieces = pieces[1:]
        for i, x in zip(range(low, len(live)), pieces, strict=True):
            if ways[i] == "own":
                out.append(self._own(i, live[i], x, None))
            elif ways[i] == "base":
                out.append(self._biased(next(products)))
            else:
                out.append(self._own(i, live[i], x, next(products)))
        return torch.cat(out)

    def _biased(self, y: Tensor) -> Tensor:
        bias: Any = self.frozen.bias  # type: ignore[union-attr]
        return y if bias is None else y + bias.to(y.dtype)

    def _way(self, k: int, x: Tensor) -> str:
        """How a slice takes part: by its `factors`; by its own forward, which `asks` for the
        product of its input by the base or has its `own`; or with the `base` alone."""
        if k not in self.ways:
            self.ways[k] = way(self.parts[k], x)
        return self.ways[k]


def factored(layer: Adapted) -> bool:
    """Whether all that a layer adds to the base's product is s B A x, in training as well."""
    form = type(layer.form)
    plain = form.forward is Form.forward and form.bias is Form.bias
    return plain and not layer.p_drop and layer.form.factors(layer.p) is not None


def way(part: Any, x: Tensor) -> str:
    """See `Layer._way`; x: any rows that reach the part."""
    if not isinstance(part, Adapted):
        return "base"
    if factored(part):
        return "factors"
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        one = x[:1, :1].detach().contiguous()
        stored: Any = part.frozen.stored
        with stored.lend(one, one.new_zeros((*one.shape[:-1], part.out_features))):
            part(one)
            return "asks" if stored.asked else "own"


class Stacks:
    """The factors of a layer's slices side by side, A [K, R, n] and B [K, m, R], in buffers that
    are written anew each time and hold zeros, and what an init took out, where no factor is."""

    def __init__(self) -> None:
        self.key: Any = None

    def fill(
        self, like: Tensor, factors: tuple[Tensor, ...], scales: Sequence[float],
        shifts: Sequence[Pair | None],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The stacks in the dtype of `like`, and the scales [K, 1, R]; factors: A, B, A, B, ..."""
        ranks = [A.shape[0] for A in factors[::2]]
        key = ranks, scales, [id(shift) for shift in shifts], like.dtype, like.device
        if key != self.key:
            self._make(like, factors, ranks, scales, shifts)
            self.key = key
        if self.even and factors[0].dtype == like.dtype:
            torch.stack(factors[::2], out=self.A)
            torch.stack(factors[1::2], out=self.B)
        else:
            torch._foreach_copy_(self.into, factors)
        return self.A, self.B, self.scales

    def _make(
        self, like: Tensor, factors: tuple[Tensor, ...], ranks: list[int], scales: Sequence[float],
        shifts: Sequence[Pair | None],
    ) -> None:  # fmt: skip
        taken = [0 if shift is None else shift[0].shape[0] for shift in shifts]
        K, R = len(ranks), max(r + more for r, more in zip(ranks, taken, strict=True))
        n, m = factors[0].shape[1], factors[1].shape[0]
        self.A, self.B = like.new_zeros(K, R, n), like.new_zeros(K, m, R)
        self.scales = like.new_ones(K, 1, R)
        self.even = min(ranks) == R
        self.into: list[Tensor] = []
        for k, (r, shift) in enumerate(zip(ranks, shifts, strict=True)):
            self.into += [self.A[k, :r], self.B[k, :, :r]]
            self.scales[k, :, :r] = scales[k]
            if shift is not None:
                end = r + shift[0].shape[0]
                self.A[k, r:end], self.B[k, :, r:end] = shift[0], -shift[1]


class _Beside(torch.autograd.Function):
    """x W^T + bias, and in the first rows s_k x_k A_k^T B_k^T; keeps x and s x A^T."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, whole: Stored, stacks: Stacks, first: int,
        scales: Sequence[float], shifts: Sequence[Pair | None], *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        with whole.decoded(x.dtype) as W:
            y = F.linear(x, W, None if bias is None else bias.to(x.dtype))
        ctx.settings = whole, first, [(t.shape, t.dtype) for t in factors]
        if not factors:
            ctx.save_for_backward(x)
            return y
        ctx.stacks = A, B, s = stacks.fill(x, factors, scales, shifts)
        K = A.shape[0]
        down = torch.bmm(x[:first].reshape(K, -1, x.shape[-1]), A.mT).mul_(s)
        y[:first].view(K, -1, y.shape[-1]).baddbmm_(down, B.mT)
        ctx.save_for_backward(x, down)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        whole, first, given = ctx.settings
        x, *rest = ctx.saved_tensors
        g, gx = grads[0], None
        if ctx.needs_input_grad[0]:
            with whole.decoded(g.dtype) as W:
                gx = g @ W
        found: list[Any] = [None] * len(given)
        if given:
            (A, B, s), down = ctx.stacks, rest[0]
            K = A.shape[0]
            own = g[:first].reshape(K, -1, g.shape[-1])
            up = torch.bmm(own, B).mul_(s)
            found[::2] = torch.bmm(up.mT, x[:first].reshape(K, -1, x.shape[-1])).unbind()
            found[1::2] = torch.bmm(own.mT, down).unbind()
            if gx is not None:
                gx[:first].view(K, -1, gx.shape[-1]).baddbmm_(up, A)
            found = [
                grad[: shape[0], : shape[1]].to(dtype) if needed else None
                for grad, (shape, dtype), needed in zip(
                    found, given, ctx.needs_input_grad[7:], strict=True
                )
            ]
        return gx, None, None, None, None, None, None, *found


def beside(
    x: Tensor, bias: Tensor | None, whole: Stored, stacks: Stacks, first: int,
    scales: Sequence[float], shifts: Sequence[Pair | None], pairs: Sequence[Pair],
) -> Tensor:  # fmt: skip
    """x [rows, ..., n] -> W x + bias [rows, ..., m], and s_k B_k A_k x in equal portions of the
    first `first` rows; the shifts (A0, B0) take B0 A0 x from it. One derivative, not two."""
    factors = [t for pair in pairs for t in pair]
    return _Beside.apply(x, bias, whole, stacks, first, scales, shifts, *factors)  # type: ignore[return-value]
