"""Words learned from a few rendered scenes: how well they find their objects in others.

Scenes are noised and looked at (`record_image`) with their own captions. Training scenes of a class are drawn from one
range of seeds, test scenes are the first ones of another that show it. Thresholds, shares of each map's range, are
chosen on the training scenes of the row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from attnlab import (
    LinearMap,
    Recording,
    Token,
    fit_token,
    linear_daam,
    metrics,
    optimize_token,
    ovam,
    record_image,
    seed,
)
from attnlab.learning.fit import Whitening
from attnlab.maps.heatmaps import minmax
from attnlab.scenes import street
from attnlab.scenes.scene import Scene

from ..bundled.localize import TIMESTEPS

TRAINING = street.HELD_OUT + 300_000  # first seed of the scenes that tokens are learned from
SHOWN = 0.01  # an example of a class shows it in at least this share of the image
NOUNS = {"ground": "grass", "building": "house", "roof": "house", "wheel": "car", "trunk": "tree"}
"""Words of classes that are called otherwise in captions, and of what parts belong to."""


@dataclass
class Pool:
    """Recorded scenes of a range of seeds."""

    scenes: list[Scene]
    recordings: list[Recording]
    maps: list[LinearMap]

    def examples(self, name: str, count: int | None = None, draw: int = 0) -> list[int]:
        """Numbers of scenes that show a class or part: the first ones, or with `draw` others at random."""
        found = [i for i, scene in enumerate(self.scenes) if scene.mask(name).mean() >= SHOWN]
        if draw:
            found = np.random.default_rng(draw).permutation(found).tolist()
        if count is not None and len(found) < count:
            raise ValueError(f"{name!r} is in {len(found)} of {len(self.scenes)} scenes: {count} are wanted, make more")
        return found[:count]

    def masks(self, name: str, numbers: Sequence[int]) -> list[np.ndarray]:
        return [self.scenes[i].mask(name) for i in numbers]


def pool(pipe, first: int, count: int, batch: int = 20) -> Pool:
    """Scenes with seeds first, first + 1, ...; the noise depends on the seed of a batch's first one."""
    found = Pool([], [], [])
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    for start in tqdm(range(first, first + count, batch), desc="scenes", leave=False):
        scenes = [street.render(s, size) for s in range(start, min(start + batch, first + count))]
        pictures, captions = [s.image for s in scenes], [s.caption for s in scenes]
        looked = record_image(pipe, pictures, captions, timesteps=TIMESTEPS, dtype=torch.float16, generator=seed(start))
        found.scenes += scenes
        found.recordings += list(looked)
        found.maps += [linear_daam(one) for one in looked]
    return found


Maps = Callable[[Pool, int], np.ndarray]
"""The map (row, column) of a scene of a pool, by its number."""


def linear(word: str | Token) -> Maps:
    return lambda among, i: among.maps[i][word]


def padded(word: str) -> Maps:
    return lambda among, i: ovam(among.recordings[i], word, padded=True)[word]


def softmax(token: Token) -> Maps:
    """Beside the background that was learned with it."""
    return lambda among, i: ovam(among.recordings[i], token)[token]


def curves(maps: Maps, among: Pool, name: str, numbers: Sequence[int]) -> np.ndarray:
    """IoU (threshold, image) at each share of each map's range."""
    truths = among.masks(name, numbers)
    heats = [minmax(maps(among, i), truth.shape) for i, truth in zip(numbers, truths, strict=True)]
    return metrics.miou_curve(heats, truths)


def at_zero(token: Token, name: str, test: Pool, asked: Sequence[int]) -> np.ndarray:
    """IoU (image,) where the token's map is above 0."""
    truths = test.masks(name, asked)
    found = [test.maps[i].upscaled(token, truth.shape) > 0 for i, truth in zip(asked, truths, strict=True)]
    return np.array([metrics.iou(mask, truth) for mask, truth in zip(found, truths, strict=True)])


