"""Diffusion transformers whose text and image attend to one another in one attention ("joint")."""

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import CLIPTextModelWithProjection

from . import autoencoders, encoders
from .encoders import OTHER, PROMPT, random_weights

SIZE = {"height": 32, "width": 48}  # pixels; / 2 by the autoencoder, / 2 by patches: 8 rows of 12 image tokens
GUIDED = {"prompt": PROMPT, "negative_prompt": OTHER, **SIZE}


def flow():
    return FlowMatchEulerDiscreteScheduler()


# FLUX.1


def flux_parts(guidance_embeds=True, **transformer):
    config = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16}
    config |= {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16}
    config |= {"axes_dims_rope": (4, 4, 8), "guidance_embeds": guidance_embeds}
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
    before = pipe.prompt_template_encode.split("{}")[0]
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(before).input_ids)
    return pipe


def qwen_image():
    pipe = drop_template(QwenImagePipeline(**qwen_parts()))
    return pipe, {**GUIDED, "true_cfg_scale": 3.0}


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
