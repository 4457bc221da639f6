"""Label a recorded image by a recipe: maps, masks, one label image, and why an image is rejected."""

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..maps.heatmaps import HeatMaps, upscale
from ..maps.linear import linear_daam
from ..maps.softmax import daam, ovam, propagate
from ..masks import IGNORE, mask_by
from ..recording import Recording
from ..recording.words import Word
from ..tokens import TokenLibrary
from .instances import needs_attention
from .recipe import Recipe

__all__ = ["Labeling", "heats", "label", "streaming"]


class Labeling(NamedTuple):
    """Labels of one image, and whether it is good enough."""

    labels: np.ndarray  # uint8 (row, column): 0 background, from 1 on the classes in the recipe's order, 255 ignored
    masks: dict[
        str, np.ndarray
    ]  # bool (row, column), of each class with a map, and may overlap; by vote uint8, 255 ignored
    areas: dict[str, float]  # fraction of the image that each class has in `labels`
    scores: dict[str, float]  # mean of a map inside its mask minus that outside, as a fraction of the map's range
    similarity: float | None  # cosine of the image and its prompt, where the recipe has a CLIP model
    rejected: str | None  # why the image is rejected
    instances: np.ndarray | None = None  # uint16 (row, column) of `number_instances`, in data sets that have them


def streaming(recipe: Recipe) -> dict:
    """Return the options of `record` for a recipe, which keep nothing that grows with the steps."""
    kept = {"self_attention": recipe.attention} if recipe.propagate or needs_attention(recipe.instances) else {}
    if recipe.map == "ovam":
        return kept | {"texts": [recipe.context.replace("{}", word) for word in recipe.classes.values()]}
    return kept | {"keep": "maps" if recipe.map == "daam" else "sum"}


def heats(
    recording: Recording, recipe: Recipe, size: tuple[int, int], tokens: TokenLibrary | None = None
) -> dict[str, np.ndarray]:
    """Return the map (row, column) of each class at a size, (height, width), without those whose word the prompt lacks.

    A class that names one of the learned `tokens` has the token's map.
    """
    classes = recipe.classes
    if recipe.map == "linear":
        linear = linear_daam(recording)
        values = [linear[tokens[word] if tokens and word in tokens else word] for word in classes.values()]
        maps = HeatMaps(np.stack(values), [Word(name, (i,)) for i, name in enumerate(classes)], special=False)
        groups = [(maps, {name: name for name in classes})]
    elif recipe.map == "ovam":
        groups = [(ovam(recording, word, context=recipe.context), {name: word}) for name, word in classes.items()]
    else:
        maps = daam(recording)
        groups = [(maps, {name: word for name, word in classes.items() if word in maps})]
    if recipe.propagate:
        attention = recording.self_attention(recipe.attention)
        groups = [(propagate(maps, *attention, recipe.propagate), words) for maps, words in groups]
    mode = "bicubic" if recipe.map == "daam" else "bilinear"
    return {name: upscale(maps[word], size, mode) for maps, words in groups for name, word in words.items()}


def label(
    heats: Mapping[str, np.ndarray], image: np.ndarray, recipe: Recipe, similarity: float | None = None
) -> Labeling:
    """Label an image from the map of each class.

    Where masks overlap, the class with the largest margin wins: 0 at its mask's least value, 1 at its map's maximum.

    Parameters
    ----------
    heats : mapping of str to (row, column) array
        Maps by the name of the class, as large as the image.
    image : (row, column, rgb) array of uint8
        The image.
    recipe : Recipe
        Method of masks, filters, and numbers of classes.
    similarity : float, optional
        Cosine of the image and its prompt.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # empty masks are counted instead
        found = {name: mask_by(recipe.mask, heat, image) for name, heat in heats.items()}
    numbers = {name: i for i, name in enumerate(recipe.classes, 1)}
    labels, best = np.zeros(image.shape[:2], np.uint8), np.full(image.shape[:2], -np.inf)
    near = np.zeros(image.shape[:2], bool)  # to the border of some mask
    for name, mask in found.items():
        if not mask.any():
            continue
        heat, least = heats[name], heats[name][mask].min()
        margin = (heat - least) / max(heat.max() - least, 1e-12)
        higher = mask & (margin > best)
        labels[higher], best[higher] = numbers[name], margin[higher]
        near |= np.abs(margin) < recipe.band
    labels[near & (best < recipe.band)] = IGNORE
    areas = {name: float((labels == numbers[name]).mean()) for name in found}
    scores = {name: _score(heats[name], mask) for name, mask in found.items()}
    return Labeling(labels, found, areas, scores, similarity, _reason(heats, found, image, similarity, recipe))


def _score(heat, mask):
    if not mask.any() or mask.all():
        return 0.0
    return float((heat[mask].mean() - heat[~mask].mean()) / max(np.ptp(heat), 1e-12))


def _reason(heats, found, image, similarity, recipe):
    """Name the first of the recipe's filters that an image does not pass."""
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
