"""Figures for print: small panels of equal scale, colours that the colour-blind tell apart.

matplotlib comes with the extra `report` and is imported when a figure is made. Files repeat to the
byte: nothing of the day or of chance is in them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from variants import Incompatible

# Okabe and Ito's palette (jfly.uni-koeln.de/color), and a marker for each, for prints in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
FAR = 20  # times between the least and the largest value: the scale is logarithmic then
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7,
    "xtick.labelsize": 7, "ytick.labelsize": 7, "axes.spines.top": False,
    "axes.spines.right": False, "lines.linewidth": 1.0, "lines.markersize": 3.5,
    "figure.constrained_layout.use": True, "svg.hashsalt": "figures", "savefig.dpi": 300,
}  # fmt: skip
Lines = Mapping[str, Sequence[tuple[int, float]]]  # by name, the points (x, y)


def need_matplotlib() -> None:
    """Says what is missing, before anything is computed."""
    if find_spec("matplotlib") is None:
        raise Incompatible(
            "figures need matplotlib, which is not installed here: pip install -e '.[report]', "
            "or leave them out with --no-figures"
        )


@contextmanager
def styled() -> Iterator[None]:
    """matplotlib with the settings above, and the user's own again after it."""
    import matplotlib

    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        yield


@styled()
def lines(panels: Mapping[str, Lines], x: str, y: str) -> Any:
    """A panel of lines for each title, one scale for all, one legend.

    The scale is logarithmic where values lie far apart.
    """
    figure, axes = _grid(len(panels), sharey=True)
    names = list(dict.fromkeys(name for found in panels.values() for name in found))
    values = [v for found in panels.values() for points in found.values() for _, v in points]
    for axis, (title, found) in zip(axes, panels.items()):
        axis.set_title(title)
        for name, points in found.items():
            i = names.index(name)
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)],
                    "linestyle": "--" if i >= len(COLOURS) else "-"}  # fmt: skip
            axis.plot(*zip(*points, strict=True), label=name, **look)
        if min(values) > 0 and max(values) > FAR * min(values):
            axis.set_yscale("log")
        axis.grid(axis="y", linewidth=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= {label: h for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    entry = 0.5 + 0.065 * max(map(len, names))  # inches
    columns = max(1, min(len(names), int(figure.get_figwidth() / entry)))
    figure.legend([handles[name] for name in names], names, loc="outside upper center",
                  ncols=columns, frameon=False)  # fmt: skip
    _label(figure, x, y)
    return figure


@styled()
def bars(panels: Mapping[str, Sequence[float]], x: str, y: str) -> Any:
    """A panel of bars for each title, at 0, 1, 2, ..."""
    figure, axes = _grid(len(panels), sharey=False)
    for axis, (title, heights) in zip(axes, panels.items()):
        axis.set_title(title)
        wide = 1.0 if len(heights) > 32 else 0.85
        axis.bar(range(len(heights)), heights, width=wide, color=COLOURS[0], linewidth=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
    _label(figure, x, y)
    return figure


def _label(figure: Any, x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=STYLE["axes.labelsize"])
    figure.supylabel(y, fontsize=STYLE["axes.labelsize"])


def _grid(count: int, sharey: bool) -> tuple[Any, list[Any]]:
    """A figure of `count` axes, up to four in a row."""
    from matplotlib.figure import Figure

    columns = min(4, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(3.3, 1.75 * columns), 1.5 * rows + 0.5))
    axes: list[Any] = list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


@styled()
def save(figure: Any, stem: Path) -> list[Path]:
    """Writes `stem`.svg and `stem`.png."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], metadata={"Software": None})
    return paths
