"""A canvas that paints color and meaning with the same stroke, so that masks are exact by construction."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

OVERSAMPLE = 3  # odd, so that one sample lies on the center of every final pixel: that one gives its label


class Thing(NamedTuple):
    """What a stroke belongs to: a class, which one of its kind (0, 1, ...), and a part of it or ""."""

    name: str
    instance: int = 0
    part: str = ""
    glows: bool = False  # gives its own light: neither dimmed at night nor textured


class Canvas:
    """Square canvas; coordinates are fractions of its side, x to the right and y down.

    Strokes go to an RGB image and, under the number of their `Thing`, to a second image of the same size.
    """

    def __init__(self, size: int):
        self.side = size * OVERSAMPLE
        self.rgb = Image.new("RGB", (self.side, self.side))
        self.ids = Image.new("L", (self.side, self.side))
        self.things: list[Thing] = []
        self._pens = ImageDraw.Draw(self.rgb), ImageDraw.Draw(self.ids)

    def number(self, thing: Thing) -> int:
        """The number under which `thing` stands in `ids`; at most 255 things fit one canvas."""
        if thing not in self.things:
            self.things.append(thing)
        return self.things.index(thing)

    def polygon(self, points, color, thing: Thing) -> None:
        self._stroke("polygon", self._scaled(points), color, thing)

    def line(self, points, width: float, color, thing: Thing) -> None:
        """Straight from point to point, `width` wide."""
        self._stroke("line", self._scaled(points), color, thing, width=max(1, round(width * self.side)), joint="curve")

    def circle(self, x: float, y: float, radius: float, color, thing: Thing) -> None:
        self.ellipse((x - radius, y - radius, x + radius, y + radius), color, thing)

    def ring(self, x: float, y: float, radius: float, width: float, color, thing: Thing) -> None:
        """The outline of a circle, `width` wide, inside it; what lies within stays as it was."""
        box = [v * self.side for v in (x - radius, y - radius, x + radius, y + radius)]
        self._stroke("ellipse", box, color, thing, paint="outline", width=max(1, round(width * self.side)))

    def ellipse(self, box, color, thing: Thing) -> None:
        self._stroke("ellipse", [v * self.side for v in box], color, thing)

    def rectangle(self, box, color, thing: Thing) -> None:
        """Between two opposite corners (x, y, x, y), in any order."""
        (x0, x1), (y0, y1) = sorted(box[::2]), sorted(box[1::2])
        self._stroke("rectangle", [v * self.side for v in (x0, y0, x1, y1)], color, thing)

    def _scaled(self, points):
        return [(float(x) * self.side, float(y) * self.side) for x, y in points]

    def _stroke(self, shape, where, color, thing, paint="fill", **how):
        rgb, ids = self._pens
        getattr(rgb, shape)(where, **{paint: tuple(int(c) for c in color)}, **how)
        getattr(ids, shape)(where, **{paint: self.number(thing)}, **how)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """What has been painted so far: float32 (row, column, rgb) in 0..255 and uint8 (row, column) numbers."""
        return np.array(self.rgb, dtype=np.float32), np.array(self.ids)


def reduce(rgb: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Oversampled arrays to final ones: color by the mean of each block, meaning by the sample at its center."""
    k = OVERSAMPLE
    rows, columns = ids.shape[0] // k, ids.shape[1] // k
    image = rgb.reshape(rows, k, columns, k, 3).mean((1, 3))
    return np.clip(image.round(), 0, 255).astype(np.uint8), ids[k // 2 :: k, k // 2 :: k].copy()


def noise(rng: np.random.Generator, side: int, cells: int, aspect: float = 1.0) -> np.ndarray:
    """Smooth noise, float32 (side, side), about -1..1: `cells` random values a row, interpolated between."""
    grid = rng.uniform(-1, 1, (max(2, round(cells * aspect)), cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC))
