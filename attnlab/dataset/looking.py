"""Label photos by what a model's attention asks of them: whole or in tiles, once or through several noises."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..maps.heatmaps import upscale
from ..masks import IGNORE
from ..pipelines import seed
from ..recording.checks import latent_side, own_size, side_multiple
from ..recording.existing import record_image
from ..tokens import TokenLibrary
from .labeling import Labeling, heats, label, streaming
from .recipe import Recipe

__all__ = ["Tiling", "label_photo", "look", "tiling", "vote_labels"]

_OVERLAP = 4  # neighboring tiles share one part in so many of their side
_WORKING = 2048  # most pixels of a side at which masks are cut; maps are far coarser


class Tiling(NamedTuple):
    """How a photo is cut into pieces that a model looks at; sizes are (height, width) in pixels."""

    size: tuple[int, int]  # to which the photo is resized first
    tile: tuple[int, int]  # of each piece
    corners: list[tuple[int, int]]  # row and column of the first pixel of each piece


def tiling(size: tuple[int, int], box: tuple[int, int], tiles: int = 1, multiple: int = 8) -> Tiling:
    """Cut a photo into tiles: equally spaced ones that share a quarter of their side or more.

    Parameters
    ----------
    size, box : tuple of two int
        (height, width) of the photo, and of the largest piece, in pixels.
    tiles : int
        Pieces along the photo's longer side, by the measure of the box.
    multiple : int
        Of pixels that all sides and corners are; those of the box are made so.
    """
    box = [max(1, side // multiple) * multiple for side in box]
    strides = [max(1, side * (_OVERLAP - 1) // _OVERLAP // multiple) * multiple for side in box]
    spans = [side + (tiles - 1) * stride for side, stride in zip(box, strides, strict=True)]
    scale = min(span / side for span, side in zip(spans, size, strict=True))
    scaled = tuple(max(1, round(side * scale / multiple)) * multiple for side in size)
    tile = tuple(map(min, scaled, box))
    axes = [_starts(*one, multiple) for one in zip(scaled, tile, strides, strict=True)]
    return Tiling(scaled, tile, list(product(*axes)))


def _starts(side, tile, stride, multiple):
    """List where tiles begin along one axis."""
    count = -(-(side - tile) // stride) + 1
    return [round(start / multiple) * multiple for start in np.linspace(0, side - tile, count)]


def look(
    pipe, photo: np.ndarray, recipe: Recipe, index: int, tokens: TokenLibrary | None = None
) -> list[dict[str, np.ndarray]]:
    """Look at a photo as a recipe says: of each look, the map of each class, as fine as the model's latents.

    Where tiles overlap their maps are averaged, each with a weight that falls smoothly to its borders.

    Parameters
    ----------
    pipe : DiffusionPipeline
        As for `record_image`, whose errors are raised.
    photo : (row, column, rgb) array of uint8
        The photo.
    recipe : Recipe
        Its prompt, kind of map, size and `photos`.
    index : int
        Of the record, whose seed all of its noise is drawn by.
    tokens : TokenLibrary, optional
        Learned tokens, as in `heats`.
    """
    asked, side = recipe.photos, latent_side(pipe)
    box = recipe.size or (own_size(pipe),) * 2
    cut = tiling(photo.shape[:2], box, asked.tiles, math.lcm(side_multiple(pipe), side))
    resized = np.asarray(Image.fromarray(photo).resize(cut.size[::-1], Image.Resampling.LANCZOS))
    grid, piece = (tuple(n // side for n in size) for size in (cut.size, cut.tile))
    weight, total = _weight(piece), np.zeros(grid, np.float32)
    sums = [{} for _ in range(asked.looks)]
    views, generator = list(product(cut.corners, range(asked.looks))), seed(recipe.seed_of(index))
    for first in range(0, len(views), recipe.batch):
        some = views[first : first + recipe.batch]
        images = [resized[y : y + cut.tile[0], x : x + cut.tile[1]] for (y, x), _ in some]
        how = {"timesteps": asked.timesteps, "generator": generator, "batch": len(some), **streaming(recipe)}
        recording = record_image(pipe, images, [recipe.prompt(index)] * len(some), **how)
        for i, ((y, x), k) in enumerate(some):
            area = np.s_[y // side : y // side + piece[0], x // side : x // side + piece[1]]
            total[area] += weight / asked.looks
            for name, heat in heats(recording[i], recipe, piece, tokens).items():
                sums[k].setdefault(name, np.zeros(grid, np.float32))[area] += weight * heat
    return [{name: found / total for name, found in one.items()} for one in sums]


def _weight(size):
    """Make the weight of a tile's map, (row, column): sin² along both sides, nowhere 0."""
    rows, columns = (np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in size)
    return np.outer(rows, columns).astype(np.float32)


