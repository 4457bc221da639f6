"""`explore(pipe)`: a prompt, its image, and the maps of any words, to play with."""

import threading
from collections.abc import Sequence
from weakref import WeakSet

import ipywidgets as ui
import numpy as np
from PIL import Image

from ..recording.recording import Recording
from ..recording.words import Query
from ..tokens import Token, TokenLibrary
from . import views
from .drawing import beside, enlarged, titled
from .panel import Panel, Report, row, sized
from .picture import Picture

_RUNNING: WeakSet = WeakSet()  # explorers that generate: a new one ends them, so that no forgotten cell runs on


class Explorer(Panel):
    """The widget of `explore`; `image` and `recording` are those of the last generation, or None."""

    def __init__(self, pipe, prompt: str, seed: int, steps: int, guidance: float, words, tokens: Sequence[Token]):
        _end_all()
        self.pipe, self.tokens = pipe, {token.name: token for token in tokens}
        self.image, self.recording, self.filling = None, None, False
        self.stopping, self.thread = threading.Event(), None
        self.asked = [" ".join(word.split()) for word in words]  # beyond the prompt's
        self.chips: dict[str, tuple[Query | Token, ui.ToggleButton]] = {}
        self.report, self.progress = Report(), ui.IntProgress(0, 0, steps, layout={"width": "160px"})
        self._make_controls(prompt, seed, steps, guidance)
        self.words, self.pictures = row(), row()
        self.pixel = ui.Image(format="png", layout={"display": "none", "max_width": "100%"})
        super().__init__(
            [
                row(self.prompt, self.seed, self.steps, self.guidance),
                row(self.generate, self.stop, self.progress, self.report),
                row(self.words, self.more),
                row(self.method, self.opacity, self.colormap, self.scale),
                row(self.layers, self.kept, self.heads),
                self.pictures,
                self.pixel,
            ]
        )

    def _make_controls(self, prompt, seed, steps, guidance):
        self.prompt = ui.Text(prompt, description="prompt", **sized("420px"))
        self.seed = ui.BoundedIntText(seed, 0, 2**31 - 1, description="seed", **sized("110px"))
        self.steps = ui.BoundedIntText(steps, 1, 1000, description="steps", **sized("110px"))
        self.guidance = ui.BoundedFloatText(guidance, min=0, max=50, step=0.5, description="guidance", **sized("140px"))
        self.generate = ui.Button(description="Generate", button_style="primary", icon="play")
        self.stop = ui.Button(description="Stop", icon="stop", disabled=True)
        self.more = ui.Text(placeholder="another word or token, then Enter", continuous_update=False)
        method = "OVAM" if self.asked else "DAAM"
        self.method = ui.ToggleButtons(options=views.METHODS, value=method, style={"button_width": "80px"})
        self.opacity = ui.FloatSlider(value=0.5, min=0, max=1, step=0.05, description="opacity", **sized("260px"))
        self.colormap = ui.Dropdown(options=views.COLORMAPS, description="colors", **sized("140px"))
        self.scale = ui.Dropdown(options=views.SCALES, description="scale", **sized("140px"))
        self.layers, self.kept, self.heads = (
            ui.IntRangeSlider(value=(0, 0), min=0, max=0, description=name, continuous_update=False, **sized("265px"))
            for name in ("layers", "steps", "heads")
        )
        self.generate.on_click(lambda _: self.start())
        self.stop.on_click(lambda _: self.end())
        self.more.observe(lambda change: self.add(change["new"]), "value")
        for control in (self.method, self.opacity, self.colormap, self.scale, self.layers, self.kept, self.heads):
            control.observe(lambda _: self.update(), "value")

    def start(self) -> None:
        """Generate what the fields say, in the background."""
        with self.report.saying():
            if self.thread is not None and self.thread.is_alive():
                raise ValueError("it is generating already: wait, or stop it first")
            if not self.prompt.value.strip():
                raise ValueError("the prompt is empty: write what the image shows")
            _end_all()
            _RUNNING.add(self)
            self.stopping.clear()
            self.progress.max, self.progress.value = self.steps.value, 0
            self.generate.disabled, self.stop.disabled = True, False
            self.report.say("generating")
            self.thread = threading.Thread(target=self._generate, daemon=True)
            self.thread.start()

    def end(self, wait: bool = False) -> None:
        """Stop a generation after its current step."""
        self.stopping.set()
        if wait and self.thread is not None:
            self.thread.join()

    def close(self) -> None:
        self.end()
        super().close()

    def _generate(self):
        def each(done):
            self.progress.value = done
            if self.stopping.is_set():
                raise views.Stopped

        asked = {"seed": self.seed.value, "steps": self.steps.value, "guidance": self.guidance.value}
        try:
            with self.report.saying():
                self.take(*views.generate(self.pipe, self.prompt.value, each=each, **asked))
        finally:
            self.generate.disabled, self.stop.disabled = False, True
            _RUNNING.discard(self)

    def take(self, image: Image.Image, recording: Recording) -> None:
        """Show an image and its recording: the words that were chosen before or asked for, or the prompt's last one."""
        self.image, self.recording = image, recording
        trace = recording.trace
        counts = len(trace.sizes), len(trace.steps), min(layer.heads for layer in trace.layers.values())
        chosen = [name for name, (_, chip) in self.chips.items() if chip.value]
        self.chips, self.filling = {}, True  # one picture at the end, not one for each control
        for slider, count in zip((self.layers, self.kept, self.heads), counts, strict=True):
            slider.max, slider.value = count - 1, (0, count - 1)
        own = views.words_of(recording)
        for word in (*own, *self.tokens.values(), *self.asked):
            self._add_chip(word)
        for name in [name for name in chosen if name in self.chips] or self.asked or [views.spelled(own[-1])]:
            self.chips[name][1].value = True
        self.filling = False
        self.report.say(f"{counts[1]} steps recorded, {recording.nbytes / 1e6:.1f} MB")
        self.update()

    def add(self, text: str) -> None:
        """A chip for any word or phrase, or for a token by its name, chosen."""
        text = " ".join(text.split())
        if not text:
            return
        with self.report.saying():
            if self.recording is None:
                raise ValueError("generate an image first, then ask for words")
            self.recording.encode(text)  # says what is wrong with it
            if text not in self.chips:
                self.asked.append(text)
                self._add_chip(text)
            if self.method.value == "DAAM" and text not in map(views.spelled, views.words_of(self.recording)):
                self.method.value = "OVAM"
            self.more.value = ""
            self.chips[text][1].value = True

    def _add_chip(self, word: Query | Token) -> None:
        name = views.spelled(word)
        chip = ui.ToggleButton(description=name, layout={"width": "auto"}, tooltip=f"show the map of {name}")
        chip.observe(lambda _: self.update(), "value")
        self.chips[name] = word, chip
        self.words.children = [chip for _, chip in self.chips.values()]

    @property
    def settings(self) -> dict:
        """Layers, steps and heads as the sliders have them, for the map functions."""
        trace = self.recording.trace
        ranges = [range(low, high + 1) for low, high in (self.layers.value, self.kept.value, self.heads.value)]
        names = list(trace.sizes)
        return {
            "layers": [names[i] for i in ranges[0]],
            "steps": [trace.steps[i] for i in ranges[1]],
            "heads": list(ranges[2]),
        }

    def update(self) -> None:
        """Draw the maps of the chosen words."""
        if self.recording is None or self.filling:
            return
        with self.report.saying():
            chosen = {name: word for name, (word, chip) in self.chips.items() if chip.value}
            own = {views.spelled(word) for word in views.words_of(self.recording)}
            foreign = [name for name in chosen if name not in own] if self.method.value == "DAAM" else []
            words = [word for name, word in chosen.items() if name not in foreign]
            maps = views.word_maps(self.recording, words, self.method.value, **self.settings)
            look = {"opacity": self.opacity.value, "colormap": self.colormap.value, "scale": self.scale.value}
            large = enlarged(np.asarray(self.image))
            found = views.side_by_side(large, maps, **look)
            self._draw({"image": large, **found})
            if foreign:
                raise ValueError(f"{', '.join(foreign)}: not in the prompt; choose OVAM or linear")

    def _draw(self, pixels: dict[str, np.ndarray]) -> None:
        """Each in a picture under its name; pictures that are there are used again."""
        slots, grid = list(self.pictures.children), self.image.size[::-1]
        for k, (name, one) in enumerate(pixels.items()):
            if k < len(slots):
                slots[k].children[0].value = titled(name)
                slots[k].children[1].show(one, name, grid)
                continue
            picture = Picture(one, name, grid)
            picture.observe(lambda change: self.inspect(*change["new"]), "point")
            slots.append(ui.VBox([ui.HTML(titled(name)), picture], layout={"margin": "0 6px 6px 0"}))
        if len(slots) > len(self.pictures.children):
            self.pictures.children = slots
        for k, slot in enumerate(slots):  # those that are not needed are hidden: taking them out would draw all anew
            slot.layout.display = None if k < len(pixels) else "none"

    def inspect(self, *point: int) -> None:
        """What the words of the prompt have at a pixel (row, column) of the image."""
        if self.recording is None or len(point) != 2:
            return
        with self.report.saying():
            self.pixel.value = views.pixel_figure(self.recording, point, self.image.size[::-1])
            self.pixel.layout.display = "block"

    def still(self) -> np.ndarray:
        shown = [slot.children[1].pixels for slot in self.pictures.children if slot.layout.display != "none"]
        return beside(shown) if shown else np.full((16, 16, 3), 255, np.uint8)


def _end_all():
    """Stop every generation of explorers."""
    for running in list(_RUNNING):
        running.end(wait=True)


def explore(
    pipe,
    prompt: str = "a burning house with smoke",
    *,
    seed: int = 0,
    steps: int = 20,
    guidance: float = 4.0,
    words: Sequence[str] = (),
    tokens: TokenLibrary | Sequence[Token] = (),
    image: Image.Image | None = None,
    recording: Recording | None = None,
) -> Explorer:
    """A widget to generate with `pipe` and to ask for the maps of any words.

    With `image` and its `recording` it begins with those, and with `words` or the prompt's last one. `tokens` are
    learned words, offered beside the prompt's own.
    A pixel that is clicked, or reached by arrow keys, tells its words, strongest first. As a last line of a cell it is
    a live widget in JupyterLab, and a still picture where a notebook is only read.
    """
    tokens = tokens.values() if isinstance(tokens, TokenLibrary) else tokens
    explorer = Explorer(pipe, prompt, seed, steps, guidance, words, list(tokens))
    if recording is not None and image is not None:
        explorer.take(image, recording)
    return explorer
