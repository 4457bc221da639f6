"""The thesis's tables, of several models beside the published numbers, as CSV and Markdown.

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

from .examples import WORDS
from .experiment import METHODS, TRACKS, Experiment, over_classes, summary

PUBLISHED = {  # Stable Diffusion 2-base, generated images, masks by hand: DAAM, Linear DAAM, both optimized
    "car": (82.5, 41.7, 86.0, 85.8),
    "person": (36.2, 37.4, 71.6, 71.3),
    "traffic light": (71.1, 68.2, 72.5, 72.3),
    "rider": (31.0, 21.3, 47.6, 43.1),
    "all": (53.2, 38.3, 67.3, 66.6),
}
PUBLISHED_AREA = {"all": (28.1, 22.1, 38.6, 39.5)}
PUBLISHED_SIZES = {1: (69.8, 63.1), 2: (69.8, 67.3), 5: (63.6, 65.4)}
"""Linear DAAM, optimized, all classes: images learned from, maximum on those, maximum on the others."""


class Table(NamedTuple):
    """A table with a name, a caption that says its protocol, a header, and rows of texts and numbers (one decimal)."""

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    @property
    def csv(self) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self._texts()])
        return text.getvalue()

    @property
    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self._texts()]
        return "\n".join(["| " + " | ".join(line) + " |" for line in lines]) + f"\n\n{self.caption}\n"

    def save(self, folder: str | Path) -> list[Path]:
        """As ⟨name⟩.csv and ⟨name⟩.md in a folder, each whole or not at all."""
        paths = []
        for suffix, text in ((".csv", self.csv), (".md", self.markdown)):
            path = Path(folder) / (self.name + suffix)
            part = path.with_name(path.name + ".part")
            part.write_text(text, "utf-8")
            paths.append(part.replace(path))
        return paths

    def _texts(self):
        return [[_text(cell) for cell in row] for row in self.rows]


def images(experiments: Sequence[Experiment]) -> Table:
    """How many images each class has, and which were dropped."""
    rows = []
    for x in experiments:
        for track in TRACKS:
            for name in WORDS:
                examples = x.sets[track, name]
                absent = [e.number for e in examples if e.truth is not None and not e.shown]
                unmasked = [e.number for e in examples if e.truth is None]
                learned, tested = (len(parts.get((track, name), [])) for parts in (x.lessons, x.tests))
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
    """Maximum of the mIoU-threshold curve, or the area under it, by class and method, beside the published numbers."""
    published, rows = PUBLISHED_AREA if area else PUBLISHED, []
    for x in experiments:
        for track in TRACKS:
            curves = {method: x.curves(method, track) for method in METHODS}
            for name in [*x.names(track), *(["all"] if x.names(track) else [])]:
                found = [over_classes(c) if name == "all" else c[name] for c in curves.values()]
                values = [100 * (summary(ious).area if area else summary(ious).maximum) for ious in found]
                tested = sum(len(x.tests[track, n]) for n in ([name] if name in WORDS else x.names(track)))
                rows.append([x.model, track, name, tested, *values, *published.get(name, [""] * 4)])
    what = "Area under the mean IoU by threshold" if area else "Maximum over thresholds of the mean IoU"
    caption = (
        f"{what}, in percent, on the test images; the maximum is over thresholds on these images, as published. *all* "
        f"is of the mean of the classes' curves. Tokens are learned from {experiments[0].usual} other images. "
        "Published: Stable Diffusion 2-base, generated images."
    )
    header = ["model", "track", "class", "images", *METHODS, *(f"published: {m}" for m in list(METHODS)[:4])]
    return Table("07_area" if area else "07_maximum_miou", caption, header, rows)


def training_sizes(experiments: Sequence[Experiment]) -> Table:
    """Maximum mIoU over all classes on the images learned from and on the others, by how many were learned from."""
    rows = []
    for x in experiments:
        for track in (track for track in TRACKS if x.names(track)):
            for method in ("Linear DAAM, optimized", "fit_token"):
                values = []
                for count in x.training:
                    for lesson in (True, False):
                        ious = {name: x.ious(method, track, name, lesson, count) for name in x.names(track)}
                        values.append(100 * summary(over_classes(ious)).maximum)
                rows.append([x.model, track, method, *values])
    known = [PUBLISHED_SIZES.get(count, ("", "")) for count in experiments[0].training]
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
    """Mean IoU of the tests at the threshold that is best for the images learned from, with 95% intervals."""
    rows = []
    for x in experiments:
        for track in (track for track in TRACKS if x.names(track)):
            found = {method: at_chosen_threshold(x, method, track) for method in METHODS}
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
    return Table("07_chosen_threshold", caption, ["model", "track", "class", "images", *METHODS], rows)


def at_chosen_threshold(x: Experiment, method: str, track: str, count: int | None = None) -> dict[str, np.ndarray]:
    """IoU (image,) of the tests by class, at the threshold that is best for the images learned from."""
    found = {}
    for name in x.names(track):
        tau = best_threshold(THRESHOLDS, x.ious(method, track, name, lesson=True, count=count))
        found[name] = x.ious(method, track, name, count=count)[np.searchsorted(THRESHOLDS, tau)]
    return found


def as_columns(by_class: dict[str, np.ndarray]) -> np.ndarray:
    """Numbers of different images by class as (image, class), NaN elsewhere, for `metrics.mean_over_classes`."""
    total, first = np.full((sum(map(len, by_class.values())), len(by_class)), np.nan), 0
    for column, values in enumerate(by_class.values()):
        total[first : first + len(values), column] = values
        first += len(values)
    return total


def _interval(mean, low, high) -> str:
    return f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _text(cell) -> str:
    return f"{cell:.1f}" if isinstance(cell, float | np.floating) else str(cell)
