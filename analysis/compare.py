"""From results to verdicts: better, equivalent, worse, inconclusive or not comparable.

    python -m analysis.compare RUNS... --out DIR          run folders, or folders above them
    python -m analysis.compare --csv FILE --out DIR       columns variant, lr, seed, task, score
    python -m analysis.compare --wandb ENTITY/PROJECT --out DIR

Writes DIR/index.html (one file, no network), report.json, tables/ (tex, md, csv) and figures/ (svg,
png); tables/runs.csv has the runs themselves, which --csv reads again. Prints the verdicts. How
they come about: docs/compare.md; how often they are wrong: `python -m analysis.calibration`.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__" and find_spec("pandas") is None:
    sys.exit("error: reports need pandas, which is not installed here: pip install -c "
             "constraints.txt -e '.[report]'")  # fmt: skip

from . import cells, load, panels
from .verdicts import Rules, Unit, Verdict, judge, records, units

SCHEMA = 1
ROOT = Path(__file__).parents[1]
COSTS = panels.COSTS | {"forgetting": "forgetting, nats", "disk_bytes": "adapter on disk, bytes"}
DRAWN_COSTS = ("forgetting", "peak_bytes", "train_s", "trained", "disk_bytes")


def compare(
    table: Any, rules: Rules, unfinished: Sequence[dict[str, str]] = (), about: Any = None
) -> tuple[dict[str, Any], list[Unit]]:
    """The report as plain data (report.json), and the units that it is of."""
    found = units(table, rules.lower_is_better)
    rows = judge(found, rules)
    curves = panels.curves(found, rules)
    names = sorted({u.variant for u in found})
    costs = panels.costs(found, rules)
    report = {
        "schema": SCHEMA,
        "baseline": rules.baseline,
        "rules": asdict(rules),
        "study": about,
        "runs": {"finished": len(table), "diverged": int((table["status"] == "diverged").sum()),
                 "unfinished": list(unfinished)},
        "notes": notes(table, found, rows, rules, unfinished),
        "verdicts": records(rows),
        "learning_rates": curves,
        "winners": panels.winners(curves, rules.baseline),
        "regret": panels.regret(curves, rules.baseline, panels.papers(names)),
        "ranks": panels.over_ranks(found),
        "time_to_target": panels.to_target(found, rules),
        "costs": costs,
        "fronts": panels.fronts(costs),
        "aggregates": panels.summaries(found, rules),
        "profiles": panels.profiles(found, rules),
        "ranks_over_tasks": panels.ranks_over_tasks(found, rules),
        "stability": panels.stability(found),
        "fairness": panels.fairness(found, rules),
        "provenance": panels.provenance(table),
    }  # fmt: skip
    return report, found


def notes(
    table: Any,
    found: Sequence[Unit],
    rows: Sequence[Verdict],
    rules: Rules,
    unfinished: Sequence[dict[str, str]],
) -> list[str]:
    """What a reader must know of the input before any verdict."""
    said = [line for line in [load.unsaid(table)] if line]
    scopes = sorted({u.scope for u in found if u.scope})
    if scopes:
        said.append(f"several models or revisions, compared apart: {'; '.join(scopes)}")
    if all(u.selected.rates == 1 for u in found):
        said.append("one learning rate a variant: nothing here shows that any was tuned")
    elif any(u.selected.rule == "left one out" for u in found):
        said.append("no separate confirmation: each seed is scored at the rate that is best on the "
                    "other seeds, and its interval counts that choice")  # fmt: skip
    flat = [f"{u.name} on {u.task} ({u.selected.bracket.partition(',')[0]})" for u in found
            if u.selected.bracket.endswith("within noise")]  # fmt: skip
    if flat:
        said.append("best on an edge of its grid, but by no more than noise, so that it counts as "
                    f"inside: {_some(flat)}")  # fmt: skip
    margins = sorted({r.margin for r in rows if r.margin is not None})
    if margins and rules.margin is None:
        said.append(f"equivalent means within {', '.join(f'{m:g}' for m in margins)}: one point")
    if any(r.margin is None and r.verdict == "inconclusive" for r in rows):
        said.append("no margin for a metric without points: --margin says what counts as equal")
    if unfinished:
        said.append(f"runs that are not finished and count nowhere: {len(unfinished)}")
    said += [f"left out: {r['error']}" for r in unfinished if r["status"] == "truncated"]
    return said


def _some(names: Sequence[str], most: int = 8) -> str:
    """The first of them, and how many more."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def write(report: dict[str, Any], out: Path) -> Path:
    """Writes every file of the report; index.html comes last."""
    from . import charts, report as html  # noqa: I001

    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, allow_nan=False)
    (out / "report.json").write_text(text + "\n")
    base, folder = report["baseline"], out / "figures"
    rows = report["verdicts"]

    def drawn(made: dict[str, Any]) -> dict[str, str]:
        return {n: charts.save(f, folder, _file(n)) for n, f in list(made.items())[:24]}

    cells.write(out / "tables", "verdicts", rows, _keys(rows, cells.VERDICTS))
    for name in ("fairness", "costs", "stability", "regret", "winners", "aggregates",
                 "time_to_target"):  # fmt: skip
        if report[name]:
            keys = [k for k in cells.columns(report[name]) if k != "unlike"]
            cells.write(out / "tables", name, report[name], keys)
    costs = {k: COSTS[k] for k in DRAWN_COSTS}
    fronts = drawn(charts.fronts(report["costs"], costs, base))
    lead = [html.escaped(note) for note in report["notes"]]
    study = report["study"]
    if study:
        lead.insert(0, html.escaped(
            f"{study.get('question', '')} Study {study.get('name', '')}, tier "
            f"{study.get('tier', '-')}, frozen as {study.get('hash', '-')}."))  # fmt: skip
    sections = [
        ("Verdicts", _verdicts(report, html) + html.figures(
            drawn(charts.effects(rows, base)), single=True)),
        ("Learning rates", html.figures(drawn(charts.learning_rates(
            report["learning_rates"], base)))
            + html.paragraph("A ring: the rate chosen. A band: one standard deviation over seeds.")
            + html.table(_widths(report["learning_rates"]))),
        ("Who is ahead at each rate", html.table(report["winners"])),
        ("What another's rate costs", html.table(report["regret"])),
        ("What tuning buys", html.figures(drawn(charts.budgets(
            panels.best_of(report["learning_rates"]), base)))),
        ("Ranks", html.figures(drawn(charts.ranks(report["ranks"], base)))),
        ("Time to the baseline's loss", html.table(report["time_to_target"])),
        ("Quality against costs", html.figures(fronts) + html.table(report["fronts"])
            + html.table(report["costs"])),
        ("Aggregates", html.table(report["aggregates"])
            + _friedman(report, html)
            + html.figures(drawn(charts.profiles(report["profiles"], base)))),
        ("Stability", html.table(report["stability"])),
        ("Fairness", _departures(study, html)
            + html.paragraph("In red: what is unlike the baseline's; trained numbers may differ by "
                             "2 %.") + html.table(report["fairness"])),
        ("Not finished", html.table(report["runs"]["unfinished"])),
        ("Provenance", html.table([{"what": k, "values": v, "unlike": ["values"] if len(v) > 1
                                    and k in ("model_hash", "code", "packages") else []}
                                   for k, v in report["provenance"].items()])),
    ]  # fmt: skip
    tried = [len(r["lr"]) for r in report["learning_rates"] if r["variant"] == base]
    tuned = "tuned " if min(tried) > 1 else ""
    title = f"Against {tuned}{base}: {report['runs']['finished']} runs"
    part = out / "index.html.part"
    part.write_text(html.page(title, lead, sections))
    part.replace(out / "index.html")
    return out / "index.html"


