"""Point at a pixel, and see the words that it attends to: `inspect_pixel(image, recording)`."""

import io
from collections.abc import Sequence

import ipywidgets as ui
import numpy as np
from PIL import Image

from ..recording import Recording
from . import views
from .drawing import beside, enlarged
from .panel import Panel, Report
from .picture import Picture

__all__ = ["PixelInspector", "inspect_pixel"]


class PixelInspector(Panel):
    """The widget of `inspect_pixel`; `picture.point` is the pixel, [row, column]."""

    def __init__(self, image: np.ndarray, recording: Recording, point: Sequence[int]):
        self.recording, self.size, self.report = recording, image.shape[:2], Report()
        self.picture = Picture(enlarged(image), "the image: click a pixel", self.size)
        self.found = ui.Image(format="png", layout={"max_width": "100%"})
        super().__init__([self.report, self.picture, self.found])
        self.inspect(*point)
        self.picture.point = list(map(int, point))
        self.picture.observe(lambda _: self._update(), "point")

    def inspect(self, row: int, column: int) -> None:
        """Draw the attention of a pixel to the prompt's words."""
        self.found.value = views.pixel_figure(self.recording, (row, column), self.size)
        self.report.say(f"row {row}, column {column}; click another pixel, or move by arrow keys")

    def _update(self):
        with self.report.saying():
            self.inspect(*self.picture.point)

    def still(self) -> np.ndarray:
        """Return the image beside the drawing."""
        with Image.open(io.BytesIO(self.found.value)) as found:
            return beside([self.picture.pixels, np.asarray(found.convert("RGB"))])


def inspect_pixel(image: Image.Image, recording: Recording, point: Sequence[int] | None = None) -> PixelInspector:
    """Make a widget that draws a pixel's attention to words, strongest first, and to the first over steps and layers.

    Attention is the mean over all layers, steps and heads (DAAM).

    Parameters
    ----------
    image, recording : PIL.Image.Image, Recording
        The image and its recording.
    point : (row, column), optional
        The pixel to begin with. Default: the middle of the image.

    Raises
    ------
    ValueError
        If the point is outside the image.
    """
    pixels = np.asarray(image)
    point = [length // 2 for length in pixels.shape[:2]] if point is None else point
    return PixelInspector(pixels, recording, point)
