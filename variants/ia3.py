"""(IA)^3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning
(Liu et al., NeurIPS 2022), arXiv:2205.05638.

    W = diag(l) W0 and bias = l b0 (keys, values),    W = W0 diag(l) (second layer of the MLP)

Learned vectors scale keys, values and the MLP's inner activations, from l = 1. Scaling an output
scales its bias too, as in PEFT; scaling an input leaves it. Official code: r-three/t-few,
src/models/lora.py, which scales the output of wi_1 for the inner activations: of a gated MLP the
same numbers, as wi_1's product is linear in it. PEFT names the layers that scale their input
`feedforward_modules`; here they are `inputs`, roles or ends of names. There is no rank.

Rows for keys and values, with the bias; columns for `down`, without it:

>>> import torch
>>> form, W0 = IA3(), torch.ones(2, 3)
>>> form.rank_of(2, 3, 1, "h.0.k_proj"), form.rank_of(2, 3, 1, "h.0.mlp.down_proj")
(1, 2)
>>> form.shapes(2, 3, 1), form.shapes(2, 3, 2)
({'rows': (2,)}, {'columns': (3,)})
>>> rows, columns = {"rows": torch.tensor([2.0, 3.0])}, {"columns": torch.tensor([2.0, 3.0, 4.0])}
>>> form.weight(W0, rows, 1.0).tolist(), form.bias(torch.ones(2), rows).tolist()
([[2.0, 2.0, 2.0], [3.0, 3.0, 3.0]], [2.0, 3.0])
>>> form.weight(W0, columns, 1.0).tolist(), form.bias(torch.ones(2), columns).tolist()
([[2.0, 3.0, 4.0], [2.0, 3.0, 4.0]], [1.0, 1.0])
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._api import Form, Tensors
from ._layer import Adapted
from ._magnitude import rescaled
from ._registry import Incompatible, preset
from ._targets import role_of


@dataclass(frozen=True)
class IA3(Form, name="ia3"):
    """A gain for each output, or for each input, of a layer."""

    inputs: str = "down"
    """layers whose input is scaled, by role or name, with commas; others scale their output"""

    rank_means = None
    parameters = "m if r == 1 else n"  # r is 1 where outputs are scaled, 2 where inputs are
    parameters_in_words = "m where outputs are scaled, n where inputs are"
    scaled = False

    def words(self) -> list[str]:
        return [word.strip() for word in self.inputs.split(",") if word.strip()]

    def rank_of(self, m: int, n: int, r: int, where: str) -> int:
        return 2 if any(reads(word, where) for word in self.words()) else 1

    def fits_layers(self, names: Sequence[str]) -> None:
        for word in self.words():
            if self.inputs != IA3.inputs and not any(reads(word, name) for name in names):
                raise Incompatible(f"form ia3: inputs={word}: matches no layer that targets name")

    def shapes(self, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"rows": (m,)} if r == 1 else {"columns": (n,)}

    def start(self, W0: Tensor, r: int, s: float, generator: torch.Generator) -> Tensors:
        m, n = W0.shape
        return {k: W0.new_ones(shape) for k, shape in self.shapes(m, n, r).items()}

    def weight(self, W0: Tensor, p: Tensors, s: float) -> Tensor:
        return p["rows"][:, None] * W0 if "rows" in p else W0 * p["columns"]

    def bias(self, b0: Tensor | None, p: Tensors) -> Tensor | None:
        return p["rows"] * b0 if b0 is not None and "rows" in p else b0

    def forward(self, x: Tensor, layer: Adapted) -> Tensor:
        p, product = layer.p, layer.frozen.stored.product
        if not layer.drops:
            if "rows" in p:
                return rescaled(layer.frozen(x), p["rows"])
            return layer.frozen(rescaled(x, p["columns"]))
        dropped = layer.dropout(x)
        if "rows" in p:
            return product(x, layer.bias_like(x)) + (p["rows"] - 1).to(x.dtype) * product(dropped)
        return layer.frozen(x) + product((p["columns"] - 1).to(x.dtype) * dropped)


def reads(word: str, where: str) -> bool:
    """Whether `word` is the role of the layer `where`, its name, or the end of its name."""
    return where == word or where.endswith(f".{word}") or role_of(where) == word


preset(
    "ia3",
    form="ia3",
    scale="none",
    rank=None,
    alpha=None,
    lr=3e-3,
    lr_origin="the paper's recipe T-Few (Section 3.3) and configs/ia3.json, with Adafactor",
    width=2048,
    targets="k,v,down",
)
