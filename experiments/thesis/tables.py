"""Make the thesis's tables, of several models beside the published numbers, as CSV and Markdown.

All numbers are percentages of IoU or of its curve's area, as published. "Maximum" is the highest mean IoU over
thresholds on the very images that it is the mean of: optimistic, for every method alike.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from attnlab.metrics import THRESHOLDS, best_threshold, bootstrap_interval, mean_over_classes
from attnlab.storage import replacing

from .examples import PROMPT_WORDS
from .experiment import THESIS_METHODS, TRACKS, Experiment, over_classes, summarize_curve

__all__ = ["Table", "as_columns", "at_chosen_threshold", "chosen_threshold", "images", "miou", "training_sizes"]

_PUBLISHED = {  # Stable Diffusion 2-base, generated images, masks by hand: DAAM, Linear DAAM, both optimized
    "car": (82.5, 41.7, 86.0, 85.8),
    "person": (36.2, 37.4, 71.6, 71.3),
    "traffic light": (71.1, 68.2, 72.5, 72.3),
    "rider": (31.0, 21.3, 47.6, 43.1),
    "all": (53.2, 38.3, 67.3, 66.6),
}
_PUBLISHED_AREA = {"all": (28.1, 22.1, 38.6, 39.5)}
_PUBLISHED_SIZES = {1: (69.8, 63.1), 2: (69.8, 67.3), 5: (63.6, 65.4)}
"""Linear DAAM, optimized, all classes: number of train images, maximum on those, maximum on the others."""


class Table(NamedTuple):
    """A table with a name, a caption that says its protocol, a header, and rows of texts and numbers (one decimal)."""

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    @property
    def csv(self) -> str:
        """The table as CSV."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self._texts()])
        return text.getvalue()

    @property
    def markdown(self) -> str:
        """The table as Markdown, with its caption."""
        lines = [self.header, ["---"] * len(self.header), *self._texts()]
        return "\n".join(["| " + " | ".join(line) + " |" for line in lines]) + f"\n\n{self.caption}\n"

    def save(self, folder: str | Path) -> list[Path]:
        """Write ⟨name⟩.csv and ⟨name⟩.md into a folder; return their paths."""
        paths = [Path(folder) / (self.name + suffix) for suffix in (".csv", ".md")]
        for path, text in zip(paths, (self.csv, self.markdown), strict=True):
            with replacing(path) as part:
                part.write_text(text, "utf-8")
        return paths

    def _texts(self):
        return [[_text(cell) for cell in row] for row in self.rows]


def images(experiments: Sequence[Experiment]) -> Table:
    """Count the images of each class, and list those that were dropped."""
    rows = []
    for x in experiments:
        for track in TRACKS:
            for name in PROMPT_WORDS:
                examples = x.sets[track, name]
                absent = [e.number for e in examples if e.truth is not None and not e.shown]
                unmasked = [e.number for e in examples if e.truth is None]
                learned, tested = (len(parts.get((track, name), [])) for parts in (x.train, x.tests))
                numbers = (" ".join(map(str, some)) or "none" for some in (absent, unmasked))
                rows.append([x.model, track, name, len(examples), learned, tested, *numbers])
    caption = (
        "Images of each class; from how many of those that show it tokens were learned at most, and how many were left "
        "to test on (none: too few show it, so the class is missing from the other tables); seeds of those dropped "
        "because the main object covers less than 1% of the image, and of those without a mask."
    )
    header = ["model", "track", "class", "images", "learned from", "tested", "dropped: not there", "dropped: no mask"]
    return Table("07_images", caption, header, rows)


