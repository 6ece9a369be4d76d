"""Tables for a paper and a reader: LaTeX (booktabs), Markdown and csv, from the same rows."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .tables import tex_of

VERDICTS = ("variant", "rank", "task", "verdict", "effect", "low", "high", "p", "n", "lr",
            "score_naive", "score_corrected", "reason")  # fmt: skip
RATES = ("lr", "chosen", "paper_lr", "baseline_lr")  # columns of learning rates


def shown(value: Any, key: str = "") -> str:
    """A cell: numbers in a few digits, lists joined, nothing for None.

    >>> [shown(v) for v in (None, 0.000316, 12345678, 49.876543, [16, 4], True, "a_b")]
    ['', '3.16e-04', '12,345,678', '49.877', '16, 4', 'yes', 'a_b']
    >>> [shown(v, "lr") for v in (0.003162, 0.0001)]
    ['3.16e-03', '1.00e-04']
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float) and key in RATES:
        return f"{value:.2e}"
    if isinstance(value, float):
        size = abs(value)
        if value == 0:
            return "0"
        if size >= 1e5 or size < 1e-3:
            return f"{value:.2e}"
        return f"{value:.3f}" if size < 100 else f"{value:,.1f}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(shown(v) for v in value)
    return str(value)


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of all rows, in the order in which they occur; those without any value left out."""
    keys = list(dict.fromkeys(k for row in rows for k in row))
    return [k for k in keys if any(row.get(k) not in (None, "", []) for row in rows)]


def tex(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """A booktabs table.

    >>> print(tex([{"variant": "a_b", "p": 0.5}], ["variant", "p"]))
    \\begin{tabular}{lr}
    \\toprule
    variant & p \\\\
    \\midrule
    a\\_b & 0.500 \\\\
    \\bottomrule
    \\end{tabular}
    <BLANKLINE>
    """
    numeric = [all(not isinstance(row.get(k), str) for row in rows) for k in keys]
    sides = "".join("r" if n else "l" for n in numeric)
    heads = " & ".join(tex_of(k.replace("_", " ")) for k in keys)
    lines = [rf"\begin{{tabular}}{{{sides}}}", r"\toprule", heads + r" \\", r"\midrule"]
    lines += [" & ".join(tex_of(shown(row.get(k), k)) for k in keys) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def markdown(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(k.replace("_", " ") for k in keys) + " |", "|---" * len(keys) + "|"]
    lines += ["| " + " | ".join(shown(row.get(k), k).replace("|", "\\|") for k in keys) + " |"
              for row in rows]  # fmt: skip
    return "\n".join(lines) + "\n"


def comma_separated(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """A csv with numbers in full."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(keys)
    writer.writerows([[("" if row.get(k) is None else row.get(k)) for k in keys] for row in rows])
    return out.getvalue()


def write(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """NAME.tex, NAME.md and NAME.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, made in (("tex", tex), ("md", markdown), ("csv", comma_separated)):
        (folder / f"{name}.{suffix}").write_text(made(rows, keys))
