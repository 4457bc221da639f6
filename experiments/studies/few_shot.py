"""Measure how well tokens learned from a few rendered scenes find their objects in other scenes.

Scenes are noised and recorded (`record_image`) with their own captions. Train examples of a class are drawn from one
range of seeds; test examples are the first scenes of another range that show the class. Thresholds, as fractions of
each map's range, are chosen on the train examples of the row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from attnlab import LinearMap, Recording, Token, linear_daam, metrics, ovam, record_image, seed
from attnlab.learning.fit import Whitening, fit_token
from attnlab.learning.optimize import optimize_token
from attnlab.maps.heatmaps import minmax
from attnlab.scenes import street
from attnlab.scenes.scene import Scene

from ..bundled.localize import TIMESTEPS

__all__ = ["CAPTION_WORDS", "FIRST_TRAIN_SEED", "FewShotStudy", "ScenePool", "record_pool"]

FIRST_TRAIN_SEED = street.HELD_OUT + 300_000  # of the scenes that tokens are learned from
_MIN_AREA = 0.01  # an example of a class shows it in at least this fraction of the image
CAPTION_WORDS = {"ground": "grass", "building": "house", "roof": "house", "wheel": "car", "trunk": "tree"}
"""Words of classes that captions call otherwise, and of the objects that parts belong to."""


@dataclass
class ScenePool:
    """Recorded scenes of a range of seeds."""

    scenes: list[Scene]
    recordings: list[Recording]
    maps: list[LinearMap]

    def examples(self, name: str, count: int | None = None, draw: int = 0) -> list[int]:
        """Return the numbers of scenes that show a class or part: the first ones, or with `draw` random ones."""
        found = [i for i, scene in enumerate(self.scenes) if scene.mask(name).mean() >= _MIN_AREA]
        if draw:
            found = np.random.default_rng(draw).permutation(found).tolist()
        if count is not None and len(found) < count:
            raise ValueError(f"{name!r} is in {len(found)} of {len(self.scenes)} scenes: {count} are wanted, make more")
        return found[:count]

    def masks(self, name: str, numbers: Sequence[int]) -> list[np.ndarray]:
        """Return the exact masks of a class or part in some scenes."""
        return [self.scenes[i].mask(name) for i in numbers]


def record_pool(pipe, first: int, count: int, batch: int = 20) -> ScenePool:
    """Render and record scenes with seeds first, first + 1, ...; the noise depends on the first seed of a batch."""
    found = ScenePool([], [], [])
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    for start in tqdm(range(first, first + count, batch), desc="scenes", leave=False, delay=1):
        scenes = [street.render(s, size) for s in range(start, min(start + batch, first + count))]
        images, captions = [s.image for s in scenes], [s.caption for s in scenes]
        options = {"timesteps": TIMESTEPS, "dtype": torch.float16, "generator": seed(start)}
        recording = record_image(pipe, images, captions, **options)
        found.scenes += scenes
        found.recordings += list(recording)
        found.maps += [linear_daam(one) for one in recording]
    return found


_Method = Callable[[ScenePool, int], np.ndarray]  # to the map (row, column) of a scene of a pool, by its number


def _linear(word: str | Token) -> _Method:
    return lambda pool, i: pool.maps[i][word]


def _padded(word: str) -> _Method:
    return lambda pool, i: ovam(pool.recordings[i], word, padded=True)[word]


def _softmax(token: Token) -> _Method:  # in one text with the background that was learned with it
    return lambda pool, i: ovam(pool.recordings[i], token)[token]


def _curves(method: _Method, pool: ScenePool, name: str, numbers: Sequence[int]) -> np.ndarray:
    """Return IoU (threshold, image) at fractions of each map's range."""
    truths = pool.masks(name, numbers)
    heats = [minmax(method(pool, i), truth.shape) for i, truth in zip(numbers, truths, strict=True)]
    return metrics.miou_curve(heats, truths)


def _ious_above_zero(token: Token, name: str, pool: ScenePool, numbers: Sequence[int]) -> np.ndarray:
    """Return IoU (image,) of the mask where the token's map is above 0."""
    truths = pool.masks(name, numbers)
    found = [pool.maps[i].upscaled(token, truth.shape) > 0 for i, truth in zip(numbers, truths, strict=True)]
    return np.array([metrics.iou(mask, truth) for mask, truth in zip(found, truths, strict=True)])


