"""The stacked expert weights of mixture-of-experts models (Mixtral, Qwen3-MoE in transformers 5).

Such a model keeps the matrices of all its experts in one parameter [experts, ., .] and multiplies
by it in ways of its own. `unstack` puts a list of single matrices in that parameter's place, each
of which can be frozen or adapted like any layer, and hands the model their stack while its forward
runs; `restack` makes it a parameter again.

A model of three experts, stored transposed, of which one is adapted: it is what the matrices say,
merged as well, and the stack is the model's own again:

>>> class Experts(nn.Module):
...     is_transposed = True
...     def __init__(self):
...         super().__init__()
...         self.w1 = nn.Parameter(torch.randn(3, 4, 5))
...     def forward(self, x):
...         return torch.einsum("en,enm->em", x, self.w1)
>>> import variants
>>> model, x = nn.Sequential(Experts()), torch.randn(3, 4)
>>> before, stack = model(x), model[0].w1.detach().clone()
>>> adapter = variants.attach(model, "lora", rank=2, targets="w1.1")
>>> layer = adapter.layers["0.w1.1"]
>>> torch.allclose(model(x), before), torch.equal(layer.W0, stack[1].T)
(True, True)
>>> _ = torch.nn.init.normal_(layer.params["B"])
>>> wanted = torch.stack([stack[0], layer.weight.T, stack[2]])
>>> torch.allclose(model(x), torch.einsum("en,enm->em", x, wanted), atol=1e-4)
True
>>> _ = adapter.merge()
>>> torch.allclose(model[0].w1, wanted, atol=1e-5), "w1" in vars(model[0])
(True, False)
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._kinds import Expert

NAMES = ("gate_up_proj", "down_proj", "gate_proj", "up_proj", "w1", "w2", "w3")


def stacks(module: nn.Module) -> dict[str, Tensor]:
    """The stacked matrices of an experts module, by name."""
    own = module._parameters
    return {k: p for k, p in own.items() if k in NAMES and p is not None and p.ndim == 3}


def experts(module: Any) -> Iterator[tuple[str, Expert]]:
    """("down_proj.3", its matrix) of each expert, in views of the stack."""
    for name, stack in stacks(module).items():
        for index in range(stack.shape[0]):
            yield f"{name}.{index}", Expert(stack, index, getattr(module, "is_transposed", False))


class Unstacked:
    """What an unstacked module's class has before its own: the stack, while its forward runs."""

    unstacked: tuple[str, ...]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in self.unstacked:
            self.__dict__[name] = torch.stack([stored(part) for part in self._modules[name]])
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            for name in self.unstacked:
                del self.__dict__[name]


def stored(part: Any) -> Tensor:
    """The matrix of an expert now, as the model stores it."""
    from ._layer import effective

    if isinstance(part, Expert):
        return part.weight
    return part.kind.from_matrix(effective(part))


def unstack(module: Any) -> None:
    """Puts lists of `Expert` in place of the stacks."""
    names = tuple(stacks(module))
    transposed = getattr(module, "is_transposed", False)
    for name in names:
        stack = module._parameters.pop(name)
        parts = [Expert(stack, index, transposed) for index in range(stack.shape[0])]
        module.add_module(name, nn.ModuleList(parts))
    cls = type(module)
    module.__class__ = type(cls.__name__, (Unstacked, cls), {"unstacked": names})


def restack(module: Any) -> None:
    """The inverse of `unstack`: every part must be an `Expert` again."""
    for name in module.unstacked:
        stack = torch.stack([part.weight for part in module._modules.pop(name)])
        module.register_parameter(name, nn.Parameter(stack, requires_grad=False))
    module.__class__ = type(module).__mro__[2]


@contextmanager
def apart(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Where `paths` name experts, their stacks as lists of views; then the very stacks again."""
    own = {path.rsplit(".", 2)[0] for path in paths}
    kept = [
        (m, m._parameters.copy()) for name, m in model.named_modules() if name in own and stacks(m)
    ]
    for module, _ in kept:
        unstack(module)
    try:
        yield
    finally:
        for module, parameters in kept:
            for name in module.unstacked:  # type: ignore[union-attr]
                del module._modules[name]  # type: ignore[arg-type]
            module._parameters = parameters
            module.__class__ = type(module).__mro__[2]
