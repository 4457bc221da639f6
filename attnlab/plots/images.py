"""Draw images, and maps, masks, labels and clusters over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colors, patheffects
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike
from PIL import Image

from ..metrics import as_mask
from ..storage import read_rgb
from .styling import MASK_COLOR, add_colorbar, as_2d, brightness, class_color, color_of, grid, legend, no_frame, style

__all__ = [
    "heat_bar", "outline", "overlay", "pair_sheet", "show_clusters", "show_heat", "show_image", "show_labels",
    "show_mask",
]  # fmt: skip

_ImageLike = ArrayLike | Image.Image
_COLORMAP = "inferno"  # perceptually uniform, and its lightness alone gives the order: readable in gray
_BLEND = 0.6  # weight of the heat map's color where it lies over an image


@style()
def show_image(ax: Axes, image: _ImageLike, title: str | None = None) -> Axes:
    """Show an image without ticks.

    Parameters
    ----------
    ax : Axes
        Where to draw; returned.
    image : (row, column, rgb) array, (row, column) array or PIL image
        uint8, or float in 0..1.
    title : str, optional
        Text above.
    """
    ax.imshow(_as_rgb(image), interpolation="nearest")
    return no_frame(ax, title)


@style()
def show_heat(
    ax: Axes,
    heat: ArrayLike,
    title: str | None = None,
    image: _ImageLike | None = None,
    vmax: float | None = None,
    colorbar: bool = False,
) -> Axes:
    """Show a heat map: pixel by pixel when alone, smooth and see-through over an image.

    The image is gray there: a sunset and a fire have the colors of heat. `heat_bar` says what these colors mean.

    Parameters
    ----------
    ax
        As in `show_image`.
    heat : (row, column) array
        The map.
    title, image
        As in `show_image`.
    vmax : float, optional
        Value of the last color, by default the map's maximum, which is written in the corner of the image; give
        several maps the same to compare them. The first color is 0, or the map's minimum where no value is positive,
        as may be in linear maps.
    colorbar : bool
        Draw a color bar, in the map's unit.
    """
    heat = as_2d(heat, "heat map")
    if image is not None:
        show_image(ax, brightness(_as_rgb(image)) / 255)
        if vmax is None:  # white letters with a dark rim are readable over anything
            rim = [patheffects.withStroke(linewidth=1.5, foreground="black")]
            note = {"ha": "right", "va": "bottom", "fontsize": 7, "color": "white", "path_effects": rim}
            ax.annotate(f"max {heat.max():.2g}", (1, 0), (-2, 2), "axes fraction", "offset points", **note)
    alpha, interpolation = (None, "nearest") if image is None else (_BLEND, "bilinear")
    norm, extent = _heat_scale(heat, vmax), _extent(ax, heat)
    drawn = ax.imshow(heat, _COLORMAP, norm, extent=extent, alpha=alpha, interpolation=interpolation)
    if colorbar:
        add_colorbar(ax, drawn)
    return no_frame(ax, title)


@style()
def heat_bar(fig: Figure, label: str = "", vmax: float | None = None) -> None:
    """Draw one color bar at the right of a figure of `grid`, which becomes wider, for all of its heat maps.

    Parameters
    ----------
    fig : Figure
        Of `grid`.
    label : str
        What the maps measure.
    vmax : float, optional
        Where the bar ends, as in `show_heat`; or else at "max", each map's own maximum.
    """
    fig.set_figwidth(fig.get_figwidth() + 0.45 + 0.2 * bool(label))  # so that the cells stay as large
    colored = plt.cm.ScalarMappable(colors.Normalize(0, 1 if vmax is None else vmax), _COLORMAP)
    long = min(1.0, 2.2 / fig.get_figheight())  # a bar as high as many rows of maps would not be read better
    bar = fig.colorbar(colored, ax=fig.axes, label=label, shrink=long, aspect=18, pad=0.01)
    bar.outline.set_visible(False)
    if vmax is None:
        bar.set_ticks([0, 1], labels=["0", "max"])


@style()
def show_mask(
    ax: Axes, image: _ImageLike | None, mask: ArrayLike, color: str = MASK_COLOR, title: str | None = None
) -> Axes:
    """Show an image, or what the axes show already, with the pixels of a mask tinted and outlined.

    Parameters
    ----------
    ax, image
        As in `show_image`.
    mask : (row, column) array of bool
        The mask.
    color : str
        Name of a class in `CLASS_COLORS`, or a color of matplotlib.
    title
        As in `show_image`.
    """
    mask = as_mask(as_2d(mask, "mask"))
    if image is not None:
        show_image(ax, image, title)
    _paint(ax, mask, {1: color_of(color)}, alpha=0.45)
    return outline(ax, mask, color)


@style()
def outline(ax: Axes, mask: ArrayLike, color: str = MASK_COLOR, linewidth: float = 1.2) -> Axes:
    """Draw the border of a mask, along the edges of its own pixels, over what the axes show already.

    Parameters
    ----------
    ax, mask, color
        As in `show_mask`.
    linewidth : float
        In points, without the white line around it.
    """
    mask = as_mask(as_2d(mask, "mask"))
    padded = np.pad(mask, 1)
    y, x = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])  # edges between neighbors in a row: upright lines
    upright = np.stack([[x, y], [x, y + 1]]).transpose(2, 0, 1)  # (edge, end, xy), in mask pixels from its corner
    y, x = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    level = np.stack([[x, y], [x + 1, y]]).transpose(2, 0, 1)
    left, right, bottom, top = _extent(ax, mask)
    scale = np.array([right - left, bottom - top]) / mask.shape[::-1]
    halo = [patheffects.withStroke(linewidth=linewidth + 1, foreground="white"), patheffects.Normal()]
    edges = LineCollection(np.concatenate([upright, level]) * scale + (left, top), path_effects=halo)
    edges.set(color=color_of(color), linewidth=linewidth, capstyle="round")
    ax.add_collection(edges, autolim=False)
    return ax


@style()
def show_labels(
    ax: Axes, labels: ArrayLike, names: Sequence[str], legend: bool = True, title: str | None = None
) -> Axes:
    """Show a label map in the colors of its classes.

    Parameters
    ----------
    ax
        As in `show_image`.
    labels : (row, column) array of int
        Class numbers.
    names : Sequence[str]
        Names of the classes, by number.
    legend : bool
        List the classes that occur.
    title
        As in `show_image`.
    """
    labels = as_2d(labels, "label map")
    if other := sorted(set(np.unique(labels).tolist()) - {*range(len(names))}):
        raise ValueError(f"labels are 0 to {len(names) - 1}, as there are {len(names)} names; there is {other[:5]}")
    palette = {i: class_color(names[i], i) for i in np.unique(labels)}
    _paint(ax, labels, palette)
    if legend:
        _legend_beside(ax, {names[i]: color for i, color in palette.items()})
    return no_frame(ax, title)


def pair_sheet(
    images: ArrayLike, labels: ArrayLike, names: Sequence[str], columns: int = 6, row_titles: Sequence[str] = ()
) -> Figure:
    """Make a figure of pairs, each image beside its labels, with the colors of all names.

    Parameters
    ----------
    images, labels, names
        As in `show_image` and `show_labels`; images and labels with a first axis, the pairs.
    columns : int
        Pairs in a row.
    row_titles : Sequence[str]
        As in `grid`.
    """
    fig, axes = grid(-(-len(images) // columns), 2 * columns, cell=1.0, row_titles=row_titles)
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        show_image(axes.flat[2 * k], image)
        show_labels(axes.flat[2 * k + 1], label, names, legend=False)
    legend(fig, names)
    return fig


@style()
def show_clusters(
    ax: Axes, clusters: ArrayLike, image: _ImageLike | None = None, legend: bool = True, title: str | None = None
) -> Axes:
    """Show clusters: noise in gray, each other cluster in a color.

    Parameters
    ----------
    ax
        As in `show_image`.
    clusters : (row, column) array of int
        As `attnlab.masks.dbscan_clusters` numbers them: 0 nothing, -1 noise, from 1 on the clusters.
    image, legend, title
        As in `show_image` and `show_labels`; without an image, what lies below is light gray.
    """
    clusters = as_2d(clusters, "cluster map").astype(int)
    found = np.unique(clusters)
    palette = {n: class_color("", n - 1) for n in found[found > 0]} | {n: (0.6, 0.6, 0.6) for n in found[found < 0]}
    show_image(ax, np.full((*clusters.shape, 3), 0.95) if image is None else image, title)
    _paint(ax, clusters, palette, alpha=0.85)
    if legend:
        _legend_beside(ax, {f"cluster {n}" if n > 0 else "noise": color for n, color in palette.items()})
    return ax


def overlay(
    image: _ImageLike, heat: ArrayLike, vmax: float | None = None, opacity: float = _BLEND, colormap: str = _COLORMAP
) -> np.ndarray:
    """Blend an image with a heat map in the colors of `show_heat`: uint8 (row, column, rgb), as large as the image.

    Parameters
    ----------
    image, heat, vmax
        As in `show_heat`.
    opacity : float in 0..1
        Weight of the map's color; the more of it, the less is left of the image's own, from a half on none.
    colormap : str
        A colormap of matplotlib.
    """
    pixels, heat = _as_rgb(image), as_2d(heat, "heat map").astype(np.float32)
    stretched = np.asarray(Image.fromarray(heat).resize(pixels.shape[1::-1], Image.Resampling.BILINEAR))
    colored = 255 * plt.colormaps[colormap](_heat_scale(heat, vmax)(stretched))[..., :3]
    faded = pixels + min(1.0, 2 * opacity) * (brightness(pixels)[..., None] - pixels)
    return np.rint((1 - opacity) * faded + opacity * colored).astype(np.uint8)


def _as_rgb(image: _ImageLike) -> np.ndarray:
    """Return an image as a (row, column, rgb) array of uint8."""
    if isinstance(image, Image.Image):
        return read_rgb(image)
    image = np.asarray(image)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"an image is (row, column, rgb), gray or PIL's, got shape {image.shape}; move channels last")
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind != "f" or not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"an image is uint8 or float in 0..1, got {image.dtype} in {image.min()}..{image.max()}")
    return np.rint(255 * image).astype(np.uint8)


def _extent(ax: Axes, values: np.ndarray) -> tuple[float, float, float, float]:
    """Return the area (left, right, bottom, top) of the image in the axes, or else of the values' own pixels."""
    if ax.images:
        return tuple(ax.images[0].get_extent())
    return (-0.5, values.shape[1] - 0.5, values.shape[0] - 0.5, -0.5)


def _paint(ax: Axes, numbers: np.ndarray, palette: Mapping[int, tuple], alpha: float = 1.0) -> None:
    """Draw each number (row, column) in its color. Numbers without a color stay transparent."""
    pixels = np.zeros((*numbers.shape, 4))
    for number, color in palette.items():
        pixels[numbers == number] = (*color, alpha)
    ax.imshow(pixels, extent=_extent(ax, numbers), interpolation="nearest")


def _heat_scale(heat: np.ndarray, vmax: float | None) -> colors.Normalize:
    if not np.isfinite(heat).all():
        raise ValueError("the heat map holds NaN or infinity; was it divided by zero?")
    highest = heat.max()
    return colors.Normalize(0 if highest > 0 else heat.min(), highest if vmax is None else vmax, clip=True)


def _legend_beside(ax: Axes, entries: Mapping[str, tuple]) -> None:
    handles = [Patch(color=color, label=name) for name, color in entries.items()]
    if handles:
        ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1, labelspacing=0.25)
