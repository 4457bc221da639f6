"""Measure whether prompts steer a model: what the reference segmenter sees in images of single-object prompts.

Measured by class: the fraction of images that show it when asked, the fraction of other images that show it unasked,
and the segmenter's own recall on rendered scenes.
"""

import numpy as np
from tqdm import tqdm

from attnlab.recording.checks import own_size
from attnlab.scenes import street
from attnlab.scenes.captions import VISIBLE_AREA

from .seen import draw_images, rate

__all__ = ["COMPANIONS", "prompt_of", "shown_classes", "shown_when_asked", "steering"]

_PROMPTS = {"sky": "a blue sky", "ground": "grass", "water": "a river", "mountain": "mountains"}
_PROMPTS |= {"fire": "fire", "smoke": "smoke"}  # of all others "a car", "a tree", ...
COMPANIONS = {"pole": "traffic light", "bicycle": "rider", "smoke": "fire"}
"""Classes that come with another one, in whose images they do not count as unasked."""


def prompt_of(name: str) -> str:
    """Return the prompt that asks for a class and nothing else."""
    return _PROMPTS.get(name, f"a {name}")


def shown_classes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return which classes each label map shows, bool (image, class): those that a caption could name."""
    areas = np.stack([np.bincount(m.ravel(), minlength=num_classes) for m in labels]) / labels[0].size
    return areas >= VISIBLE_AREA


def steering(
    pipe, segmenter, images: int = 50, scenes: int = 500, batch: int = 10, steps: int = 20, guidance: float = 4.0
) -> dict:
    """Return, by class, how often images show it when asked (with interval) and unasked, and the segmenter's recall."""
    found = {}
    for c, name in enumerate(tqdm(segmenter.classes, desc="classes")):
        seeds = range(1000 * c, 1000 * c + images)
        pictures = draw_images(pipe, [prompt_of(name)] * images, seeds, batch, steps, guidance)
        found[name] = shown_classes(segmenter.segment(pictures), len(segmenter.classes))
    size = own_size(pipe)
    rendered = [street.render(s, size) for s in range(street.HELD_OUT, street.HELD_OUT + scenes)]
    true = shown_classes(np.stack([s.labels for s in rendered]), len(segmenter.classes))
    segmented = shown_classes(segmenter.segment([s.image for s in rendered]), len(segmenter.classes))
    rows = {}
    for c, name in enumerate(segmenter.classes):
        asked = found[name][:, c]
        others = [found[other][:, c] for other in segmenter.classes if other not in (name, COMPANIONS.get(name))]
        rows[name] = {
            "asked": float(asked.mean()),
            "interval": rate(asked)["interval"],
            "unasked": float(np.mean(others)),
            "oracle recall": float(segmented[true[:, c], c].mean()),
        }
    return {"images a class": images, "steps": steps, "guidance": guidance, "classes": rows}


def shown_when_asked(rows: dict, thin: bool) -> tuple[float, float]:
    """Return the mean and the least fraction of images that show what was asked, of the thin classes or the others."""
    asked = [row["asked"] for name, row in rows.items() if (name in street.THIN) == thin]
    return float(np.mean(asked)), min(asked)