def miou(experiments: Sequence[Experiment], area: bool = False) -> Table:
    """Tabulate the maximum of the mIoU curve, or the area under it, by class and method, with published numbers."""
    published, rows = _PUBLISHED_AREA if area else _PUBLISHED, []
    for x in experiments:
        for track in TRACKS:
            curves = {method: x.curves(method, track) for method in THESIS_METHODS}
            for name in [*x.names(track), *(["all"] if x.names(track) else [])]:
                found = [over_classes(c) if name == "all" else c[name] for c in curves.values()]
                values = [100 * getattr(summarize_curve(ious), "area" if area else "maximum") for ious in found]
                tested = sum(len(x.tests[track, n]) for n in ([name] if name in PROMPT_WORDS else x.names(track)))
                rows.append([x.model, track, name, tested, *values, *published.get(name, [""] * 4)])
    what = "Area under the mean IoU by threshold" if area else "Maximum over thresholds of the mean IoU"
    caption = (
        f"{what}, in percent, on the test images; the maximum is over thresholds on these images, as published. *all* "
        f"is of the mean of the classes' curves. Tokens are learned from {experiments[0].usual} other images. "
        "Published: Stable Diffusion 2-base, generated images."
    )
    header = ["model", "track", "class", "images", *THESIS_METHODS]
    header += [f"published: {method}" for method in list(THESIS_METHODS)[:4]]
    return Table("07_area" if area else "07_maximum_miou", caption, header, rows)


def training_sizes(experiments: Sequence[Experiment]) -> Table:
    """Tabulate the maximum mIoU over all classes on train and test images, by the number of train images."""
    rows = []
    for x in experiments:
        for track in (track for track in TRACKS if x.names(track)):
            for method in ("Linear DAAM, optimized", "fit_token"):
                values = []
                for count in x.training:
                    for train in (True, False):
                        ious = {name: x.ious(method, track, name, train, count) for name in x.names(track)}
                        values.append(100 * summarize_curve(over_classes(ious)).maximum)
                rows.append([x.model, track, method, *values])
    known = [_PUBLISHED_SIZES.get(count, ("", "")) for count in experiments[0].training]
    rows.append(["Stable Diffusion 2-base", "generated", "Linear DAAM, optimized, published", *sum(known, ())])
    counts = [
        f"{count} image{'s' * (count > 1)}, {on}" for count in experiments[0].training for on in ("train", "test")
    ]
    caption = (
        "Maximum over thresholds of the mean of the classes' mIoU curves, in percent, on the images that the token was "
        f"learned from (train) and on all but the first {experiments[0].training[-1]} (test)."
    )
    return Table("07_training_sizes", caption, ["model", "track", "method", *counts], rows)


def chosen_threshold(experiments: Sequence[Experiment]) -> Table:
    """Tabulate the mean IoU of the test images at the best threshold of the train images, with 95% intervals."""
    rows = []
    for x in experiments:
        for track in (track for track in TRACKS if x.names(track)):
            found = {method: at_chosen_threshold(x, method, track) for method in THESIS_METHODS}
            for name in x.names(track):
                values = [ious[name] for ious in found.values()]
                cells = [_interval(v.mean(), *bootstrap_interval(v)) for v in values]
                rows.append([x.model, track, name, len(values[0]), *cells])
            cells = [_interval(*mean_over_classes(as_columns(ious))) for ious in found.values()]
            rows.append([x.model, track, "all", sum(len(x.tests[track, n]) for n in x.names(track)), *cells])
    caption = (
        "Mean IoU of the test images in percent, with its 95% bootstrap interval over images, at the threshold that is "
        f"best for the {experiments[0].usual} images of the class that tokens are learned from; *all* is the mean over "
        "classes. Nothing is chosen on the images it is reported on."
    )
    return Table("07_chosen_threshold", caption, ["model", "track", "class", "images", *THESIS_METHODS], rows)


def at_chosen_threshold(x: Experiment, method: str, track: str, count: int | None = None) -> dict[str, np.ndarray]:
    """Return the IoU (image,) of the test examples by class, at the best threshold of the train examples."""
    found = {}
    for name in x.names(track):
        tau = best_threshold(THRESHOLDS, x.ious(method, track, name, train=True, count=count))
        found[name] = x.ious(method, track, name, count=count)[np.searchsorted(THRESHOLDS, tau)]
    return found


def as_columns(by_class: dict[str, np.ndarray]) -> np.ndarray:
    """Arrange numbers of different images by class as (image, class), with NaN elsewhere, for `mean_over_classes`."""
    total, first = np.full((sum(map(len, by_class.values())), len(by_class)), np.nan), 0
    for column, values in enumerate(by_class.values()):
        total[first : first + len(values), column] = values
        first += len(values)
    return total


def _interval(mean, low, high) -> str:
    return f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _text(cell) -> str:
    return f"{cell:.1f}" if isinstance(cell, float | np.floating) else str(cell)
