"""Measure how well tokens learned from a few rendered scenes find their objects in other scenes.

Scenes are noised and recorded (`record_image`) with their own captions. Training sets of a class are drawn from one
range of seeds, and no scene is in two of them; test examples are the first scenes of another range that show the
class. Thresholds, as fractions of each map's range, are chosen on the training set of the row.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from attnlab import LinearMap, Recording, Token, linear_daam, metrics, ovam, record_image, seed
from attnlab.learning.fit import Whitening, fit_token
from attnlab.learning.optimize import optimize_token
from attnlab.learning.targets import as_masks, coverage
from attnlab.maps.heatmaps import minmax, resize, upscale
from attnlab.scenes import street
from attnlab.scenes.scene import Scene

from ..bundled.localize import TIMESTEPS

__all__ = [
    "CAPTION_WORDS", "FIRST_TRAIN_SEED", "FewShotStudy", "ScenePool", "interval_over_draws", "record_pool",
    "stacked_queries",
]  # fmt: skip

FIRST_TRAIN_SEED = street.HELD_OUT + 300_000  # of the scenes that tokens are learned from
_MIN_AREA = 0.01  # an example of a class shows it in at least this fraction of the image
_PROBE_C = 10.0  # inverse ridge of the linear probe; this and _scaling were chosen on scenes of other seeds
CAPTION_WORDS = {"ground": "grass", "building": "house", "roof": "house", "wheel": "car", "trunk": "tree"}
"""Words of classes that captions call otherwise, and of the objects that parts belong to."""


@dataclass
class ScenePool:
    """Recorded scenes of a range of seeds."""

    scenes: list[Scene]
    recordings: list[Recording] = field(default_factory=list)
    maps: list[LinearMap] = field(default_factory=list)
    queries: list[LinearMap] = field(default_factory=list)  # as `stacked_queries` gives them

    def examples(self, name: str, count: int | None = None, draw: int = 0) -> list[int]:
        """Return the numbers of scenes that show a class or part: all, or `count` of them, others for each `draw`."""
        found = [i for i, scene in enumerate(self.scenes) if scene.mask(name).mean() >= _MIN_AREA]
        if count is None:
            return found
        if len(found) < count * (draw + 1):
            wanted = f"{count} are wanted" if not draw else f"{draw + 1} sets of {count} are wanted"
            raise ValueError(f"{name!r} is in {len(found)} of {len(self.scenes)} scenes: {wanted}, make more")
        return found[count * draw : count * (draw + 1)]

    def masks(self, name: str, numbers: Sequence[int]) -> list[np.ndarray]:
        """Return the exact masks of a class or part in some scenes."""
        return [self.scenes[i].mask(name) for i in numbers]


def record_pool(pipe, first: int, count: int, batch: int = 20) -> ScenePool:
    """Render and record scenes with seeds first, first + 1, ...; the noise depends on the first seed of a batch."""
    found = ScenePool([])
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    for start in tqdm(range(first, first + count, batch), desc="scenes", leave=False, delay=1):
        scenes = [street.render(s, size) for s in range(start, min(start + batch, first + count))]
        images, captions = [s.image for s in scenes], [s.caption for s in scenes]
        options = {"timesteps": TIMESTEPS, "dtype": torch.float16, "generator": seed(start)}
        recording = record_image(pipe, images, captions, **options)
        found.scenes += scenes
        found.recordings += list(recording)
        found.maps += [linear_daam(one) for one in recording]
        found.queries += [stacked_queries(one) for one in recording]
    return found


def stacked_queries(recording: Recording) -> LinearMap:
    """Return the queries of all layers and heads side by side, summed over steps: (pixel, channel) in place of texts.

    Linear DAAM's map of any word or token is a weighted sum of these channels, so what a linear probe reads from them
    is all that a token can show, and more.
    """
    trace, found = recording.trace, []
    largest = max(trace.sizes.values(), key=math.prod)
    for name, layer in trace.layers.items():
        queries = sum(layer.queries(of_step.cpu()) for of_step in trace.queries[name])  # (head, pixel, width)
        channels = queries.transpose(1, 2).flatten(0, 1).unflatten(-1, trace.sizes[name])
        found.append(resize(channels[None], largest, "bilinear", clamp=False)[0])
    matrix = torch.cat(found).flatten(1).T.contiguous()
    return LinearMap(matrix, torch.zeros(len(matrix)), largest, metadata={"model": recording.metadata["model"]})


def interval_over_draws(
    values: np.ndarray, minus: np.ndarray | None = None, resamples: int = 2000
) -> tuple[float, float, float]:
    """Return the mean over classes, and its 95 % interval over training sets and test scenes.

    A hierarchical bootstrap: each resample draws as many test scenes as there are, and of each class's D training sets
    D - 1, which makes the variance right for few of them (Rao and Wu, JASA 1988). With one training set the interval
    is over test scenes alone.

    Parameters
    ----------
    values : (draw, scene, class) array
        One number per training set and class of each scene, NaN where the scene is no test example of the class.
    minus : (draw, scene, class) array, optional
        Another row of the same scenes, to be subtracted. Training sets are drawn in pairs where both have as many.
    resamples : int
        Number of means drawn.
    """
    if minus is not None and minus.shape == values.shape:
        values, minus = values - minus, None
    rng, (_, scenes, _) = np.random.default_rng(0), values.shape
    chosen = rng.multinomial(scenes, np.full(scenes, 1 / scenes), resamples)  # how often each scene
    found, means = 0.0, 0.0
    for sign, row in ((1, values), (-1, minus)):
        if row is not None:
            found += sign * np.nanmean(row, axis=(0, 1)).mean()
            means += sign * _resampled(row, chosen, rng)
    return float(found), *(float(end) for end in np.quantile(means, [0.025, 0.975]))


def _resampled(values, chosen, rng):
    """Return the mean over classes of each resample: scenes `chosen` times, training sets drawn here."""
    draws, _, classes = values.shape
    present = np.isfinite(values[0])
    sets = rng.multinomial(max(draws - 1, 1), np.full(draws, 1 / draws), (len(chosen), classes))
    sums = (chosen @ np.where(present, values, 0)).transpose(1, 2, 0)  # (resample, class, draw)
    counts = chosen @ present * max(draws - 1, 1)
    # A class that no chosen scene shows is left out of that resample.
    return np.nanmean(np.divide((sets * sums).sum(2), counts, out=np.full(counts.shape, np.nan), where=counts > 0), 1)


_Method = Callable[[ScenePool, Sequence[int]], np.ndarray]  # to maps (scene, row, column) of some scenes of a pool


def _linear(word: str | Token, kind: str = "maps") -> _Method:
    return lambda pool, numbers: LinearMap.stack([getattr(pool, kind)[i] for i in numbers])[word]


def _padded(word: str) -> _Method:
    return lambda pool, numbers: np.stack([ovam(pool.recordings[i], word, padded=True)[word] for i in numbers])


def _softmax(token: Token) -> _Method:  # in one text with the background that was learned with it
    return lambda pool, numbers: np.stack([ovam(pool.recordings[i], token)[token] for i in numbers])


def _scaling(maps: Sequence[LinearMap]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of features, and the (channel, direction) matrix that divides each by variance ** 0.25."""
    cells = torch.cat([one.matrix for one in maps]).double()
    variance, axes = torch.linalg.eigh(torch.cov(cells.T))
    return cells.mean(0), axes * variance.clamp(min=1e-8 * float(variance[-1])) ** -0.25


