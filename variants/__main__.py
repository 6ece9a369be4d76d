"""python -m variants            every variant, a line each
python -m variants NAME       one of them: paper, equation, axes, defaults, parameters, notes
python -m variants NAME --check   puts it to the contract; --with AXIS=PART for a pair
python -m variants --matrix   which parts compose: every pair, with the reason where not
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


def _check(name: str, words: list[str], console: Console) -> int:
    """Every clause of the contract, one line each; the exit code says whether all hold."""
    from ._contract import CLAUSES, Case

    axes = {}
    for word in words:
        axis, _, part = word.partition("=")
        if axis not in AXES or not part:
            raise Incompatible(f"--with {word}: AXIS=PART, an axis being one of {', '.join(AXES)}")
        axes[axis] = part
    case, broken = Case(name, axes=axes), 0
    case.attach()  # a pair that is refused is said at once
    for clause, check in CLAUSES.items():
        try:
            check(case)
            console.print(f"  holds    {clause}", markup=False)
        except AssertionError as error:
            broken += 1
            console.print(f"  BROKEN   {clause}: {error}", markup=False, soft_wrap=True)
    console.print(f"{name}: {len(CLAUSES) - broken} of {len(CLAUSES)} clauses hold")
    return int(broken > 0)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m variants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", help="a variant, or a file that has one")
    parser.add_argument("--check", action="store_true", help="put it to the contract")
    parser.add_argument("--with", dest="axes", action="append", default=[], metavar="AXIS=PART")
    parser.add_argument("--matrix", action="store_true", help="which parts compose")
    parser.add_argument("--parts", action="store_true", help="every part of every axis")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="renew a file's table")
    given = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    try:
        if given.markdown:
            given.markdown.write_text(renewed(given.markdown.read_text()))
        elif given.matrix:
            from ._matrix import page as matrix

            print(matrix())
        elif given.name and given.check:
            return _check(given.name, given.axes, console)
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
