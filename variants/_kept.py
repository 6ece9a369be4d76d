"""Activations that backward makes again from others that are kept.

While a model with an adapter runs, autograd keeps what came out of a cheap operation (`MADE`: a
product by elements, an activation, a cast) as what went into it, where that is kept anyway. In a
gated MLP down(silu(gate) * up) it keeps gate and up alone; of a norm that computes in fp32 its
input in the model's dtype, and nothing of what comes out. The same operation makes the same numbers
again, to the bit.

>>> import variants
>>> class Net(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(64, 64) for _ in range(3))
...     def forward(self, x):
...         return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
>>> def kept(net):
...     found = {}
...     def note(t):
...         found[t.data_ptr()] = t
...         return t
...     with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
...         y = net(x).sum()
...     return sum(t.shape == x.shape for t in found.values()), torch.autograd.grad(y, x)[0]
>>> net, x = Net(), torch.randn(32, 64, requires_grad=True)
>>> _ = variants.attach(net, "lora", rank=2)
>>> fewer, gradient = kept(net)  # x, gate, up
>>> handles = [hooks.clear() for hooks in (net._forward_pre_hooks, net._forward_hooks)]
>>> more, same = kept(net)
>>> fewer, more, torch.equal(gradient, same)
(3, 5, True)

torch.compile decides by itself what to keep. Before torch 2.8 nothing tells which hooks are there
already, and autograd keeps what it is given.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.nn import functional as F

from ._magnitude import rescale

log = logging.getLogger("variants")
# the hooks that are on top now, or None
top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # type: ignore[attr-defined]


class Held:
    """A tensor that is kept, as it is."""

    def __init__(self, t: Tensor) -> None:
        self.t, self.version = t.detach(), t._version

    def value(self) -> Tensor:
        if self.t._version != self.version:
            raise RuntimeError("a tensor that backward needs was changed in place")
        return self.t


class Made:
    """What an operation makes of others; made once for all that ask for it in a backward."""

    def __init__(self, operation: Callable[..., Tensor], *parts: "Held | Made") -> None:
        self.operation, self.parts = operation, parts
        self.uses = 0
        self.found: Tensor | None = None
        for part in parts:
            if isinstance(part, Made):
                part.uses += 1

    def value(self) -> Tensor:
        found = self.found
        if found is None:
            with torch.no_grad():
                found = self.operation(*(part.value() for part in self.parts))
        self.uses -= 1
        self.found = found if self.uses > 0 else None
        return found


Kept = Held | Made


def _cast(node: Any) -> Callable[..., Tensor] | None:
    made, of = node._input_metadata[0], _origin(node)
    if of is None or made.device != of.device:
        return None
    return partial(Tensor.to, dtype=made.dtype)


def _origin(node: Any) -> Any:
    """(dtype, device and shape of) what the cast of `node` took."""
    before, output = node.next_functions[0]
    return None if before is None else before._input_metadata[output]


# by the node of its derivative: an operation, and its arguments that are tensors, by the names or
# numbers under which the node saves them
MADE: dict[str, tuple[Callable[[Any], Callable[..., Tensor] | None], tuple[Any, ...]]] = {
    "MulBackward0": (lambda node: torch.mul, ("self", "other")),
    "SiluBackward0": (lambda node: F.silu, ("self",)),
    "GeluBackward0": (lambda node: partial(F.gelu, approximate=node._saved_approximate), ("self",)),
    "ToCopyBackward0": (_cast, ("self",)),
    "_RescaledBackward": (lambda node: rescale, (0, 1)),
}


def _saved(node: Any, name: str | int) -> Any:
    """What a `Pass` made of an argument that the node saved; None, or another thing: it did not."""
    if isinstance(name, int):
        return node._raw_saved_tensors[name].data
    saved = getattr(node, f"_raw_saved_{name}", None)
    return None if saved is None else saved.data


class Pass:
    """One forward pass; `hooks`: the saved-tensor hooks that were there before, if any."""

    def __init__(self, hooks: Any) -> None:
        self.hooks = hooks
        self.known: dict[tuple[Node, int], Kept] = {}

    def _held(self, t: Tensor) -> Kept:
        if self.hooks is None:
            return Held(t)
        pack, unpack = self.hooks
        return Made(partial(unpack, pack(t)))

    def pack(self, t: Tensor) -> Kept:
        if t.grad_fn is None:
            kept = self._held(t)
        else:
            key = t.grad_fn, t.output_nr
            kept = self.known.get(key) or self._made(*key) or self._narrow(t) or self._held(t)
            self.known[key] = kept
        if isinstance(kept, Made):
            kept.uses += 1
        return kept

    def _made(self, node: Any, output: int) -> Made | None:
        """What came out of the operation of `node`, where all that went in is kept."""
        operation_of, names = MADE.get(node.name(), (None, ()))
        operation = None if operation_of is None else operation_of(node)
        if operation is None:
            return None
        parts: list[Kept] = []
        for name, before in zip(names, node.next_functions, strict=True):
            part = _saved(node, name)
            if not isinstance(part, Held | Made):
                if before[0] is None:
                    return None
                part = self.known.get(before) or self._made(*before)
                if part is None:
                    return None
                self.known[before] = part
            parts.append(part)
        return Made(operation, *parts)

    def _narrow(self, t: Tensor) -> Made | None:
        """A cast to more bits, from a copy in the fewer that it had."""
        node = t.grad_fn
        of = _origin(node) if node is not None and node.name() == "ToCopyBackward0" else None
        if of is None or of.dtype.itemsize >= t.dtype.itemsize or not of.dtype.is_floating_point:
            return None
        return Made(partial(Tensor.to, dtype=t.dtype), self._held(t.detach().to(of.dtype)))


class Hooked:
    """What happens about a module's forward, for as long as it is installed there."""

    def install(self, module: nn.Module) -> "End":
        """From now on."""
        module.register_forward_pre_hook(self.begin)
        module.register_forward_hook(self.end, always_call=True)
        return End(self, module)

    def begin(self, module: nn.Module, *_: Any) -> None:
        raise NotImplementedError  # abstract

    def end(self, module: nn.Module, *_: Any) -> None:
        raise NotImplementedError  # abstract

    def leave(self) -> None:
        """Ends what a forward that was broken off has left open."""


