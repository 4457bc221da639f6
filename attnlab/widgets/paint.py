"""Paint a thing on an image, and fit a token to it: `paint_token(image, recording)`."""

from collections.abc import Sequence
from pathlib import Path

import ipywidgets as ui
import numpy as np
from PIL import Image

from ..learning.fit import fit_token
from ..maps.linear import LinearMap, linear_daam
from ..recording import Recording
from ..tokens import TokenLibrary
from .drawing import beside, draw_mask, enlarged
from .panel import Panel, Report, row, sized
from .picture import Picture

__all__ = ["TokenPainter", "paint_token"]

_Shown = tuple[Image.Image, Recording | LinearMap]


class TokenPainter(Panel):
    """The widget of `paint_token`; `token` is the last one fitted, or None."""

    def __init__(self, shown: Sequence[_Shown], word: str, library: Path):
        self.images = [np.asarray(image) for image, _ in shown]
        self.maps = [one if isinstance(one, LinearMap) else linear_daam(one) for _, one in shown]
        self.library, self.token = library, None
        self.canvas = Picture(enlarged(self.images[0]), "paint here", self.images[0].shape[:2], brush=3)
        self.tool = ui.ToggleButtons(options=["paint", "erase"], style={"button_width": "80px"})
        widest = max(8, self.images[0].shape[0] // 6)
        self.brush = ui.IntSlider(value=3, min=1, max=widest, description="brush, pixels", **sized("300px"))
        clear = ui.Button(description="Clear", icon="trash")
        self.name = ui.Text("my word", description="name", **sized("220px"))
        self.start = ui.Text(word, description="starts at", placeholder="a word, or nothing", **sized("220px"))
        fit = ui.Button(description="Fit", button_style="primary", icon="magic")
        self.save = ui.Button(description="Save", icon="save", disabled=True, tooltip=f"add it to {library}")
        self.report, self.gallery = Report(), row()
        tools = row(self.tool, self.brush, clear)
        super().__init__([tools, row(self.name, self.start, fit, self.save), self.report, self.canvas, self.gallery])
        for control in (self.tool, self.brush):
            control.observe(lambda _: self._choose_brush(), "value")
        clear.on_click(lambda _: self.clear())
        fit.on_click(lambda _: self.learn())
        self.save.on_click(lambda _: self.keep())
        self.clear()

    def clear(self) -> None:
        """Forget what is painted, and what was fitted to it."""
        self.canvas.mask = b""
        self._forget()
        self.report.say("paint the thing, with the mouse or with arrow keys and space; then press Fit")

    def _forget(self):
        self.token, self.save.disabled, self.gallery.layout.display = None, True, "none"

    def _choose_brush(self):
        self.canvas.brush = self.brush.value * (1 if self.tool.value == "paint" else -1)

    def learn(self) -> None:
        """Fit a token to what is painted, and show its masks on all images."""
        self._forget()
        with self.report.saying():
            mask = self.canvas.painted
            if not mask.any():
                raise ValueError("nothing is painted: paint the thing on the picture first")
            if mask.all():
                raise ValueError("all of it is painted: leave out what is not the thing")
            name, word = self.name.value.strip(), self.start.value.strip() or None
            if not name:
                raise ValueError("the token has no name: write one")
            self.token = fit_token([self.maps[0]], [mask], init=word, name=name, unlabeled=self.maps)
            self.save.disabled = False
            metadata = self.token.metadata
            self.report.say(f"{metadata['seconds'] * 1e3:.0f} ms; IoU with what is painted {metadata['iou']:.2f}")
            self._show()

    def _show(self):
        """Show where the token's maps are above zero."""
        pixels = [
            draw_mask(image, linear.upscaled(self.token, image.shape[:2]) > 0)
            for image, linear in zip(self.images, self.maps, strict=True)
        ]
        if self.gallery.children:
            for picture, one in zip(self.gallery.children, pixels, strict=True):
                picture.show(one)
        else:
            named = [(f"token on image {number}", one) for number, one in enumerate(pixels, 1)]
            self.gallery.children = [Picture(one, name, layout={"margin": "0 6px 6px 0"}) for name, one in named]
        self.gallery.layout.display = None

    def keep(self) -> None:
        """Add the token to the library's file; it replaces one of its name."""
        with self.report.saying():
            if self.token is None:
                raise ValueError("there is no token yet: paint, then fit")
            known = TokenLibrary.load(self.library) if self.library.exists() else TokenLibrary()
            known.add(self.token)
            known.save(self.library)
            self.report.say(f"{self.token.name!r} is in {self.library}, which has {len(known)} tokens")

    def still(self) -> np.ndarray:
        """Return the image and the masks of the token on all images."""
        return beside([self.canvas.pixels, *(picture.pixels for picture in self.gallery.children if self.token)])


def paint_token(
    image: Image.Image,
    recording: Recording | LinearMap,
    gallery: Sequence[_Shown] = (),
    *,
    word: str = "",
    mask: np.ndarray | None = None,
    library: str | Path = "tokens.safetensors",
) -> TokenPainter:
    """Make a widget to paint a mask on an image, fit a token to it, see it on other images and keep it in a file.

    Parameters
    ----------
    image, recording : PIL.Image.Image, Recording or LinearMap
        The image to paint on, and its recording or linear map.
    gallery : Sequence of (image, recording)
        Other images of the same model and size. `fit_token` learns from them how features vary.
    word : str
        Word that the token starts at.
    mask : (row, column) array of bool, optional
        Mask of the image's size to begin with.
    library : str or Path
        File of tokens to save to.
    """
    painter = TokenPainter([(image, recording), *gallery], word, Path(library))
    if mask is not None:
        painter.canvas.painted = mask
        painter.learn()
    return painter
