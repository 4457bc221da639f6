"""Train a segmenter on any mix of real and synthetic pairs.

segmenter = train_segmenter(images, labels, classes, seed=0)                      # a small SegFormer, from nothing
segmenter = train_segmenter(images, labels, classes, extra=(more, their_labels))  # half of every batch from each
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..masks import IGNORE
from .augment import AUGMENTATIONS, check_augmentations, flip
from .folders import Pairs, checked
from .model import Segmenter, as_input

__all__ = ["MIXES", "draw_batch", "train_segmenter"]

MIXES = ("half", "pool", "pretrain")


def train_segmenter(
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    extra: Pairs | None = None,
    architecture: str = "segformer",
    mix: str = "half",
    augmentations: Sequence[str] = (),
    steps: int = 500,
    batch: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Segmenter:
    """Train a segmenter from nothing, for a number of steps that does not depend on the number of pairs.

    Cross-entropy on valid pixels, AdamW with a linearly falling learning rate, left-right flips. The result repeats
    with its seed.

    Parameters
    ----------
    images : (image, row, column, rgb) array of uint8
        Images of one size.
    labels : (image, row, column) array of uint8
        Classes of their pixels; those with 255 do not count.
    classes : sequence of str
        Names of the labels 0, 1, ...
    extra : (images, labels), optional
        Further pairs.
    architecture : str
        "segformer" or "unet".
    mix : str
        "half": `extra` makes half of every batch; "pool": all pairs alike; "pretrain": the first half of the steps
        sees `extra` alone, the second one the other pairs.
    augmentations : sequence of str
        Names of `attnlab.segmentation.augment.AUGMENTATIONS`, applied in this order.
    steps, batch : int
        Optimizer steps, and pairs per step.
    lr : float
        Learning rate of the first step.
    seed : int
        Draws the starting weights and the batches.
    device : str or torch.device
        Where it is trained.
    progress : bool
        Show a progress bar.

    Raises
    ------
    ValueError
        If pairs do not fit each other or hold other labels, or an architecture, mix or augmentation is unknown.
    """
    check_augmentations(augmentations)
    if mix not in MIXES:
        raise ValueError(f"mix={mix!r}: choose one of {', '.join(MIXES)}")
    segmenter, rng = Segmenter.new(classes, architecture, seed), np.random.default_rng(seed)
    sources = [checked(*pairs, len(classes)) for pairs in ((images, labels), extra) if pairs is not None]
    if mix == "pool":
        sources = [tuple(np.concatenate(x) for x in zip(*sources, strict=True))]
    model = segmenter.model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        for step in tqdm(range(steps), desc="segmenter", leave=False, disable=not progress):
            now = sources[1:] if step < steps // 2 else sources[:1]
            x, y = draw_batch(now if mix == "pretrain" and len(sources) > 1 else sources, batch, augmentations, rng)
            loss = F.cross_entropy(segmenter.logits(x.to(device)), y.to(device), ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    model.eval()
    return segmenter


def draw_batch(
    sources: Sequence[Pairs], batch: int, augmentations: Sequence[str], rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw as many pairs from each source, each flipped or not and augmented; return model input and labels."""
    images, labels = [], []
    for k, (x, y) in enumerate(sources):
        some = rng.integers(len(x), size=batch // len(sources) + (k < batch % len(sources)))
        flipped = flip(x[some], y[some], rng)
        images.append(flipped[0])
        labels.append(flipped[1])
    x, y = np.concatenate(images), np.concatenate(labels)
    for name in augmentations:
        x, y = AUGMENTATIONS[name](x, y, rng)
    return as_input(x), torch.from_numpy(y).long()
