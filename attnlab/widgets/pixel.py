"""`inspect_pixel(image, recording)`: point at a pixel, and see which words it looks at."""

import io
from collections.abc import Sequence

import ipywidgets as ui
import numpy as np
from PIL import Image

from ..recording.recording import Recording
from . import views
from .drawing import beside, enlarged
from .panel import Panel, Report
from .picture import Picture


class PixelInspector(Panel):
    """The widget of `inspect_pixel`; `picture.point` is the pixel, [row, column]."""

    def __init__(self, image: np.ndarray, recording: Recording, point: Sequence[int]):
        self.recording, self.size, self.report = recording, image.shape[:2], Report()
        self.picture = Picture(enlarged(image), "the image: click a pixel", self.size)
        self.found = ui.Image(format="png", layout={"max_width": "100%"})
        super().__init__([self.report, self.picture, self.found])
        self.inspect(*point)
        self.picture.point = list(map(int, point))
        self.picture.observe(lambda change: self.update(), "point")

    def inspect(self, row: int, column: int) -> None:
        """Draw what a pixel looks at."""
        self.found.value = views.pixel_figure(self.recording, (row, column), self.size)
        self.report.say(f"row {row}, column {column}; click another pixel, or move by arrow keys")

    def update(self) -> None:
        with self.report.saying():
            self.inspect(*self.picture.point)

    def still(self) -> np.ndarray:
        with Image.open(io.BytesIO(self.found.value)) as found:
            return beside([self.picture.pixels, np.asarray(found.convert("RGB"))])


def inspect_pixel(image: Image.Image, recording: Recording, point: Sequence[int] | None = None) -> PixelInspector:
    """A widget that tells what a pixel looks at: its words, strongest first, and the first one over steps and layers.

    `point`: (row, column) of the image's pixel to begin with, its middle unless given. The shares are DAAM's, over all
    layers, steps and heads.

    ValueError: a point outside the image.
    """
    pixels = np.asarray(image)
    point = [length // 2 for length in pixels.shape[:2]] if point is None else point
    return PixelInspector(pixels, recording, point)
