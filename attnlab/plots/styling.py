"""The style of all figures: one look, one color per class, equal cells, files with the same bytes every time."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from ..storage import replacing

__all__ = [
    "CLASS_COLORS", "MASK_COLOR", "STYLE", "add_colorbar", "as_2d", "brightness", "class_color", "color_of", "grid",
    "legend", "no_frame", "save_figure", "style",
]  # fmt: skip

STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "lines.linewidth": 1.6,
}  # fmt: skip
"""The one style. It holds while a function that draws runs, and in a block `with style():` of your own."""

CLASS_COLORS = {  # dark to light, even steps of brightness, so that a gray print keeps the classes of a scene apart
    "pole": "#21121c", "car": "#391066", "bicycle": "#740d51", "road": "#414148", "water": "#1958b3",
    "rider": "#d0206a", "building": "#be4c32", "vehicle": "#f03fa0", "tree": "#37a253", "traffic light": "#28b1a9",
    "mountain": "#9d8da4", "grass": "#a3c64f", "fire": "#ff910b", "person": "#ff84c8", "sidewalk": "#c7c0a3",
    "ground": "#e5cc90", "smoke": "#dadadd", "sky": "#cef1ff",
}  # fmt: skip
"""Color of each class, the same in every figure. Other names take the colors of matplotlib's tab10 in turn."""

MASK_COLOR = "#ff1fd1"  # a color that neither fire nor sky nor grass has


@contextmanager
def style():
    """Set `STYLE` within the block. Unlike `plt.rc_context` it leaves alone what else changes: a notebook's backend."""
    before = {name: plt.rcParams[name] for name in STYLE}
    plt.rcParams.update(STYLE)
    try:
        yield
    finally:
        plt.rcParams.update(before)


@style()
def grid(
    rows: int,
    columns: int,
    cell: float = 1.6,
    aspect: float = 1.0,
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    title: str = "",
) -> tuple[Figure, np.ndarray]:
    """Make a figure of equal cells without ticks; return it and its Axes, (row, column) also for one cell.

    Parameters
    ----------
    rows, columns : int
        Numbers of cells.
    cell, aspect : float
        Width of a cell in inches, and its height divided by its width.
    column_titles, row_titles : Sequence[str]
        Titles above the first row and left of the first column, broken into lines where they are too long for a cell.
    title : str
        Title above the whole figure.
    """
    column_titles, lines_above = _wrapped(column_titles, "column", columns, cell)
    row_titles, lines_left = _wrapped(row_titles, "row", rows, cell * aspect)
    size = (columns * cell + 0.17 * lines_left, rows * cell * aspect + 0.17 * lines_above + 0.3 * bool(title))
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.05 if title else 0.02, wspace=0.02, hspace=0.02)
    if title:
        fig.suptitle(title, fontsize=11)
    for ax in axes.flat:
        no_frame(ax)
    for ax, title in zip(axes[0], column_titles, strict=False):
        ax.set_title(title)
    for ax, title in zip(axes[:, 0], row_titles, strict=False):
        ax.set_ylabel(title)
    return fig, axes


@style()
def legend(fig: Figure, names: Sequence[str]) -> None:
    """List classes in their colors at the right of a figure of `grid`, which becomes wider.

    Parameters
    ----------
    fig : Figure
        Of `grid`.
    names : sequence of str
        Of the classes, in their order.
    """
    fig.set_figwidth(fig.get_figwidth() + 0.45 + 0.075 * max(map(len, names)))
    handles = [Patch(color=class_color(name, i), label=name) for i, name in enumerate(names)]
    fig.legend(handles=handles, loc="outside right upper", handlelength=1, labelspacing=0.25)


@style()
def save_figure(fig: Figure, path: str | os.PathLike, dpi: float = 150, caption: str = "", pdf: bool = False) -> Path:
    """Write a figure, with the same bytes every time (no date, no version of a program), and return where it is.

    Parameters
    ----------
    fig : Figure
        The figure.
    path : str or Path
        A .png or .pdf file. Missing folders are made; an interrupted run leaves the old file.
    dpi : float
        Pixels per inch.
    caption : str
        Text in the file's metadata.
    pdf : bool
        Write a .pdf of the same name as well.
    """
    path = Path(path)
    metadata = {
        ".png": {"Software": None} | ({"Description": caption} if caption else {}),
        ".pdf": dict.fromkeys(("Creator", "Producer", "CreationDate")) | ({"Subject": caption} if caption else {}),
    }
    if path.suffix not in metadata:
        raise ValueError(f"a figure is saved as .png or .pdf, got {path.name!r}")
    if pdf and path.suffix != ".pdf":
        save_figure(fig, path.with_suffix(".pdf"), dpi, caption)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        fig.savefig(part, dpi=dpi, bbox_inches="tight", pad_inches=0.05, metadata=metadata[path.suffix])
    return path


def _wrapped(titles: Sequence[str], what: str, count: int, inches: float) -> tuple[list[str], int]:
    """Break titles into lines that fit into a cell; return them and the largest number of lines."""
    if len(titles) not in (0, count):
        raise ValueError(f"{what}_titles has {len(titles)} entries for {count} {what}s")
    width = max(8, int(12 * inches))  # at 9 points 12 characters fill an inch
    titles = [textwrap.fill(str(title), width, break_on_hyphens=False) for title in titles]
    return titles, max((title.count("\n") + 1 for title in titles), default=0)


def no_frame(ax: Axes, title: str | None = None) -> Axes:
    """Take ticks and frame away, but leave axis labels, which `set_axis_off` would hide."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if title is not None:
        ax.set_title(title, fontsize=STYLE["axes.titlesize"])
    return ax


def color_of(color: str) -> tuple[float, float, float]:
    """Return a color (red, green, blue), 0..1, by the name of a class or as matplotlib takes it."""
    return colors.to_rgb(CLASS_COLORS.get(color, color))


def class_color(name: str, index: int) -> tuple[float, float, float]:
    """Return the color of a class, by its number where its name has none."""
    return color_of(name) if name in CLASS_COLORS else plt.colormaps["tab10"](index % 10)[:3]


def brightness(rgb: ArrayLike) -> np.ndarray:
    """Return how bright colors ([row, column,] rgb) are in a gray print, in their own unit (ITU-R BT.601)."""
    return np.asarray(rgb)[..., :3] @ (0.299, 0.587, 0.114)


def add_colorbar(ax: Axes, drawn: plt.cm.ScalarMappable) -> None:
    """Draw a color bar beside a map or table."""
    ax.figure.colorbar(drawn, ax=ax, aspect=20, pad=0.02).outline.set_visible(False)


def as_2d(values: ArrayLike, name: str) -> np.ndarray:
    """Return values as a (row, column) array, or raise a ValueError that has their name."""
    values = np.asarray(values)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"a {name} is (row, column), got shape {values.shape}")
    return values
