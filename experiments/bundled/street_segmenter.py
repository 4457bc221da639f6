"""Train and measure the reference segmenter of street scenes, which says what a generated image shows and where."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from skimage.measure import label, regionprops
from tqdm import tqdm

from attnlab.metrics import class_ious, confusion
from attnlab.pipelines import mixed_precision
from attnlab.scenes import street
from attnlab.segmentation import Segmenter
from attnlab.segmentation.model import UNet, as_input
from attnlab.training import Schedule, run_training, seeded

from .data import Scenes

__all__ = ["measure_segmenter", "restore", "train_street_segmenter"]

_SMALL_OBJECT = 100 / 64**2  # fraction of the image below which an object is small


def train_street_segmenter(
    scenes: Scenes, restored: np.ndarray, schedule: Schedule, folder: Path, device: torch.device, batch: int = 32
) -> UNet:
    """Minimize cross-entropy, with classes weighted by 1 / sqrt(frequency); return the trained model.

    `restored` holds the first scenes as the VAE restores them, uint8 (image, row, column, rgb). Half of every batch is
    of them, because generated images look like this.
    """
    frequency = np.bincount(scenes.labels[:4000].ravel(), minlength=len(street.CLASSES)) / scenes.labels[:4000].size
    weight = torch.from_numpy((1 / np.sqrt(frequency)) / (1 / np.sqrt(frequency)).mean()).float().to(device)

    def loss(model, generator):
        sharp = torch.randint(len(scenes), (batch // 2,), generator=generator).numpy()
        soft = torch.randint(len(restored), (batch // 2,), generator=generator).numpy()
        images = as_input(np.concatenate([scenes.images[sharp], restored[soft]]))
        images = images + 0.04 * torch.randn(images.shape, generator=generator)
        labels = torch.from_numpy(scenes.labels[np.concatenate([sharp, soft])]).long()
        flip = torch.rand(1, generator=generator) < 0.5
        if flip:
            images, labels = images.flip(-1), labels.flip(-1)
        logits = model(images.to(device).contiguous(memory_format=torch.channels_last)).logits
        return {"loss": F.cross_entropy(logits, labels.to(device), weight)}

    with seeded(schedule.seed):
        model = UNet.new(len(street.CLASSES), channels=(24, 48, 80), shuffle=1, size=scenes.images.shape[1])
        model = model.to(device, memory_format=torch.channels_last)
    return run_training(model, loss, schedule, folder)


@torch.no_grad()
def restore(autoencoder: AutoencoderKL, images: np.ndarray, batch: int = 100) -> np.ndarray:
    """Return images as the VAE restores them, uint8 (image, row, column, rgb)."""
    restored = []
    for i in tqdm(range(0, len(images), batch), desc="restoring", leave=False, delay=1):
        with mixed_precision(autoencoder.device):
            latents = autoencoder.encode(as_input(images[i : i + batch]).to(autoencoder.device)).latent_dist.mean
            pixels = autoencoder.decode(latents).sample.float().clamp(-1, 1)
        restored.append(((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(restored)


def measure_segmenter(segmenter: Segmenter, images: np.ndarray, labels: np.ndarray) -> dict:
    """Return the IoU of each class over all pixels of all images, their mean, and recall of small objects.

    A small object is a connected region of one class; it is found where most of its pixels have the class.
    """
    found = segmenter.segment(images)
    iou = class_ious(confusion(labels, found, len(segmenter.classes)))
    result = {
        "mIoU": float(iou.mean()),
        "images": len(labels),
        "IoU": dict(zip(segmenter.classes, iou.tolist(), strict=True)),
    }
    result["recall of small objects"] = {
        name: {"objects": len(hits), "recall": float(np.mean(hits))}
        for c, name in enumerate(segmenter.classes)
        if (hits := _small_hits(labels == c, found == c))
    }
    return result


def _small_hits(truth, found):
    """Return for each small region of `truth` (image, row, column) whether most of it is in `found`."""
    hits = []
    for mask, answer in zip(truth, found, strict=True):
        regions = regionprops(label(mask, connectivity=1), answer.astype(float))
        hits += [region.intensity_mean > 0.5 for region in regions if 8 <= region.area < _SMALL_OBJECT * mask.size]
    return hits
