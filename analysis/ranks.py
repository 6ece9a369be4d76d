"""How many directions each matrix has, and how that came about, from a run's folder.

metrics.jsonl has `budget` and `ranks` in each row of the training loss, for allocations that change
while they train; result.json has the ranks at the end, by layer, in the same order.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from variants import Incompatible

from .weights import Place


@dataclass(frozen=True)
class Trajectory:
    """The ranks in use over a run."""

    layers: tuple[str, ...]
    steps: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]  # [steps][layers]
    budget: tuple[float, ...]  # of all layers together, as the schedule allows

    @property
    def final(self) -> dict[str, int]:
        return dict(zip(self.layers, self.ranks[-1], strict=True))


def trajectory(run: str | Path) -> Trajectory | None:
    """The ranks of each layer over the run; None where they never change.

    Raises:
        Incompatible: a folder without a finished run's files, or files that are cut short.
    """
    path = Path(run)
    try:
        result = json.loads((path / "result.json").read_text())
        lines = (path / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "ranks" in row]
    except FileNotFoundError as error:
        raise Incompatible(f"{error.filename}: no such file: the run is not finished") from None
    except ValueError as error:
        raise Incompatible(f"{path}: result.json or metrics.jsonl is cut short ({error})") from None
    if not rows:
        return None
    return Trajectory(
        layers=tuple(result["ranks"]),
        steps=tuple(row["step"] for row in rows),
        ranks=tuple(tuple(row["ranks"]) for row in rows),
        budget=tuple(row["budget"] for row in rows),
    )


def heatmap(
    places: Sequence[Place], values: Mapping[str, float]
) -> tuple[list[str], list[int], list[list[float | None]]]:
    """(roles, layers, values [roles][layers]) of AdaLoRA's Figure 3: a row a kind of matrix, a
    column a layer; None where a layer has no such matrix. Several (experts) count as their mean.
    """
    own = [p for p in places if p.layer is not None and p.name in values]
    roles = list(dict.fromkeys(p.role for p in own))
    layers = sorted({p.layer for p in own if p.layer is not None})
    cells: dict[tuple[str, int | None], list[float]] = {}
    for p in own:
        cells.setdefault((p.role, p.layer), []).append(values[p.name])
    table = [[_mean(cells.get((role, layer))) for layer in layers] for role in roles]
    return roles, layers, table


def _mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None
