"""Kinds of layers: each shows its weight as a matrix W [m, n], and computes with another one.

This is the one place that knows them. Forms, inits and bases see the matrix and nothing else.

A module that is of none; a bias that is left out; what W multiplies; rows of an embedding:

>>> import torch
>>> from transformers.pytorch_utils import Conv1D
>>> kind_of(nn.GELU()), kind_of(Conv1D(3, 2)).__name__, matrix_of(Conv1D(3, 2)).shape
(None, 'Conv1DKind', torch.Size([3, 2]))
>>> conv = nn.Conv2d(2, 3, 2, stride=2, padding=1)
>>> kind, x, W = Conv2dKind(conv), torch.randn(1, 2, 5, 5), matrix_of(conv)
>>> y, free = conv(x), conv(x) - conv.bias[:, None, None]
>>> torch.allclose(kind.product(x, W, conv.bias), y), torch.allclose(kind.product(x, W, None), free,
...     atol=1e-6), torch.allclose((kind.inputs(x) @ W.T).mT.view_as(free), free, atol=1e-6)
(True, True, True)
>>> torch.allclose(kind.plain(W, conv.bias)(x), y)
True
>>> A, B, ids = torch.randn(2, 5, requires_grad=True), torch.randn(3, 2), torch.tensor([4, 0, 4])
>>> found = EmbeddingKind(nn.Embedding(5, 3, padding_idx=0)).low_rank(ids, A, B)
>>> torch.allclose(found, (B @ A).T[ids])
True
>>> found.sum().backward()
>>> [bool(column.any()) for column in A.grad.T]  # 0 stands for padding, which does not learn
[False, False, False, False, True]
>>> stack = torch.randn(3, 2, 4)
>>> torch.equal(matrix_of(Expert(stack, 1, True)), stack[1].T)
True
"""

import copy
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F


class Keeper(nn.Module):
    """A layer that keeps its matrix in a storage of its own, and knows of what kind it was."""

    kind: "Kind"
    stored: Any


