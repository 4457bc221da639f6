"""What a rendered world gives: an image, what is said of it, and the truth about every pixel."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Scene:
    """One rendered image and its exact annotation.

    Attributes
    ----------
    image : uint8 (row, column, rgb), 0..255
    caption : names only what can be seen in the image
    labels : uint8 (row, column), index into `classes` of what the center of the pixel shows
    parts : uint8 (row, column), index into `part_names`; 0 where a pixel belongs to no named part
    words : word of the caption -> class it names, for every word that names one
    classes, part_names : the names behind the numbers
    """

    image: np.ndarray
    caption: str
    labels: np.ndarray
    parts: np.ndarray
    words: dict[str, str]
    classes: tuple[str, ...] = field(repr=False)
    part_names: tuple[str, ...] = field(repr=False)

    def mask(self, name: str) -> np.ndarray:
        """Exact mask, bool (row, column), of a word of the caption, a class or a part."""
        if name in self.words:
            name = self.words[name]
        if name in self.classes:
            return self.labels == self.classes.index(name)
        if name in self.part_names[1:]:
            return self.parts == self.part_names.index(name)
        known = [*self.words, *self.classes, *self.part_names[1:]]
        raise KeyError(f"{name!r} is no word of the caption, class or part; known: {', '.join(dict.fromkeys(known))}")
