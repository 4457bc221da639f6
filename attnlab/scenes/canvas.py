"""Paint colors and labels with the same strokes, so that masks are exact by construction."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["Canvas", "Thing", "downsample", "number_things", "smooth_noise"]

_OVERSAMPLE = 3  # odd, so that one sample lies on the center of every final pixel: that one gives its label


class Thing(NamedTuple):
    """What a stroke shows: a class, the number of the object among those of its class, and a part of it or ""."""

    name: str
    instance: int = 0
    part: str = ""
    glows: bool = False  # gives its own light: neither dimmed at night nor textured


class Canvas:
    """Square canvas; coordinates are fractions of its side, x to the right and y down.

    Each stroke paints its color into an RGB image, and the number of its `Thing` into a second image of the same size.
    """

    def __init__(self, size: int):
        self.side = size * _OVERSAMPLE
        self.rgb = Image.new("RGB", (self.side, self.side))
        self.ids = Image.new("L", (self.side, self.side))
        self.things: list[Thing] = []
        self._pens = ImageDraw.Draw(self.rgb), ImageDraw.Draw(self.ids)

    def number(self, thing: Thing) -> int:
        """Return the value of `thing` in `ids`; at most 255 things fit on one canvas."""
        if thing not in self.things:
            self.things.append(thing)
        return self.things.index(thing)

    def polygon(self, points, color, thing: Thing) -> None:
        """Fill a polygon."""
        self._stroke("polygon", self._scaled(points), color, thing)

    def line(self, points, width: float, color, thing: Thing) -> None:
        """Draw straight lines from point to point, `width` wide."""
        self._stroke("line", self._scaled(points), color, thing, width=max(1, round(width * self.side)), joint="curve")

    def circle(self, x: float, y: float, radius: float, color, thing: Thing) -> None:
        """Fill a circle around (x, y)."""
        self.ellipse((x - radius, y - radius, x + radius, y + radius), color, thing)

    def ring(self, x: float, y: float, radius: float, width: float, color, thing: Thing) -> None:
        """Draw the outline of a circle, `width` wide, on its inner side; the area within stays as it was."""
        box = [v * self.side for v in (x - radius, y - radius, x + radius, y + radius)]
        self._stroke("ellipse", box, color, thing, paint="outline", width=max(1, round(width * self.side)))

    def ellipse(self, box, color, thing: Thing) -> None:
        """Fill the ellipse inside a box (left, top, right, bottom)."""
        self._stroke("ellipse", [v * self.side for v in box], color, thing)

    def rectangle(self, box, color, thing: Thing) -> None:
        """Fill a rectangle between two opposite corners (x, y, x, y), in any order."""
        (x0, x1), (y0, y1) = sorted(box[::2]), sorted(box[1::2])
        self._stroke("rectangle", [v * self.side for v in (x0, y0, x1, y1)], color, thing)

    def _scaled(self, points):
        return [(float(x) * self.side, float(y) * self.side) for x, y in points]

    def _stroke(self, shape, where, color, thing, paint="fill", **how):
        rgb, ids = self._pens
        getattr(rgb, shape)(where, **{paint: tuple(int(c) for c in color)}, **how)
        getattr(ids, shape)(where, **{paint: self.number(thing)}, **how)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return what was painted so far: float32 (row, column, rgb) in 0..255 and uint8 (row, column) numbers."""
        return np.array(self.rgb, dtype=np.float32), np.array(self.ids)


def downsample(rgb: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduce oversampled arrays to the final size: the mean color of each block, the number at its center."""
    k = _OVERSAMPLE
    rows, columns = ids.shape[0] // k, ids.shape[1] // k
    image = rgb.reshape(rows, k, columns, k, 3).mean((1, 3))
    return np.clip(image.round(), 0, 255).astype(np.uint8), ids[k // 2 :: k, k // 2 :: k].copy()


def number_things(ids: np.ndarray, things: list[Thing], is_counted: Callable[[Thing], bool]) -> np.ndarray:
    """Return the number of the thing at each of `ids` (row, column): uint8 (row, column), 0 for what is not counted.

    1 is the one painted first, no number is left out, and all parts of a thing have its number.
    """
    owners = [(thing.name, thing.instance) if is_counted(thing) else None for thing in things]
    seen = dict.fromkeys(owners[i] for i in np.unique(ids) if owners[i])  # others are hidden or outside
    numbers = {owner: number for number, owner in enumerate(seen, 1)}
    return np.array([numbers.get(owner, 0) for owner in owners], np.uint8)[ids]


def smooth_noise(rng: np.random.Generator, side: int, cells: int, aspect: float = 1.0) -> np.ndarray:
    """Draw smooth noise: float32 (side, side), about -1..1, interpolated between `cells` random values per row."""
    grid = rng.uniform(-1, 1, (max(2, round(cells * aspect)), cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC))
