"""Draw numbers as lines, dots and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import AutoLocator, NullLocator
from numpy.typing import ArrayLike

from .styling import STYLE, add_colorbar, as_2d, brightness, class_color, style

__all__ = ["curves", "dots", "matrix"]

_Series = Mapping[str, ArrayLike]  # numbers by the name of a line, or of the dots of one color


@style()
def curves(
    ax: Axes,
    x: ArrayLike | _Series,
    ys: _Series,
    bands: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    legend: bool = True,
    log: bool = False,
) -> Axes:
    """Draw lines over x; classes in their colors, a line named "all" black and dashed.

    Parameters
    ----------
    ax : Axes
        Where to draw; returned. The legend stands beside it.
    x : (point,) array, or mapping of str to such arrays
        Positions, of all lines or by the name of the line.
    ys : mapping of str to (point,) array
        Heights by the name of the line. A line of one point is a star, one of up to 12 has dots where they are.
    bands : mapping of str to two (point,) arrays, optional
        Lower and upper edge of what is shaded around a line or a star.
    xlabel, ylabel, title : str
        Texts at the axes.
    legend, log : bool
        Draw the legend; make x logarithmic, with ticks at the points where `x` is one array of at most 8.
    """
    xs = x if isinstance(x, Mapping) else dict.fromkeys(ys, x)
    if unknown := set(bands or {}) - set(ys):
        raise ValueError(f"bands for {sorted(unknown)}, but the curves are {list(ys)}")
    for index, (name, y) in enumerate(ys.items()):
        color, dashes = ((0, 0, 0), "--") if name == "all" else (class_color(name, index), "-")
        if brightness(color) > 0.65:  # smoke and sky would be lost on white paper
            color = np.multiply(color, 0.65 / brightness(color))
        if bands and name in bands:
            ax.fill_between(xs[name], *bands[name], color=color, alpha=0.18, linewidth=4 * (np.size(y) == 1))
        marker, size = ("*", 10) if np.size(y) == 1 else ("o" if np.size(y) <= 12 and name != "all" else None, 3)
        ax.plot(xs[name], y, color=color, linestyle=dashes, label=name, marker=marker, markersize=size)
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
def dots(
    ax: Axes,
    names: Sequence[str],
    values: _Series,
    spans: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    xlabel: str = "",
    title: str = "",
    legend: bool = True,
) -> Axes:
    """Draw a row for each name, and in it a dot and its interval for each series, one below the other.

    Parameters
    ----------
    ax
        As in `curves`.
    names : Sequence[str]
        Names left of the rows, from top to bottom.
    values : mapping of str to (name,) array
        Where the dots are, by the name of the series; NaN leaves one out. A line marks 0.
    spans : mapping of str to two (name,) arrays, optional
        Lower and upper ends of the intervals of a series.
    xlabel, title, legend
        As in `curves`.
    """
    for series, found in values.items():
        if len(found) != len(names):
            raise ValueError(f"{series!r} has {len(found)} dots for {len(names)} names")
    for row in range(0, len(names), 2):
        ax.axhspan(row - 0.5, row + 0.5, color="0.95", linewidth=0)
    ax.axvline(0, color="0.3", linewidth=0.8)
    for k, (series, found) in enumerate(values.items()):
        at, color = np.arange(len(names)) + (k - (len(values) - 1) / 2) * 0.7 / len(values), class_color(series, k)
        ax.hlines(at, *(spans or {}).get(series, (found, found)), color=color, linewidth=1.2)
        ax.plot(found, at, "osD^v"[k % 5], color=color, markersize=4, label=series)
    ax.set(ylim=(len(names) - 0.5, -0.5), yticks=range(len(names)), yticklabels=names)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(AutoLocator())
    ax.spines["bottom"].set_visible(True)
    if legend:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return _with_labels(ax, xlabel, "", title)


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
    """Draw a table of numbers as colored cells.

    Parameters
    ----------
    ax
        As in `curves`.
    values : (row, column) array
        Numbers; NaN stays gray.
    row_labels, column_labels : Sequence[object]
        Labels; an empty string leaves its tick out.
    xlabel, ylabel, title
        As in `curves`.
    highlight : tuple of two int, optional
        (row, column) of a cell to frame.
    fmt : str, optional
        Format of the number in each cell. None writes none and adds a color bar, for large tables.
    limits : tuple of two float
        Values of the first and the last color, to compare matrices. None: the least and the largest value.
    """
    values = as_2d(values, "matrix").astype(float)
    if values.shape != (len(row_labels), len(column_labels)):
        raise ValueError(f"a {values.shape} matrix has {len(row_labels)} row and {len(column_labels)} column labels")
    drawn = ax.imshow(values, cmap="viridis", aspect="auto", interpolation="nearest", vmin=limits[0], vmax=limits[1])
    ax.set_facecolor("0.85")
    ax.set_xticks(range(values.shape[1]), column_labels)
    ax.set_yticks(range(values.shape[0]), row_labels)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if fmt is None:
        add_colorbar(ax, drawn)
    else:
        for i, j in np.argwhere(np.isfinite(values)):
            ink = "black" if brightness(drawn.to_rgba(values[i, j])) > 0.5 else "white"
            ax.text(j, i, format(values[i, j], fmt), ha="center", va="center", fontsize=8, color=ink)
    if highlight is not None:
        corner = (highlight[1] - 0.5, highlight[0] - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2, clip_on=False))
    return _with_labels(ax, xlabel, ylabel, title)


def _with_labels(ax: Axes, xlabel: str, ylabel: str, title: str) -> Axes:
    """Write texts in the project's sizes, also on axes of another style; an empty one leaves what `grid` wrote."""
    for text, label in ((xlabel, ax.xaxis.label), (ylabel, ax.yaxis.label), (title, ax.title)):
        label.set(text=text or label.get_text(), size=STYLE["axes.labelsize"])
    ax.tick_params(labelsize=STYLE["xtick.labelsize"])
    return ax