def _verdicts(report: dict[str, Any], html: Any) -> str:
    rows = report["verdicts"]
    told = html.paragraph(
        "Effects are paired differences in the metric's own unit, positive where the variant is "
        "better; p is adjusted over the variants (Holm). naive: the best mean score of all rates "
        "tried, corrected: what is reported."
    )
    more = ("reason", "baseline_corrected", "detectable", "unreachable", "seeds_needed")
    more += ("bracket", "baseline_bracket", "improvement", "mcnemar", "notes")
    return told + html.table(rows, _keys(rows, ("scope", *cells.VERDICTS[:-1], *more)))


def _departures(study: dict[str, Any] | None, html: Any) -> str:
    """What the study's ledger says of itself."""
    lines = (study or {}).get("departures")
    if lines is None:
        return ""
    if not lines:
        return html.paragraph("The study's ledger names no departure from the protocol.")
    return "".join(f'<p class="red">{html.escaped(f"Less than the protocol: {line}.")}</p>'
                   for line in lines)  # fmt: skip


def _keys(rows: Sequence[dict[str, Any]], wanted: Sequence[str]) -> list[str]:
    there = cells.columns(rows)
    return [k for k in wanted if k in there]


def _widths(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"variant": r["variant"], "rank": r["rank"], "task": r["task"], "chosen": r["chosen"],
         "rule": r["rule"], "bracket": r["bracket"], "usable decades": r["width"],
         "rates": len(r["lr"]), "diverged": sum(r["diverged"]),
         "unlike": ["bracket"] if r["bracket"].endswith("edge") else []}
        for r in rows
    ]  # fmt: skip


