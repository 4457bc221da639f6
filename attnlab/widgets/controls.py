"""Controls of `explore`: the form of a generation, the words of a recording, and how their maps are shown."""

import threading
from collections.abc import Callable, Mapping, Sequence
from weakref import WeakSet

import ipywidgets as ui

from ..recording.trace import Trace
from ..recording.words import Query
from ..tokens import Token
from . import views
from .panel import ROW_LAYOUT, row, sized

__all__ = ["GenerationForm", "MapControls", "WordChips"]

_RUNNING: WeakSet = WeakSet()  # forms that generate: a new one ends them, so that no forgotten cell runs on
_ENDED = "stopped, since another explorer was opened or started: one image is made at a time; Generate begins it again"


def _end_all():
    for running in list(_RUNNING):
        running.end(wait=True, why=_ENDED)


class GenerationForm:
    """The fields of a generation, and the thread in which it runs."""

    def __init__(self, prompt: str, seed: int, steps: int, guidance: float):
        _end_all()
        self.prompt = ui.Text(prompt, description="prompt", **sized("420px"))
        self.seed = ui.BoundedIntText(seed, 0, 2**31 - 1, description="seed", **sized("110px"))
        self.steps = ui.BoundedIntText(steps, 1, 1000, description="steps", **sized("110px"))
        self.guidance = ui.BoundedFloatText(guidance, min=0, max=50, step=0.5, description="guidance", **sized("140px"))
        self.generate = ui.Button(description="Generate", button_style="primary", icon="play")
        self.stop = ui.Button(description="Stop", icon="stop", disabled=True)
        self.progress = ui.IntProgress(0, 0, steps, layout={"width": "160px"})
        self.stopping, self.why = threading.Event(), ""
        self.thread = None
        self.stop.on_click(lambda _: self.end())

    def start(self, work: Callable[..., None]) -> None:
        """Call `work` with the options of `views.generate` in the background, after all other generations are ended."""
        if self.thread is not None and self.thread.is_alive():
            raise ValueError("it is generating already: wait, or stop it first")
        if not self.prompt.value.strip():
            raise ValueError("the prompt is empty: write what the image shows")
        _end_all()
        _RUNNING.add(self)
        self.stopping.clear()
        self.progress.max, self.progress.value = self.steps.value, 0
        self.generate.disabled, self.stop.disabled = True, False
        self.thread = threading.Thread(target=self._generate, args=(work,), daemon=True)
        self.thread.start()

    def end(self, wait: bool = False, why: str = "stopped on the way; the picture before it is kept") -> None:
        """Stop a generation after its current step; the widget then says why."""
        self.why = why
        self.stopping.set()
        if wait and self.thread is not None:
            self.thread.join()

    def _generate(self, work):
        fields = {"prompt": self.prompt, "seed": self.seed, "steps": self.steps, "guidance": self.guidance}
        try:
            work(each=self._advance, **{name: field.value for name, field in fields.items()})
        finally:
            self.generate.disabled, self.stop.disabled = False, True
            _RUNNING.discard(self)

    def _advance(self, done):
        self.progress.value = done
        if self.stopping.is_set():
            raise views.Stopped(self.why)


class WordChips(ui.HBox):
    """Buttons for words and tokens: those of the prompt, then those that were asked for."""

    def __init__(self, asked: Sequence[str | Token], changed: Callable[[], None]):
        super().__init__(layout=ROW_LAYOUT)
        self.asked = list(asked)  # beyond the prompt's
        self.chips: dict[str, tuple[Query | Token, ui.ToggleButton]] = {}  # by the name on the button
        self._on_change = changed

    @property
    def chosen(self) -> dict[str, Query | Token]:
        """Chosen words and tokens by name."""
        return {name: word for name, (word, chip) in self.chips.items() if chip.value}

    def fill(self, own: Mapping[str, Query]) -> None:
        """Offer a prompt's words. Chosen stay those that were, or else what was asked for, or the last word."""
        before, self.chips = self.chosen, {}
        for word in (*own.values(), *self.asked):
            self._add(word)
        texts = [word for word in self.asked if isinstance(word, str)]
        for name in [name for name in before if name in self.chips] or texts or [*own][-1:]:
            self.chips[name][1].value = True

    def choose(self, text: str) -> None:
        """Choose any word or phrase, or a token by its name."""
        if text not in self.chips:
            self.asked.append(text)
            self._add(text)
        self.chips[text][1].value = True

    def _add(self, word):
        name = views.spelled(word)
        chip = ui.ToggleButton(description=name, layout={"width": "auto"}, tooltip=f"show the map of {name}")
        chip.observe(lambda _: self._on_change(), "value")
        self.chips[name] = word, chip
        self.children = [chip for _, chip in self.chips.values()]


class MapControls:
    """The controls of how maps are computed and shown."""

    def __init__(self, method: str, changed: Callable[[], None]):
        self.method = ui.ToggleButtons(options=views.MAP_METHODS, value=method, style={"button_width": "80px"})
        self.opacity = ui.FloatSlider(value=0.6, min=0, max=1, step=0.05, description="opacity", **sized("260px"))
        self.colormap = ui.Dropdown(options=views.COLORMAPS, description="colors", **sized("140px"))
        self.scale = ui.Dropdown(options=views.SCALES, description="scale", **sized("140px"))
        self.choices = {"layers": [], "steps": [], "heads": []}  # of a recording, in the order of its sliders
        options = {"value": (0, 0), "min": 0, "max": 0, "continuous_update": False}
        self.ranges = {name: ui.IntRangeSlider(description=name, **options, **sized("265px")) for name in self.choices}
        self.rows = [row(self.method, self.opacity, self.colormap, self.scale), row(*self.ranges.values())]
        for control in (child for line in self.rows for child in line.children):
            control.observe(lambda _: changed(), "value")

    def fit(self, trace: Trace) -> None:
        """Offer what a recording tells of, and choose all of its layers, steps and heads."""
        offered, self.choices = views.methods_of(trace), views.choices_of(trace)
        if self.method.options != offered:
            before, self.method.options = self.method.value, offered
            self.method.value = before if before in offered else offered[0]
        _show(self.method, len(offered) > 1)
        for name, choices in self.choices.items():
            last, slider = max(0, len(choices) - 1), self.ranges[name]
            slider.max, slider.value = last, (0, last)
            _show(slider, last > 0)

    @property
    def chosen(self) -> dict[str, list]:
        """The chosen layers, steps and heads, as the map functions take them."""
        ends = {name: slider.value for name, slider in self.ranges.items() if self.choices[name]}
        return {name: self.choices[name][low : high + 1] for name, (low, high) in ends.items()}


def _show(control, shown):
    """Show a control, or hide one that leaves no choice."""
    control.layout.display = None if shown else "none"
