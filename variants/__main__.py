"""python -m variants            every variant, a line each
python -m variants NAME       one of them: paper, equation, axes and settings, defaults, notes
python -m variants NAME --check   puts it to the contract; --with AXIS=PART for a pair
python -m variants --matrix   which parts compose: every pair, with the reason where not
python -m variants --parts    every part of every axis
python -m variants --markdown FILE    renews the table between the marks of a Markdown file
"""

import argparse
import doctest
import sys
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import Incompatible, describe, names, parts
from ._registry import AXES, find_part, find_preset, imported, index, overrides


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
            _count(known),
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
            f"{_cell(known)} | {known['paper']} |"
        )
    return "\n".join(lines)


def _cell(known: dict[str, Any]) -> str:
    """The trained numbers in a cell of the table: a formula as code, words as words."""
    if known["parameters_in_words"] or known["shared_parameters"] != "0":
        return _count(known).replace("*", "\\*").replace("|", "\\|")
    return f"`{known['parameters']}`"


def renewed(text: str) -> str:
    """`text` with the table between its marks made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{markdown()}\n{END}{after}"


def page(name: str) -> str:
    """All that is known of one variant."""
    known = describe(name)
    defaults = known["defaults"]
    lines = [*_wrapped(known["paper"]), ""]
    lines += [*(f"    {line}" for line in known["equation"].splitlines()), "", "Axes"]
    for axis, part in known["axes"].items():
        doc = " ".join(find_part(axis, part["name"]).doc.split("\n\n")[0].split())
        lines += _row(axis, f"{part['name']}: {doc}" if doc else part["name"])
        for key, value in part.items():
            if key != "name":
                lines += _row("", f"{key}={value}  {known['settings'][axis].get(key, '')}", 4)
    lines += ["", "Defaults"]
    lines += _row("rank", f"{defaults['rank'] or 'none'}: {known['rank'] or 'there is no rank'}")
    lines += _row("alpha", str(defaults["alpha"] or "none: the scale has no alpha"))
    width = f"width {defaults['width']:,}" if defaults["width_exponent"] else "any width"
    lines += _row("lr", f"{defaults['lr']:g} at {width}: {defaults['lr_origin']}")
    lines += _row("targets", defaults["targets"])
    lines += ["", "Training"]
    lines += _row("parameters", f"of a matrix W [m, n]: {_count(known)}")
    if known["parameters_in_words"]:
        lines += _row("exactly", known["parameters"])
    for label, text in _conduct(known):
        lines += _row(label, text)
    lines += _row("file", known["file"])
    return "\n".join([*lines, "", "Notes", "", known["notes"]])


def _wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=first, subsequent_indent=rest,
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip


def _row(label: str, text: str, further: int = 0) -> list[str]:
    """A line of the page, wrapped under its text."""
    indent = " " * (14 + further)
    return _wrapped(text, f"  {label:<12}" + " " * further, indent + "  " * bool(further))


def _count(known: dict[str, Any]) -> str:
    """The trained numbers, in words where the formula is hard to read."""
    shared = known["shared_parameters"]
    own = known["parameters_in_words"] or known["parameters"]
    return own if shared == "0" else f"{own}, and {shared} once for layers that share"


def _conduct(known: dict[str, Any]) -> list[tuple[str, str]]:
    """What a variant asks for, where it starts, and what it moves, freezes and shares."""
    parts = {axis: find_part(axis, part["name"]) for axis, part in known["axes"].items()}

    def those(trait: str) -> list[str]:
        return [f"{axis} {p.name}" for axis, p in parts.items() if p.traits.get(trait)]

    def tensors(trait: str) -> str:
        found = [(p.traits.get(trait), f"{axis} {p.name}") for axis, p in parts.items()]
        return "; ".join(f"{', '.join(names)} ({who})" for names, who in found if names)

    away = [f"{axis} {parts[axis].name}" for axis in ("form", "init")
            if not parts[axis].traits["starts_at_base"]]  # fmt: skip
    rows = [("starts", f"away from the base, by {' and '.join(away)}" if away else "at the base")]
    base = "frozen, as it was loaded"
    if those("replaces"):
        base = f"{those('replaces')[0]} trains in place of W; the original is kept"
    elif those("joint"):
        base = f"frozen; A and B make up for what it loses, by {those('joint')[0]}"
    elif those("moves_base"):
        when = "once, at the start" if parts["init"].traits["moves_base"] else "while training"
        base = f"moved {when}, by {those('moves_base')[0]}; the original is kept"
    if those("lossy"):
        base += f"; rounded, by {those('lossy')[0]}"
    rows.append(("base", base))
    frozen = [tensors(trait) for trait in ("constants", "frozen") if tensors(trait)]
    rows.append(("frozen", "; ".join(frozen) or "no tensor of the adapter"))
    if tensors("shared"):
        again = "; drawn again from the seed, not saved" if tensors("redrawn") else ""
        rows.append(("shared", f"{tensors('shared')}: one copy for several layers{again}"))
    needs = "none"
    if known["needs"]:
        batches = [p["batches"] for p in known["axes"].values() if "batches" in p]
        needs = f"{max(batches, default=8)} batches, for the {' and the '.join(known['needs'])} "
        needs += f"of each layer: {' and '.join(those('needs'))}"
    rows.append(("calibration", needs))
    for trait, text in (
        ("scheduled", "changes during the run, and must know its length"),
        ("partial", "shows a step a part of the tensors"),
        ("penalized", "adds a term to the training loss"),
    ):
        if those(trait):
            rows.append(
                ("schedule" if trait != "penalized" else "loss", f"{those(trait)[0]} {text}")
            )
    return rows


def _check(name: str, words: list[str], console: Console) -> int:
    """Every clause of the contract, one line each; the exit code says whether all hold."""
    from ._contract import CLAUSES, Case

    axes = overrides(name, words)
    case, broken = Case(name, axes=axes), 0
    case.attach()  # a pair that is refused is said at once
    for clause, check in CLAUSES.items():
        try:
            check(case)
            console.print(f"  holds    {clause}", markup=False)
        except Exception as error:  # whatever a wrong file does
            broken += 1
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            why = " ".join(f"{kind}{error}".split())
            console.print(f"  BROKEN   {clause}: {why}", markup=False, soft_wrap=True)
    facts = doctest.testmod(imported(find_preset(name).module), report=False)
    broken += facts.failed > 0
    console.print(f"  {'BROKEN' if facts.failed else 'holds '}   facts of the file: "
                  f"{facts.attempted - facts.failed} of {facts.attempted}")  # fmt: skip
    total = len(CLAUSES) + 1
    console.print(f"{name}: {total - broken} of {total} hold")
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