def label_photo(
    looks: Sequence[Mapping[str, np.ndarray]], photo: np.ndarray, recipe: Recipe, similarity: float | None = None
) -> Labeling:
    """Label a photo, at its own size, by what its looks agree on; scores and filters are of the mean of their maps.

    Masks are cut at up to 2,048 pixels a side and enlarged from there.

    Parameters
    ----------
    looks : sequence of mappings
        Of each look, the maps of the classes, as `look` gives them.
    photo : (row, column, rgb) array of uint8
        The photo.
    recipe : Recipe
        As in `label`.
    similarity : float, optional
        As in `label`.
    """
    scale = min(1, _WORKING / max(photo.shape[:2]))
    size = tuple(max(1, round(n * scale)) for n in photo.shape[:2])
    image = photo if scale == 1 else np.asarray(Image.fromarray(photo).resize(size[::-1], Image.Resampling.BOX))
    mode = "bicubic" if recipe.map == "daam" else "bilinear"  # as in `heats`
    mean = {name: np.mean([one[name] for one in looks], axis=0) for name in looks[0]}
    whole, *each = (
        label({name: upscale(heat, size, mode) for name, heat in maps.items()}, image, recipe, similarity)
        for maps in ([mean] if len(looks) == 1 else [mean, *looks])
    )
    voted = vote_labels(whole, each, recipe.photos.agree) if each else whole
    labels = _enlarged(voted.labels, photo.shape)
    areas = {name: float((labels == i).mean()) for i, name in enumerate(recipe.classes, 1) if name in voted.masks}
    return voted._replace(
        labels=labels, areas=areas, masks={name: _enlarged(mask, photo.shape) for name, mask in voted.masks.items()}
    )


def vote_labels(whole: Labeling, each: Sequence[Labeling], agree: float) -> Labeling:
    """Let the labelings of several looks vote: a pixel has the label that `agree` of them give it, others 255.

    Parameters
    ----------
    whole : Labeling
        By the mean of their maps; it gives scores, and why the image is rejected.
    each : sequence of Labeling
        Of each look.
    agree : float
        Fraction above 0.5.

    Returns
    -------
    Labeling
        Its masks are uint8, 0, 1 and 255.
    """
    labels = _vote([one.labels for one in each], agree)
    masks = {name: _vote([one.masks[name].astype(np.uint8) for one in each], agree) for name in whole.masks}
    lost = [name for name, mask in masks.items() if whole.masks[name].any() and not (mask == 1).any()]
    reason = whole.rejected or (f"no agreement of {lost[0]}" if lost else None)
    return whole._replace(labels=labels, masks=masks, rejected=reason)


def _vote(votes, agree):
    """Return the value that enough arrays have at each pixel, or `IGNORE`."""
    votes = np.stack(votes)
    found = np.full(votes.shape[1:], IGNORE, np.uint8)
    for value in np.unique(votes):
        found[(votes == value).mean(axis=0) >= agree] = value
    return found


def _enlarged(values, shape):
    """Enlarge labels to a (height, width, ...), each pixel from the nearest one."""
    rows, columns = ((np.arange(n) * 2 + 1) * m // (2 * n) for n, m in zip(shape[:2], values.shape, strict=True))
    return values if values.shape == shape[:2] else values[rows[:, None], columns]
