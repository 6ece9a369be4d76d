"""Tables of text cells: on the screen, in Markdown, in LaTeX (booktabs), and rows as CSV.

>>> table = Table("Errors", ("format", "bits"), [("nf4_dq", "4.127"), ("50 %", "|")])
>>> print(table.markdown())
**Errors**
<BLANKLINE>
| format | bits |
|---|---:|
| nf4_dq | 4.127 |
| 50 % | \\| |
>>> print(table.tex())
% Errors
\\begin{tabular}{lr}
\\toprule
format & bits \\\\
\\midrule
nf4\\_dq & 4.127 \\\\
50 \\% & \\textbar{} \\\\
\\bottomrule
\\end{tabular}
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

ESCAPED = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip


@dataclass
class Table:
    """A title, names of columns, rows of text; the first columns stand left, the others right."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    left: int = 1

    def show(self, console: Console) -> None:
        """On the screen."""
        width = min(len(self.title), console.width)  # so that the title stands on one line
        shown = RichTable(title=self.title, title_justify="left", min_width=width)
        for i, name in enumerate(self.columns):
            shown.add_column(name, justify="left" if i < self.left else "right", overflow="fold")
        for row in self.rows:
            shown.add_row(*row)
        console.print(shown, markup=False)

    def markdown(self) -> str:
        rule = ["---"] * self.left + ["---:"] * (len(self.columns) - self.left)
        head, *rows = (f"| {' | '.join(map(_cell, row))} |" for row in (self.columns, *self.rows))
        return "\n".join((f"**{self.title}**", "", head, f"|{'|'.join(rule)}|", *rows))

    def tex(self) -> str:
        """A tabular of the package booktabs, its title as a comment."""
        head, *rows = (" & ".join(map(tex_of, row)) + r" \\" for row in (self.columns, *self.rows))
        begin = rf"\begin{{tabular}}{{{'l' * self.left + 'r' * (len(self.columns) - self.left)}}}"
        parts = [f"% {self.title}", begin, r"\toprule", head, r"\midrule", *rows,
                 r"\bottomrule", r"\end{tabular}"]  # fmt: skip
        return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def tex_of(text: str) -> str:
    """The text as LaTeX sets it."""
    return "".join(ESCAPED.get(c, c) for c in text)


def csv_of(rows: Sequence[dict[str, Any]]) -> str:
    """The rows under the keys of the first one; None is an empty cell.

    >>> csv_of([{"name": "a,b", "error": 0.5}, {"name": "c", "error": None}]).splitlines()
    ['name,error', '"a,b",0.5', 'c,']
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
