"""The rank at which a variant trains as many numbers as another, without its weights."""

from functools import cached_property
from typing import Any

from variants import Incompatible
from variants._adapter import choose, count_trained, plan

MOST = 4096


class Sizes:
    """Trained numbers of one prepared run's variant by rank, on its model's shapes."""

    def __init__(self, prepared: Any) -> None:
        self.prepared = prepared
        self.counted: dict[int | None, int] = {}

    @cached_property
    def model(self) -> Any:
        return self.prepared.source.meta(self.prepared.settings.task.num_labels)

    def trained(self, rank: int | None) -> int:
        """The count at a rank; `Incompatible` where the model has no such rank."""
        if rank not in self.counted:
            settings, choice = self.prepared.settings, self.prepared.choice
            alpha = settings.alpha if choice.alpha_per_rank is None else None
            at = choose(choice.preset, rank, alpha, **choice.axes())
            planned = plan(self.model, at, settings.targets, settings.rank_pattern,
                           settings.alpha_pattern)  # fmt: skip
            self.counted[rank] = count_trained(at, planned)
        return self.counted[rank]

    def nearest(self, target: int) -> int | None:
        """The rank whose count is nearest `target`; None for a form without rank.

        Counts rise with the rank for most forms and fall for some (RandLoRA's), so the ranks are
        first tried by doubling, then around the nearest.
        """
        if self.prepared.choice.rank is None:
            return None
        r = 1
        while r <= MOST and self._distance(r, target) is not None:
            r *= 2
        while True:
            known = {
                k: d for k in self.counted if k and (d := self._distance(k, target)) is not None
            }
            best = min(known, key=lambda k: (known[k], k))
            below = [k for k in known if k < best]
            above = [k for k in known if k > best]
            low = (max(below) + best) // 2 if below else best
            high = (min(above) + best + 1) // 2 if above else best + 1
            new = [k for k in (low, high) if k not in self.counted]
            if not [k for k in new if self._distance(k, target) is not None]:
                return best

    def _distance(self, rank: int, target: int) -> int | None:
        try:
            return abs(self.trained(rank) - target)
        except Incompatible:
            return None
