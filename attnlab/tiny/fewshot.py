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

from .. import LinearMap, Recording, Token, linear_daam, metrics, ovam, record_image, seed
from ..heatmaps import stretch
from ..scenes import street
from ..scenes.scene import Scene
from .localize import TIMESTEPS

TRAINING = street.HELD_OUT + 300_000  # first seed of the scenes that tokens are learned from
SHOWN = 0.01  # an example of a class shows it in at least this share of the image
NOUNS = {"ground": "grass", "building": "house"}
"""Words of classes that are called otherwise in captions."""


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


def linear(word: str | Token | np.ndarray) -> Maps:
    return lambda among, i: among.maps[i] @ word if isinstance(word, np.ndarray) else among.maps[i][word]


def padded(word: str) -> Maps:
    return lambda among, i: ovam(among.recordings[i], word, padded=True)[word]


def softmax(token: Token) -> Maps:
    """Beside the background that was learned with it."""
    return lambda among, i: ovam(among.recordings[i], token)[token]


def curves(maps: Maps, among: Pool, name: str, numbers: Sequence[int]) -> np.ndarray:
    """IoU (threshold, image) at each share of each map's range."""
    truths = among.masks(name, numbers)
    heats = [stretch(maps(among, i), truth.shape) for i, truth in zip(numbers, truths, strict=True)]
    return metrics.miou_curve(heats, truths)


def at_threshold(maps: Maps, name: str, train: Pool, known: Sequence[int], test: Pool, asked: Sequence[int]):
    """IoU of each test scene at the threshold that is best on the training scenes: (image,)."""
    cut = metrics.best_threshold(metrics.THRESHOLDS, curves(maps, train, name, known))
    return curves(maps, test, name, asked)[np.searchsorted(metrics.THRESHOLDS, cut)]


def at_zero(token: Token, name: str, test: Pool, asked: Sequence[int]) -> np.ndarray:
    """IoU of each test scene where the token's map is above 0: (image,)."""
    truths = test.masks(name, asked)
    found = [test.maps[i].upscaled(token, truth.shape) > 0 for i, truth in zip(asked, truths, strict=True)]
    return np.array([metrics.iou(mask, truth) for mask, truth in zip(found, truths, strict=True)])
