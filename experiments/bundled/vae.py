"""Train and use the autoencoder: images to latents of a quarter of their side, 4 channels, and back."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

from attnlab import training
from attnlab.segmentation.model import as_input

from .data import Scenes

__all__ = ["encode_images", "local_contrast", "psnr", "train_vae"]

_WINDOW = 7  # pixels to a side in which contrast is measured


def _new_vae(size: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=size,
    )


def train_vae(
    scenes: Scenes, schedule: training.Schedule, folder: Path, device: torch.device, batch: int
) -> AutoencoderKL:
    """Minimize weighted L1 and L2 of pixels, L1 of their differences (edges), and a little KL of the latents.

    Pixels weigh more where much changes around them, so that small things are not lost. No mask takes part.
    """

    def loss(vae, generator):
        index = torch.randint(len(scenes), (batch,), generator=generator).numpy()
        image = as_input(scenes.images[index]).to(device).contiguous(memory_format=torch.channels_last)
        weight = 0.5 + 0.5 * local_contrast(image)
        posterior = vae.encode(image).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        sample = posterior.mean + posterior.std * noise
        error = vae.decode(sample).sample.float() - image
        pixels = (weight * (error.abs() + 0.5 * error**2)).mean()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = posterior.kl().mean() / sample[0].numel()
        return {"loss": pixels + 0.5 * edges + 3e-4 * kl, "pixels": pixels, "edges": edges, "kl": kl}

    with training.seeded(schedule.seed):
        vae = _new_vae(scenes.images.shape[1]).to(device, memory_format=torch.channels_last)
    vae = training.run_training(vae, loss, schedule, folder)
    latents = encode_images(vae, scenes.images[:2000])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae


def local_contrast(image: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of the pixels around each, (image, 1, row, column), as a multiple of its mean.

    That of the three channels together, of images (image, channel, row, column).
    """
    image = image.float()
    around = partial(F.avg_pool2d, kernel_size=_WINDOW, stride=1, padding=_WINDOW // 2, count_include_pad=False)
    spread = (around(image**2) - around(image) ** 2).clamp(min=0).sum(1, keepdim=True).sqrt()
    return spread / spread.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: np.ndarray, batch: int = 250) -> torch.Tensor:
    """Return the latent means, float32 (image, channel, row, column) on the CPU, before scaling."""
    blocks = tqdm(range(0, len(images), batch), desc="encoding", leave=False, delay=1)
    found = [vae.encode(as_input(images[i : i + batch]).to(vae.device)).latent_dist.mean.cpu() for i in blocks]
    return torch.cat(found)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of the reconstructions, in dB; the peak is the range 2 of -1..1."""
    blocks = encode_images(vae, images).split(250)
    restored = [vae.decode(latents.to(vae.device)).sample.clamp(-1, 1).cpu() for latents in blocks]
    return float(10 * torch.log10(4 / F.mse_loss(torch.cat(restored), as_input(images))))
