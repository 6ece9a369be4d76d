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
MARKED = 25  # points of a line, about, that have a marker
FAR = 20  # times between the least and the largest value: the scale is logarithmic then
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7,
    "xtick.labelsize": 7, "ytick.labelsize": 7, "axes.spines.top": False,
    "axes.spines.right": False, "lines.linewidth": 1.0, "lines.markersize": 3.5,
    "figure.constrained_layout.use": True, "svg.hashsalt": "figures", "savefig.dpi": 300,
}  # fmt: skip
Lines = Mapping[str, Sequence[tuple[float, float]]]  # by name, the points (x, y)
Cells = Sequence[Sequence[float | None]]  # [rows][columns]; None: nothing there


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
def lines(panels: Mapping[str, Lines], x: str, y: str, linear: bool = False) -> Any:
    """A panel of lines for each title, one scale for all, one legend.

    The scale is logarithmic where values lie far apart, unless it is to be `linear`.
    """
    figure, axes = _grid(len(panels), sharey=True)
    names = list(dict.fromkeys(name for found in panels.values() for name in found))
    values = [v for found in panels.values() for points in found.values() for _, v in points]
    for axis, (title, found) in zip(axes, panels.items()):
        axis.set_title(title)
        for name, points in found.items():
            i = names.index(name)
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)],
                    "linestyle": "--" if i >= len(COLOURS) else "-",
                    "markevery": max(1, len(points) // MARKED)}  # fmt: skip
            axis.plot(*zip(*points, strict=True), label=name, **look)
        if not linear and min(values) > 0 and max(values) > FAR * min(values):
            axis.set_yscale("log")
        axis.grid(axis="y", linewidth=0.3)
        if all(isinstance(at, int) for points in found.values() for at, _ in points):
            axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes, names)
    _label(figure, x, y)
    return figure


def _legend(figure: Any, axes: Sequence[Any], names: Sequence[str]) -> None:
    """One for all panels, above them."""
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= {label: h for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    entry = 0.5 + 0.065 * max(map(len, names))  # inches
    columns = max(1, min(len(names), int(figure.get_figwidth() / entry)))
    figure.legend([handles[name] for name in names], names, loc="outside upper center",
                  ncols=columns, frameon=False)  # fmt: skip


@styled()
def points(panels: Mapping[str, Lines], x: str, y: str) -> Any:
    """A panel of points for each title, a colour for each name, one legend, the same scales."""
    figure, axes = _grid(len(panels), sharey=True)
    names = list(dict.fromkeys(name for found in panels.values() for name in found))
    for axis, (title, found) in zip(axes, panels.items()):
        axis.set_title(title)
        for name, own in found.items():
            i = names.index(name)
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            axis.plot(*zip(*own, strict=True), color=colour, marker=marker, ls="", label=name)
        axis.locator_params("x", nbins=4)  # so that long numbers stand apart
        axis.grid(linewidth=0.3)
    _legend(figure, axes, names)
    _label(figure, x, y)
    return figure


@styled()
def heat(
    panels: Mapping[str, Cells], rows: Sequence[str], columns: Sequence[str], x: str, value: str,
    y: str = "", most: float | None = None,
) -> Any:  # fmt: skip
    """A panel of coloured cells for each title, rows and columns named alike in all, one scale from
    0 (or the least value below it) to `most`; cells are numbered where there is room."""
    figure, axes = _grid(len(panels), sharey=True)
    known = [v for table in panels.values() for row in table for v in row if v is not None]
    low, high = min(0.0, *known), most if most is not None else max(known)
    tall = max(1.3, 0.2 * len(rows)) if len(rows) < 12 else 1.7
    wide = max(1.9, 0.3 * len(columns)) if len(columns) < 12 else 2.0
    across = min(4, len(panels))
    figure.set_size_inches(max(3.3, wide * across + 1.3), tall * -(-len(panels) // across) + 0.7)
    numbered = len(rows) * len(columns) <= 84 and wide / len(columns) > 0.35
    image: Any = None
    for axis, (title, table) in zip(axes, panels.items()):
        axis.set_title(title)
        cells = [[float("nan") if v is None else v for v in row] for row in table]
        image = axis.imshow(cells, vmin=low, vmax=high if high > low else low + 1, aspect="auto",
                            cmap="viridis", interpolation="nearest")  # fmt: skip
        _ticks(axis.xaxis, columns)
        _ticks(axis.yaxis, rows)
        for i, row in enumerate(table if numbered else ()):
            for j, v in enumerate(row):
                if v is not None:
                    dark = v < low + 0.6 * (high - low)
                    axis.text(j, i, f"{v:.2g}", ha="center", va="center", fontsize=5.5,
                              color="white" if dark else "black")  # fmt: skip
    figure.colorbar(image, ax=axes, label=value, fraction=0.04, aspect=30)
    _label(figure, x, y)
    return figure


def _ticks(axis: Any, names: Sequence[str]) -> None:
    """As many of the names as can be read."""
    step = max(1, -(-len(names) // 12))
    axis.set_ticks(range(0, len(names), step), names[::step])


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
    figure.draw_without_rendering()  # the layout is found once, and not again for each file
    figure.set_layout_engine("none")
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], metadata={"Software": None})
    return paths
