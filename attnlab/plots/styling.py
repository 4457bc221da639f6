"""Figures of the project: one style, one color for each class, equal cells, files with the same bytes every time."""

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
from numpy.typing import ArrayLike

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
}
"""The one style. It holds while a function that draws runs, and in a block `with style():` of your own."""

CLASS_COLORS = {  # dark to light, even steps of brightness, so that a gray print keeps the classes of a scene apart
    "pole": "#21121c",
    "car": "#391066",
    "bicycle": "#740d51",
    "road": "#414148",
    "water": "#1958b3",
    "rider": "#d0206a",
    "building": "#be4c32",
    "vehicle": "#f03fa0",
    "tree": "#37a253",
    "traffic light": "#28b1a9",
    "mountain": "#9d8da4",
    "grass": "#a3c64f",
    "fire": "#ff910b",
    "person": "#ff84c8",
    "sidewalk": "#c7c0a3",
    "ground": "#e5cc90",
    "smoke": "#dadadd",
    "sky": "#cef1ff",
}
"""Color of each class, the same in every figure. Other names take the colors of matplotlib's tab10 in turn."""


@contextmanager
def style():
    """`STYLE` within the block. Unlike `plt.rc_context` it leaves alone what else changes: a notebook's backend."""
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
    """Figure of equal cells without ticks, and its (row, column) array of Axes, two-dimensional also for one cell.

    A cell is `cell` inches wide and `cell` times `aspect` high. Titles stand above the first row and left of the
    first column, broken into lines where they are longer than a cell; `title` stands above the whole figure.
    """
    for name, titles, count in (("column_titles", column_titles, columns), ("row_titles", row_titles, rows)):
        if len(titles) not in (0, count):
            raise ValueError(f"{name} has {len(titles)} entries for {count} {name.split('_')[0]}s")
    column_titles, row_titles = (
        [textwrap.fill(str(title), max(8, int(12 * inches))) for title in titles]  # 9 points: 12 characters an inch
        for titles, inches in ((column_titles, cell), (row_titles, cell * aspect))
    )
    lines_above, lines_left = (
        max((t.count("\n") + 1 for t in titles), default=0) for titles in (column_titles, row_titles)
    )
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
def save_figure(fig: Figure, path: str | os.PathLike, dpi: float = 150, caption: str = "", pdf: bool = False) -> Path:
    """Write a figure as .png or .pdf, with the same bytes every time, and return where it is.

    The file carries its caption, in its metadata, but no date and no program version. It is written beside its place
    and then renamed, so that an interrupted run leaves the old figure. Missing folders are made. `dpi` is in pixels an
    inch; `pdf` writes a .pdf of the same name as well.
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
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        fig.savefig(unfinished, dpi=dpi, bbox_inches="tight", pad_inches=0.05, metadata=metadata[path.suffix])
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def no_frame(ax: Axes, title: str | None = None) -> Axes:
    """Without ticks and frame, but with axis labels, which `set_axis_off` would hide."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if title is not None:
        ax.set_title(title, fontsize=STYLE["axes.titlesize"])
    return ax


def color_of(color: str) -> tuple[float, float, float]:
    return colors.to_rgb(CLASS_COLORS.get(color, color))


def class_color(name: str, index: int) -> tuple[float, float, float]:
    return color_of(name) if name in CLASS_COLORS else plt.colormaps["tab10"](index % 10)[:3]


def brightness(color: Sequence[float]) -> float:
    """How bright a color (red, green, blue, ...) is in a gray print, 0..1 (ITU-R BT.601)."""
    return float(np.dot(colors.to_rgb(color), (0.299, 0.587, 0.114)))


def colorbar(ax: Axes, drawn: plt.cm.ScalarMappable) -> None:
    """What the colors of a map or table beside it mean."""
    ax.figure.colorbar(drawn, ax=ax, aspect=20, pad=0.02).outline.set_visible(False)


def as_plane(values: ArrayLike, name: str) -> np.ndarray:
    """As a (row, column) array; ValueError, with its name, for another shape."""
    values = np.asarray(values)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"a {name} is (row, column), got shape {values.shape}")
    return values
