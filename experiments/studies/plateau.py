"""Train a segmenter until its validation mIoU stops rising: one recipe for all arms of the study of scarce labels.

Every step sees a batch of the labeled scenes. What else an arm learns from is a further term of the loss, drawn with a
random generator of its own: arms of one seed begin with the same weights and see the same labeled batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from attnlab.masks import IGNORE
from attnlab.metrics import class_ious
from attnlab.segmentation import Segmenter
from attnlab.segmentation.folders import Pairs
from attnlab.segmentation.learn import draw_batch

__all__ = ["GEOMETRY", "ExtraLoss", "Plateau", "pairs_loss", "train_to_plateau"]

GEOMETRY = ("rotate90", "crop")  # besides left-right flips
_AUGMENTATIONS = (*GEOMETRY, "color")
ExtraLoss = Callable[[Segmenter, Segmenter, np.random.Generator], torch.Tensor]
"""A further term of the loss, of the segmenter in training, the one of its averaged weights, and what draws batches."""


@dataclass(frozen=True)
class Plateau:
    """How a segmenter is trained: AdamW at a constant rate, with a moving average of the weights."""

    steps: int = 4000  # at most
    every: int = 100  # steps between looks at validation scenes
    patience: int = 6  # looks in a row without a higher mIoU, after which it ends
    batch: int = 8  # labeled pairs a step, and as many others
    lr: float = 2e-3
    ema: float = 0.99  # decay of the moving average, which is what is measured and returned


def train_to_plateau(
    labeled: Pairs,
    classes: Sequence[str],
    valid: Pairs,
    settings: Plateau,
    extra: ExtraLoss | None = None,
    weight: float = 1.0,
    seed: int = 0,
) -> Segmenter:
    """Train a U-Net on labeled pairs, and on `weight` times a further loss; return the average that did best.

    Its `curve` has (step, mIoU on validation pairs) of each look.
    """
    learner = Segmenter.new(classes, "unet", seed)
    average = AveragedModel(learner.model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    averaged, best, failed = Segmenter(average.module, classes), {}, 0
    optimizer = torch.optim.AdamW(learner.model.train().parameters(), settings.lr, weight_decay=0.01, fused=True)
    of_labeled, of_extra = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    supervised = pairs_loss(labeled, settings.batch)
    for step in range(1, settings.steps + 1):
        loss = supervised(learner, averaged, of_labeled)
        if extra is not None:
            loss = loss + weight * extra(learner, averaged, of_extra)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(learner.model)
        if step % settings.every and step != settings.steps:
            continue
        miou = float(np.nanmean(class_ious(averaged.evaluate(*valid))))
        failed += 1
        if miou > max((value for _, value in averaged.curve), default=-1.0):
            best, failed = {name: x.detach().clone() for name, x in averaged.model.state_dict().items()}, 0
        averaged.curve.append((step, miou))
        if failed >= settings.patience:
            break
    averaged.model.load_state_dict(best)
    return averaged


def pairs_loss(pairs: Pairs, batch: int) -> ExtraLoss:
    """Return the cross-entropy on batches of pairs: the mean over pixels that are not ignored, 0 if all of them are."""

    def loss(learner, averaged, rng):
        x, y = draw_batch([pairs], batch, _AUGMENTATIONS, rng)
        total = F.cross_entropy(learner.logits(x), y, ignore_index=IGNORE, reduction="sum")
        return total / (y != IGNORE).sum().clamp(min=1)

    return loss
