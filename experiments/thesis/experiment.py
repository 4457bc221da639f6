"""The thesis's experiment on one model: who is tested on what, the maps of every method, their curves and matrices.

Maps are resized to the image and divided by their maximum (DAAM) or moved and scaled to 0..1 (linear and learned maps),
and a threshold on them is swept over 0..1, as there.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from attnlab.learning.optimize import PRESETS
from attnlab.maps.heatmaps import minmax, upscale
from attnlab.metrics import THRESHOLDS, area_under_curve, miou_curve
from attnlab.tokens import Token

from .examples import WORDS, Example
from .gallery import Gallery

TRACKS = ("generated", "rendered")
METHODS = {
    "DAAM": "",
    "Linear DAAM": "",
    "DAAM, optimized": "thesis-softmax",
    "Linear DAAM, optimized": "thesis",
    "fit_token": "fit_token",
}
"""The methods, in the thesis's order, and how their token is learned; the first two ask for the class's word."""


class Experiment:
    """Examples of both tracks, those that tokens are learned from and those that everything is tested on.

    Attributes
    ----------
    sets : by (track, class), all examples
    tests : by (track, class), the examples to test on: those that show the class but for the first `max(training)`.
        Track and class are missing where that leaves none
    """

    def __init__(self, gallery: Gallery, images: int = 50, training: Sequence[int] = (1, 2, 5), epochs: int = 500):
        if not training or min(training) < 1 or images <= max(training):
            raise ValueError(
                f"training={list(training)} of {images} images: learn from 1 or more, and leave some to test on"
            )
        self.gallery, self.training, self.epochs = gallery, sorted(training), epochs
        self.sets: dict[tuple[str, str], list[Example]] = {}
        for name in WORDS:
            self.sets["generated", name] = gallery.generated(name, range(images))
            self.sets["rendered", name] = gallery.rendered(name, images)
        most = self.training[-1]
        shown = {key: [e for e in examples if e.shown] for key, examples in self.sets.items()}
        self.lessons = {key: examples[:most] for key, examples in shown.items() if len(examples) > most}
        self.tests = {key: shown[key][most:] for key in self.lessons}
        self._ious: dict[tuple, np.ndarray] = {}

    @property
    def model(self) -> str:
        return self.gallery.model

    @property
    def usual(self) -> int:
        """How many images the tokens of tables and figures are learned from, unless they say: the middle of all."""
        return self.training[len(self.training) // 2]

    def token(self, method: str, track: str, name: str, count: int | None = None) -> Token:
        """What a method learned from the first `count` images."""
        preset = METHODS[method]
        settings = replace(PRESETS[preset], epochs=self.epochs) if preset in PRESETS else preset
        lesson = self.lessons[track, name][: count or self.usual]
        return self.gallery.learn(lesson, settings, [e for n in WORDS for e in self.sets[track, n]])

    def heats(
        self, method: str, track: str, name: str, examples: Sequence[Example] | None = None, count: int | None = None
    ) -> list[np.ndarray]:
        """A method's maps (row, column) of examples, or of the tests: 0..1, at the images' size.

        `count`: images that its token was learned from.
        """
        examples = self.tests[track, name] if examples is None else examples
        sizes = [e.image.size[::-1] for e in examples]
        if method == "DAAM":
            heats = [upscale(e.maps[WORDS[e.name]], size, "bicubic") for e, size in zip(examples, sizes, strict=True)]
            return [heat / heat.max() for heat in heats]
        if method == "Linear DAAM":
            return [minmax(e.linear[WORDS[e.name]], size) for e, size in zip(examples, sizes, strict=True)]
        token = self.token(method, track, name, count)
        maps = (e.linear[token] for e in examples) if not token.background else self.gallery.softmax(token, examples)
        return [minmax(m, size) for m, size in zip(maps, sizes, strict=True)]

    def ious(self, method: str, track: str, name: str, lesson: bool = False, count: int | None = None) -> np.ndarray:
        """IoU (threshold, image) at `metrics.THRESHOLDS`, of the tests, or of the `count` images learned from."""
        key = method, track, name, lesson, count or self.usual
        if key not in self._ious:
            examples = self.lessons[track, name][: count or self.usual] if lesson else self.tests[track, name]
            self._ious[key] = miou_curve(self.heats(method, track, name, examples, count), [e.truth for e in examples])
        return self._ious[key]

    def curves(self, method: str, track: str) -> dict[str, np.ndarray]:
        """IoU (threshold, image) of the tests, by class."""
        return {name: self.ious(method, track, name) for name in self.names(track)}

    def names(self, track: str) -> list[str]:
        """The classes there are tests of."""
        return [name for name in WORDS if (track, name) in self.tests]


class Summary(NamedTuple):
    """Of a curve: its highest mIoU, the threshold there, the area under it, and how many images it is the mean of."""

    maximum: float
    threshold: float
    area: float
    images: int


def summary(ious: np.ndarray) -> Summary:
    """Of IoU (threshold, image). The maximum is over thresholds on these very images, as published: optimistic."""
    mean = ious.mean(1)
    return Summary(
        float(mean.max()), float(THRESHOLDS[mean.argmax()]), area_under_curve(THRESHOLDS, mean), ious.shape[1]
    )


def over_classes(by_class: dict[str, np.ndarray]) -> np.ndarray:
    """The mean curve of several classes, each weighing the same: (threshold, 1), to be summarized like a class's."""
    return np.mean([ious.mean(1) for ious in by_class.values()], axis=0)[:, None]