@dataclass
class End:
    """Ends it there. A copy of the model and of this ends the copy's."""

    what: Hooked
    module: nn.Module

    def __call__(self) -> None:
        self.what.leave()
        for hooks in (self.module._forward_pre_hooks, self.module._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__self__", None) is self.what:
                    del hooks[key]
        always = self.module._forward_hooks_always_called
        for key in always.keys() - self.module._forward_hooks.keys():
            del always[key]


class Remaking(Hooked):
    """The hooks of a model that keep a forward pass of it so."""

    def __init__(self) -> None:
        self.open: dict[int, list[saved_tensors_hooks | None]] = {}  # by thread

    def install(self, module: nn.Module) -> End:
        """From now on, where torch tells what this has to know."""
        if top_hooks is None:
            log.info("torch %s: backward keeps all that it is given", torch.__version__)
            return End(self, module)
        return super().install(module)

    def begin(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        within = None
        if torch.is_grad_enabled():
            self.leave()
            assert top_hooks is not None
            now = Pass(top_hooks(True))
            within = saved_tensors_hooks(now.pack, lambda kept: kept.value())
            within.__enter__()
        self.open.setdefault(get_ident(), []).append(within)

    def end(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        own = self.open.get(get_ident())  # None: `begin` was compiled, this is not
        within = own.pop() if own else None
        if not own:
            self.open.pop(get_ident(), None)
        if within is not None:
            within.__exit__()

    def leave(self) -> None:
        """Torch does not call hooks at the end of a forward that an interrupt has broken off."""
        own = self.open.get(get_ident(), [])
        while own and isinstance(getattr((top_hooks(True) or [None])[0], "__self__", None), Pass):  # type: ignore[misc]
            within = own.pop()
            if within is not None:
                within.__exit__()
