"""Arms of the study of scarce labels: what is added to each batch of labeled scenes, and by whom it was drawn."""

from typing import NamedTuple

from attnlab.masks import IGNORE
from attnlab.scenes import aerial
from attnlab.segmentation import Segmenter
from attnlab.segmentation.folders import Pairs

from .pair_levers import class_losses, clean_regions, filter_pixels, pixel_losses
from .plateau import ExtraLoss, pairs_loss
from .semi_supervised import consistency_loss, soft_loss

__all__ = ["ARMS", "DRAWN", "SMALLEST_REGION", "Arm", "Drawn", "arm_loss"]

SMALLEST_REGION = 5  # pixels with which a region keeps its label: of exact masks that changes 0.3%, and no vehicle


class Arm(NamedTuple):
    """One arm."""

    about: str
    added: str = ""  # a name of DRAWN, "unlabeled" or "exact"
    lever: str = ""
    tuned: str = ""  # arm whose weight it takes, so that a lever is all in which two arms differ


class Drawn(NamedTuple):
    """Pairs of a kind of joint model."""

    model: str  # "own": of the labeled scenes alone; "shared": of unlabeled ones too
    rare: bool = False  # whether rare classes are ordered more often


DRAWN = {"own": Drawn("own"), "shared": Drawn("shared"), "rare": Drawn("shared", True)}
ARMS = {
    "labels": Arm("labeled scenes alone"),
    "published": Arm("+ pairs drawn by a model of these scenes alone", "own", tuned="published"),
    "drawn": Arm("+ pairs drawn by a model that saw unlabeled scenes too", "shared", tuned="drawn"),
    "filtered": Arm("the same, pixels filtered by class-wise loss", "shared", "filter", "drawn"),
    "cleaned": Arm("the same, small regions cleaned", "shared", "clean", "drawn"),
    "rare": Arm("the same model, rare classes ordered more often", "rare", tuned="drawn"),
    "soft": Arm("its images, with soft labels of a segmenter of the labeled scenes", "shared", "soft", "soft"),
    "consistent": Arm("+ unlabeled scenes, semi-supervised", "unlabeled", tuned="consistent"),
    "exact": Arm("+ as many further exact scenes as drawn pairs", "exact"),
}


def arm_loss(
    arm: str, batch: int, labeled: Pairs, added: Pairs | None, teacher: Segmenter | None
) -> tuple[ExtraLoss | None, dict]:
    """Return the term that an arm adds to the loss, and notes on it.

    `added` are drawn pairs, unlabeled or further scenes; `teacher` is the segmenter of the labeled scenes alone, for
    levers that ask it. The limits of the filter are its losses on the labeled scenes.
    """
    if added is None:
        return None, {}
    images, labels = added
    if arm == "consistent":
        return consistency_loss(images, batch), {}
    match ARMS[arm].lever:
        case "soft":
            return soft_loss(images, teacher, batch), {}
        case "filter":
            limits = class_losses(pixel_losses(teacher, *labeled), labeled[1], len(aerial.CLASSES))
            changed = filter_pixels(pixel_losses(teacher, images, labels), labels, limits)
        case "clean":
            changed = clean_regions(labels, SMALLEST_REGION)
        case _:
            return pairs_loss(added, batch), {}
    notes = {"ignored": float((changed == IGNORE).mean()), "changed": float((changed != labels).mean())}
    return pairs_loss((images, changed), batch), {name: round(x, 5) for name, x in notes.items()}
