"""What a generated data set is worth: segmenters trained on few real pairs, on synthetic ones, and on both.

The real world is the renderer, whose masks are exact; the synthetic one a bundled model's, with the masks of its own
attention. Every segmenter takes the same number of steps, and is tested on the same held-out scenes.

    real, tests = scenes(100, TRAINING), scenes(200, TESTS)
    rows = study(real, synthetic, tests, sizes=(10, 30, 100), seeds=(0, 1, 2))
"""

from collections.abc import Sequence

import numpy as np
from tqdm.auto import tqdm

from .. import segment
from ..dataset import Dataset
from ..scenes import street

CLASSES = ("fire", "smoke", "water")
TRAINING = street.HELD_OUT + 500_000  # first seeds: no bundled model saw these scenes, nor what notebooks look at
TESTS = street.HELD_OUT + 600_000
SEEN = 0.02  # a scene counts if one of the classes covers this share of it


def scenes(count: int, first: int, classes: Sequence[str] = CLASSES, size: int = 64) -> segment.Pairs:
    """Rendered scenes, from a seed on, that show at least one of the classes: images, and labels 0, 1.. of them."""
    images, labels, number = [], [], first
    while len(images) < count:
        scene = street.render(number, size)
        masks = [scene.mask(name) for name in classes]
        if max(mask.mean() for mask in masks) >= SEEN:
            images.append(scene.image)
            labels.append(sum(i * mask for i, mask in enumerate(masks, 1)).astype(np.uint8))
        number += 1
    return np.stack(images), np.stack(labels)


def pairs_of(dataset: Dataset) -> segment.Pairs:
    """A data set as arrays."""
    pairs = list(dataset)
    return np.stack([np.asarray(p.image) for p in pairs]), np.stack([p.labels for p in pairs])


def with_truth(pairs: segment.Pairs, oracle, classes: Sequence[str] = CLASSES) -> segment.Pairs:
    """The same images with the oracle's labels: what better masks would be worth."""
    found, labels = oracle.segment(pairs[0]), np.zeros(pairs[1].shape, np.uint8)
    for number, name in enumerate(classes, 1):
        labels[found == oracle.classes.index(name)] = number
    return pairs[0], labels


def study(
    real: segment.Pairs,
    synthetic: dict[str, segment.Pairs],
    tests: segment.Pairs,
    sizes: Sequence[int],
    seeds: Sequence[int],
    steps: int = 500,
    count: int = len(CLASSES) + 1,
) -> dict[tuple[int, str], np.ndarray]:
    """IoU (seed, class) on the tests, by how many real pairs there are and what is added to them ("" for nothing).

    0 real pairs: synthetic ones alone. Another seed takes other real pairs, too.
    """
    arms = [(n, kind) for n in sizes for kind in ("", *synthetic)] + [(0, kind) for kind in synthetic]
    found = {}
    for n, kind in tqdm(arms, desc="segmenters"):
        ious = []
        for s in seeds:
            some = np.random.default_rng([s, n]).permutation(len(real[0]))[:n]
            few = real[0][some], real[1][some]
            first, extra = (few, synthetic.get(kind)) if n else (synthetic[kind], None)
            model = segment.train(*first, count, extra=extra, steps=steps, seed=s)
            ious.append(segment.class_ious(segment.evaluate(model, *tests, count)))
        found[n, kind] = np.stack(ious)
    return found
