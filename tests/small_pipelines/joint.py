"""Diffusion transformers whose text and image attend to one another in one attention ("joint")."""

import re

import numpy as np
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from transformers import ByT5Tokenizer, CLIPTextModelWithProjection, UMT5EncoderModel

from . import autoencoders, encoders
from .encoders import OTHER, PROMPT, random_weights

SIZE = {"height": 32, "width": 48}  # pixels; / 2 by the autoencoder, / 2 by patches: 8 rows of 12 image tokens
BY_EIGHT = {"height": 128, "width": 192}  # for pipelines that take any autoencoder to make one latent pixel of 8 x 8
GUIDED = {"prompt": PROMPT, "negative_prompt": OTHER, **SIZE}


def picture(rows, columns):
    """Return an image of that many pixels, the same each time."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (rows, columns, 3), dtype=np.uint8))


def flow():
    return FlowMatchEulerDiscreteScheduler()


# FLUX.1


def flux_parts(**transformer):
    config = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16}
    config |= {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16}
    config |= {"axes_dims_rope": (4, 4, 8), "guidance_embeds": True}
    tokenizer = encoders.t5_tokenizer()
    return {
        "transformer": random_weights(FluxTransformer2DModel(**config | transformer)),
        "scheduler": flow(),
        "vae": autoencoders.kl(),
        "tokenizer": encoders.clip_tokenizer(),
        "text_encoder": encoders.clip(16),
        "tokenizer_2": tokenizer,
        "text_encoder_2": encoders.t5(tokenizer, 32),
    }


def flux():
    """FLUX.1 with guidance: two calls a step."""
    return FluxPipeline(**flux_parts()), {**GUIDED, "true_cfg_scale": 3.0, "max_sequence_length": 24}


def flux_distilled():
    """FLUX.1 as it is mostly used: one call a step, which is told the guidance as a number."""
    return FluxPipeline(**flux_parts()), {"prompt": PROMPT, "guidance_scale": 3.5, "max_sequence_length": 24, **SIZE}


# Stable Diffusion 3


def sd3():
    """Stable Diffusion 3.5: the text is that of both CLIP encoders, side by side, and behind it that of T5."""
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=16 + 12,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    tokenizer = encoders.t5_tokenizer()
    pipe = StableDiffusion3Pipeline(
        transformer=random_weights(transformer),
        scheduler=flow(),
        vae=autoencoders.kl(),
        tokenizer=encoders.clip_tokenizer(),
        text_encoder=encoders.clip(16, CLIPTextModelWithProjection),
        tokenizer_2=encoders.clip_tokenizer(),
        text_encoder_2=encoders.clip(12, CLIPTextModelWithProjection, seed=1),
        tokenizer_3=tokenizer,
        text_encoder_3=encoders.t5(tokenizer, 32),
    )
    return pipe, {**GUIDED, "guidance_scale": 4.0, "max_sequence_length": 24}


# Qwen-Image


def qwen_parts(**transformer):
    config = {"in_channels": 16, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16}
    config |= {"num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (8, 4, 4)}
    tokenizer = encoders.qwen_tokenizer()
    return {
        "transformer": random_weights(QwenImageTransformer2DModel(**config | transformer)),
        "scheduler": flow(),
        "vae": autoencoders.qwen_image(),
        "tokenizer": tokenizer,
        "text_encoder": encoders.qwen_vision(tokenizer, 32),
    }


def drop_template(pipe):
    """Let the pipeline drop the template before the prompt: how many tokens it is depends on the tokenizer."""
    before = re.split(r"<\|vision_start\|>|{}", pipe.prompt_template_encode)[0]  # the image belongs to the prompt
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(before).input_ids)
    return pipe


def qwen_image():
    pipe = drop_template(QwenImagePipeline(**qwen_parts()))
    return pipe, {**GUIDED, "true_cfg_scale": 3.0}


def qwen_image_edit():
    """Qwen-Image-Edit: the image to edit is read by the text encoder, and its tokens stand behind those of the image.

    The pipeline makes it a megapixel large, whatever is asked for, so here a latent pixel is of 64 x 64 pixels.
    """
    parts = qwen_parts() | {"vae": autoencoders.qwen_image(levels=7)}
    pipe = QwenImageEditPipeline(**parts, processor=encoders.qwen_processor(parts["tokenizer"]))
    call = {"image": picture(24, 40), "height": 8 * 128, "width": 12 * 128, "true_cfg_scale": 3.0}
    return drop_template(pipe), {**GUIDED, **call}


# Z-Image


def z_image():
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    tokenizer = encoders.qwen_tokenizer()
    pipe = ZImagePipeline(
        transformer=random_weights(transformer),
        scheduler=flow(),
        vae=autoencoders.kl(),
        tokenizer=tokenizer,
        text_encoder=encoders.qwen3(tokenizer, 32),
    )
    return pipe, {**GUIDED, "guidance_scale": 3.0, "max_sequence_length": 96}


# FLUX.1 with an image at hand


def flux_fill():
    """FLUX.1 Fill: the hidden image and its mask are channels of the image's own tokens."""
    latent, mask = 16, 4 * 2 * 2  # channels of a token: 2 x 2 latent pixels, each of 2 x 2 pixels of the mask
    parts = flux_parts(in_channels=2 * latent + mask, out_channels=latent)
    call = {"image": picture(32, 48), "mask_image": picture(32, 48).convert("L")}
    return FluxFillPipeline(**parts), {
        "prompt": PROMPT,
        "guidance_scale": 3.5,
        "max_sequence_length": 24,
        **SIZE,
        **call,
    }


