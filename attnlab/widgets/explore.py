"""Look at the maps of any words, `explore(pipe)`, and at the words of any pixel, `inspect_pixel(image, recording)`."""

import html
import io
from collections.abc import Sequence

import ipywidgets as ui
import numpy as np
from PIL import Image

from ..recording import Recording
from ..tokens import Token, TokenLibrary
from . import views
from .controls import GenerationForm, MapControls, WordChips
from .drawing import beside, enlarged
from .panel import Panel, Report, row
from .picture import Picture

__all__ = ["Explorer", "PixelInspector", "explore", "inspect_pixel"]


class Explorer(Panel):
    """The widget of `explore`; `image` and `recording` are those of the last generation, or None."""

    def __init__(self, pipe, form: GenerationForm, words: Sequence[str], tokens: Sequence[Token], size: int = 0):
        self.pipe, self.form, self.size, self.report = pipe, form, size, Report()
        self.image = self.recording = None
        self._of_steps: tuple[list[int], Recording] | None = None  # what the denoiser was asked once more, and for whom
        self.words = WordChips([*tokens, *(" ".join(word.split()) for word in words)], self._update)
        self.more = ui.Text(placeholder="another word or token, then Enter", continuous_update=False)
        self.maps = MapControls("OVAM" if words else "DAAM", self._update)
        self.pictures = row()
        self.pixel = ui.Image(format="png", layout={"display": "none", "max_width": "100%"})
        fields = row(form.prompt, form.seed, form.steps, form.guidance)
        buttons = row(form.generate, form.stop, form.progress, self.report)
        super().__init__([fields, buttons, row(self.words, self.more), *self.maps.rows, self.pictures, self.pixel])
        form.generate.on_click(lambda _: self.start())
        self.more.observe(lambda change: self.add(change["new"]), "value")
        self.report.say("press Generate to make the image; then choose words, or click a pixel")

    def start(self) -> None:
        """Generate what the fields say, in the background."""
        with self.report.saying(errors_only=True):
            self.report.say("generating")
            self.form.start(self._make)

    def _make(self, prompt, **options):
        with self.report.saying(errors_only=True):
            image, recording = views.generate(self.pipe, prompt, size=self.size, **options)
            self.take(image, recording)
            if lost := recording.encoder.lost(prompt):
                self.report.say(f"the model's text window has no room for {' '.join(lost)!r}", failed=True)

    def close(self) -> None:
        """Stop a generation, and take the widget off the screen."""
        self.form.end()
        super().close()

    def take(self, image: Image.Image, recording: Recording) -> None:
        """Show an image and its recording: the words that were chosen or asked for, or the prompt's last one."""
        self.recording = self._of_steps = None  # nothing is drawn until all controls are set
        self.maps.fit(recording.trace)
        self.words.fill(views.words_of(recording))
        self.image, self.recording = image, recording
        self.pixel.layout.display = "none"  # it is of the image before
        for slot in self.pictures.children:
            slot.children[1].point = []
        self.report.say(f"{len(recording.trace.steps)} steps recorded, {recording.nbytes / 1e6:.1f} MB")
        self._update()

    def add(self, text: str) -> None:
        """Choose any word or phrase, or a token by its name."""
        text = " ".join(text.split())
        if not text:
            return
        with self.report.saying():
            if self.recording is None:
                raise ValueError("generate an image first, then ask for words")
            if not views.is_said(self.recording, text):
                if text not in self.recording.trace.beside:
                    self.recording.encode(text)  # says what is wrong with it
                if self.maps.method.value == "DAAM":
                    self.maps.method.value = "OVAM"
            self.more.value = ""
            self.words.choose(text)

    def _update(self):
        """Draw the maps of the chosen words."""
        if self.recording is None:
            return
        with self.report.saying():
            chosen, method = list(self.words.chosen.values()), self.maps.method.value
            recording, over = self._chosen()
            words = [word for word in chosen if views.is_mapped(recording, word, method)]
            maps = views.word_maps(recording, words, method, **over)
            large = enlarged(np.asarray(self.image))
            look = {name: getattr(self.maps, name).value for name in ("opacity", "colormap", "scale")}
            if look["scale"] == "together":  # a word alone, too, is only as bright as it is among the prompt's
                look["highest"] = views.strongest(recording, method, **over)
            titles = {"image": "", **{name: f"max {heat.max():.2g}" for name, heat in maps.items()}}
            self._draw({"image": large, **views.side_by_side(large, maps, **look)}, titles)
            self.report.forget()
            views.check_mapped(recording, chosen, method)

    def _chosen(self):
        """Return the recording of the chosen steps, and what else is chosen, as the map functions take it."""
        over = self.maps.chosen
        if self.recording.trace.queries:
            return self.recording, over
        steps = over.pop("steps", self.recording.trace.steps)
        if self._of_steps is None or self._of_steps[0] != steps:
            self._of_steps = steps, views.record_steps(self.pipe, self.recording, steps)
        return self._of_steps[1], over

    def _draw(self, pixels, beside):
        """Show pixels by name, with a text beside it; pictures that are there are used again."""
        slots, grid = list(self.pictures.children), self.image.size[::-1]
        for k, (name, one) in enumerate(pixels.items()):
            title = f"<b>{html.escape(name)}</b> {beside[name]}"
            if k < len(slots):
                slots[k].children[0].value = title
                slots[k].children[1].show(one, name, grid)
            else:
                picture = Picture(one, name, grid)
                picture.observe(lambda change: self.inspect(*change["new"]), "point")
                slots.append(ui.VBox([ui.HTML(title), picture], layout={"margin": "0 6px 6px 0"}))
        self.pictures.children = slots
        for k, slot in enumerate(slots):  # those that are not needed are hidden: taking them out would draw all anew
            slot.layout.display = None if k < len(pixels) else "none"

    def inspect(self, *point: int) -> None:
        """Draw the attention of a pixel (row, column) of the image to the prompt's words."""
        if self.recording is None or len(point) != 2:
            return
        with self.report.saying():
            self.pixel.value = views.pixel_figure(self.recording, point, self.image.size[::-1])
            self.pixel.layout.display = "block"

    def still(self) -> np.ndarray:
        """Return the image and the maps, in a row."""
        return beside([slot.children[1].pixels for slot in self.pictures.children if slot.layout.display != "none"])


