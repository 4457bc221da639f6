"""Measure whether prompts steer the bundled model: `python -m attnlab.tiny.steer`.

Fifty images from single-object prompts of each class; the oracle says which classes an image shows. Beside the share of
images that show the class that was asked for: the share of other images that show it unasked, and the oracle's own
recall on rendered scenes that do show it.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .. import load_oracle, load_pipeline, metrics, seed
from ..scenes import street
from ..scenes.captions import AREA
from .data import report

NOUNS = {
    "sky": "a blue sky",
    "ground": "grass",
    "water": "a river",
    "mountain": "mountains",
    "fire": "fire",
    "smoke": "smoke",
}
"""Prompts of classes that are not "a house", "a car", ..."""


def shown(labels: np.ndarray, classes: int) -> np.ndarray:
    """Which classes each label map shows, bool (image, class): those that a caption could name."""
    areas = np.stack([np.bincount(m.ravel(), minlength=classes) for m in labels]) / labels[0].size
    return areas >= AREA


def steering(pipe, oracle, images: int = 50, batch: int = 10, steps: int = 20, guidance: float = 4.0) -> dict:
    """Share of images that show the asked class, by class, with intervals; unasked share; the oracle's recall."""
    found = {}
    for c, name in enumerate(tqdm(oracle.classes, desc="classes")):
        prompt, pictures = NOUNS.get(name, f"a {name}"), []
        for first in range(0, images, batch):
            generators = [seed(1000 * c + k) for k in range(first, min(first + batch, images))]
            call = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generators}
            pictures += pipe([prompt] * len(generators), **call).images
        found[name] = shown(oracle.segment(pictures), len(oracle.classes))
    scenes = [
        street.render(s, pipe.unet.config.sample_size * pipe.vae_scale_factor)
        for s in range(street.HELD_OUT, street.HELD_OUT + 500)
    ]
    true = shown(np.stack([s.labels for s in scenes]), len(oracle.classes))
    judged = shown(oracle.segment([s.image for s in scenes]), len(oracle.classes))
    rows = {}
    for c, name in enumerate(oracle.classes):
        asked = found[name][:, c]
        others = np.concatenate([found[other][:, c] for other in oracle.classes if other != name])
        rows[name] = {
            "asked": float(asked.mean()),
            "interval": list(metrics.bootstrap_interval(asked.astype(float))),
            "unasked": float(others.mean()),
            "oracle recall": float(judged[true[:, c], c].mean()),
        }
    return {
        "images a class": images,
        "mean asked": float(np.mean([r["asked"] for r in rows.values()])),
        "classes": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--images", type=int, default=50, help="images a class")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    pipe = load_pipeline(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    report(steering(pipe, load_oracle(), arguments.images), arguments.out)


if __name__ == "__main__":
    main()
