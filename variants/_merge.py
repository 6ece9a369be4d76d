"""Merging into a base of few bits, when that is asked for, and out of it again.

`adapter.merge()` gives plain layers of decoded numbers, so that nothing is rounded twice.
`adapter.merge(requantize=True)` stores each merged matrix again as the base stores, which loses a
part of what was trained; `merge_error` says how much. `dequantize` makes plain layers of those.

Layers of the base's own storage, with the error against the exact sum; then plain ones with the
same outputs:

>>> import variants
>>> net, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(2, 64)
>>> adapter = variants.attach(net, "lora", base="nf4", rank=2, targets="0")
>>> W0 = adapter.layers["0"].W0.clone()
>>> _ = nn.init.normal_(adapter.layers["0"].params["B"], std=0.01)
>>> W = adapter.layers["0"].weight.detach()
>>> net = adapter.merge(requantize=True)
>>> [type(layer).__name__ for layer in net]
['Frozen', 'ReLU', 'Frozen']
>>> lost = ((net[0].weight - W).norm() / W.norm()).item()
>>> lost == adapter.merge_error, 0.01 < lost < 0.2, torch.equal(net[0].weight, W0)
(True, True, False)
>>> y = net(x)
>>> torch.allclose(variants.dequantize(net)(x), y, atol=1e-6), type(net[0]).__name__
(True, 'Linear')
"""

from typing import Any

import torch
from torch import nn

from ._experts import Expert, Unstacked, restack
from ._layer import Adapted, Frozen, Fused, effective, own_bias, plain, replace, stand_ins
from ._registry import Incompatible


def stored_again(layer: Any) -> tuple[nn.Module, float]:
    """A layer with its merged matrix in its base's storage, and the relative error of that.

    By the form, where it can say its change in the base's own codes, exactly.
    """
    if isinstance(layer, Fused):
        slices = {name: stored_again(part) for name, part in layer.slices.items()}
        worst = max(error for _, error in slices.values())
        return Fused({name: part for name, (part, _) in slices.items()}, layer.kind), worst
    if isinstance(layer, Frozen):
        return layer, 0.0
    base, old, W0 = layer.frozen.base, layer.frozen.stored, layer.W0
    W = layer.form.weight(W0, layer.params, layer.full_s)
    stored = layer.form.absorbed(old, layer.params, layer.full_s)
    if stored is None:  # a form that leaves the weight alone leaves its codes alone
        stored = old if W is W0 else base.store(W.to(old.dtype))
    lost = torch.linalg.vector_norm(stored.dense().to(W.dtype) - W)
    size = torch.linalg.vector_norm(W)
    error = (lost / size).item() if size > 0 else lost.item()
    bias = own_bias(layer)
    if bias is not None:
        bias = nn.Parameter(bias.detach(), requires_grad=False)
    return Frozen(stored, bias, layer.kind, base), error


def is_lossy(layer: Any) -> bool:
    """Whether the layer, or any slice of a fused one, is stored by a lossy base."""
    if isinstance(layer, Fused):
        return any(is_lossy(part) for part in layer.slices.values())
    return (layer.frozen if isinstance(layer, Adapted) else layer).base.lossy


def dequantize(model: nn.Module) -> nn.Module:
    """Plain layers of decoded numbers in place of what `merge(requantize=True)` left.

    Raises:
        Incompatible: an adapter sits in the model, whose own merge() is meant then.
    """
    layers = list(stand_ins(model))
    for path, layer in layers:
        parts = layer.slices.values() if isinstance(layer, Fused) else (layer,)
        if any(isinstance(part, Adapted) for part in parts):
            raise Incompatible(f"dequantize: an adapter sits at {path}: merge() or detach() it")
    with torch.no_grad():
        for path, layer in layers:
            replace(model, path, plain(layer, effective, own_bias=False))
        restack_all(model)
    return model


def restack_all(model: nn.Module) -> None:
    """Makes stacks again of the experts that are plain matrices now."""
    for module in model.modules():
        if isinstance(module, Unstacked):
            parts = (part for name in module.unstacked for part in module._modules[name])  # type: ignore[union-attr]
            if all(isinstance(part, Expert) for part in parts):
                restack(module)