@dataclass
class FewShotStudy:
    """A table of methods, each learning from a few train examples per class, tested on `tests` others."""

    train: ScenePool
    test: ScenePool
    names: Sequence[str] = street.CLASSES
    tests: int = 60  # scenes per class

    def __post_init__(self):
        self.rows: dict[str, np.ndarray] = {}  # IoU (scene, class); NaN where a scene is no test example of a class
        self.seconds: dict[str, list[float]] = {}  # of each fit, by row
        self.test_numbers = {name: self.test.examples(name, self.tests) for name in self.names}
        self.whitening = Whitening.of(self.train.maps)

    def words(self, count: int) -> None:
        """Add rows of the plain words, with thresholds chosen on `count` train examples."""
        for name in tqdm(self.names, desc="words", leave=False, delay=1):
            word, train = CAPTION_WORDS.get(name, name), self.train.examples(name, count)
            self._put(f"Linear DAAM, {count}", name, [self._at_threshold(_linear(word), name, train)])
            self._put(f"OVAM padded, {count}", name, [self._at_threshold(_padded(word), name, train)])

    def fits(self, count: int, draws: int = 1) -> None:
        """Add rows of `fit_token` on `count` examples: at a threshold chosen on them, and at the zero level."""
        for name in tqdm(self.names, desc=f"{count} images", leave=False, delay=1):
            found = [self._fit(name, count, draw) for draw in range(draws)]
            self._put(f"fit_token, {count}", name, [cut for cut, _ in found])
            self._put(f"fit_token above 0, {count}", name, [zero for _, zero in found])

    def descents(self, count: int, preset: str, draws: int = 1) -> None:
        """Add rows of `optimize_token` on `count` examples."""
        for name in tqdm(self.names, desc=f"{preset}, {count} images", leave=False, delay=1):
            found = []
            for draw in range(draws):
                train = self.train.examples(name, count, draw)
                images = [self.train.recordings[i] for i in train]
                token = optimize_token(images, self.train.masks(name, train), CAPTION_WORDS.get(name, name), preset)
                self.seconds.setdefault(f"{preset}, {count}", []).append(token.metadata["seconds"])
                method = _linear(token) if token.background is None else _softmax(token)
                found.append(self._at_threshold(method, name, train))
            self._put(f"{preset}, {count}", name, found)

    def gain(self, row: str, over: str) -> tuple[float, float, float]:
        """Return the mean over classes of the difference of two rows, and its 95 % interval."""
        return metrics.mean_over_classes(self.rows[row] - self.rows[over])

    def by_class(self, row: str) -> np.ndarray:
        """Return the mean IoU (class,) of a row."""
        return np.nanmean(self.rows[row], axis=0)

    def train_examples(self, name: str, count: int, draw: int = 0) -> tuple[list[LinearMap], list[np.ndarray]]:
        """Return maps and masks of train examples of a class or part."""
        numbers = self.train.examples(name, count, draw)
        return [self.train.maps[i] for i in numbers], self.train.masks(name, numbers)

    def test_examples(self, name: str, count: int | None = None) -> tuple[list[LinearMap], list[np.ndarray]]:
        """Return maps and masks of test examples of a class or part."""
        numbers = self.test.examples(name, count or self.tests)
        return [self.test.maps[i] for i in numbers], self.test.masks(name, numbers)

    def learn(self, name: str, count: int, draw: int = 0) -> Token:
        """Learn a token from train examples by `fit_token`, near to the word of the class."""
        train = self.train_examples(name, count, draw)
        return fit_token(*train, CAPTION_WORDS.get(name, name), name=name, unlabeled=self.whitening)

    def _fit(self, name, count, draw):
        token = self.learn(name, count, draw)
        self.seconds.setdefault(f"fit_token, {count}", []).append(token.metadata["seconds"])
        found = self._at_threshold(_linear(token), name, self.train.examples(name, count, draw))
        return found, _ious_above_zero(token, name, self.test, self.test_numbers[name])

    def _at_threshold(self, method, name, train):
        """Return the IoU (image,) of the test examples at the best threshold of the train examples."""
        cut = metrics.best_threshold(metrics.THRESHOLDS, _curves(method, self.train, name, train))
        return _curves(method, self.test, name, self.test_numbers[name])[np.searchsorted(metrics.THRESHOLDS, cut)]

    def _put(self, row, name, found):
        table = self.rows.setdefault(row, np.full((len(self.test.scenes), len(self.names)), np.nan))
        table[self.test_numbers[name], list(self.names).index(name)] = np.mean(found, axis=0)
