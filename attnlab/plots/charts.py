"""Numbers as lines, bars and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import AutoLocator, NullLocator
from numpy.typing import ArrayLike

from .styling import STYLE, as_plane, brightness, class_color, colorbar, style


@style()
def curves(
    ax: Axes,
    x: ArrayLike | Mapping[str, ArrayLike],
    ys: Mapping[str, ArrayLike],
    bands: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    legend: bool = True,
    log: bool = False,
) -> Axes:
    """Lines over x, (point,) arrays by name; classes in their colors, a line named "all" black and dashed.

    `x` is shared, or by name as well; a line of one point is a star. `bands` shades from a lower to an upper (point,)
    array, for any of the names. The legend stands beside the axes. `log`: x is logarithmic, with ticks at the points
    where they are shared and few.
    """
    xs = x if isinstance(x, Mapping) else dict.fromkeys(ys, x)
    if unknown := set(bands or {}) - set(ys):
        raise ValueError(f"bands for {sorted(unknown)}, but the curves are {list(ys)}")
    for index, (name, y) in enumerate(ys.items()):
        color, dashes = ("black", "--") if name == "all" else (class_color(name, index), "-")
        if brightness(color) > 0.65:  # smoke and sky would be lost on white paper
            color = np.multiply(color, 0.65 / brightness(color))
        if bands and name in bands:
            ax.fill_between(xs[name], *bands[name], color=color, alpha=0.18, linewidth=0)
        marker = {"marker": "*", "markersize": 10} if np.size(y) == 1 else {}
        ax.plot(xs[name], y, color=color, linestyle=dashes, label=name, **marker)
    if legend:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    ax.margins(x=0.04 if any(np.size(y) == 1 for y in ys.values()) else 0)
    if log:
        ax.set_xscale("log")
        if not isinstance(x, Mapping) and len(x) <= 8:
            ax.set_xticks(x, [format(value, "g") for value in x])
            ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.xaxis.set_major_locator(AutoLocator())  # the cells of `grid` have none
    ax.yaxis.set_major_locator(AutoLocator())
    ax.spines[["left", "bottom"]].set_visible(True)
    ax.spines[["right", "top"]].set_visible(False)
    ax.grid(color="0.9", linewidth=0.6)
    return _with_labels(ax, xlabel, ylabel, title)


@style()
def bars(
    ax: Axes,
    names: Sequence[str],
    values: Mapping[str, ArrayLike],
    errors: Mapping[str, ArrayLike] | None = None,
    ylabel: str = "",
    title: str = "",
    legend: bool = True,
) -> Axes:
    """Bars side by side for each of `names`, one of each series: (name,) arrays by the name of the series.

    `errors` draws lines from so much below to so much above, for any of the series; NaN leaves a bar out.
    """
    for series, found in values.items():
        if len(found) != len(names):
            raise ValueError(f"{series!r} has {len(found)} bars for {len(names)} names")
    width = 0.8 / len(values)
    for k, (series, found) in enumerate(values.items()):
        at = np.arange(len(names)) + (k - (len(values) - 1) / 2) * width
        ax.bar(at, found, width * 0.92, yerr=(errors or {}).get(series), color=class_color(series, k), label=series)
    ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set_xticks(range(len(names)), names)
    ax.yaxis.set_major_locator(AutoLocator())
    ax.spines["left"].set_visible(True)
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    if legend:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return _with_labels(ax, "", ylabel, title)


@style()
def matrix(
    ax: Axes,
    values: ArrayLike,
    row_labels: Sequence[object],
    column_labels: Sequence[object],
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    highlight: tuple[int, int] | None = None,
    fmt: str | None = ".2f",
    limits: tuple[float | None, float | None] = (None, None),
) -> Axes:
    """Table of numbers, (row, column), as colored cells; NaN stays gray, `highlight` frames one (row, column).

    `fmt` writes the number into each cell; None writes none and adds a color bar, for large tables. A label that is
    an empty string leaves its tick out. `limits` are the values of the first and the last color, to compare matrices;
    by default the least and the largest.
    """
    values = as_plane(values, "matrix").astype(float)
    if values.shape != (len(row_labels), len(column_labels)):
        raise ValueError(f"a {values.shape} matrix has {len(row_labels)} row and {len(column_labels)} column labels")
    drawn = ax.imshow(values, cmap="viridis", aspect="auto", interpolation="nearest", vmin=limits[0], vmax=limits[1])
    ax.set_facecolor("0.85")
    ax.set_xticks(range(values.shape[1]), column_labels)
    ax.set_yticks(range(values.shape[0]), row_labels)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if fmt is None:
        colorbar(ax, drawn)
    else:
        for i, j in np.argwhere(np.isfinite(values)):
            ink = "black" if brightness(drawn.to_rgba(values[i, j])) > 0.5 else "white"
            ax.text(j, i, format(values[i, j], fmt), ha="center", va="center", fontsize=8, color=ink)
    if highlight is not None:
        corner = (highlight[1] - 0.5, highlight[0] - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2, clip_on=False))
    return _with_labels(ax, xlabel, ylabel, title)


def _with_labels(ax: Axes, xlabel: str, ylabel: str, title: str) -> Axes:
    """Texts in the project's sizes, also on axes made in another style; an empty one leaves what `grid` wrote."""
    for text, label in ((xlabel, ax.xaxis.label), (ylabel, ax.yaxis.label), (title, ax.title)):
        label.set(text=text or label.get_text(), size=STYLE["axes.labelsize"])
    ax.tick_params(labelsize=STYLE["xtick.labelsize"])
    return ax
