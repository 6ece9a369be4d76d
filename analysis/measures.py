"""The analyses of `python -m analysis.inspect` by name, and what runs them."""

from collections.abc import Sequence
from typing import Any

from experiments.tasks import BadInput
from variants import Incompatible

from .by_matrix import MATRICES, Matrix
from .by_model import DATA, OTHERS
from .opened import Asked, Opened

NAMES = (*MATRICES, *OTHERS)
DEFAULT = tuple(name for name in NAMES if name not in DATA)


def measured(o: Opened, what: Sequence[str], asked: Asked) -> tuple[dict[str, Any], dict[str, str]]:
    """({analysis: its numbers}, {analysis: why it cannot be had}), in the order of `what`.

    An analysis of one matrix after the other has {matrix: numbers}; the dear parts of a matrix are
    computed once for all of them, and freed before the next one.
    """
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    own = [name for name in what if name in MATRICES]
    if "quantization" in own and not o.adapter.choice.base.lossy:
        base = o.adapter.choice.base
        missing["quantization"] = f"base {base.name} stores every number as it is"
        own.remove("quantization")
    for layer in o.adapter.layers if own else ():
        x = Matrix(o, layer)
        for name in own:
            found.setdefault(name, {})[layer] = MATRICES[name](x, asked)
    for name in (name for name in what if name in OTHERS):
        try:
            found[name] = OTHERS[name](o, asked)
        except (BadInput, Incompatible) as error:
            missing[name] = str(error)
    return {name: found[name] for name in what if name in found}, missing
