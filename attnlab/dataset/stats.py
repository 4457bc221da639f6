"""Count what is in a data set: classes, pixels, regions, sizes, prompts, and what was rejected and why."""

from collections import Counter

import numpy as np
from skimage.measure import label as regions_of
from tqdm import tqdm

from ..masks import IGNORE
from .keeping import count_reasons
from .records import Dataset

__all__ = ["count_dataset"]


def count_dataset(dataset: Dataset) -> dict:
    """Count a data set's images, pixels and regions by class, its prompts, and what was rejected; read every mask.

    Parameters
    ----------
    dataset : Dataset
        A finished data set. Images marked as bad are counted as such, and left out of all else.

    Returns
    -------
    dict of JSON types
        "images", "background alone" (images with no class), "bad": numbers of images. "sizes": images by width x
        height. "classes": of each class "images" that show it, "pixels", their "share" of all pixels, 0..1, "regions"
        (connected, diagonals too) and their "median region", in pixels; "ignored": pixels. "rejected": images by
        reason. "prompts": numbers of kept and of rejected images by prompt.
    """
    good = [i for i, record in enumerate(dataset.records) if record["file_name"] not in dataset.bad]
    names, sizes = dataset.classes[1:], Counter()
    areas: dict[str, list[np.ndarray]] = {name: [] for name in names}  # pixels of each region, by image
    pixels, ignored, alone = 0, 0, 0
    for i in tqdm(good, "counting", delay=1, leave=False, unit="image"):
        pair = dataset[i]
        masks = _masks(pair.labels, names)
        sizes[f"{pair.image.width} x {pair.image.height}"] += 1
        pixels += pair.image.width * pair.image.height
        ignored += 0 if isinstance(pair.labels, dict) else int((pair.labels == IGNORE).sum())
        alone += not any(mask.any() for mask in masks.values())
        for name, mask in masks.items():
            areas[name].append(np.bincount(regions_of(mask, connectivity=2).ravel())[1:])
    prompts = {prompt: [0, 0] for prompt in dataset.recipe.texts}
    for lines, column in (([dataset.records[i] for i in good], 0), (dataset.rejected, 1)):
        for line in lines:
            prompts.setdefault(line["prompt"], [0, 0])[column] += 1
    return {
        "images": len(good),
        "background alone": alone,
        "bad": len(dataset.records) - len(good),
        "sizes": dict(sizes),
        "classes": {name: _summary(found, pixels) for name, found in areas.items()},
        "ignored": ignored,
        "rejected": count_reasons([line["reason"] for line in dataset.rejected]),
        "prompts": prompts,
    }


def _masks(labels, names):
    if isinstance(labels, dict):
        return labels
    return {name: labels == number for number, name in enumerate(names, 1)}


def _summary(found, pixels):
    """Sum up a class: the pixels of each of its regions, by image."""
    sizes = np.concatenate([*found, np.zeros(0, int)])
    return {
        "images": sum(len(own) > 0 for own in found),
        "pixels": int(sizes.sum()),
        "share": float(sizes.sum() / max(pixels, 1)),
        "regions": len(sizes),
        "median region": float(np.median(sizes)) if len(sizes) else 0.0,
    }
