"""Figures for a paper: one style, svg and png, readable in print, on a screen, light and dark."""

import io
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .panels import alike

INK = "#010101"  # of text and axes: becomes the page's own colour in html
# Okabe and Ito's colours, told apart by nearly everyone; then line styles
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#7F5C3B")
STYLES = ("-", "--", ":", "-.")
STYLE: dict[str, Any] = {
    "figure.figsize": (4.6, 3.0), "figure.dpi": 150, "figure.constrained_layout.use": True,
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 8,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "grid.color": "#888888", "svg.fonttype": "none", "lines.linewidth": 1.4,
    "savefig.transparent": True,
}  # fmt: skip
MOST = 12  # lines of one figure; more would not be read


mpl.rcParams.update(STYLE)  # pyright: ignore


def axes(width: float = 4.6, height: float = 3.0) -> tuple[Figure, Any]:
    """A figure with one pair of axes, in the style of all."""
    return plt.subplots(figsize=(width, height))


def save(figure: Figure, folder: Path, name: str) -> str:
    """Writes NAME.svg and NAME.png and returns the svg's text, its ids its own."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.png", dpi=200, transparent=False, facecolor="white")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    (folder / f"{name}.svg").write_text(text.replace(INK, "#000000"))
    inline = text[text.index("<svg") :].replace(INK, "currentColor")
    prefix = re.sub(r"\W", "-", name)
    inline = re.sub(r'\bid="', f'id="{prefix}-', inline)
    inline = re.sub(r'(xlink:href="|href="|url\()#', rf"\g<1>#{prefix}-", inline)
    inline = re.sub(r"<metadata>.*?</metadata>", "", inline, flags=re.DOTALL)
    return inline.replace("<svg ", f'<svg role="img" aria-label="{prefix}" ', 1)


def look(names: Sequence[str], first: str) -> dict[str, dict[str, Any]]:
    """A colour and a line for each name, the baseline black."""
    rest = [n for n in sorted(names) if n != first]
    found: dict[str, dict[str, Any]] = {first: {"color": INK, "linestyle": "-", "linewidth": 2.0}}
    for i, name in enumerate(rest):
        found[name] = {"color": COLOURS[i % len(COLOURS)],
                       "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}  # fmt: skip
    return found


def key(row: Mapping[str, Any]) -> str:
    return row["variant"] if row["rank"] is None else f"{row['variant']} r{row['rank']}"


def by_place(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of one scope and task together, by a readable name."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[" · ".join(w for w in (row["scope"], row["task"]) if w)].append(row)
    return found


def learning_rates(rows: Sequence[Mapping[str, Any]], baseline: str) -> dict[str, Figure]:
    """Score by learning rate, a band of one standard deviation, a ring at the rate chosen."""
    found = {}
    for place, here in by_place(rows).items():
        here = [row for row in here if len(row["lr"]) > 1][:MOST]
        if not here:
            continue
        figure, ax = axes()
        looks = look([row["variant"] for row in here], baseline)
        for row in here:
            points = [(x, m, s) for x, m, s in zip(row["lr"], row["mean"], row["sd"], strict=True)
                      if m is not None]  # fmt: skip
            if not points:
                continue
            x, mean, sd = zip(*points, strict=True)
            style = looks[row["variant"]]
            ax.plot(x, mean, marker=".", label=key(row), **style)
            ax.fill_between(x, [m - (s or 0) for m, s in zip(mean, sd, strict=True)],
                            [m + (s or 0) for m, s in zip(mean, sd, strict=True)],
                            color=style["color"], alpha=0.12, linewidth=0)  # fmt: skip
            at = [m for v, m in zip(x, mean, strict=True) if math.isclose(v, row["chosen"])]
            if at:
                ax.plot([row["chosen"]], at, "o", mfc="none", ms=8, color=style["color"])
        ax.set(xscale="log", xlabel="learning rate", ylabel=here[0]["metric"])
        ax.legend(ncols=2)
        found[f"learning_rate {place}"] = figure
    return found


def effects(rows: Sequence[Mapping[str, Any]], baseline: str) -> dict[str, Figure]:
    """The effect of every verdict with its interval, the margin shaded: a forest plot."""
    found = {}
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["effect"] is not None and row["low"] is not None:
            groups[row["scope"]].append(row)
    for scope, here in groups.items():
        here = here[:40]
        figure, ax = axes(5.2, 0.6 + 0.26 * len(here))
        margins = {row["margin"] for row in here}
        if len(margins) == 1 and None not in margins:
            margin = margins.pop()
            ax.axvspan(-margin, margin, color="#888888", alpha=0.15, linewidth=0)
        ax.axvline(0, color=INK, linewidth=0.8)
        colours = {"better": "#009E73", "worse": "#D55E00", "equivalent": "#0072B2"}
        for y, row in enumerate(reversed(here)):
            colour = colours.get(row["verdict"], "#888888")
            ax.plot([row["low"], row["high"]], [y, y], color=colour)
            ax.plot([row["effect"]], [y], "o", color=colour, ms=4)
        names = [key(r) if r["task"] == here[0]["task"] else f"{key(r)} · {r['task']}"
                 for r in here]  # fmt: skip
        ax.set_yticks(range(len(here)), names[::-1])
        ax.set_ylim(-0.7, len(here) - 0.3)
        ax.set_xlabel(f"difference to {baseline}, {here[0]['metric']}")
        ax.grid(visible=False, axis="y")
        found[f"effects {scope}".strip()] = figure
    return found


def ranks(rows: Sequence[Mapping[str, Any]], baseline: str) -> dict[str, Figure]:
    """Score by rank, with intervals."""
    found = {}
    for place, here in by_place(rows).items():
        figure, ax = axes()
        looks = look([row["variant"] for row in here], baseline)
        for row in here[:MOST]:
            points = [(r, m) for r, m in zip(row["rank"], row["mean"], strict=True)
                      if m is not None]  # fmt: skip
            if not points:
                continue
            x, mean = zip(*points, strict=True)
            ax.plot(x, mean, marker="o", ms=4, label=row["variant"], **looks[row["variant"]])
            bars = [(r, i) for r, i in zip(row["rank"], row["interval"], strict=True) if i]
            for r, (low, high) in bars:
                ax.plot([r, r], [low, high], color=looks[row["variant"]]["color"], linewidth=0.8)
        if not ax.lines:  # no rank with a score that a verdict could use
            continue
        ax.set(xscale="log", xlabel="rank", ylabel="score")
        ticks = sorted({r for row in here for r in row["rank"]})
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.legend(ncols=2)
        found[f"rank {place}"] = figure
    return found


def budgets(rows: Sequence[Mapping[str, Any]], baseline: str) -> dict[str, Figure]:
    """The expected best of k trials: what tuning longer buys."""
    found = {}
    for place, here in by_place(rows).items():
        figure, ax = axes()
        looks = look([row["variant"] for row in here], baseline)
        for row in here[:MOST]:
            best = row["expected_best"]
            ax.plot(range(1, len(best) + 1), best, label=key(row), **looks[row["variant"]])
        ax.set(xlabel="learning rates tried", ylabel="expected best score")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(ncols=2)
        found[f"tuning_budget {place}"] = figure
    return found


def fronts(
    rows: Sequence[Mapping[str, Any]], costs: Mapping[str, str], baseline: str
) -> dict[str, Figure]:
    """Quality against each cost, with boxes of their intervals."""
    found = {}
    for place, here in by_place(rows).items():
        looks = look([row["variant"] for row in here], baseline)
        for cost, name in costs.items():
            known = [r for r in here if r.get(cost) is not None and r["score"] is not None]
            if len(known) < 2 or len({r[cost] for r in known}) < 2:
                continue
            if cost == "peak_bytes" and not alike(known):
                continue
            figure, ax = axes()
            for row in known[:40]:
                colour = looks[row["variant"]]["color"]
                low, high = row["score_interval"] or (row["score"], row["score"])
                left, right = row.get(f"{cost}_range") or (row[cost], row[cost])
                ax.fill_between([left, right], low, high, color=colour, alpha=0.12, linewidth=0)
                ax.plot([row[cost]] * 2, [low, high], color=colour, linewidth=0.8)
                ax.plot([row[cost]], [row["score"]], "o", ms=4, color=colour)
                ax.annotate(key(row), (row[cost], row["score"]), xytext=(4, 3),
                            textcoords="offset points", fontsize=7)  # fmt: skip
            paid = [r[cost] for r in known]
            if cost != "forgetting" and min(paid) > 0 and max(paid) > 10 * min(paid):
                ax.set_xscale("log")  # within a decade its labels would run into each other
            ax.set(xlabel=name, ylabel="score")
            found[f"pareto_{cost} {place}"] = figure
    return found


def profiles(rows: Sequence[Mapping[str, Any]], baseline: str) -> dict[str, Figure]:
    """The share of runs above each score."""
    found = {}
    for row in rows:
        figure, ax = axes()
        names = list(row["share"])[:MOST]
        first = next((n for n in names if n.split(" r")[0] == baseline), "")
        looks = look(names, first)
        for name in names:
            ax.plot(row["at"], row["share"][name], label=name, **looks[name])
        ax.set(xlabel=row["metric"], ylabel="share of runs above")
        ax.legend(ncols=2)
        found[f"profile {row['scope']} {row['metric']}".replace("  ", " ")] = figure
    return found
