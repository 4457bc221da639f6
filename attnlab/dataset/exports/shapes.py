"""Find the single objects of a labeled image."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
from scipy.ndimage import find_objects
from skimage.measure import label

from ...masks import IGNORE
from .polygons import trace_parts, trace_polygons
from .writing import Labeled

__all__ = ["Shape", "class_map", "find_outlines", "find_shapes"]

_TOGETHER = 100_000  # pixels of images that are traced together

Labels = np.ndarray | Mapping[str, np.ndarray]
"""As `Dataset.numbers` gives them."""


class Shape(NamedTuple):
    """One object of an image."""

    number: int  # of its class
    place: tuple[slice, slice]  # rows and columns of its box
    mask: np.ndarray  # bool (row, column), within its box


def find_shapes(labels: Labels, instances: np.ndarray | None = None) -> list[Shape]:
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
    """
    if instances is not None:
        return _numbered(instances.astype(int), labels)
    return [shape for layer in _layers(labels) for shape in _numbered(label(layer, connectivity=2), layer)]


def find_outlines(
    records: Iterable[Labeled], low: float = 0.0, high: float = 1.0
) -> Iterator[tuple[Labeled, list[tuple[int, list[np.ndarray]]]]]:
    """Yield records with what `find_shapes` finds, traced: each object's class, and polygons of its connected parts.

    Parameters
    ----------
    records : iterable of Labeled
        What to trace; of small images several are read ahead.
    low, high
        As in `trace_parts`.
    """
    for size, alike in groupby(records, lambda one: one.size):
        while group := [*islice(alike, max(1, _TOGETHER // np.prod(size)))]:
            if group[0].instances is not None:
                found = [_outline_instances(one, low, high) for one in group]
            else:
                found = _outline_classes([_layers(one.labels) for one in group], low, high)
            for one, outlines in zip(group, found, strict=True):
                yield one, sorted(outlines, key=lambda outline: outline[0])


def _outline_classes(images, low, high):
    """Outline the connected parts of classes in images, one below the other: numpy takes as long for few pixels."""
    layers = [layer for image in images for layer in image]
    height, width = layers[0].shape
    tall = np.zeros((len(layers), height + 1, width), layers[0].dtype)
    tall[:, :-1] = layers
    found = [[] for _ in images]
    for number, (x, y), polygon in trace_parts(tall.reshape(-1, width), low, high):
        layer, y = divmod(y, height + 1)
        found[layer * len(images) // len(layers)].append((number, [np.add(polygon, (x, y))]))
    return found


def _outline_instances(one, low, high):
    regions, firsts = np.unique(one.instances, return_index=True)
    classes = one.labels.ravel()[firsts[regions > 0]].tolist()
    return zip(classes, trace_polygons(one.instances.astype(int), low, high), strict=True)


def _layers(labels):
    """List arrays (row, column) of class numbers, without what is ignored: one, or one of each class."""
    if isinstance(labels, Mapping):
        return [np.where(mask == 1, number, 0) for number, mask in enumerate(labels.values(), 1)]
    return [np.where(labels == IGNORE, 0, labels)]


def _numbered(regions, layer):
    """List what has the numbers 1, 2, ... in `regions`, in the order of its numbers in `layer`."""
    found = []
    for region, place in enumerate(find_objects(regions), 1):
        mask = regions[place] == region
        found.append(Shape(int(layer[place][mask][0]), place, mask))
    return sorted(found, key=lambda shape: shape.number)


def class_map(labels: Labels) -> np.ndarray:
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
