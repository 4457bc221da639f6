"""Measure whether images show as many things as prompts ask for: "two cars", "three people".

Things are counted as connected regions that the reference segmenter sees. How often that is right is measured on
rendered scenes whose captions say such a number.
"""

import numpy as np
from tqdm import tqdm

from attnlab.scenes import street
from attnlab.segmentation import Segmenter

from .seen import Seen, draw_images, rate, regions

__all__ = ["NUMBER_PROMPTS", "count_regions", "number_rates"]

NUMBER_PROMPTS = {
    "two cars": ("car", 2), "three cars": ("car", 3), "two people": ("person", 2), "three people": ("person", 3),
    "two houses": ("building", 2), "two trees": ("tree", 2),
}  # fmt: skip
"""The class and the number that a prompt asks for."""


def count_regions(labels: np.ndarray, name: str) -> np.ndarray:
    """Return how many connected regions of a class each label map (row, column) shows: int (image,)."""
    return np.array([len(regions(one, street.CLASSES.index(name))) for one in labels], int)


def number_rates(pipe, segmenter: Segmenter, scenes: Seen, images: int = 50, **call) -> dict:
    """Return, by prompt, how often images show its number of things, and how many on average.

    Beside it stands how often rendered `scenes` whose captions say the same are counted rightly. `call` goes to
    `draw_images`.
    """
    rows = {}
    for prompt, (name, number) in tqdm(NUMBER_PROMPTS.items(), "numbers"):
        drawn = draw_images(pipe, [prompt] * images, range(images), **call)
        counts = count_regions(segmenter.segment(drawn), name)
        told = [prompt in caption for caption in scenes.captions]
        true = count_regions(scenes.labels[told], name)
        rows[prompt] = rate(counts == number) | {"mean": float(counts.mean()), "scenes": rate(true == number)}
    return rows
