"""The autoencoder: 64 x 64 images to 16 x 16 x 4 latents and back."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from ..scenes import street
from . import loop
from .data import Scenes

SMALL = [street.CLASSES.index(name) for name in ("car", "person", "fire")]  # rare pixels that must look right
SMALL_WEIGHT = 2.5


def new_vae(size: int) -> AutoencoderKL:
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


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (image, row, column, rgb) to float32 (image, rgb, row, column) in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(scenes: Scenes, schedule: loop.Schedule, folder: Path, batch: int = 16) -> AutoencoderKL:
    """Weighted L1 and L2 on pixels, L1 on their differences (edges), and a little KL on the latents."""

    def loss(vae, generator):
        index = torch.randint(len(scenes), (batch,), generator=generator).numpy()
        image = to_tensor(scenes.images[index]).contiguous(memory_format=torch.channels_last)
        weight = 1 + (SMALL_WEIGHT - 1) * torch.from_numpy(np.isin(scenes.labels[index], SMALL)).float()[:, None]
        posterior = vae.encode(image).latent_dist
        sample = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        error = vae.decode(sample).sample.float() - image
        pixels = (weight * (error.abs() + 0.5 * error**2)).mean()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = posterior.kl().mean() / sample[0].numel()
        return {"loss": pixels + 0.5 * edges + 3e-4 * kl, "pixels": pixels, "edges": edges, "kl": kl}

    vae = new_vae(scenes.images.shape[1]).to(memory_format=torch.channels_last)
    vae = loop.train(vae, loss, schedule, folder)
    latents = encode(vae, scenes.images[:2000])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, batch: int = 250) -> torch.Tensor:
    """Latent means, float32 (image, channel, row, column), before scaling."""
    blocks = tqdm(range(0, len(images), batch), desc="encoding", leave=False)
    return torch.cat([vae.encode(to_tensor(images[i : i + batch])).latent_dist.mean for i in blocks])


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Peak signal-to-noise ratio of the reconstructions, in dB; the peak is the range 2 of -1..1."""
    truth = to_tensor(images)
    restored = vae.decode(encode(vae, images)).sample.clamp(-1, 1)
    return float(10 * torch.log10(4 / F.mse_loss(restored, truth)))
