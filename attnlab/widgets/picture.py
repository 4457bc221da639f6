"""Show pixels that can be pointed at and painted on, with the mouse or the keyboard."""

from pathlib import Path

import anywidget
import numpy as np
import traitlets

from .drawing import as_png

__all__ = ["Picture"]


class Picture(anywidget.AnyWidget):
    """Pixels, uint8 (row, column, rgb), shown large; arrow keys move the point, space paints at it."""

    _esm = Path(__file__).with_name("picture.js")
    _css = Path(__file__).with_name("picture.css")

    png = traitlets.Bytes().tag(sync=True)  # of `pixels`
    number = traitlets.Int(0).tag(sync=True)  # of the pixels that are shown, counted up
    size = traitlets.Tuple((1, 1)).tag(sync=True)  # (rows, columns) that points and masks count in: `grid`, or pixels'
    width = traitlets.Int(256).tag(sync=True)  # on the screen, at most
    label = traitlets.Unicode().tag(sync=True)  # what a screen reader says
    point = traitlets.List().tag(sync=True)  # [row, column] that was pointed at, or []
    brush = traitlets.Int(0).tag(sync=True)  # radius of what is painted; below 0 of what is erased; 0 points instead
    # painted, one byte per pixel, row by row; empty where nothing is
    mask = traitlets.Bytes().tag(sync=True, from_json=lambda value, _: bytes(value))

    def __init__(self, pixels: np.ndarray, label: str = "", grid: tuple[int, int] | None = None, **traits):
        super().__init__(label=label, **traits)
        self.show(pixels, grid=grid)

    def show(self, pixels: np.ndarray, label: str | None = None, grid: tuple[int, int] | None = None) -> None:
        """Show other pixels; what was painted or pointed at in another size is forgotten."""
        size = tuple(pixels.shape[:2] if grid is None else grid)
        with self.hold_sync():
            if size != self.size:
                self.size, self.mask, self.point = size, b"", []
            self.pixels, self.label = pixels, self.label if label is None else label
            self.png, self.number = as_png(pixels), self.number + 1

    @property
    def painted(self) -> np.ndarray:
        """The painted mask, bool (row, column)."""
        if not self.mask:
            return np.zeros(self.size, bool)
        return np.frombuffer(self.mask, np.uint8).reshape(self.size).astype(bool)

    @painted.setter
    def painted(self, mask: np.ndarray):
        self.mask = np.asarray(mask, np.uint8).tobytes() if np.any(mask) else b""
