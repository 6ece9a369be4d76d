"""Which parts compose: every two parts of different axes, joined at their homes or refused.

A part's home is the first preset that has it. Two parts are joined on LoRA's other axes, or on
those of either one's home, in this order; the first choice that is accepted stands for the pair.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from ._registry import AXES, Incompatible, index, parts


@dataclass(frozen=True)
class Pair:
    """Two parts, and either the axes on which they are joined or the reason why they are not."""

    first: tuple[str, str]  # (axis, part)
    second: tuple[str, str]
    axes: dict[str, Any] | None
    reason: str = ""


@cache
def homes() -> dict[tuple[str, str], dict[str, Any]]:
    """{(axis, part): the axes of a preset that has it}, LoRA's for a part that no preset has."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    own = index()[1]["lora"].axes
    for preset in (index()[1]["lora"], *index()[1].values()):
        for axis, part in preset.axes.items():
            found.setdefault((axis, part["name"]), preset.axes)
    for axis, names in parts().items():
        for name in names:
            found.setdefault((axis, name), own)
    return found


def joined(*chosen: tuple[str, str]) -> dict[str, Any]:
    """Axes on which the parts are accepted together.

    Raises:
        Incompatible: the reason, where none is: one that names every part, if there is one.
    """
    from ._adapter import choose

    given = {axis: {"name": part} for axis, part in chosen}
    refusals: list[str] = []
    bare = homes()["form", "lora"]
    surroundings = [bare, *(homes()[part] for part in chosen)]
    for base in surroundings:
        axes = {**base, **{a: base[a] if base[a]["name"] == p["name"] else p
                           for a, p in given.items()}}  # fmt: skip
        for scale in (axes["scale"], *([{"name": "none"}] if "scale" not in given else [])):
            try:
                choose("lora", 4, 8, **axes | {"scale": scale})
            except Incompatible as error:
                refusals.append(str(error))
            else:
                return axes | {"scale": scale}
    names = [part for _, part in chosen]
    full = [r for r in refusals if all(re.search(rf"\b{n}\b", r) for n in names)]
    parts_ = " and ".join(f"{axis} {part}" for axis, part in chosen)
    raise Incompatible(full[0] if full else f"{parts_}: {refusals[-1]}")


def pairs() -> Iterator[Pair]:
    """Every two parts of different axes."""
    for a, b in itertools.combinations(AXES, 2):
        for x, y in itertools.product(parts()[a], parts()[b]):
            try:
                yield Pair((a, x), (b, y), joined((a, x), (b, y)))
            except Incompatible as error:
                yield Pair((a, x), (b, y), None, str(error))


def _apart(part: tuple[str, str]) -> str:
    """What the part requires that not every machine has: it would make the page another one."""
    return index()[0][part[0]][part[1]].traits.get("requires", "")


def page() -> str:
    """A Markdown page: a table for every two axes, refusals numbered and explained below."""
    found = {(p.first, p.second): p for p in pairs() if not (_apart(p.first) or _apart(p.second))}
    reasons: dict[str, int] = {}
    total = sum(p.axes is not None for p in found.values())
    lines = [
        "# Which parts compose",
        "",
        "Made by `python -m variants --matrix`. `+`: the two are joined, on LoRA's other axes or",
        "on those of a preset that has one of them, and pass the contract. A number: refused at",
        "construction, with the reason of that number below.",
        "",
        f"{total} of {len(found)} pairs are joined, {len(found) - total} are refused.",
    ]
    for a, b in itertools.combinations(AXES, 2):
        columns = [name for name in parts()[b] if not _apart((b, name))]
        lines += ["", f"## {a} and {b}", "", f"| {a} | {' | '.join(columns)} |",
                  "|---" * (len(columns) + 1) + "|"]  # fmt: skip
        for x in (name for name in parts()[a] if not _apart((a, name))):
            marks = []
            for y in columns:
                pair = found[(a, x), (b, y)]
                if pair.axes is None:
                    reason = re.sub(r", not \w+$", "", pair.reason)
                    marks.append(str(reasons.setdefault(reason, len(reasons) + 1)))
                else:
                    marks.append("+")
            lines.append(f"| {x} | {' | '.join(marks)} |")
    lines += ["", "## Reasons", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    apart = [f"- {a} {name}: {_apart((a, name))}"
             for a in AXES for name in parts()[a] if _apart((a, name))]  # fmt: skip
    if apart:
        lines += ["", "## Left out", "", "Refused where the machine has not what they need:", ""]
        lines += apart
    return "\n".join(lines) + "\n"
