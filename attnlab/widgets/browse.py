"""Look through a data set and mark what is bad: `browse_dataset(folder)`."""

import html
from pathlib import Path

import ipywidgets as ui
import numpy as np

from ..dataset import Dataset, Pair
from ..plots.styling import class_color
from .drawing import beside, enlarged
from .panel import Panel, Report, row, sized
from .picture import Picture

__all__ = ["DatasetBrowser", "browse_dataset", "describe_pair", "draw_pair", "find_records"]

_PAIRS_PER_PAGE = 12


def find_records(
    dataset: Dataset, kind: str | None = None, text: str = "", score: float = 0.0, bad: bool = False
) -> list[int]:
    """Find the records that show a class, with a text in the prompt, a high enough score, and marked as bad; by number.

    The score is that of the class, or the least of the image's. None, "", 0 and False let all through.
    """

    def fits(line):
        scores = [value for name, value in line["scores"].items() if value is not None and kind in (None, name)]
        shows = kind is None or line["areas"].get(kind)
        scored = score <= 0 or min(scores, default=0) >= score
        marked = not bad or line["file_name"] in dataset.bad
        return shows and scored and marked and text.lower() in line["prompt"].lower()

    return [i for i, line in enumerate(dataset.records) if fits(line)]


def draw_pair(pair: Pair, dataset: Dataset) -> np.ndarray:
    """Draw an image beside itself under its masks, in the colors of the classes: uint8 (row, column, rgb)."""
    pixels = np.asarray(pair.image)
    shown = pixels.astype(float)
    for number, name in enumerate(dataset.classes[1:], 1):
        mask = pair.labels == number if dataset.recipe.labels else pair.labels[name]
        color = 255 * np.array(class_color(name, number))
        shown = np.where(mask[..., None], 0.4 * shown + 0.6 * color, shown)
    return enlarged(np.concatenate([pixels, shown.astype(np.uint8)], 1), 128)


def describe_pair(pair: Pair) -> str:
    """Return a pair's prompt and its classes' areas and scores, HTML."""
    scores = pair.metadata["scores"]
    parts = [
        f"{name} {area:.1%}" + (f", score {scores[name]:.2f}" if scores.get(name) is not None else "")
        for name, area in pair.metadata["areas"].items()
        if area
    ]
    return f"{html.escape(pair.metadata['prompt'])}<br><small>{html.escape('; '.join(parts) or 'no class')}</small>"


class DatasetBrowser(Panel):
    """The widget of `browse_dataset`; `found` are the numbers of the records that the filters let through."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.found = dataset, list(range(len(dataset)))
        self.kind = ui.Dropdown(options=["any class", *dataset.classes[1:]], description="shows", **sized("240px"))
        self.text = ui.Text(placeholder="part of a prompt", description="prompt", **sized("240px"))
        self.score = ui.FloatSlider(
            max=1, step=0.01, description="least score", continuous_update=False, **sized("300px")
        )
        self.marked = ui.Checkbox(description="marked as bad only", indent=False)
        self.back = ui.Button(description="Back", icon="arrow-left", layout={"width": "90px"})
        self.ahead = ui.Button(description="Ahead", icon="arrow-right", layout={"width": "90px"})
        self.page, self.report, self.sheet = 0, Report(), row()
        filters = (self.kind, self.text, self.score, self.marked)
        super().__init__([row(*filters), row(self.back, self.ahead, self.report), self.sheet])
        for control in filters:
            control.observe(lambda _: self._filter(), "value")
        self.back.on_click(lambda _: self.turn(-1))
        self.ahead.on_click(lambda _: self.turn(1))
        self._filter()

    def _filter(self):
        """Find what the fields ask for, and show its first page."""
        kind = self.kind.value if self.kind.index else None
        self.found = find_records(self.dataset, kind, self.text.value, self.score.value, self.marked.value)
        self.page = 0
        self.turn(0)

    def turn(self, pages: int) -> None:
        """Go so many pages on, or back."""
        last = max(0, (len(self.found) - 1) // _PAIRS_PER_PAGE)
        self.page = min(max(self.page + pages, 0), last)
        self.back.disabled, self.ahead.disabled = self.page == 0, self.page == last
        with self.report.saying():
            here = self.found[self.page * _PAIRS_PER_PAGE :][:_PAIRS_PER_PAGE]
            self.sheet.children = [self._card(i) for i in here]
            bad = len(self.dataset.bad)
            self.report.say(f"page {self.page + 1} of {last + 1}; {len(self.found)} pairs; {bad} marked as bad")

    def _card(self, i):
        name, failed = self.dataset.records[i]["file_name"], Report()
        shown = [failed]
        with failed.saying():  # a damaged pair hides no other
            pair = self.dataset[i]
            picture = Picture(draw_pair(pair, self.dataset), pair.metadata["prompt"], width=240)
            shown = [picture, ui.HTML(describe_pair(pair))]
        bad = ui.ToggleButton(name in self.dataset.bad, description="bad", icon="thumbs-down", layout={"width": "70px"})
        bad.observe(lambda change: self.mark(i, change["new"]), "value")
        return ui.VBox([*shown, bad], layout={"width": "250px", "margin": "0 8px 12px 0"})

    def mark(self, i: int, bad: bool = True) -> None:
        """Mark a record as bad, or as good again; exports leave out what is bad."""
        with self.report.saying():
            self.dataset.mark(self.dataset.records[i]["file_name"], bad)
            self.report.say(f"{len(self.dataset.bad)} marked as bad, in {self.dataset.folder / 'bad.json'}")

    def still(self) -> np.ndarray:
        """Return the first pairs of the page."""
        shown = [card.children[0] for card in self.sheet.children]
        return beside([one.pixels for one in shown if isinstance(one, Picture)][:4])


def browse_dataset(folder: str | Path | Dataset) -> DatasetBrowser:
    """Make a widget with the pairs of a data set or its folder, page by page, found by class, prompt and score.

    What is marked as bad is kept in bad.json beside the data set, and left out of exports. FileNotFoundError where the
    folder holds no finished data set.
    """
    return DatasetBrowser(folder if isinstance(folder, Dataset) else Dataset(folder))