def flux_kontext():
    """FLUX.1 Kontext: the tokens of a reference image, here 6 rows of 10, stand behind those of the image."""
    call = {"image": picture(24, 40), "max_area": 32 * 48, "_auto_resize": False}
    call |= {"true_cfg_scale": 3.0, "max_sequence_length": 24}
    return FluxKontextPipeline(**flux_parts()), {**GUIDED, **call}


# FLUX.2


def flux2():
    """FLUX.2: text of three layers of the text encoder, side by side; one call a step, guidance as a number."""
    width = 16
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * width,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    tokenizer = encoders.mistral_tokenizer()
    pipe = Flux2Pipeline(
        transformer=random_weights(transformer),
        scheduler=flow(),
        vae=autoencoders.flux2(),
        tokenizer=tokenizer,
        text_encoder=encoders.mistral_vision(tokenizer, width),
    )
    call = {"prompt": PROMPT, "guidance_scale": 2.5, "max_sequence_length": 192, "text_encoder_out_layers": (1, 2, 3)}
    return pipe, {**call, **SIZE}


# Chroma


def chroma():
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    tokenizer = encoders.t5_tokenizer()
    pipe = ChromaPipeline(
        transformer=random_weights(transformer),
        scheduler=flow(),
        vae=autoencoders.kl(),
        tokenizer=tokenizer,
        text_encoder=encoders.t5(tokenizer, 32),
    )
    return pipe, {**GUIDED, "guidance_scale": 3.0, "max_sequence_length": 24}


# AuraFlow


def aura_flow():
    transformer = AuraFlowTransformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pos_embed_max_size=256,
    )
    tokenizer = encoders.t5_tokenizer()
    pipe = AuraFlowPipeline(
        transformer=random_weights(transformer),
        scheduler=flow(),
        vae=autoencoders.kl(),
        tokenizer=tokenizer,
        text_encoder=encoders.t5(tokenizer, 32, UMT5EncoderModel),
    )
    return pipe, {**GUIDED, "guidance_scale": 3.0, "max_sequence_length": 24}


# CogView4


def cogview4():
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    )
    tokenizer = encoders.glm_tokenizer()
    pipe = CogView4Pipeline(
        transformer=random_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
        vae=autoencoders.kl(),
        tokenizer=tokenizer,
        text_encoder=encoders.glm(tokenizer, 32),
    )
    return pipe, {**GUIDED, "guidance_scale": 3.0}


# Lumina Image 2


def lumina2():
    """Lumina Image 2: four heads of queries, two of keys and values."""
    transformer = Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(256, 32, 32),
        cap_feat_dim=16,
    )
    tokenizer = encoders.gemma_tokenizer()
    pipe = Lumina2Pipeline(
        transformer=random_weights(transformer),
        scheduler=flow(),
        vae=autoencoders.kl(levels=4),
        tokenizer=tokenizer,
        text_encoder=encoders.gemma2(tokenizer, 16),
    )
    return pipe, {**GUIDED, **BY_EIGHT, "guidance_scale": 3.0, "max_sequence_length": 192}


# HunyuanImage


def hunyuan_image():
    """HunyuanImage 2.1: a second encoder reads, byte by byte, what stands between quotation marks (here nothing)."""
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=32,
        text_embed_2_dim=16,
        rope_axes_dim=(8, 8),
    )
    tokenizer, byte_tokenizer = encoders.qwen_tokenizer(), ByT5Tokenizer()
    pipe = HunyuanImagePipeline(
        transformer=random_weights(transformer),
        scheduler=flow(),
        vae=autoencoders.hunyuan_image(),
        tokenizer=tokenizer,
        text_encoder=encoders.qwen_vision(tokenizer, 32),
        tokenizer_2=byte_tokenizer,
        text_encoder_2=encoders.t5(byte_tokenizer, 16),
        guider=AdaptiveProjectedMixGuidance(guidance_scale=3.0, adaptive_projected_guidance_start_step=1),
        ocr_guider=AdaptiveProjectedMixGuidance(guidance_scale=3.0, adaptive_projected_guidance_start_step=1),
    )
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 64, 32  # instead of 1000 and 128: padding, mostly
    return drop_template(pipe), {**GUIDED}


# HiDream


def hidream():
    """HiDream I1: the text is that of T5, and behind it, anew in every block, that of one of Llama's layers."""
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 24],
        text_emb_dim=16 + 12,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1, 1, 2),
    )
    t5_tokenizer, llama_tokenizer = encoders.t5_tokenizer(), encoders.llama_tokenizer()
    pipe = HiDreamImagePipeline(
        transformer=random_weights(transformer),
        scheduler=flow(),
        vae=autoencoders.kl(),
        tokenizer=encoders.clip_tokenizer(),
        text_encoder=encoders.clip(16, CLIPTextModelWithProjection),
        tokenizer_2=encoders.clip_tokenizer(),
        text_encoder_2=encoders.clip(12, CLIPTextModelWithProjection, seed=1),
        tokenizer_3=t5_tokenizer,
        text_encoder_3=encoders.t5(t5_tokenizer, 32),
        tokenizer_4=llama_tokenizer,
        text_encoder_4=encoders.llama(llama_tokenizer, 24),
    )
    pipe.default_sample_size = 20  # the pipeline gives every image this area: (20 * 2)², a little more than 32 x 48
    return pipe, {**GUIDED, "guidance_scale": 3.0, "max_sequence_length": 24}
