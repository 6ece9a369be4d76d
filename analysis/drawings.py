"""The figures of `python -m analysis.inspect`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import figures
from .by_matrix import PERCENT
from .intruders import EPS
from .views import Found, mean, roles_of


def drawn(found: Found) -> dict[str, Any]:
    """The figures, by name."""
    made = {}
    for name, own in found["analyses"].items():
        for suffix, figure in FIGURES.get(name, lambda *_: {})(found, own).items():
            made[name + suffix] = figure
    return made


def _heat(
    found: Found, picks: Mapping[str, Callable[[str], float | None]], value: str,
    most: float | None = None,
) -> Any:  # fmt: skip
    """Role by layer, a panel for each pick; None where no matrix stands in a numbered layer."""
    rows = [row for row in found["matrices"] if row["layer"] is not None]
    roles = list(dict.fromkeys(row["role"] for row in rows))
    layers = sorted({row["layer"] for row in rows})
    panels = {}
    for title, pick in picks.items():
        cells: dict[Any, list[float | None]] = {}
        for row in rows:
            cells.setdefault((row["role"], row["layer"]), []).append(pick(row["name"]))
        table = [[mean(cells.get((role, layer), ())) for layer in layers] for role in roles]
        if any(v is not None for line in table for v in line):
            panels[title] = table
    return figures.heat(panels, roles, list(map(str, layers)), "layer", value, most=most
                        ) if panels else None  # fmt: skip


def _kept(**made: Any) -> dict[str, Any]:
    return {("_" + k if k else k): v for k, v in made.items() if v is not None}


def _spectrum_figures(found: Found, own: Found) -> dict[str, Any]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for role, names in roles_of(found).items():
        values = [[v / own[n]["spectral"] for v in own[n]["values"]]
                  for n in names if own[n]["spectral"]]  # fmt: skip
        count = min(64, min(map(len, values), default=0))
        means = [(i + 1, sum(v[i] for v in values) / len(values)) for i in range(count)]
        lines[role] = [(i, v) for i, v in means if v > 1e-7]
    lines = {role: line for role, line in lines.items() if line}
    curve = (
        figures.lines({"": lines}, "singular value", "relative to the largest") if lines else None
    )
    picks = {"effective rank": lambda n: own[n]["effective_rank"],
             "stable rank": lambda n: own[n]["stable_rank"]}  # fmt: skip
    return _kept(values=curve, ranks=_heat(found, picks, "rank"))


def _similarity_figures(found: Found, own: Found) -> dict[str, Any]:
    panels: dict[str, Any] = {}
    known = [n for n in own if own[n]["phi"]]
    if not known:
        return {}
    size = [max(len(own[n]["phi"]) for n in known), max(len(own[n]["phi"][0]) for n in known)]
    for role, names in roles_of(found).items():
        panels[role] = _mean_table([own[n]["phi"] for n in names if own[n]["phi"]], size)
    panels = {role: table for role, table in panels.items() if table}
    panels["random"] = _mean_table([own[n]["random"] for n in known], size)
    rows, columns = ([str(i + 1) for i in range(n)] for n in size)
    x = f"j, of {found['against'] or 'W0'}"
    return _kept(phi=figures.heat(panels, rows, columns, x, "phi(i, j)", y="i, of dW", most=1.0))


def _mean_table(tables: Sequence[Any], size: Sequence[int]) -> Any:
    """The mean of tables, cell by cell, of those that reach there."""
    if not tables:
        return None
    return [[mean(t[i][j] for t in tables if i < len(t) and j < len(t[0]))
             for j in range(size[1])] for i in range(size[0])]  # fmt: skip


def _alignment_figures(found: Found, own: Found) -> dict[str, Any]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for role, names in roles_of(found).items():
        curves = [own[n]["cumulative"] for n in names if own[n]["cumulative"]]
        lines[role] = [(p, sum(c[i] for c in curves) / len(curves)) for i, p in enumerate(PERCENT)
                       if curves]  # fmt: skip
    lines = {role: line for role, line in lines.items() if line}
    lines["chance"] = [(p, p / 100) for p in PERCENT]
    x = "% of W0's singular vectors, largest first"
    return _kept(energy=figures.lines({"": lines}, x, "share of dW's energy", linear=True))


def _intruder_figures(found: Found, own: Found) -> dict[str, Any]:
    lines = {role: [(eps, sum(own[n]["counts"][str(eps)] for n in names) / len(names))
                    for eps in EPS] for role, names in roles_of(found).items()}  # fmt: skip
    return _kept(eps=figures.lines({"": lines}, "eps", "intruders a matrix"))


def _magnitude_figures(found: Found, own: Found) -> dict[str, Any]:
    states = list(dict.fromkeys(row["state"] for row in own["rows"]))
    roles = roles_of(found)  # in the order of the other figures, so that a colour means one role
    panels = {
        state: {role: [(r["dD"], r["dM"]) for r in own["rows"]
                       if (r["role"], r["state"]) == (role, state)]
                for role in roles if role in {r["role"] for r in own["rows"]}}
        for state in states
    }  # fmt: skip
    if not panels:
        return {}
    return _kept(direction=figures.points(panels, "dD, change of direction", "dM, of magnitude"))


def _rank_figures(found: Found, own: Found) -> dict[str, Any]:
    path, budget = own["trajectory"], None
    if path:
        roles = {row["name"]: row["role"] for row in found["matrices"]}
        count = len(path["layers"])
        lines: dict[str, list[tuple[float, float]]] = {}
        for role, names in roles_of(found).items():
            at = [i for i, layer in enumerate(path["layers"]) if roles[layer] == role]
            means = (sum(row[i] for i in at) / len(names) for row in path["ranks"])
            lines[role] = list(zip(path["steps"], means, strict=True))
        lines["budget"] = [(step, b / count) for step, b in zip(path["steps"], path["budget"])]
        budget = figures.lines({"": lines}, "step", "mean rank of a matrix")
    heat = _heat(found, {"": lambda n: own["final"][n]}, "rank")
    return _kept(heatmap=heat, budget=budget)


def _causal_figures(found: Found, own: Found) -> dict[str, Any]:
    lines = {name: [(row["factor"], row[name]) for row in own["rows"]] for name in own["base"]}
    return _kept(loss=figures.lines({"": lines}, "intruders' singular values scaled by", "loss"))


FIGURES: dict[str, Callable[[Found, Found], dict[str, Any]]] = {
    "spectrum": _spectrum_figures,
    "amplification": lambda found, own: _kept(
        factor=_heat(found, {"": lambda n: own[n]["factor"]}, "amplification")
    ),
    "similarity": _similarity_figures,
    "alignment": _alignment_figures,
    "intruders": _intruder_figures,
    "quantization": lambda found, own: _kept(
        reduction=_heat(found, {"": lambda n: own[n]["frobenius_relative"]}, "||W - Q|| / ||W||")
    ),
    "magnitude": _magnitude_figures,
    "ranks": _rank_figures,
    "causal": _causal_figures,
    "init": lambda found, own: _kept(
        cosine=_heat(
            found,
            {
                "gradients": lambda n: own["layers"][n]["gradient"],
                "optimizer": lambda n: own["layers"][n]["optimizer"],
            },
            "cosine with -dL/dW",
            most=1.0,
        )
    ),
}
