"""python -m variants            every variant, a line each
python -m variants NAME       one of them: paper, equation, axes, defaults, parameters, notes
python -m variants --parts    every part of every axis
python -m variants --markdown FILE    renews the table between the marks of a Markdown file
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import Incompatible, describe, names, parts
from ._registry import AXES, index


def table() -> Table:
    """Every variant: its axes where they differ from LoRA's, its defaults, its paper."""
    found = Table(title=f"{len(names())} variants; python -m variants NAME tells more")
    for column in ("variant", "differs from LoRA on", "rank", "alpha", "lr", "parameters", "paper"):
        found.add_column(column)
    own = describe("lora")["axes"]
    for name in names():
        known = describe(name)
        differs = [f"{a}={p['name']}" for a, p in known["axes"].items() if p != own[a]]
        defaults = known["defaults"]
        found.add_row(
            name,
            ", ".join(differs) or "-",
            str(defaults["rank"] or "-"),
            str(defaults["alpha"] or "-"),
            f"{defaults['lr']:g}",
            known["parameters"],
            known["paper"],
        )
    return found


BEGIN, END = "<!-- variants: begin -->", "<!-- variants: end -->"


def markdown() -> str:
    """The table for a Markdown page."""
    own = describe("lora")["axes"]
    lines = ["| variant | differs from LoRA on | trained numbers of an m x n matrix | paper |",
             "|---|---|---|---|"]  # fmt: skip
    for name in names():
        known = describe(name)
        differs = [f"{a} `{p['name']}`" for a, p in known["axes"].items() if p != own[a]]
        lines.append(
            f"| [`{name}`]({known['file']}) | {', '.join(differs) or '-'} | "
            f"`{known['parameters']}` | {known['paper']} |"
        )
    return "\n".join(lines)


def renewed(text: str) -> str:
    """`text` with the table between its marks made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{markdown()}\n{END}{after}"


def page(name: str) -> str:
    """All that is known of one variant."""
    known = describe(name)
    defaults = known["defaults"]
    lines = [known["paper"], "", *(f"    {line}" for line in known["equation"].splitlines()), ""]
    for axis, part in known["axes"].items():
        settings = ", ".join(f"{k}={v}" for k, v in part.items() if k != "name")
        lines.append(f"  {axis:<11} {part['name']}" + (f" ({settings})" if settings else ""))
    lines += [
        "",
        f"  rank        {defaults['rank'] or '-'}: {known['rank'] or 'there is none'}",
        f"  alpha       {defaults['alpha'] or '-'}",
        f"  lr          {defaults['lr']:g}, {defaults['lr_origin']}",
        f"  parameters  {known['parameters']} for a matrix of m x n",
        f"  file        {known['file']}",
        "",
        known["notes"],
    ]
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m variants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", help="a variant")
    parser.add_argument("--parts", action="store_true", help="every part of every axis")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="renew a file's table")
    given = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    try:
        if given.markdown:
            given.markdown.write_text(renewed(given.markdown.read_text()))
        elif given.name:
            console.print(page(given.name), markup=False, soft_wrap=True)
        elif given.parts:
            for axis in AXES:
                console.print(axis, style="bold")
                for part in parts()[axis]:
                    doc = index()[0][axis][part].doc.split("\n")[0]
                    console.print(f"  {part:<12} {doc}", markup=False, soft_wrap=True)
        else:
            console.print(table())
    except (Incompatible, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
