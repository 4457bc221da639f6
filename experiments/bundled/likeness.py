"""Measure how far drawn images are from rendered ones, and from one another where they began with the same noise."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from attnlab.scenes import Scene
from attnlab.segmentation import Segmenter

from ..studies.pair_quality import features, frechet_distance
from .seen import draw_images
from .street_segmenter import restore

__all__ = ["NEAR_PROMPTS", "image_quality", "noise_copies"]

NEAR_PROMPTS = ("a car", "a house", "a tree", "a person", "a traffic light", "a rider")


def image_quality(pipe, segmenter: Segmenter, scenes: Sequence[Scene], **call) -> dict:
    """Return the Fréchet distance of drawn images to rendered ones, by features of the segmenter's encoder.

    Captions are those of the first half of `scenes`, compared is with the second half. Floors are the distances of the
    first half itself: as rendered, and as the autoencoder restores it. `call` goes to `draw_images`.
    """
    half = len(scenes) // 2
    first, second = (np.stack([scene.image for scene in part]) for part in (scenes[:half], scenes[half : 2 * half]))
    drawn = draw_images(pipe, [scene.caption for scene in scenes[:half]], range(half), **call)
    sets = {"drawn": drawn, "restored": restore(pipe.vae, first), "rendered": first}
    to = features(segmenter, second)
    return {"images": half} | {kind: frechet_distance(features(segmenter, x), to) for kind, x in sets.items()}


def noise_copies(pipe, seeds: int = 5, **call) -> dict:
    """Return the PSNR in dB of images of prompts for different things, to each other: of the same noise, and of other.

    The higher that of the same noise, the more it is noise that decides what is drawn. It is of the mean error over
    all pairs of prompts. `call` goes to `draw_images`.
    """
    sets = [draw_images(pipe, [prompt] * seeds, range(seeds), **call) / 255 for prompt in NEAR_PROMPTS]
    apart = {
        kind: np.mean([(one - np.roll(other, shift, 0)) ** 2 for one, other in combinations(sets, 2)])
        for kind, shift in (("same noise", 0), ("other noise", 1))
    }
    return {kind: float(-10 * np.log10(error)) for kind, error in apart.items()}
