"""U-Nets whose text is read in other ways than that of Stable Diffusion: 16 rows of 24 latent pixels, then 8 of 12."""

from diffusers import (
    AnimateDiffPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    IFPipeline,
    MotionAdapter,
    StableDiffusionPAGPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline  # from diffusers alone, with sentencepiece
from transformers import CLIPTextModel

from . import autoencoders, encoders
from .encoders import random_weights
from .joint import GUIDED

CHANNELS = (16, 32)


def unet(**config):
    """Return a U-Net that meets the text at both of its levels and between them."""
    down, up = ("CrossAttnDownBlock2D",) * 2, ("CrossAttnUpBlock2D",) * 2
    common = {"block_out_channels": CHANNELS, "down_block_types": down, "up_block_types": up, "layers_per_block": 1}
    return UNet2DConditionModel(**common | {"norm_num_groups": 4, "sample_size": 16} | config)


def clip_parts():
    return {"tokenizer": encoders.clip_tokenizer(), "text_encoder": encoders.clip(32, CLIPTextModel)}


def animate_diff():
    """AnimateDiff: three frames at once, rows of one batch for the text; layers of motion run across them."""
    motion = MotionAdapter(
        block_out_channels=CHANNELS, motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4
    )
    pipe = AnimateDiffPipeline(
        unet=random_weights(unet(cross_attention_dim=32, attention_head_dim=4)),
        motion_adapter=random_weights(motion),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        vae=autoencoders.kl(),
        **clip_parts(),
    )
    return pipe, {**GUIDED, "num_frames": 3, "guidance_scale": 4.0}


def kolors():
    """Kolors: Stable Diffusion XL with GLM for a text encoder, whose text the U-Net projects first."""
    text, pooled = 16, 16
    model = unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + pooled,
        encoder_hid_dim_type="text_proj",
        encoder_hid_dim=text,
        cross_attention_dim=24,
    )
    tokenizer = encoders.glm3_tokenizer()
    pipe = KolorsPipeline(
        unet=random_weights(model),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        vae=autoencoders.kl(),
        tokenizer=tokenizer,
        text_encoder=encoders.glm3(tokenizer, text),
    )
    return pipe, {**GUIDED, "guidance_scale": 4.0}


def pag():
    """Perturbed attention guidance: a third part of the batch, whose self-attention in the middle is the identity."""
    pipe = StableDiffusionPAGPipeline(
        unet=random_weights(unet(cross_attention_dim=32, attention_head_dim=4)),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        vae=autoencoders.kl(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **clip_parts(),
    )
    return pipe, {**GUIDED, "guidance_scale": 4.0, "pag_scale": 2.0}


def deepfloyd_if():
    """DeepFloyd IF: pixels instead of latents; image and text are keys of the same attention."""
    down, up = "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"
    model = unet(
        down_block_types=("ResnetDownsampleBlock2D", down),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(up, "ResnetUpsampleBlock2D"),
        in_channels=3,
        out_channels=6,  # noise and its variance
        encoder_hid_dim=32,
        cross_attention_dim=32,
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )
    tokenizer = encoders.t5_tokenizer()
    pipe = IFPipeline(
        unet=random_weights(model),
        scheduler=DDPMScheduler(variance_type="learned_range", thresholding=True, sample_max_value=100.0),
        tokenizer=tokenizer,
        text_encoder=encoders.t5(tokenizer, 32),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    return pipe, {**GUIDED, "height": 16, "width": 24, "guidance_scale": 4.0, "clean_caption": False}
