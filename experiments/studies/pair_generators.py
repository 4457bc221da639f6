"""Joint models for the study of scarce labels: of the labeled scenes alone, or of unlabeled ones too.

An unlabeled scene has the label 255 everywhere: its label channels are 0, its class proportions unknown, and the loss
of its label channels is left out. One model learns 2,000 such scenes; for each labeled set it is trained further, on
batches of which one half is labeled.

What a model knows of labels must come from its own labeled set. So codes of classes, which `JointDiffusion.new` would
take from which classes touch in the pairs at hand, are here those of `PRIOR_NEIGHBORS`: what anybody may expect of land
from above. They are the same for all models, labeled scenes alone or not.
"""

from pathlib import Path

import numpy as np
import torch

from attnlab import training
from attnlab.joint import JointDiffusion, class_proportions
from attnlab.joint.channels import bit_codes
from attnlab.joint.proportions import blurred
from attnlab.masks import IGNORE
from attnlab.pipelines import seed
from attnlab.scenes import aerial
from attnlab.segmentation.folders import Pairs
from attnlab.storage import replacing

from .pair_levers import order_rare

__all__ = ["PRIOR_NEIGHBORS", "adapt_generator", "draw_pairs", "fit_and_keep", "half_labeled", "new_generator"]

PRIOR_NEIGHBORS = {  # classes that one expects side by side
    "vehicle": ("road", "ground"),
    "road": ("ground", "grass"),
    "building": ("ground", "grass"),
    "tree": ("grass", "ground"),
    "water": ("grass", "ground"),
    "grass": ("ground",),
}


def new_generator(pairs: Pairs, channels: tuple[int, ...], number: int = 0) -> JointDiffusion:
    """Return an untrained model of the pairs' colors and proportions; `number` draws its starting weights."""
    model = JointDiffusion.new(*pairs, aerial.CLASSES, channels=channels, seed=number)
    touching = np.zeros((len(aerial.CLASSES),) * 2)
    for name, others in PRIOR_NEIGHBORS.items():
        for other in others:
            i, j = aerial.CLASSES.index(name), aerial.CLASSES.index(other)
            touching[i, j] = touching[j, i] = 1
    return JointDiffusion(model.unet, model.metadata | {"codes": bit_codes(touching).tolist()})


def adapt_generator(folder: str | Path, labeled: Pairs) -> JointDiffusion:
    """Load the model of unlabeled scenes, and tell it the class proportions of a labeled set, which it will draw."""
    model = JointDiffusion.from_pretrained(folder)
    known = class_proportions(labeled[1], len(aerial.CLASSES))
    return JointDiffusion(model.unet, model.metadata | {"proportions": known.round(4).tolist()})


def half_labeled(labeled: Pairs, unlabeled: Pairs) -> Pairs:
    """Return all unlabeled pairs and as many labeled ones, repeated in turn: half of what a batch draws is labeled."""
    if (unlabeled[1] != IGNORE).any():
        raise ValueError(f"unlabeled scenes have labels: give {IGNORE} everywhere, as unlabeled_scenes does")
    again = np.arange(len(unlabeled[0])) % len(labeled[0])
    return tuple(np.concatenate((few[again], many)) for few, many in zip(labeled, unlabeled, strict=True))


def fit_and_keep(
    model: JointDiffusion, pairs: Pairs, folder: Path, schedule: training.Schedule, check: Pairs, batch: int
) -> list[tuple[int, float]]:
    """Train a model, or go on, into folder/model, and return its checks; nothing is done if it is there.

    Checkpoints, which are eight times as large, are deleted.
    """
    if not (folder / "model" / "joint.json").exists():  # what is written last
        model.fit(*pairs, folder, schedule, check=check, batch=batch)
        model.save_pretrained(folder / "model")
    for name in ("checkpoint", "best"):
        (folder / f"{name}.safetensors").unlink(missing_ok=True)
    return training.checks(folder)


def draw_pairs(folder: Path, path: Path, count: int, number: int, rare: bool = False, steps: int = 50) -> None:
    """Draw pairs with the model in folder/model and write images and labels to `path`, .npz.

    Each known row of class proportions is asked for equally often, with `rare` as `order_rare` has it; blurred in both
    cases. `number` is the seed.
    """
    model = JointDiffusion.from_pretrained(folder / "model")
    asked = None
    if rare:
        chosen = order_rare(model.metadata["proportions"], count, np.random.default_rng(number))
        asked = blurred(torch.from_numpy(chosen), seed(number)).numpy()
    images, labels, _ = model.sample(count, seed(number), proportions=asked, steps=steps)
    with replacing(path) as part:
        np.savez_compressed(part, images=images, labels=labels)
