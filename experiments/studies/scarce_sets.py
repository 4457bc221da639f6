"""Scenes of the study of scarce labels: which seeds are labeled, unlabeled, for validation and for the test.

A labeled set has a block of seeds of its own: its first n scenes are the set of size n, the ones behind them the
further exact scenes. Sets of other blocks share no scene with it, nor with those of any bundled model.
"""

from functools import lru_cache

import numpy as np

from attnlab.masks import IGNORE
from attnlab.scenes import aerial
from attnlab.segmentation.folders import Pairs

__all__ = ["BLOCK", "FIRST_LABELED_SEED", "FIRST_SCARCE_TEST_SEED", "FIRST_SCARCE_VALIDATION_SEED"]
__all__ += ["FIRST_TUNING_SET", "FIRST_UNLABELED_SEED", "further_scenes", "labeled_set", "scarce_tests"]
__all__ += ["scarce_validation", "unlabeled_scenes"]

FIRST_LABELED_SEED = aerial.HELD_OUT + 1_000_000
BLOCK = 1000  # seeds of each labeled set
FIRST_TUNING_SET = 900  # sets from here on are for choosing settings, and for nothing else
FIRST_UNLABELED_SEED = aerial.HELD_OUT + 2_000_000
FIRST_SCARCE_VALIDATION_SEED = aerial.HELD_OUT + 2_100_000
FIRST_SCARCE_TEST_SEED = aerial.HELD_OUT + 2_200_000


def labeled_set(number: int, count: int) -> Pairs:
    """Render the first `count` scenes of a labeled set; ValueError where its block has fewer."""
    return further_scenes(number, 0, count)


def further_scenes(number: int, after: int, count: int) -> Pairs:
    """Render `count` scenes of a labeled set's block that come after the first ones; ValueError as above."""
    if after + count > BLOCK:
        raise ValueError(f"{after} + {count} scenes of one set: there are {BLOCK}, ask for smaller sizes or ratios")
    return _rendered(FIRST_LABELED_SEED + BLOCK * number + after, count)


def unlabeled_scenes(count: int) -> Pairs:
    """Render scenes whose labels nobody knows: all of them are 255."""
    images, labels = _rendered(FIRST_UNLABELED_SEED, count)
    return images, np.full_like(labels, IGNORE)


def scarce_validation(count: int) -> Pairs:
    """Render the scenes that decide when a training ends, and how pairs are mixed."""
    return _rendered(FIRST_SCARCE_VALIDATION_SEED, count)


def scarce_tests(count: int) -> Pairs:
    """Render the scenes that only the gains are measured on."""
    return _rendered(FIRST_SCARCE_TEST_SEED, count)


@lru_cache(maxsize=8)
def _rendered(first, count):
    scenes = [aerial.render(seed) for seed in range(first, first + count)]
    return np.stack([scene.image for scene in scenes]), np.stack([scene.labels for scene in scenes])
