"""From a recorded image to its labels, by a recipe: maps, masks, one label image, and why an image is no good.

with record(pipe, **streaming(recipe)) as recording:
    image = pipe(...).images[0]
labeling = label(heats(recording, recipe, image.size[::-1]), np.asarray(image), recipe)
"""

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .. import masks
from ..maps.heatmaps import HeatMaps, upscale
from ..maps.linear import linear_daam
from ..maps.softmax import daam, ovam, propagate
from ..masks import IGNORE
from ..recording.recording import Recording
from ..recording.words import Word
from ..tokens import TokenLibrary
from .recipe import Recipe


class Labeling(NamedTuple):
    """Labels of one image.

    labels : uint8 (row, column): 0 background, 1.. the classes in the recipe's order, 255 undecided
    masks : bool (row, column) of each class that the image was asked about, which may overlap
    areas : share of the image that each class has in `labels`
    scores : of each class, the mean of its map inside its mask minus that outside, as a share of the map's range
    similarity : cosine of the image and its prompt, where the recipe asks a CLIP model
    rejected : why the image is no good, or None
    """

    labels: np.ndarray
    masks: dict[str, np.ndarray]
    areas: dict[str, float]
    scores: dict[str, float]
    similarity: float | None
    rejected: str | None


def streaming(recipe: Recipe) -> dict:
    """What `record` has to keep for a recipe: nothing that grows with the steps."""
    kept = {"self_attention": recipe.attention} if recipe.propagate else {}
    if recipe.map == "ovam":
        return kept | {"texts": [recipe.context.replace("{}", word) for word in recipe.classes.values()]}
    return kept | {"keep": "maps" if recipe.map == "daam" else "sum"}


def heats(
    recording: Recording, recipe: Recipe, size: tuple[int, int], tokens: TokenLibrary | None = None
) -> dict[str, np.ndarray]:
    """The map (row, column) of each class at a size, (height, width); without those whose word the prompt lacks.

    `tokens`: learned tokens, by name; a class named there has its token's map.
    """
    if recipe.map == "linear":
        linear = linear_daam(recording)
        values = [linear[tokens[word] if tokens and word in tokens else word] for word in recipe.classes.values()]
        words = [Word(name, (i,)) for i, name in enumerate(recipe.classes)]
        found = {name: HeatMaps(np.stack(values), words, special=False) for name in recipe.classes}
    elif recipe.map == "ovam":
        found = {name: ovam(recording, word, context=recipe.context) for name, word in recipe.classes.items()}
    else:
        maps = daam(recording)
        found = {name: maps for name, word in recipe.classes.items() if word in maps}
    if recipe.propagate:
        attention = recording.self_attention(recipe.attention)
        propagated = {
            id(maps): propagate(maps, *attention, recipe.propagate)
            for maps in {id(m): m for m in found.values()}.values()
        }
        found = {name: propagated[id(maps)] for name, maps in found.items()}
    asked = {name: name if recipe.map == "linear" else recipe.classes[name] for name in found}
    mode = "bicubic" if recipe.map == "daam" else "bilinear"
    return {name: upscale(maps[asked[name]], size, mode) for name, maps in found.items()}


def label(
    heats: Mapping[str, np.ndarray], image: np.ndarray, recipe: Recipe, similarity: float | None = None
) -> Labeling:
    """Labels of an image, uint8 (row, column, rgb), from the map of each class at its size.

    Where masks overlap, the class whose map is farther on the way from its own cut (the least value in its mask) to its
    maximum has the pixel.
    """
    found = {name: to_mask(heat, image, recipe.mask) for name, heat in heats.items()}
    numbers = {name: i for i, name in enumerate(recipe.classes, 1)}
    labels, best = np.zeros(image.shape[:2], np.uint8), np.full(image.shape[:2], -np.inf)
    undecided = np.zeros(image.shape[:2], bool)
    for name, mask in found.items():
        if not mask.any():
            continue
        margin = _margin(heats[name], mask)
        higher = mask & (margin > best)
        labels[higher], best[higher] = numbers[name], margin[higher]
        undecided |= np.abs(margin) < recipe.band
    labels[undecided & (best < recipe.band)] = IGNORE
    areas = {name: float((labels == numbers[name]).mean()) for name in found}
    scores = {name: _score(heats[name], mask) for name, mask in found.items()}
    return Labeling(labels, found, areas, scores, similarity, _reason(heats, found, image, similarity, recipe))


def to_mask(heat: np.ndarray, image: np.ndarray, settings: Mapping) -> np.ndarray:
    """Mask bool (row, column) of a map by a recipe's method; empty where the method finds nothing."""
    method, options = settings["method"], {k: v for k, v in settings.items() if k != "method"}
    if method == "zero":
        return heat > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # empty masks are counted instead
        if method == "random_walker":
            return masks.random_walker_mask(heat, image, **options)
        return getattr(masks, f"{method}_mask")(heat, **options)


def _margin(heat, mask):
    """0 at the least value in the mask, 1 at the map's maximum."""
    cut = heat[mask].min()
    return (heat - cut) / max(heat.max() - cut, 1e-12)


def _score(heat, mask):
    if not mask.any() or mask.all():
        return 0.0
    return float((heat[mask].mean() - heat[~mask].mean()) / max(np.ptp(heat), 1e-12))


def _reason(heats, found, image, similarity, recipe):
    """The first of the recipe's filters that an image does not pass, as a short text."""
    filters = recipe.filters
    if filters.blank is not None and np.dot(image, (0.299, 0.587, 0.114)).std() < filters.blank:
        return "blank image"
    if filters.similarity is not None and similarity is not None and similarity < filters.similarity:
        return "unlike its prompt"
    if not found:  # a prompt without any class's word: an image of the background alone
        return None
    if filters.flat is not None and recipe.map != "linear":
        flat = [name for name, heat in heats.items() if np.ptp(heat) < filters.flat * heat.max() or heat.max() <= 0]
        if flat:
            return f"flat map of {flat[0]}"
    empty = [name for name, mask in found.items() if not mask.any()]
    if empty and recipe.mask["method"] != "zero":  # a learned token may well say that its class is not there
        return f"no mask of {empty[0]}"
    if filters.area is not None:
        covered = np.any(list(found.values()), axis=0).mean()
        if not filters.area[0] <= covered <= filters.area[1]:
            return "mask too small" if covered < filters.area[0] else "mask too large"
    return None
