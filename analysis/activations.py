"""The matrices of a model with the statistics of what reaches them on a text.

The model is loaded in full and runs over windows of the text, one after the other, in eval mode;
activations are summed at once and never kept (variants/_calibrate.py).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.config import HF
from experiments.model import Source
from variants import Incompatible
from variants._adapter import Planned
from variants._calibrate import statistics
from variants._kinds import kind_of, matrix_of
from variants._targets import all_layers, resolve

from .weights import Place, place_of


class Activations:
    """A loaded model, and windows of a text.

    Args:
        wanted: the names of the statistics.
        batches, length: how many windows at most, and of how many tokens.

    Raises:
        Incompatible, BadInput: a text or a model that is missing or broken, or too short a text.
    """

    def __init__(
        self,
        folder: str | Path,
        text: Path,
        *,
        wanted: tuple[str, ...] = ("covariance",),
        targets: str | list[str] = "all-linear",
        batches: int = 8,
        length: int = 512,
        dtype: str = "fp32",
        device: str = "cpu",
    ) -> None:
        if not text.is_file():
            raise Incompatible(f"--text {text}: no such file")
        loaded = Source(HF(path=str(folder), dtype=dtype)).load()
        ids = loaded.tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
        length = min(length, loaded.positions)
        starts = range(0, min(batches * length, len(ids)), length)
        self.windows = [w for w in (ids[i : i + length] for i in starts) if len(w) > 1]
        if not self.windows:
            raise Incompatible(f"--text {text}: fewer than two tokens")
        self.model, self.device, self.wanted = loaded.model.to(device), device, wanted
        self.layers: dict[str, Any] = all_layers(self.model)
        self.places = [place_of(self.layers, site) for site in resolve(self.model, targets)]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.windows))

    def __iter__(self) -> Iterator[tuple[Place, Tensor, dict[str, Tensor]]]:
        """Each matrix [m, n] with its statistics; none where inputs cannot be measured (experts,
        embeddings)."""
        seen = [place for place in self.places if self._measured(place)]
        items = [Planned(place.site, place.shape, 0, 1.0, {}) for place in seen]
        ids = [torch.tensor([window], device=self.device) for window in self.windows]
        calls = [{"input_ids": window, "labels": window} for window in ids]
        found = statistics(self.model, items, calls, self.wanted)
        for place in self.places:
            own = next(found)[1] if self._measured(place) else {}
            W, rows = matrix_of(self.layers[place.site.path]).detach(), place.site.rows
            yield place, W if rows is None else W[slice(*rows)], own

    def _measured(self, place: Place) -> bool:
        module = self.layers[place.site.path]
        return kind_of(module)(module).measured
