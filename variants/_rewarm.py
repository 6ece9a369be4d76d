"""A warm-up of the learning rate for some tensors in the middle of a run.

An allocation knows no optimizer, but a step of any is as long as its rate. So each tensor that
warms up is kept as it was before the step, and goes only a share of the way. The allocation's state
holds `since` {tensor: the step after which it began} and `before` {tensor: its numbers}.

Of a warm-up of four steps that begins after step 10, steps 11 to 13 go a part of the way:

>>> layer = type("Layer", (), {"params": {"A": torch.zeros(1)}})
>>> state, layers = {}, {"x": layer}
>>> begin(state)
>>> hold(layers, state, 10, 4, [key_of("x", "A")])
>>> for step in range(11, 15):
...     _ = layer.params["A"].add_(1.0)
...     shorten(layers, state, step, 4)
...     hold(layers, state, step, 4)
...     print(step, round(layer.params["A"].item(), 2), list(state["before"]))
11 0.25 ['x:A']
12 0.75 ['x:A']
13 1.5 []
14 2.5 []
"""

from collections.abc import Iterable

import torch

from ._api import Layers, State


def begin(state: State) -> None:
    """Nothing warms up yet."""
    state["since"], state["before"] = {}, {}


def key_of(layer: str, tensor: str) -> str:
    """The name of a tensor in the state."""
    return f"{layer}:{tensor}"


def shorten(layers: Layers, state: State, step: int, length: int) -> None:
    """Makes the step that was just taken, number `step`, the part of it that the warm-up allows."""
    for key, before in state["before"].items():
        layer, _, k = key.rpartition(":")
        tensor, share = layers[layer].params[k], (step - state["since"][key]) / length
        tensor.copy_(torch.lerp(before, tensor, share))


def hold(
    layers: Layers,
    state: State,
    step: int,
    length: int,
    new: Iterable[str] = (),
) -> None:
    """Keeps the numbers of those that warm up in step + 1; `new` begin with it."""
    since = state["since"] | dict.fromkeys(new, step)
    state["since"] = {key: began for key, began in since.items() if step + 1 - began < length}
    state["before"] = {
        key: layers[key.rpartition(":")[0]].params[key.rpartition(":")[2]].detach().clone()
        for key in state["since"]
    }
