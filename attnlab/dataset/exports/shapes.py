"""Find the single objects of a labeled image."""

from collections.abc import Mapping
from itertools import repeat
from typing import NamedTuple

import numpy as np
from scipy.ndimage import find_objects
from skimage.measure import label

from ...masks import IGNORE
from .polygons import trace_polygons

__all__ = ["Shape", "class_map", "find_shapes"]


class Shape(NamedTuple):
    """One object of an image."""

    number: int  # of its class
    place: tuple[slice, slice]  # rows and columns of its box
    mask: np.ndarray  # bool (row, column), within its box
    polygons: list[np.ndarray]  # as `trace_polygons` gives them, where they are wanted


def find_shapes(
    labels: np.ndarray | Mapping[str, np.ndarray],
    instances: np.ndarray | None = None,
    outline: tuple[float, float] | None = None,
) -> list[Shape]:
    """Find the single objects of every class, in the order of the classes.

    They are the connected regions of a class, where pixels also connect by their corners; or what `instances` numbers.

    Parameters
    ----------
    labels : (row, column) array of uint8, or dict of such arrays
        As `Dataset.numbers` gives them: class numbers, 0 the background; or of each class, in order, 0 and 1. 255 is
        ignored.
    instances : (row, column) array of int, optional
        As `Dataset.instances` gives them: 1, 2, ... where an object is, each of one class; an object may lie in several
        pieces, and pixels of a class may belong to none.
    outline : tuple of float, optional
        Trace polygons, with `low` and `high` of `trace_polygons`.
    """
    if instances is not None:
        return _numbered(instances.astype(int), labels, outline)
    if isinstance(labels, Mapping):
        layers = [np.where(mask == 1, number, 0) for number, mask in enumerate(labels.values(), 1)]
    else:
        layers = [np.where(labels == IGNORE, 0, labels)]
    return [shape for layer in layers for shape in _numbered(label(layer, connectivity=2), layer, outline)]


def _numbered(regions, layer, outline):
    """List what has the numbers 1, 2, ... in `regions`, in the order of its numbers in `layer`."""
    found, polygons = [], trace_polygons(regions, *outline) if outline else repeat([])
    for region, (place, traced) in enumerate(zip(find_objects(regions), polygons, strict=False), 1):
        mask = regions[place] == region
        found.append(Shape(int(layer[place][mask][0]), place, mask, traced))
    return sorted(found, key=lambda shape: shape.number)


def class_map(labels: np.ndarray | Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the class number of each pixel, uint8 (row, column); where masks overlap, that of the smaller mask.

    A pixel is ignored, 255, where a mask ignores it and no other one has it.

    Parameters
    ----------
    labels
        As in `find_shapes`.
    """
    if not isinstance(labels, Mapping):
        return labels
    found = np.where(np.any([mask == IGNORE for mask in labels.values()], axis=0), IGNORE, 0).astype(np.uint8)
    for number, mask in sorted(enumerate(labels.values(), 1), key=lambda item: -(item[1] == 1).sum()):
        found[mask == 1] = number
    return found