@dataclass
class Study:
    """IoU of rows of a table, float (scene, class), NaN where a scene is no test of a class; by name of the row."""

    train: Pool
    test: Pool
    names: Sequence[str] = street.CLASSES
    tests: int = 60  # scenes a class

    def __post_init__(self):
        self.rows: dict[str, np.ndarray] = {}
        self.seconds: dict[str, list[float]] = {}  # of each fit, by row
        self.asked = {name: self.test.examples(name, self.tests) for name in self.names}
        self.whitening = Whitening.of(self.train.maps)

    def words(self, count: int) -> None:
        """Rows of the plain words, thresholds chosen on `count` training scenes."""
        for name in tqdm(self.names, desc="words", leave=False):
            word, known = NOUNS.get(name, name), self.train.examples(name, count)
            self._put(f"Linear DAAM, {count}", name, [self._at_threshold(linear(word), name, known)])
            self._put(f"OVAM padded, {count}", name, [self._at_threshold(padded(word), name, known)])

    def fits(self, count: int, draws: int = 1) -> None:
        """Rows of `fit_token` on `count` scenes: at a threshold chosen on them, and at the zero level."""
        for name in tqdm(self.names, desc=f"{count} images", leave=False):
            found = [self._fit(name, count, draw) for draw in range(draws)]
            self._put(f"fit_token, {count}", name, [cut for cut, _ in found])
            self._put(f"fit_token above 0, {count}", name, [zero for _, zero in found])

    def descents(self, count: int, preset: str, draws: int = 1) -> None:
        """Rows of `optimize_token` on `count` scenes."""
        for name in tqdm(self.names, desc=f"{preset}, {count} images", leave=False):
            found = []
            for draw in range(draws):
                known = self.train.examples(name, count, draw)
                images = [self.train.recordings[i] for i in known]
                token = optimize_token(images, self.train.masks(name, known), NOUNS.get(name, name), preset)
                self.seconds.setdefault(f"{preset}, {count}", []).append(token.metadata["seconds"])
                found.append(
                    self._at_threshold(linear(token) if token.background is None else softmax(token), name, known)
                )
            self._put(f"{preset}, {count}", name, found)

    def gain(self, row: str, over: str) -> tuple[float, float, float]:
        """Mean over classes of the difference of two rows, and its 95 % interval."""
        return metrics.mean_over_classes(self.rows[row] - self.rows[over])

    def by_class(self, row: str) -> np.ndarray:
        """Mean IoU (class,)."""
        return np.nanmean(self.rows[row], axis=0)

    def lesson(self, name: str, count: int, draw: int = 0) -> tuple[list[LinearMap], list[np.ndarray]]:
        """Maps and masks of training scenes of a class or part."""
        known = self.train.examples(name, count, draw)
        return [self.train.maps[i] for i in known], self.train.masks(name, known)

    def exam(self, name: str, count: int | None = None) -> tuple[list[LinearMap], list[np.ndarray]]:
        """Maps and masks of its test scenes."""
        asked = self.test.examples(name, count or self.tests)
        return [self.test.maps[i] for i in asked], self.test.masks(name, asked)

    def learn(self, name: str, count: int, draw: int = 0) -> Token:
        """What `fit_token` learns from training scenes, near to the word of the class."""
        lesson = self.lesson(name, count, draw)
        return fit_token(*lesson, NOUNS.get(name, name), name=name, unlabeled=self.whitening)

    def _fit(self, name, count, draw):
        token = self.learn(name, count, draw)
        self.seconds.setdefault(f"fit_token, {count}", []).append(token.metadata["seconds"])
        known = self.train.examples(name, count, draw)
        return self._at_threshold(linear(token), name, known), at_zero(token, name, self.test, self.asked[name])

    def _at_threshold(self, maps, name, known):
        """IoU (image,) of the tests at the threshold that is best on the known training scenes."""
        cut = metrics.best_threshold(metrics.THRESHOLDS, curves(maps, self.train, name, known))
        return curves(maps, self.test, name, self.asked[name])[np.searchsorted(metrics.THRESHOLDS, cut)]

    def _put(self, row, name, found):
        table = self.rows.setdefault(row, np.full((len(self.test.scenes), len(self.names)), np.nan))
        table[self.asked[name], list(self.names).index(name)] = np.mean(found, axis=0)
