"""Train a segmenter on any mix of real and synthetic pairs."""

import math
from collections.abc import Sequence
from numbers import Real
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..masks import IGNORE
from ..metrics import check_counts, class_ious
from .augment import AUGMENTATIONS, flip, rotate90
from .folders import Pairs, check_classes, checked
from .model import Segmenter, as_input
from .pretrained import start_segmenter

__all__ = ["MIXES", "draw_batch", "train_segmenter"]

MIXES = ("half", "pool", "pretrain")
_CHECKS = 20  # times that validation pairs are looked at, in a training that is not stopped


def train_segmenter(
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    extra: Pairs | None = None,
    architecture: str = "segformer",
    start: str | Path | None = None,
    mix: str = "half",
    augmentations: Sequence[str] = (),
    class_weights: str | Sequence[float] | None = None,
    steps: int = 500,
    batch: int = 16,
    lr: float | None = None,
    valid: Pairs | None = None,
    patience: int = 5,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Segmenter:
    """Train a segmenter, from nothing or from given weights, for steps whose number does not depend on that of pairs.

    Cross-entropy on valid pixels, AdamW with a linearly falling rate, left-right flips; it repeats with its seed.

    Parameters
    ----------
    images, labels : array of uint8
        (image, row, column, rgb) of one size, and class numbers (image, row, column); those with 255 do not count.
    classes : sequence of str
        Names of the labels 0, 1, ...
    extra : (images, labels), optional
        Further pairs.
    architecture : str
        "segformer" or "unet".
    start : str or Path, optional
        Folder with pretrained weights of a SegFormer, as transformers saves them, such as those of nvidia/mit-b0; see
        `start_segmenter`. `architecture` is not read then.
    mix : str
        "half": `extra` makes half of every batch; "pool": all pairs alike; "pretrain": the first half of the steps
        sees `extra` alone, the second one the other pairs.
    augmentations : sequence of str
        Names of `attnlab.segmentation.augment.AUGMENTATIONS`, applied in this order.
    class_weights : "balanced" or sequence of float, optional
        How much a pixel of each class counts in the loss, above 0. "balanced": all valid pixels of all pairs over the
        number of classes that they show times the pixels of the class, as scikit-learn has it. Default: 1.
    steps, batch : int
        Optimizer steps, and pairs per step.
    lr : float, optional
        Learning rate of the first step. Default: 1e-3, with `start` 6e-5. With `start` the head has ten times the rate
        of the encoder (Xie et al., NeurIPS 2021).
    valid : (images, labels), optional
        Validation pairs, of any size. Their mIoU is taken after every twentieth of the steps; the weights that had the
        highest one are returned, and the segmenter's `curve` has every (step, mIoU).
    patience : int
        With `valid`, training ends after so many checks in a row without a higher mIoU.
    seed : int
        What starting weights and batches are drawn from.
    device, progress : str or torch.device, bool
        Where it is trained, and whether a progress bar is shown.

    Raises
    ------
    ValueError
        Before anything is trained: if pairs do not fit each other, a name is unknown or a number out of range.
    FileNotFoundError
        If `start` is no folder with a model.
    """
    if unknown := [name for name in augmentations if name not in AUGMENTATIONS]:
        raise ValueError(f"no augmentation {', '.join(map(repr, unknown))}; there are {', '.join(AUGMENTATIONS)}")
    if mix not in MIXES:
        raise ValueError(f"mix={mix!r}: choose one of {', '.join(MIXES)}")
    check_counts(steps=steps, batch=batch, patience=patience)
    check_counts(0, seed=seed)
    if mix == "half" and extra is not None:
        check_counts(2, batch=batch)  # of pairs from each source
    if lr is not None and (not isinstance(lr, Real) or not 0 < lr < math.inf):
        raise ValueError(f"lr={lr!r}: give a number above 0")
    check_classes(classes)
    sources = _sources(images, labels, extra, mix, len(classes))
    if "rotate90" in augmentations:
        rotate90(*sources[0], np.random.default_rng(0))  # says now that images are no squares
    weights = _weights(class_weights, [y for _, y in sources], classes)
    if valid is not None:
        valid = _checked_valid(valid, len(classes))
    segmenter = start_segmenter(start, classes, seed) if start else Segmenter.new(classes, architecture, seed)
    best = _Best(segmenter, valid, max(1, steps // _CHECKS), patience, batch)
    model, rng = segmenter.model.to(device).train(), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(_groups(model, lr, start), weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    weights = None if weights is None else weights.to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        for step in tqdm(range(steps), desc="segmenter", leave=False, delay=1, disable=not progress):
            now = sources[1:] if step < steps // 2 else sources[:1]
            x, y = draw_batch(now if mix == "pretrain" and len(sources) > 1 else sources, batch, augmentations, rng)
            loss = F.cross_entropy(segmenter.logits(x.to(device)), y.to(device), weights, ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if best.is_over(step + 1, steps):
                break
    best.restore()
    model.eval()
    return segmenter


def _sources(images, labels, extra, mix, num_classes):
    """Check pairs, and return what batches are drawn from."""
    sources = [checked(*pairs, num_classes) for pairs in ((images, labels), extra) if pairs is not None]
    if len({x.shape[1:3] for x, _ in sources}) > 1:
        raise ValueError(f"images are {images.shape[1:3]}, those of extra {extra[0].shape[1:3]}: give them one size")
    return [tuple(np.concatenate(x) for x in zip(*sources, strict=True))] if mix == "pool" else sources


def _checked_valid(valid, num_classes):
    """Check validation pairs."""
    if not isinstance(valid, tuple | list) or len(valid) != 2:
        raise ValueError("valid is (images, labels), arrays as those to train on")
    found = checked(*valid, num_classes)
    if (found[1] == IGNORE).all():
        raise ValueError(f"valid has no pixel of a class, all are {IGNORE}: nothing could be measured on it")
    return found


def _weights(wanted, labels, classes):
    """Return how much a pixel of each class counts in the loss, or None where all count alike."""
    if wanted is None:
        return None
    if isinstance(wanted, str):
        if wanted != "balanced":
            raise ValueError(f"class_weights={wanted!r}: give 'balanced', or a number for each class")
        counts = sum(np.bincount(one.ravel(), minlength=IGNORE + 1)[: len(classes)] for one in labels)
        shown = counts > 0  # the others have no pixel that could count
        return torch.from_numpy(np.where(shown, counts.sum() / (shown.sum() * counts.clip(1)), 1)).float()
    if len(wanted) != len(classes) or not all(isinstance(w, Real) and 0 < w < math.inf for w in wanted):
        raise ValueError(f"class_weights={wanted!r}: give a number above 0 for each of {', '.join(classes)}")
    return torch.tensor([float(w) for w in wanted])


def _groups(model, lr, start):
    """Return what is optimized at which rate: a head on a trained encoder learns faster."""
    if not start:
        return [{"params": [*model.parameters()], "lr": lr or 1e-3}]
    head = {id(p) for p in model.decode_head.parameters()}
    encoder = [p for p in model.parameters() if id(p) not in head]
    return [
        {"params": encoder, "lr": lr or 6e-5},
        {"params": [*model.decode_head.parameters()], "lr": 10 * (lr or 6e-5)},
    ]


class _Best:
    """The weights of the highest mIoU on validation pairs, and when to stop."""

    def __init__(self, segmenter, valid, every, patience, batch):
        self.segmenter, self.valid, self.every, self.patience = segmenter, valid, every, patience
        self.batch = batch  # images at once: as many as fit the memory while it is trained
        self.weights, self.miou, self.failed = None, -1.0, 0

    def is_over(self, step, last):
        """Check the model where it is time for that; return whether enough checks in a row were no better."""
        if self.valid is None or (step % self.every and step != last):
            return False
        model = self.segmenter.model.eval()
        miou = float(np.nanmean(class_ious(self.segmenter.evaluate(*self.valid, self.batch))))
        model.train()
        self.segmenter.curve.append((step, miou))
        self.failed += 1
        if miou > self.miou:
            self.weights = {name: x.detach().clone() for name, x in model.state_dict().items()}
            self.miou, self.failed = miou, 0
        return self.failed >= self.patience

    def restore(self):
        if self.weights is not None:
            self.segmenter.model.load_state_dict(self.weights)


def draw_batch(sources: Sequence[Pairs], batch: int, augmentations: Sequence[str], rng: np.random.Generator) -> tuple:
    """Draw as many pairs from each source, each flipped or not and augmented; return model input and labels."""
    drawn = []
    for k, (x, y) in enumerate(sources):
        some = rng.integers(len(x), size=batch // len(sources) + (k < batch % len(sources)))
        drawn.append(flip(x[some], y[some], rng))
    x, y = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    for name in augmentations:
        x, y = AUGMENTATIONS[name](x, y, rng)
    return as_input(x), torch.from_numpy(y).long()
