"""The oracle: a small segmenter of the rendered world, which says what a generated image shows and where."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DModel
from skimage.measure import label, regionprops
from tqdm.auto import tqdm

from attnlab import training
from attnlab.pipelines import Oracle
from attnlab.scenes import street

from . import vae
from .data import Scenes

SMALL = 100 / 64**2  # an object below this share of the image is small


def new_segmenter(size: int) -> UNet2DModel:
    """A U-Net without attention; its timestep is always 0."""
    return UNet2DModel(
        sample_size=size,
        in_channels=3,
        out_channels=len(street.CLASSES),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        block_out_channels=(24, 48, 80),
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
    )


def train_oracle(
    scenes: Scenes,
    blurred: np.ndarray,
    schedule: training.Schedule,
    folder: Path,
    device: torch.device,
    batch: int = 32,
) -> UNet2DModel:
    """Cross-entropy, rare classes weighted up by the root of their rarity.

    `blurred` holds the first scenes as the VAE restores them, uint8 (image, row, column, rgb): half of every batch, for
    generated images have its look.
    """
    share = np.bincount(scenes.labels[:4000].ravel(), minlength=len(street.CLASSES)) / scenes.labels[:4000].size
    weight = torch.from_numpy((1 / np.sqrt(share)) / (1 / np.sqrt(share)).mean()).float().to(device)

    def loss(model, generator):
        sharp = torch.randint(len(scenes), (batch // 2,), generator=generator).numpy()
        soft = torch.randint(len(blurred), (batch // 2,), generator=generator).numpy()
        images = vae.to_tensor(np.concatenate([scenes.images[sharp], blurred[soft]]))
        images = images + 0.04 * torch.randn(images.shape, generator=generator)
        labels = torch.from_numpy(scenes.labels[np.concatenate([sharp, soft])]).long()
        flip = torch.rand(1, generator=generator) < 0.5
        if flip:
            images, labels = images.flip(-1), labels.flip(-1)
        logits = model(images.to(device).contiguous(memory_format=torch.channels_last), 0).sample
        return {"loss": F.cross_entropy(logits.float(), labels.to(device), weight)}

    with training.seeded(schedule.seed):
        model = new_segmenter(scenes.images.shape[1]).to(device, memory_format=torch.channels_last)
    return training.train(model, loss, schedule, folder)


@torch.no_grad()
def restore(autoencoder: AutoencoderKL, images: np.ndarray, batch: int = 100) -> np.ndarray:
    """Images as the VAE gives them back, uint8 (image, row, column, rgb)."""
    restored = []
    for i in tqdm(range(0, len(images), batch), desc="restoring", leave=False):
        with torch.autocast(autoencoder.device.type, torch.bfloat16):
            latents = autoencoder.encode(vae.to_tensor(images[i : i + batch]).to(autoencoder.device)).latent_dist.mean
            pixels = autoencoder.decode(latents).sample.float().clamp(-1, 1)
        restored.append(((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(restored)


def measure(oracle: Oracle, images: np.ndarray, labels: np.ndarray) -> dict:
    """IoU of each class over all pixels of all images, their mean, and recall of small objects.

    A small object is a connected region of one class; it is found where most of its pixels have the class.
    """
    found = oracle.segment(images)
    classes = range(len(oracle.classes))
    matrix = np.bincount(labels.ravel().astype(int) * len(classes) + found.ravel(), minlength=len(classes) ** 2)
    matrix = matrix.reshape(len(classes), len(classes))
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    result = {
        "mIoU": float(iou.mean()),
        "images": len(labels),
        "IoU": dict(zip(oracle.classes, iou.tolist(), strict=True)),
    }
    result["recall of small objects"] = {
        oracle.classes[c]: {"objects": len(hits), "recall": float(np.mean(hits))}
        for c in classes
        if (hits := _small_hits(labels == c, found == c))
    }
    return result


def _small_hits(truth, found):
    """For each small region of `truth` (image, row, column), whether most of it is in `found`."""
    hits = []
    for mask, answer in zip(truth, found, strict=True):
        regions = regionprops(label(mask, connectivity=1), answer.astype(float))
        hits += [region.intensity_mean > 0.5 for region in regions if 8 <= region.area < SMALL * mask.size]
    return hits
