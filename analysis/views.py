"""The tables of `python -m analysis.inspect`, by role, and its csv."""

from collections.abc import Callable, Mapping
from typing import Any

from .direction import slope
from .intruders import EPS
from .tables import Table

Found = Mapping[str, Any]  # the json: `matrices` says what each matrix is, `analyses` the numbers
Columns = Mapping[str, Callable[[Any], float | None]]  # by head, the number of a matrix

COLUMNS: dict[str, tuple[str, Columns]] = {
    "spectrum": ("the change dW, means over matrices", {
        "||dW||_F": lambda x: x["frobenius"], "||dW||_2": lambda x: x["spectral"],
        "effective rank": lambda x: x["effective_rank"],
        "stable rank": lambda x: x["stable_rank"], "rank for 90 %": lambda x: x["rank_90"],
    }),
    "amplification": ("what dW amplifies, means over matrices", {
        "||dW||_F": lambda x: x["change"], "||U'W0 V||_F": lambda x: x["inside"],
        "of random U, V": lambda x: x["random"], "||W0||_F": lambda x: x["base"],
        "amplification": lambda x: x["factor"],
    }),
    "similarity": ("phi of dW's right singular vectors", {
        "phi(1, 1)": lambda x: x["first"], "phi of all": lambda x: x["all"],
        "of random ones": lambda x: x["random_all"], "by chance": lambda x: x["chance"],
    }),
    "alignment": ("share of dW's energy in singular subspaces of W0", {
        "left top": lambda x: x["left_top"], "right top": lambda x: x["right_top"],
        "both top": lambda x: x["both_top"], "left bottom": lambda x: x["left_bottom"],
        "right bottom": lambda x: x["right_bottom"], "both bottom": lambda x: x["both_bottom"],
        "left by chance": lambda x: x["chance"], "both by chance": lambda x: x["chance_both"],
    }),
    "intruders": ("intruder dimensions a matrix, by eps", {
        f"{eps:g}": (lambda x, eps=eps: x["counts"][str(eps)]) for eps in EPS
    }),
    "quantization": ("errors of the stored base, means over matrices", {
        "||W - Q||_F": lambda x: x["frobenius"], "relative": lambda x: x["frobenius_relative"],
        "at the start": lambda x: x["frobenius_start"],
        "% less": lambda x: x["frobenius_reduction"],
        "nuclear": lambda x: x["nuclear"], "nuclear, at the start": lambda x: x["nuclear_start"],
        "nuclear, % less": lambda x: x["nuclear_reduction"],
    }),
}  # fmt: skip


def tables(found: Found) -> list[Table]:
    """A table or two of each analysis that was made."""
    made = []
    for name, own in found["analyses"].items():
        if name in COLUMNS:
            title, columns = COLUMNS[name]
            made.append(_by_role(f"{name}: {title}", found, own, columns))
        else:
            made += TABLES[name](found, own)
    return made


def roles_of(found: Found) -> dict[str, list[str]]:
    """The names of the matrices of each role."""
    roles: dict[str, list[str]] = {}
    for row in found["matrices"]:
        roles.setdefault(row["role"], []).append(row["name"])
    return roles


def _by_role(title: str, found: Found, own: Found, columns: Columns) -> Table:
    table = Table(title, ("role", "matrices", *columns))
    roles = roles_of(found)
    for role, names in (*roles.items(), ("all", list(own))):
        cells = (_digits(mean(pick(own[name]) for name in names)) for pick in columns.values())
        table.rows.append((role, str(len(names)), *cells))
    return table


