"""Repeat the thesis's experiment on one model: train and test examples, the maps of every method, curves, matrices.

As in the thesis, maps are resized to the image, then divided by their maximum (DAAM) or rescaled to 0..1 (linear and
learned maps), and evaluated at thresholds from 0 to 1.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from attnlab.learning.optimize import PRESETS
from attnlab.maps.heatmaps import minmax, upscale
from attnlab.metrics import THRESHOLDS, area_under_curve, miou_curve
from attnlab.tokens import Token

from .examples import PROMPT_WORDS, Example
from .gallery import Gallery

__all__ = ["THESIS_METHODS", "TRACKS", "CurveSummary", "Experiment", "bootstrap_band", "by_resolution", "correlations"]
__all__ += ["layers_by_steps", "over_classes", "summarize_curve"]

TRACKS = ("generated", "rendered")
THESIS_METHODS = {
    "DAAM": "",
    "Linear DAAM": "",
    "DAAM, optimized": "thesis-softmax",
    "Linear DAAM, optimized": "thesis",
    "fit_token": "fit_token",
}
"""The methods, in the thesis's order, and how each learns its token; the first two use the word of the class."""


class Experiment:
    """The train and test examples of both tracks, and what every method reaches on them.

    A model that is not bundled has never seen a rendered scene: of that track it has none.

    Parameters
    ----------
    gallery : Gallery
        Of the model.
    images : int
        Examples per class and track.
    training : Sequence[int]
        Numbers of train examples that are compared.
    epochs : int
        Of the methods that optimize a token.
    """

    def __init__(self, gallery: Gallery, images: int = 50, training: Sequence[int] = (1, 2, 5), epochs: int = 500):
        if not training or min(training) < 1 or images <= max(training):
            text = f"training={list(training)} of {images} images"
            raise ValueError(f"{text}: learn from 1 or more, and leave some to test on")
        self.gallery, self.training, self.epochs = gallery, sorted(training), epochs
        self.sets: dict[tuple[str, str], list[Example]] = {}  # all examples by (track, class)
        for name in PROMPT_WORDS:
            self.sets["generated", name] = gallery.generated(name, range(images))
            self.sets["rendered", name] = gallery.rendered(name, images) if gallery.bundled else []
        most = self.training[-1]
        shown = {key: [e for e in examples if e.shown] for key, examples in self.sets.items()}
        # those that show the class, by (track, class): the first ones, and the others; neither where no other is left
        self.train = {key: examples[:most] for key, examples in shown.items() if len(examples) > most}
        self.tests = {key: shown[key][most:] for key in self.train}
        self._ious: dict[tuple, np.ndarray] = {}

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.gallery.model

    @property
    def usual(self) -> int:
        """Number of train examples in tables and figures, if they do not say: the middle one of `training`."""
        return self.training[len(self.training) // 2]

    def token(self, method: str, track: str, name: str, count: int | None = None) -> Token:
        """Return the token that a method learned from the first `count` train examples."""
        preset = THESIS_METHODS[method]
        settings = replace(PRESETS[preset], epochs=self.epochs) if preset in PRESETS else preset
        train = self.train[track, name][: count or self.usual]
        return self.gallery.learn(train, settings, [e for n in PROMPT_WORDS for e in self.sets[track, n]])

    def heats(
        self, method: str, track: str, name: str, examples: Sequence[Example] | None = None, count: int | None = None
    ) -> list[np.ndarray]:
        """Return a method's maps (row, column), 0..1, at the images' size, of examples or of the test examples.

        `count`: train examples of its token.
        """
        examples = self.tests[track, name] if examples is None else examples
        sizes = [e.image.size[::-1] for e in examples]
        if method == "DAAM":
            heats = [
                upscale(e.maps[PROMPT_WORDS[e.name]], size, "bicubic") for e, size in zip(examples, sizes, strict=True)
            ]
            return [heat / heat.max() for heat in heats]
        if method == "Linear DAAM":
            return [minmax(e.linear[PROMPT_WORDS[e.name]], size) for e, size in zip(examples, sizes, strict=True)]
        token = self.token(method, track, name, count)
        maps = (e.linear[token] for e in examples) if not token.background else self.gallery.softmax(token, examples)
        return [minmax(m, size) for m, size in zip(maps, sizes, strict=True)]

    def ious(self, method: str, track: str, name: str, train: bool = False, count: int | None = None) -> np.ndarray:
        """Return IoU (threshold, image) at `metrics.THRESHOLDS` of the test examples, or of `count` train examples."""
        key = method, track, name, train, count or self.usual
        if key not in self._ious:
            examples = self.train[track, name][: count or self.usual] if train else self.tests[track, name]
            self._ious[key] = miou_curve(self.heats(method, track, name, examples, count), [e.truth for e in examples])
        return self._ious[key]

    def curves(self, method: str, track: str) -> dict[str, np.ndarray]:
        """Return IoU (threshold, image) of the test examples by class."""
        return {name: self.ious(method, track, name) for name in self.names(track)}

    def names(self, track: str) -> list[str]:
        """Return the classes that have test examples."""
        return [name for name in PROMPT_WORDS if (track, name) in self.tests]


class CurveSummary(NamedTuple):
    """The highest mIoU of a curve, the threshold there, the area under the curve, and its number of images."""

    maximum: float
    threshold: float
    area: float
    images: int


def summarize_curve(ious: np.ndarray) -> CurveSummary:
    """Summarize IoU (threshold, image). As published, the threshold is chosen on these same images: optimistic."""
    mean = ious.mean(1)
    area = area_under_curve(THRESHOLDS, mean)
    return CurveSummary(float(mean.max()), float(THRESHOLDS[mean.argmax()]), area, ious.shape[1])


def over_classes(by_class: dict[str, np.ndarray]) -> np.ndarray:
    """Average the curves of several classes with equal weights: (threshold, 1), to be summarized like one class."""
    return np.mean([ious.mean(1) for ious in by_class.values()], axis=0)[:, None]


def bootstrap_band(ious: np.ndarray, resamples: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Return the 5th and 95th percentile, over bootstrap samples of the images, of the mean curve: two (threshold,)."""
    images = ious.shape[1]
    drawn = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), resamples)
    return tuple(np.percentile(ious @ drawn.T / images, [5, 95], axis=1))


def layers_by_steps(examples: Sequence[Example], tau: float = 0.5) -> np.ndarray:
    """Return the mean IoU, at threshold `tau`, of DAAM maps by layer (in the model's order) and step.

    The array is (layer + 1, step + 1): the last row is of all layers together, the last column of all steps together.
    """
    truths, rows = [e.truth for e in examples], []
    for e in examples:
        by_step = [*e.layers.values(), e.steps]
        over_steps = [*(steps.mean(0) for steps in e.layers.values()), e.maps[PROMPT_WORDS[e.name]]]
        maps = [[*steps, mean] for steps, mean in zip(by_step, over_steps, strict=True)]
        rows.append([[upscale(m, e.truth.shape, "bicubic") for m in row] for row in maps])
    cells = [[[one[i][j] for one in rows] for j in range(len(rows[0][0]))] for i in range(len(rows[0]))]
    return np.array([[miou_curve(heats, truths, [tau]).mean() for heats in row] for row in cells])


def by_resolution(examples: Sequence[Example]) -> dict[int, np.ndarray]:
    """Return IoU (threshold, image) of DAAM maps from the layers of one map height alone, by height."""
    found = {}
    for height in sorted({steps.shape[-2] for steps in examples[0].layers.values()}):
        maps = [np.mean([m.mean(0) for m in e.layers.values() if m.shape[-2] == height], axis=0) for e in examples]
        heats = [upscale(m, e.truth.shape, "bicubic") for m, e in zip(maps, examples, strict=True)]
        found[height] = miou_curve(heats, [e.truth for e in examples])
    return found


def correlations(examples: Sequence[Example], per: str) -> np.ndarray:
    """Return Pearson correlations of DAAM maps between layers or steps (`per`), over the pixels of all images.

    Maps of layers are means over steps, resized to the largest.
    """
    found = []
    for e in examples:
        size = e.steps.shape[1:]
        maps = e.steps if per == "step" else [upscale(m.mean(0), size, "bicubic") for m in e.layers.values()]
        found.append(np.stack([m.ravel() for m in maps]))
    return np.corrcoef(np.concatenate(found, axis=1))
