"""The autoencoder: images to latents of a quarter of their side, 4 channels, and back."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from attnlab import training
from attnlab.scenes import street

from .data import Scenes

SMALL = [  # rare pixels that must look right
    street.CLASSES.index(name) for name in ("car", "person", "rider", "traffic light", "pole", "bicycle", "fire")
]
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


def train_vae(
    scenes: Scenes, schedule: training.Schedule, folder: Path, device: torch.device, batch: int = 16
) -> AutoencoderKL:
    """Weighted L1 and L2 on pixels, L1 on their differences (edges), and a little KL on the latents."""

    def loss(vae, generator):
        index = torch.randint(len(scenes), (batch,), generator=generator).numpy()
        image = to_tensor(scenes.images[index]).to(device).contiguous(memory_format=torch.channels_last)
        small = torch.from_numpy(np.isin(scenes.labels[index], SMALL)).to(device)
        weight = 1 + (SMALL_WEIGHT - 1) * small.float()[:, None]
        posterior = vae.encode(image).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        sample = posterior.mean + posterior.std * noise
        error = vae.decode(sample).sample.float() - image
        pixels = (weight * (error.abs() + 0.5 * error**2)).mean()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = posterior.kl().mean() / sample[0].numel()
        return {"loss": pixels + 0.5 * edges + 3e-4 * kl, "pixels": pixels, "edges": edges, "kl": kl}

    with training.seeded(schedule.seed):
        vae = new_vae(scenes.images.shape[1]).to(device, memory_format=torch.channels_last)
    vae = training.run_training(vae, loss, schedule, folder)
    latents = encode(vae, scenes.images[:2000])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, batch: int = 250) -> torch.Tensor:
    """Latent means, float32 (image, channel, row, column) on the CPU, before scaling."""
    blocks = tqdm(range(0, len(images), batch), desc="encoding", leave=False)
    found = [vae.encode(to_tensor(images[i : i + batch]).to(vae.device)).latent_dist.mean.cpu() for i in blocks]
    return torch.cat(found)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Peak signal-to-noise ratio of the reconstructions, in dB; the peak is the range 2 of -1..1."""
    restored = [
        vae.decode(latents.to(vae.device)).sample.clamp(-1, 1).cpu() for latents in encode(vae, images).split(250)
    ]
    return float(10 * torch.log10(4 / F.mse_loss(torch.cat(restored), to_tensor(images))))
