"""Draw images of prompts, restore rendered ones, and find the things that the reference segmenter sees in them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from diffusers import AutoencoderKL
from scipy.stats import binomtest
from skimage.measure import label

from attnlab import seed
from attnlab.scenes import Scene
from attnlab.segmentation import Segmenter

from .street_segmenter import restore

__all__ = ["Seen", "draw_images", "rate", "regions", "restore_seen"]

_LEAST_AREA = 0.004  # fraction of the image from which on captions count an object


class Seen(NamedTuple):
    """Images uint8 (image, row, column, rgb), a caption of each, and labels (image, row, column) that were seen."""

    captions: list[str]
    images: np.ndarray
    labels: np.ndarray


def draw_images(
    pipe, prompts: Sequence[str], seeds: Sequence[int], batch: int = 10, steps: int = 20, guidance: float = 4.0
) -> np.ndarray:
    """Draw an image of each prompt with the noise of its seed: uint8 (image, row, column, rgb)."""
    images = []
    for i in range(0, len(prompts), batch):
        generators = [seed(number) for number in seeds[i : i + batch]]
        call = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generators}
        images += pipe(list(prompts[i : i + batch]), **call).images
    return np.stack([np.asarray(image) for image in images])


def restore_seen(autoencoder: AutoencoderKL, segmenter: Segmenter, scenes: Iterable[Scene]) -> Seen:
    """Restore scenes by an autoencoder, which is the best a model could draw, and let a segmenter see them."""
    captions, images = zip(*((scene.caption, scene.image) for scene in scenes), strict=True)
    restored = restore(autoencoder, np.stack(images))
    return Seen(list(captions), restored, segmenter.segment(restored))


def regions(labels: np.ndarray, number: int) -> list[np.ndarray]:
    """Return the connected regions of a class as masks (row, column), the largest first, without very small ones.

    Pixels that touch at a corner are connected.
    """
    found = label(labels == number, connectivity=2)
    areas = np.bincount(found.ravel())[1:]
    large = [k for k in np.argsort(-areas, kind="stable") if areas[k] >= _LEAST_AREA * labels.size]
    return [found == k + 1 for k in large]


def rate(hits: Sequence[bool]) -> dict:
    """Return the fraction that is true, its 95 % Wilson interval, and of how many; of none 0, between 0 and 1."""
    count, true = len(hits), int(np.sum(hits))
    interval = list(binomtest(true, count).proportion_ci(method="wilson")) if count else [0.0, 1.0]
    return {"rate": true / max(count, 1), "interval": interval, "of": count}
