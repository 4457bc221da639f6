"""Scene: a rendered image with its caption and the true class of every pixel."""

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Scene"]


@dataclass(frozen=True)
class Scene:
    """One rendered image and its exact annotation.

    Attributes
    ----------
    image : (row, column, rgb) array of uint8
        Values 0..255.
    caption : str
        Names only what can be seen in the image.
    labels : (row, column) array of uint8
        Index into `classes` of what the center of the pixel shows.
    parts : (row, column) array of uint8
        Index into `part_names`; 0 where a pixel belongs to no named part.
    words : dict from str to str
        The class that a word of the caption names, for every word that names one.
    classes, part_names : tuple of str
        The names behind the numbers of `labels` and `parts`.
    instances : (row, column) array of uint8
        Number of the single thing that the pixel's center shows, 1, 2, ... in the order in which they were painted; 0
        where nothing is that can be counted. A thing is of one class, that of `labels`; it may lie in several pieces,
        where something stands in front of it. Each world's `THINGS` are the classes that are counted.
    """

    image: np.ndarray
    caption: str
    labels: np.ndarray
    parts: np.ndarray
    words: dict[str, str]
    classes: tuple[str, ...] = field(repr=False)
    part_names: tuple[str, ...] = field(repr=False)
    instances: np.ndarray = field(repr=False)

    def mask(self, name: str) -> np.ndarray:
        """Return the exact mask of a word of the caption, a class or a part: bool (row, column)."""
        if name in self.words:
            name = self.words[name]
        if name in self.classes:
            return self.labels == self.classes.index(name)
        if name in self.part_names[1:]:
            return self.parts == self.part_names.index(name)
        known = [*self.words, *self.classes, *self.part_names[1:]]
        raise KeyError(f"{name!r} is no word of the caption, class or part; known: {', '.join(dict.fromkeys(known))}")