def band(ious: np.ndarray, low: float = 5, high: float = 95, resamples: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles, over bootstrap samples of the images, of the mean of IoU (threshold, image): two (threshold,)."""
    images = ious.shape[1]
    drawn = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), resamples)
    return tuple(np.percentile(ious @ drawn.T / images, [low, high], axis=1))


def layers_by_steps(examples: Sequence[Example], tau: float = 0.5) -> np.ndarray:
    """Mean IoU at a threshold of DAAM from each layer (row, as the model runs) and step: (layer + 1, step + 1).

    The last row is of all layers at one step, the last column of all steps in one layer, the last cell of everything.
    """
    truths, rows = [e.truth for e in examples], []
    for e in examples:
        everything = e.maps[WORDS[e.name]]
        planes = [*e.layers.values(), e.steps]
        wholes = [*(steps.mean(0) for steps in e.layers.values()), everything]
        maps = [[*steps, whole] for steps, whole in zip(planes, wholes, strict=True)]
        rows.append([[upscale(m, e.truth.shape, "bicubic") for m in row] for row in maps])
    cells = [[[one[i][j] for one in rows] for j in range(len(rows[0][0]))] for i in range(len(rows[0]))]
    return np.array([[miou_curve(heats, truths, [tau]).mean() for heats in row] for row in cells])


def by_resolution(examples: Sequence[Example]) -> dict[int, np.ndarray]:
    """IoU (threshold, image) of DAAM from the layers of one map height alone, by height."""
    found = {}
    for height in sorted({steps.shape[-2] for steps in examples[0].layers.values()}):
        maps = [np.mean([m.mean(0) for m in e.layers.values() if m.shape[-2] == height], axis=0) for e in examples]
        heats = [upscale(m, e.truth.shape, "bicubic") for m, e in zip(maps, examples, strict=True)]
        found[height] = miou_curve(heats, [e.truth for e in examples])
    return found


def correlations(examples: Sequence[Example], per: str) -> np.ndarray:
    """Pearson correlation between DAAM maps of the class's word from each "layer" or "step", over pixels of all images.

    Layers' maps are means over steps, resized to the largest.
    """
    found = []
    for e in examples:
        size = e.steps.shape[1:]
        maps = e.steps if per == "step" else [upscale(m.mean(0), size, "bicubic") for m in e.layers.values()]
        found.append(np.stack([m.ravel() for m in maps]))
    return np.corrcoef(np.concatenate(found, axis=1))