def mean(values: Any) -> float | None:
    """Of the numbers that are there; None where there is none."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _digits(value: Any, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


def _magnitude(found: Found, own: Found) -> list[Table]:
    columns = ("role", "state", "matrices", "dD", "dM", "slope", "correlation")
    table = Table("magnitude: rows move in magnitude (dM) and direction (dD)", columns, left=2)
    states = list(dict.fromkeys(row["state"] for row in own["rows"]))
    groups = [(role, "end") for role in roles_of(found)] + [("all", state) for state in states]
    for role, state in (*groups, *([("all", "together")] if len(states) > 1 else [])):
        rows = [r for r in own["rows"]
                if role in (r["role"], "all") and state in (r["state"], "together")]  # fmt: skip
        line = slope([(r["dD"], r["dM"]) for r in rows])
        cells = (mean(r["dD"] for r in rows), mean(r["dM"] for r in rows), *line)
        table.rows.append((role, state, str(len(rows)), *map(_digits, cells)))
    return [table]


def _ranks(found: Found, own: Found) -> list[Table]:
    table = Table("ranks", ("role", *map(str, own["layers"])))
    for role, row in zip(own["roles"], own["heatmap"], strict=True):
        table.rows.append((role, *(_digits(v, "g") for v in row)))
    made, path = [table] if own["roles"] else [], own["trajectory"]
    if path:
        second = Table("ranks over the run", ("step", "budget", "directions in use"))
        step = max(1, (len(path["steps"]) - 1) // 8)
        for i in (*range(0, len(path["steps"]) - 1, step), len(path["steps"]) - 1):
            second.rows.append((str(path["steps"][i]), _digits(path["budget"][i], "g"),
                                str(sum(path["ranks"][i]))))  # fmt: skip
        made.append(second)
    return made


def _causal(found: Found, own: Found) -> list[Table]:
    names = list(own["base"])
    table = Table(f"causal: loss with the singular values of {own['intruders']} intruders "
                  f"(eps {own['eps']:g}) scaled", ("scaled by", *names))  # fmt: skip
    for row in own["rows"]:
        table.rows.append((f"{row['factor']:g}", *(_digits(row[name]) for name in names)))
    table.rows.append(("the base", *(_digits(own["base"][name]) for name in names)))
    return [table]


def _hessian(found: Found, own: Found) -> list[Table]:
    title = "hessian: top eigenvalue over the adapter's tensors"
    if "learning_rate_ratio" in own:
        title += (f"; predicted learning rate {own['learning_rate_ratio']:.3g} times that of "
                  f"{own['reference_variant']}")  # fmt: skip
    table = Table(title, ("of", "largest", "error at most", "smallest", "products"))
    names = {"start": "this variant, at its start", "trained": "the adapter, as it is",
             "reference": f"{own.get('reference_variant')}, at its start"}  # fmt: skip
    for key, name in names.items():
        if key in own:
            top = own[key]
            cells = (_digits(top[k]) for k in ("value", "error", "least"))
            table.rows.append((name, *cells, str(top["steps"])))
    return [table]


def _init(found: Found, own: Found) -> list[Table]:
    layers = own["layers"]
    tensors = list(dict.fromkeys(k for row in layers.values() for k in row["norms"]))
    columns: dict[str, Callable[[Any], float | None]] = {
        f"gradient of {k}": (lambda x, k=k: x["norms"].get(k)) for k in tensors
    }
    columns |= {"of W": lambda x: x["full"], "cosine, gradients": lambda x: x["gradient"],
                "cosine, optimizer": lambda x: x["optimizer"]}  # fmt: skip
    title = f"init: loss {own['loss']:.4f} at the start, {own['base']:.4f} of the base"
    return [_by_role(title, found, layers, columns)]


def _forgetting(found: Found, own: Found) -> list[Table]:
    table = Table(f"forgetting: nats a token, {own['tokens']:,} tokens held out",
                  ("base", "tuned", "difference", "KL(base || tuned)"), left=0)  # fmt: skip
    keys = ("base", "tuned", "forgetting", "kl")
    table.rows.append(tuple(_digits(own[k]) for k in keys))
    return [table]


TABLES: dict[str, Callable[[Found, Found], list[Table]]] = {
    "magnitude": _magnitude, "ranks": _ranks, "causal": _causal, "hessian": _hessian,
    "init": _init, "forgetting": _forgetting,
}  # fmt: skip


def flat(found: Found) -> list[dict[str, Any]]:
    """A row for each matrix, a column for each number of it: the csv."""
    kept = ("name", "role", "stack", "layer", "rows", "columns", "rank")
    rows = [{k: place[k] for k in kept} for place in found["matrices"]]
    for name, own in found["analyses"].items():
        if name in COLUMNS or name == "init":
            layers = own["layers"] if name == "init" else own
            for row in rows:
                row |= _numbers(name, layers[row["name"]])
    return rows


def _numbers(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers by their path; lists are left to the json."""
    found = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _numbers(f"{prefix}.{key}", value)
        elif not isinstance(value, list):
            found[f"{prefix}.{key}"] = value
    return found
