"""Constant scale: Learning Rate Scaling across LoRA Ranks and Transfer to Full Finetuning (Chen,
Villar & Hayou, 2026), proceedings.mlr.press/v306.

    W = W0 + s B A,    s = alpha

A scale that does not know the rank: alpha / r^0, beside alpha / r and alpha / r^(1/2). The paper
asks which learning rate goes with which of them when the rank changes. Methods that print one
number for the scale (1, 4, 300) are said so too.

>>> [Constant().value(4.0, r) for r in (1, 8, 256)]
[4.0, 4.0, 4.0]
"""

from dataclasses import dataclass

from ._api import Scale


@dataclass(frozen=True)
class Constant(Scale, name="constant"):
    """s = alpha, whatever the rank."""

    def value(self, alpha: float, r: int) -> float:
        return alpha