def explore(
    pipe,
    prompt: str = "a burning house with smoke",
    *,
    seed: int = 0,
    steps: int = 20,
    guidance: float = 4.0,
    size: int = 0,
    words: Sequence[str] = (),
    tokens: TokenLibrary | Sequence[Token] = (),
    image: Image.Image | None = None,
    recording: Recording | None = None,
) -> Explorer:
    """Make a widget that generates images and shows the maps of any words.

    A pixel that is clicked, or reached by arrow keys, tells its words, strongest first. Of models with joint attention
    (FLUX, Stable Diffusion 3, ...) the words are those of the prompt, and texts that `recording` has beside it; and the
    denoiser is asked once more for single steps: a call for each.

    Parameters
    ----------
    pipe : DiffusionPipeline
        The pipeline.
    prompt, seed, steps, guidance : str, int, int, float
        What the fields begin with.
    size : int
        Side of the images in pixels; 0 is the model's own.
    words, tokens : Sequence[str], TokenLibrary or Sequence[Token]
        Words to ask for (default: the prompt's last one is shown), and learned tokens to offer beside the prompt's.
    image, recording : PIL.Image.Image, Recording, optional
        An image and its recording to begin with.
    """
    tokens = tokens.values() if isinstance(tokens, TokenLibrary) else tokens
    explorer = Explorer(pipe, GenerationForm(prompt, seed, steps, guidance), words, list(tokens), size)
    if recording is not None and image is not None:
        explorer.take(image, recording)
    return explorer


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

    Attention is the mean over all layers, steps and heads (DAAM). Of joint attention (FLUX, Stable Diffusion 3, ...) a
    recording has sums over steps, and single ones are not shown.

    Parameters
    ----------
    image, recording : PIL.Image.Image, Recording
        The image and its recording.
    point : (row, column), optional
        The pixel to begin with; ValueError where it is outside the image. Default: the middle of the image.
    """
    pixels = np.asarray(image)
    point = [length // 2 for length in pixels.shape[:2]] if point is None else point
    return PixelInspector(pixels, recording, point)