def _friedman(report: dict[str, Any], html: Any) -> str:
    found = report["ranks_over_tasks"]
    if not found:
        return ""
    rows = [{"variant": k, "mean rank": v} for k, v in found["ranks"].items()]
    return html.paragraph(
        f"Friedman over {found['tasks']} tasks: p = {found['p']:.3g}; mean ranks differ where they "
        f"are {found['critical_difference']:.2f} apart (Nemenyi)."
    ) + html.table(sorted(rows, key=lambda r: r["mean rank"]))


def _file(name: str) -> str:
    return "_".join("".join(c if c.isalnum() or c in "._-" else " " for c in name).split())


def show(report: dict[str, Any]) -> None:
    """The verdict table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    screen = Console(width=None if sys.stdout.isatty() else 170)
    for note in report["notes"]:
        screen.print(note, markup=False)
    found = Table(title=f"against {report['baseline']}")
    rows = report["verdicts"]
    keys = _keys(rows, ("scope", *cells.VERDICTS))
    for key in keys:
        found.add_column(key.replace("_", " "), overflow="fold",
                         justify="left" if key in ("variant", "task", "verdict", "reason", "scope")
                         else "right")  # fmt: skip
    for row in rows:
        found.add_row(*(cells.shown(row[k], k) for k in keys))
    screen.print(found)


def read(given: argparse.Namespace) -> tuple[Any, list[dict[str, str]], dict[str, Any] | None]:
    """(the table of runs, those not finished, the study they belong to)."""
    if given.csv:
        return load.csv(given.csv), [], None
    if given.wandb:
        return load.wandb(given.wandb), [], None
    table, unfinished = load.runs(given.runs)
    return table, unfinished, study_of(given.runs)


def study_of(paths: Sequence[str]) -> dict[str, Any] | None:
    """What the one study of these folders froze: question, tier, margin, baseline; and where it did
    less than a comparison should: the `departures` of its ledger, None without a ledger."""
    found = [Path(p).expanduser() for p in paths]
    found = [p for p in found if (p / "study.json").is_file()]
    if len(found) != 1:
        return None
    ledger = load.read(found[0] / "ledger.json")
    return load.read(found[0] / "study.json") | {"departures": ledger and ledger["departures"]}


def main(words: Sequence[str] | None = None) -> int:
    """The command."""
    from omegaconf import OmegaConf

    defaults: Any = OmegaConf.load(ROOT / "conf" / "compare.yaml")
    parser = argparse.ArgumentParser(
        prog="python -m analysis.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", help="run folders, or folders above them")
    parser.add_argument("--csv", help="a table of results instead")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="a W&B project instead")
    parser.add_argument("--out", required=True, help="the folder of the report")
    parser.add_argument("--baseline", help=f"what is compared with ({defaults.baseline})")
    parser.add_argument("--margin", type=float, help="differences that count as none (one point)")
    parser.add_argument("--level", type=float, help=f"of the tests ({defaults.level})")
    parser.add_argument("--lower-is-better", action="store_true", default=None)
    given = parser.parse_args(words)
    with contextlib.suppress(BrokenPipeError):
        try:
            return _main(given, defaults)
        except (load.Unreadable, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


def _main(given: argparse.Namespace, defaults: Any) -> int:
    sources = [bool(given.runs), bool(given.csv), bool(given.wandb)]
    if sum(sources) != 1:
        raise load.Unreadable("give run folders, or --csv FILE, or --wandb ENTITY/PROJECT: one")
    if given.margin is not None and not given.margin > 0:
        raise load.Unreadable(f"--margin {given.margin}: a positive number")
    table, unfinished, study = read(given)
    known = study or {}
    level = float(next(v for v in (given.level, known.get("level"), defaults.level)
                       if v is not None))  # fmt: skip
    if not 0 < level < 1:
        raise load.Unreadable(f"--level {level}: between 0 and 1")
    margin = given.margin if given.margin is not None else known.get("margin")
    rules = Rules(given.baseline or known.get("baseline") or defaults.baseline, margin, level,
                  given.lower_is_better)  # fmt: skip
    names = sorted(set(table["variant"]))
    if rules.baseline not in names:
        raise load.Unreadable(
            f"--baseline {rules.baseline}: no run of it here; there are: {', '.join(names)}"
        )
    report, _ = compare(table, rules, unfinished, study)
    show(report)
    page = write(report, Path(given.out))
    load.saved(table, page.parent / "tables" / "runs.csv")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