class Kind:
    """`nn.Linear`, stored as [m, n]: y = x W^T + bias. Other kinds say what differs."""

    linear = True  # y = x W^T + bias over the last axis of x: a form's fast path fits
    matrices = True  # W is a matrix that acts on features, not a vector of gains
    drops = True  # its input can be dropped out

    def __init__(self, module: Any) -> None:
        if isinstance(module, Keeper):
            self.shell = module.kind.shell
            return
        self.shell = copy.copy(module)  # the module without its numbers: settings, and its forward
        self.shell._parameters = {
            k: p if p is None else nn.Parameter(p.detach().to("meta"), requires_grad=False)
            for k, p in module._parameters.items()
        }

    @staticmethod
    def owns(module: nn.Module) -> bool:
        return type(module) is nn.Linear

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The stored weight (or its gradient) as W [m, n]."""
        return weight

    def from_matrix(self, W: Tensor) -> Tensor:
        """W [m, n] as the module stores it."""
        return W

    def matrix(self, module: Any) -> Tensor:
        if isinstance(module, Keeper):
            return module.stored.dense()
        return self.to_matrix(module.weight)

    def plain(self, W: Tensor, bias: Tensor | None) -> nn.Module:
        """A module of this kind again, with W and `bias`."""
        module = copy.copy(self.shell)
        weight = nn.Parameter(self.from_matrix(W).contiguous(), requires_grad=False)
        module._parameters = dict(self.shell._parameters) | {"weight": weight}
        if "bias" in module._parameters:
            module._parameters["bias"] = (
                None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
            )
        return module

    def product(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output with W in place of its own."""
        return F.linear(x, W.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor | None:
        """B A x by way of A x, or None where there is no short way."""
        return None

    @property
    def measured(self) -> bool:
        """Whether `inputs` can tell what W multiplies."""
        return self.drops

    def inputs(self, x: Tensor) -> Tensor:
        """What W multiplies, [..., n], of the layer's input."""
        return x


class Conv1DKind(Kind):
    """transformers' `Conv1D` (GPT-2): stored transposed, as [n, m]."""

    @staticmethod
    def owns(module: nn.Module) -> bool:
        cls = type(module)
        return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def from_matrix(self, W: Tensor) -> Tensor:
        return W.t()


class Shell(Kind):
    """A kind whose product is the module's own forward, with another weight put into it."""

    linear = False

    def product(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        swapped = {"weight": self.from_matrix(W)}
        own = getattr(self.shell, "bias", None)
        if bias is None and own is not None:  # without it; the shell's own has no numbers
            bias = W.new_zeros(own.shape)
        if bias is not None:
            swapped["bias"] = bias
        if x.is_floating_point():
            swapped = {k: t.to(x.dtype) for k, t in swapped.items()}
        else:
            swapped = {k: t.to(self.shell.weight.dtype) for k, t in swapped.items()}
        return functional_call(self.shell, swapped, (x,))


class EmbeddingKind(Shell):
    """`nn.Embedding` of N rows of m features, as W [m, N] on a one-hot input."""

    drops = False

    @staticmethod
    def owns(module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def from_matrix(self, W: Tensor) -> Tensor:
        return W.t()

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor | None:
        if type(self.shell) is not nn.Embedding or self.shell.max_norm is not None:
            return None  # one that scales what it finds: by its own forward
        found = F.embedding(x, A.t(), self.shell.padding_idx)
        return F.linear(found, B)


class Conv2dKind(Shell):
    """`nn.Conv2d` as W [out channels, in channels / groups x height x width]."""

    @staticmethod
    def owns(module: nn.Module) -> bool:
        return type(module) is nn.Conv2d

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def from_matrix(self, W: Tensor) -> Tensor:
        return W.view(self.shell.weight.shape)

    @property
    def measured(self) -> bool:
        s = self.shell  # patches of other convolutions are not those of `unfold`
        return s.groups == 1 and s.padding_mode == "zeros" and not isinstance(s.padding, str)

    def inputs(self, x: Tensor) -> Tensor:
        s = self.shell
        return F.unfold(x, s.kernel_size, s.dilation, s.padding, s.stride).mT


class NormKind(Shell):
    """LayerNorm, RMSNorm and their like: the vector of gains as W [m, 1]."""

    matrices = False
    drops = False

    @staticmethod
    def owns(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return "Norm" in type(module).__name__ and isinstance(weight, Tensor) and weight.ndim == 1

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight[:, None]

    def from_matrix(self, W: Tensor) -> Tensor:
        return W[:, 0]


class Expert(nn.Module):
    """One expert's matrix out of a stack [experts, ., .] of a mixture-of-experts layer."""

    def __init__(self, stack: Tensor, index: int, transposed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(stack.detach()[index], requires_grad=False)
        self.index, self.count, self.transposed = index, stack.shape[0], transposed


class ExpertKind(Kind):
    """An `Expert`, stored as [m, n], or as [n, m] where the model says `is_transposed`.

    The model multiplies by it, so a change must pass through the dense W (`Experts`).
    """

    linear = False
    drops = False

    @staticmethod
    def owns(module: nn.Module) -> bool:
        return type(module) is Expert

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.t() if self.shell.transposed else weight

    def from_matrix(self, W: Tensor) -> Tensor:
        return W.t() if self.shell.transposed else W


KINDS = (Kind, Conv1DKind, EmbeddingKind, Conv2dKind, NormKind, ExpertKind)


def kind_of(module: nn.Module) -> Any:
    """The kind that owns the module, or None."""
    if isinstance(module, Keeper):
        return type(module.kind)
    for kind in KINDS:
        if kind.owns(module):
            return kind
    return None


def shape_of(module: Any) -> tuple[int, int]:
    """(m, n) of the module's matrix, without decoding it."""
    m, n = module.stored.shape if isinstance(module, Keeper) else matrix_of(module).shape
    return m, n


def matrix_of(module: nn.Module) -> Tensor:
    """The module's weight as a matrix [m, n]."""
    return kind_of(module)(module).matrix(module)
