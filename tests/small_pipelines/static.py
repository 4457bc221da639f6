"""Diffusion transformers whose text stays as it is: image tokens read it by cross-attention ("static")."""

from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPAGPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)

from . import autoencoders, encoders
from .encoders import random_weights
from .joint import BY_EIGHT, GUIDED, flow

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


def pixart_alpha():
    return PixArtAlphaPipeline(**pixart_parts()), {**PIXART_CALL, "max_sequence_length": 24}


def pixart_sigma():
    return PixArtSigmaPipeline(**pixart_parts()), {**PIXART_CALL, "max_sequence_length": 24}


def pixart_pag():
    """PixArt-Σ with perturbed attention guidance: a third part of the batch, behind the two of guidance."""
    pipe = PixArtSigmaPAGPipeline(**pixart_parts(), pag_applied_layers=["blocks.1"])
    return pipe, {**PIXART_CALL, "max_sequence_length": 24, "pag_scale": 2.0}


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


SANA_CALL = {**GUIDED, "height": 64, "width": 96, "guidance_scale": 4.0}  # / 8 by the autoencoder, no patches
SANA_CALL |= {"use_resolution_binning": False, "max_sequence_length": 24}


def sana():
    return SanaPipeline(**sana_parts()), {**SANA_CALL}


def sana_sprint():
    """Sana Sprint: one call a step, which is told the guidance as a number; norms over all heads at once."""
    parts = sana_parts(qk_norm="rms_norm_across_heads", guidance_embeds=True) | {"scheduler": SCMScheduler()}
    return SanaSprintPipeline(**parts), {name: value for name, value in SANA_CALL.items() if name != "negative_prompt"}


# HunyuanDiT


def hunyuan_dit():
    """HunyuanDiT: the text is that of BERT, 77 tokens, and behind it that of T5, 256; queries are rotated, keys not."""
    transformer = HunyuanDiT2DModel(
        sample_size=16,
        num_layers=4,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=24,
        pooled_projection_dim=16,
        hidden_size=24,
        activation_fn="gelu-approximate",
    )
    bert_tokenizer, t5_tokenizer = encoders.bert_tokenizer(), encoders.t5_tokenizer()
    pipe = HunyuanDiTPipeline(
        transformer=random_weights(transformer),
        scheduler=DDPMScheduler(prediction_type="v_prediction", clip_sample=False),
        vae=autoencoders.kl(levels=4),
        tokenizer=bert_tokenizer,
        text_encoder=encoders.bert(bert_tokenizer, 32),
        tokenizer_2=t5_tokenizer,
        text_encoder_2=encoders.t5(t5_tokenizer, 24),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, {**GUIDED, **BY_EIGHT, "guidance_scale": 4.0, "use_resolution_binning": False}


# Lumina-Next


def lumina_next():
    """Lumina-Next: attention to the text beside that to the image, through a gate; two heads of keys for four."""
    transformer = LuminaNextDiT2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=3,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=16,
    )
    tokenizer = encoders.gemma_tokenizer()
    pipe = LuminaPipeline(
        transformer=random_weights(transformer),
        scheduler=flow(),
        vae=autoencoders.kl(levels=4),
        tokenizer=tokenizer,
        text_encoder=encoders.gemma(tokenizer, 16),
    )
    return pipe, {**GUIDED, **BY_EIGHT, "guidance_scale": 3.0, "clean_caption": False}


# Kandinsky


def kandinsky3():
    """Kandinsky 3: a U-Net; 16 rows of 24 latent pixels, of which the second of its levels makes 8 rows of 12."""
    unet = Kandinsky3UNet(
        time_embedding_dim=16,
        groups=2,
        attention_head_dim=8,
        layers_per_block=3,
        block_out_channels=(16, 32),
        cross_attention_dim=16,
        encoder_hid_dim=32,
    )
    tokenizer = encoders.t5_tokenizer()
    pipe = Kandinsky3Pipeline(
        unet=random_weights(unet),
        scheduler=DDPMScheduler(timestep_spacing="leading", clip_sample=False),
        movq=autoencoders.vector_quantized(),
        tokenizer=tokenizer,
        text_encoder=encoders.t5(tokenizer, 32),
    )
    return pipe, {**GUIDED, **BY_EIGHT, "guidance_scale": 3.0}


def kandinsky5():
    """Kandinsky 5 for images: text blocks of its own make of the text, and of the time, what the image reads."""
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=32,
        in_text_dim2=16,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=3,
        axes_dims=(4, 6, 6),
    )
    tokenizer = encoders.qwen_tokenizer()
    pipe = Kandinsky5T2IPipeline(
        transformer=random_weights(transformer),
        scheduler=flow(),
        vae=autoencoders.kl(levels=4),
        tokenizer=encoders.qwen_processor(tokenizer),
        text_encoder=encoders.qwen_vision(tokenizer, 32),
        tokenizer_2=encoders.clip_tokenizer(),
        text_encoder_2=encoders.clip(16),
    )
    pipe.resolutions = [(192, 128)]  # others are not taken
    before = pipe.prompt_template.split("{}")[0]
    pipe.prompt_template_encode_start_idx = len(tokenizer(before).input_ids)
    return pipe, {**GUIDED, **BY_EIGHT, "guidance_scale": 3.0, "max_sequence_length": 24}
