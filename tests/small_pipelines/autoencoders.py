"""Autoencoders of the real classes, made small: one latent pixel of 2 x 2 pixels where the pipeline allows."""

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    VQModel,
)

from .encoders import random_weights


def kl(levels=2):
    """Return that of most pipelines; one latent pixel is of 2 x 2 pixels with two levels, of 8 x 8 with four."""
    vae = AutoencoderKL(
        block_out_channels=(4, 8, 8, 8)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.1,
        scaling_factor=1.5,
    )
    return random_weights(vae)


def flux2():
    """FLUX.2's: its pipeline takes latents, four pixels in one, by a mean and variance that the autoencoder has."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    return random_weights(vae)


def hunyuan_image():
    """HunyuanImage's: one latent pixel of 4 x 4 pixels, and no patches."""
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=32,
        scaling_factor=0.5,
    )
    return random_weights(vae)


def qwen_image(levels=2):
    """Qwen-Image's, which was made for films: three axes, of which time is one picture long."""
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1] * levels,
        num_res_blocks=0,
        temperal_downsample=[False] * (levels - 1),
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )
    return random_weights(vae)


def vector_quantized():
    """Kandinsky 3's: one latent pixel of 8 x 8 pixels, out of a book of 16."""
    vae = VQModel(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        norm_type="spatial",
        num_vq_embeddings=16,
        vq_embed_dim=4,
    )
    return random_weights(vae)


def deep_compression():
    """Sana's: one latent pixel of 8 x 8 pixels, since its pipeline takes multiples of 32 pixels."""
    blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    scales = ((), (), (), (5,))
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        scaling_factor=0.4,
    )
    return random_weights(vae)
