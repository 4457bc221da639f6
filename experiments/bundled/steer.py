"""Measure whether prompts steer a model: what the reference segmenter sees in images of single-object prompts.

Beside the share of images that show the class that was asked for: the share of other images that show it unasked, and
the segmenter's own recall on rendered scenes that do show it.
"""

import numpy as np
from scipy.stats import binomtest
from tqdm.auto import tqdm

from attnlab import seed
from attnlab.scenes import street
from attnlab.scenes.captions import VISIBLE_AREA

NOUNS = {
    "sky": "a blue sky",
    "ground": "grass",
    "water": "a river",
    "mountain": "mountains",
    "fire": "fire",
    "smoke": "smoke",
}
"""Prompts of classes that are not "a car", "a tree", ..."""
COMPANIONS = {"pole": "traffic light", "bicycle": "rider", "smoke": "fire"}
"""What comes with something else, and with what: that is not unasked."""


def shown(labels: np.ndarray, classes: int) -> np.ndarray:
    """Which classes each label map shows, bool (image, class): those that a caption could name."""
    areas = np.stack([np.bincount(m.ravel(), minlength=classes) for m in labels]) / labels[0].size
    return areas >= VISIBLE_AREA


def steering(
    pipe, segmenter, images: int = 50, scenes: int = 500, batch: int = 10, steps: int = 20, guidance: float = 4.0
) -> dict:
    """Share of images that show the asked class, by class, with intervals; unasked share; the segmenter's recall."""
    found = {}
    for c, name in enumerate(tqdm(segmenter.classes, desc="classes")):
        prompt, pictures = NOUNS.get(name, f"a {name}"), []
        for first in range(0, images, batch):
            generators = [seed(1000 * c + k) for k in range(first, min(first + batch, images))]
            call = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generators}
            pictures += pipe([prompt] * len(generators), **call).images
        found[name] = shown(segmenter.segment(pictures), len(segmenter.classes))
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    rendered = [street.render(s, size) for s in range(street.HELD_OUT, street.HELD_OUT + scenes)]
    true = shown(np.stack([s.labels for s in rendered]), len(segmenter.classes))
    judged = shown(segmenter.segment([s.image for s in rendered]), len(segmenter.classes))
    rows = {}
    for c, name in enumerate(segmenter.classes):
        asked = found[name][:, c]
        others = [found[other][:, c] for other in segmenter.classes if other not in (name, COMPANIONS.get(name))]
        rows[name] = {
            "asked": float(asked.mean()),
            "interval": list(binomtest(int(asked.sum()), len(asked)).proportion_ci(method="wilson")),
            "unasked": float(np.mean(others)),
            "oracle recall": float(judged[true[:, c], c].mean()),
        }
    return {"images a class": images, "steps": steps, "guidance": guidance, "classes": rows}


def share(rows: dict, thin: bool) -> tuple[float, float]:
    """Mean and least share of images that show what was asked, over the thin classes or all others."""
    asked = [row["asked"] for name, row in rows.items() if (name in street.THIN) == thin]
    return float(np.mean(asked)), min(asked)