def _ious(method: _Method, pool: ScenePool, name: str, numbers: Sequence[int], thresholds) -> np.ndarray:
    """Return IoU (threshold, image) at fractions of each map's range."""
    truths = pool.masks(name, numbers)
    return metrics.miou_curve(minmax(method(pool, numbers), truths[0].shape), truths, thresholds)


@dataclass
class FewShotStudy:
    """A table of methods, each learning from a few train examples per class, tested on `tests` others.

    `fit_token` learns a token. Beside it stand two classifiers of pixels on `stacked_queries`, which no token limits:
    "nearest prototype" says whether a pixel is nearer to the mean query inside the masks than to the mean outside, and
    "linear probe" is scikit-learn's logistic regression, one class against all others. Both see features divided by
    variance ** 0.25 along their principal directions, which all training scenes tell without masks.
    """

    train: ScenePool
    test: ScenePool
    names: Sequence[str] = street.CLASSES
    tests: int = 60  # scenes per class

    def __post_init__(self):
        self.rows: dict[str, np.ndarray] = {}  # IoU (draw, scene, class); NaN where a scene is no test of a class
        self.seconds: dict[str, list[float]] = {}  # of each fit, by row
        self.test_numbers = {name: self.test.examples(name, self.tests) for name in self.names}
        self.whitening = Whitening.of(self.train.maps)
        self._mean, self._scale = _scaling(self.train.queries)

    def words(self, count: int, draws: int = 1) -> None:
        """Add rows of the plain words, with thresholds chosen on `count` train examples."""
        for name in tqdm(self.names, desc="words", leave=False, delay=1):
            word = CAPTION_WORDS.get(name, name)
            for row, method in (("Linear DAAM", _linear(word)), ("OVAM padded", _padded(word))):
                cuts = [self._at_threshold(method, name, count, draw) for draw in range(draws)]
                self._put(f"{row}, {count}", name, cuts)

    def fits(self, count: int, draws: int = 1, learner: str = "fit_token") -> None:
        """Add rows of a learner on `count` examples: at a threshold chosen on them, and above the level it learned."""
        queries = {"nearest prototype": self.prototype, "linear probe": self.probe}
        kind = "queries" if learner in queries else "maps"
        for name in tqdm(self.names, desc=f"{learner}, {count} images", leave=False, delay=1):
            cuts, zeros = [], []
            for draw in range(draws):
                started = time.perf_counter()
                token = queries.get(learner, self.learn)(name, count, draw)
                self.seconds.setdefault(f"{learner}, {count}", []).append(time.perf_counter() - started)
                cuts.append(self._at_threshold(_linear(token, kind), name, count, draw))
                zeros.append(self._above_zero(_linear(token, kind), name))
            self._put(f"{learner}, {count}", name, cuts)
            self._put(f"{learner} above 0, {count}", name, zeros)

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
                found.append(self._at_threshold(method, name, count, draw))
            self._put(f"{preset}, {count}", name, found)

    def mean(self, row: str) -> tuple[float, float, float]:
        """Return the mean over classes of a row, and its 95 % interval."""
        return interval_over_draws(self.rows[row])

    def gain(self, row: str, over: str) -> tuple[float, float, float]:
        """Return the mean over classes of the difference of two rows, and its 95 % interval."""
        return interval_over_draws(self.rows[row], self.rows[over])

    def by_class(self, row: str) -> np.ndarray:
        """Return the mean IoU (class,) of a row."""
        return np.nanmean(self.rows[row], axis=(0, 1))

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

    def prototype(self, name: str, count: int, draw: int = 0) -> Token:
        """Return the line between the mean queries inside and outside of masks, as a token of `stacked_queries`."""
        cells, inside = self._cells(name, count, draw)
        center, other = (share @ cells / share.sum() for share in (inside, 1 - inside))
        return self._token(name, center - other, (other @ other - center @ center) / 2)

    def probe(self, name: str, count: int, draw: int = 0) -> Token:
        """Return a logistic regression on queries as a token of `stacked_queries`; masks count as in `fit_token`."""
        cells, inside = self._cells(name, count, draw)
        weights = torch.cat([inside * ((1 - inside).sum() / inside.sum()).sqrt(), 1 - inside])
        used = weights > 0
        labels = torch.arange(2).flip(0).repeat_interleave(len(cells))
        found = LogisticRegression(C=_PROBE_C, tol=1e-3, max_iter=1000)
        found.fit(cells.repeat(2, 1)[used], labels[used], (weights / weights.sum())[used])
        return self._token(name, torch.from_numpy(found.coef_[0]), found.intercept_[0])

    def _cells(self, name, count, draw):
        """Return scaled queries (cell, direction) of train examples, and how much of each cell (cell,) masks cover."""
        numbers = self.train.examples(name, count, draw)
        stack = LinearMap.stack([self.train.queries[i] for i in numbers])
        masks = as_masks(self.train.masks(name, numbers), stack.size[1:], count)
        return (stack.matrix.double() - self._mean) @ self._scale, coverage(masks, stack.size[1:])[0].flatten()

    def _token(self, name, weights, bias):
        """Return a linear score of scaled queries as a token of the queries themselves."""
        value = self._scale @ weights
        return Token(name, value, float(bias - self._mean @ value))

    def _at_threshold(self, method, name, count, draw):
        """Return the IoU (image,) of the test examples at the best threshold of the train examples."""
        train = self.train.examples(name, count, draw)
        cut = metrics.best_threshold(metrics.THRESHOLDS, _ious(method, self.train, name, train, metrics.THRESHOLDS))
        return _ious(method, self.test, name, self.test_numbers[name], [cut])[0]

    def _above_zero(self, method, name):
        """Return the IoU (image,) of the test examples where a map is above 0."""
        truths = self.test.masks(name, self.test_numbers[name])
        found = upscale(method(self.test, self.test_numbers[name]), truths[0].shape) > 0
        return [metrics.iou(mask, truth) for mask, truth in zip(found, truths, strict=True)]

    def _put(self, row, name, found):
        """Write the IoU (draw, test example) of a class into a row."""
        empty = np.full((len(found), len(self.test.scenes), len(self.names)), np.nan)
        self.rows.setdefault(row, empty)[:, self.test_numbers[name], list(self.names).index(name)] = found
