"""Pipelines of Stable Diffusion's exact geometry with random weights: costs can be measured on them."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import nn

from .. import load_pipeline
from .loop import seeded
from .text import new_text_encoder

WINDOW = 77  # tokens of CLIP's texts


def stable_diffusion_15(dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Stable Diffusion 1.5: 860 million parameters in the denoiser, text 768 wide, latents an eighth of the image.

    The text encoder has its width and depth but the vocabulary of `tiny`; the autoencoder is a small one of the right
    sizes.
    """
    with seeded(0), torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    tiny = load_pipeline("tiny", device="cpu")
    tokenizer = tiny.tokenizer
    tokenizer.model_max_length = WINDOW
    with seeded(0):
        encoder = new_text_encoder(tokenizer, width=768, layers=12, heads=12)
        levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=4, **levels)
    return type(tiny)(
        vae=nn.Module.to(vae, dtype).eval(),
        text_encoder=encoder.to(dtype).eval(),
        tokenizer=tokenizer,
        unet=_random(unet, dtype),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _random(unet, dtype):
    """Weights of the usual size in place of those that are only declared: quicker than the library's own start."""
    unet = nn.Module.to(unet, dtype).to_empty(device="cpu").eval()  # not its own `to`, which warns of other types
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(float(name.endswith("weight")))  # of norms; a bias is 0
    return unet
