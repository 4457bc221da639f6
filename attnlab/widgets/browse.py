"""`browse_dataset(folder)`: look through a labeled data set, and mark what is bad."""

from pathlib import Path

import ipywidgets as ui
import numpy as np

from ..dataset import Dataset
from . import views
from .panel import Panel, Report, beside, row
from .picture import Picture

PAGE = 12  # pairs


class DatasetBrowser(Panel):
    """The widget of `browse_dataset`; `found` are the numbers of the records that the filters let through."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.found = dataset, list(range(len(dataset)))
        small, wide = {"description_width": "initial"}, {"width": "240px"}
        self.kind = ui.Dropdown(
            options=["any class", *dataset.classes[1:]], description="shows", style=small, layout=wide
        )
        self.text = ui.Text(placeholder="part of a prompt", description="prompt", style=small, layout=wide)
        self.score = ui.FloatSlider(
            value=0, min=0, max=1, step=0.01, description="least score", style=small, continuous_update=False
        )
        self.marked = ui.Checkbox(description="marked as bad only", indent=False)
        self.back = ui.Button(description="Back", icon="arrow-left", layout={"width": "90px"})
        self.ahead = ui.Button(description="Ahead", icon="arrow-right", layout={"width": "90px"})
        self.page, self.report, self.sheet = 0, Report(), row()
        super().__init__(
            [row(self.kind, self.text, self.score, self.marked), row(self.back, self.ahead, self.report), self.sheet]
        )
        for control in (self.kind, self.text, self.score, self.marked):
            control.observe(lambda _: self.filter(), "value")
        self.back.on_click(lambda _: self.turn(-1))
        self.ahead.on_click(lambda _: self.turn(1))
        self.filter()

    def filter(self) -> None:
        """Find what the fields ask for, and show its first page."""
        kind = None if self.kind.index == 0 else self.kind.value
        asked = {"kind": kind, "text": self.text.value, "score": self.score.value, "bad": self.marked.value}
        self.found = views.find_records(self.dataset, **asked)
        self.page = 0
        self.turn(0)

    def turn(self, pages: int) -> None:
        """So many pages on."""
        last = max(0, (len(self.found) - 1) // PAGE)
        self.page = min(max(self.page + pages, 0), last)
        self.back.disabled, self.ahead.disabled = self.page == 0, self.page == last
        with self.report.saying():
            here = self.found[self.page * PAGE : (self.page + 1) * PAGE]
            self.sheet.children = [self._card(i) for i in here]
            bad = len(self.dataset.bad)
            self.report.say(f"page {self.page + 1} of {last + 1}; {len(self.found)} pairs; {bad} marked as bad")

    def _card(self, i):
        pair = self.dataset[i]
        name = pair.about["file_name"]
        picture = Picture(views.pair_picture(pair, self.dataset), pair.about["prompt"], width=240)
        bad = ui.ToggleButton(name in self.dataset.bad, description="bad", icon="thumbs-down", layout={"width": "70px"})
        bad.observe(lambda change: self.mark(i, change["new"]), "value")
        return ui.VBox(
            [picture, ui.HTML(views.about_pair(pair)), bad], layout={"width": "250px", "margin": "0 8px 12px 0"}
        )

    def mark(self, i: int, bad: bool = True) -> None:
        """Mark a record as bad, or as good again; exports leave out what is bad."""
        with self.report.saying():
            self.dataset.mark(self.dataset.records[i]["file_name"], bad)
            self.report.say(f"{len(self.dataset.bad)} marked as bad, in {self.dataset.folder / 'bad.json'}")

    def still(self) -> np.ndarray:
        shown = [card.children[0].pixels for card in self.sheet.children[:4]]
        return beside(shown) if shown else np.full((16, 16, 3), 255, np.uint8)


def browse_dataset(folder: str | Path | Dataset) -> DatasetBrowser:
    """A widget with the pairs of a data set, page by page, found by class, prompt and score.

    What is marked as bad is kept in bad.json beside the data set, and left out of exports. FileNotFoundError for a
    folder without a finished data set.
    """
    return DatasetBrowser(folder if isinstance(folder, Dataset) else Dataset(folder))
