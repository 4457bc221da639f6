"""Diffusion transformers whose text stays as it is: image tokens read it by cross-attention ("static")."""

from diffusers import (
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)

from . import autoencoders, encoders
from .encoders import random_weights
from .joint import GUIDED, flow

# PixArt

PIXART_CALL = {**GUIDED, "guidance_scale": 4.0, "use_resolution_binning": False, "clean_caption": False}


def pixart_parts():
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
    )
    tokenizer = encoders.t5_tokenizer()
    return {
        "transformer": random_weights(transformer),
        "scheduler": DPMSolverMultistepScheduler(
            timestep_spacing="leading"
        ),  # starts below pure noise, else 500 times it
        "vae": autoencoders.kl(),
        "tokenizer": tokenizer,
        "text_encoder": encoders.t5(tokenizer, 32),
    }


def pixart_sigma():
    return PixArtSigmaPipeline(**pixart_parts()), {**PIXART_CALL, "max_sequence_length": 24}


# Sana


def sana_parts(**transformer):
    config = {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 3, "sample_size": 16}
    config |= {"num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2}
    config |= {"cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16}
    tokenizer = encoders.gemma_tokenizer()
    return {
        "transformer": random_weights(SanaTransformer2DModel(**config | transformer)),
        "scheduler": flow(),
        "vae": autoencoders.deep_compression(),
        "tokenizer": tokenizer,
        "text_encoder": encoders.gemma2(tokenizer, 16),
    }


def sana():
    pipe = SanaPipeline(**sana_parts())
    size = {"height": 64, "width": 96}  # / 8 by the autoencoder, no patches
    return pipe, {**GUIDED, **size, "guidance_scale": 4.0, "use_resolution_binning": False, "max_sequence_length": 24}
