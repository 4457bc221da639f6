"""Make pipelines of the exact geometry of Stable Diffusion and FLUX with random weights, to measure costs on them."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PNDMScheduler,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from attnlab import load_pipeline
from attnlab.cli.hardware import XL
from attnlab.pipelines import best_device
from attnlab.training import seeded

from ..bundled.text_encoder import new_text_encoder

__all__ = ["flux", "stable_diffusion_2_base", "stable_diffusion_15", "stable_diffusion_xl"]

_WINDOW = 77  # tokens of CLIP's texts
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def stable_diffusion_15(dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Make a Stable Diffusion 1.5: 860 million parameters in the denoiser, text 768 wide, latents 1/8 of the image.

    The text encoder has its width and depth but the vocabulary of `tiny`. The autoencoder is small, with the right
    sizes of images and latents.
    """
    with seeded(0), torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return _pipeline(unet, {"width": 768, "layers": 12, "heads": 12}, DDIMScheduler(**_NOISE, clip_sample=False), dtype)


def stable_diffusion_2_base(dtype: torch.dtype = torch.float32, narrow: int = 1) -> DiffusionPipeline:
    """Make a Stable Diffusion 2-base, as `stable_diffusion_15`: text 1024 wide, 5 to 20 heads of width 64, PNDM.

    `narrow` divides the denoiser's channels, and with them the width of heads: 8 makes it small enough for tests.
    """
    heads = (5, 10, 20, 20)
    with seeded(0), torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=[64 * n // narrow for n in heads],
            norm_num_groups=32 // narrow,
            attention_head_dim=heads,  # their number, by the library's own account
            cross_attention_dim=1024,
            use_linear_projection=True,
        )
    scheduler = PNDMScheduler(**_NOISE, skip_prk_steps=True)
    return _pipeline(unet, {"width": 1024, "layers": 23, "heads": 16}, scheduler, dtype)


def stable_diffusion_xl(dtype: torch.dtype = torch.float32, narrow: int = 1) -> DiffusionPipeline:
    """Make a Stable Diffusion XL, as `stable_diffusion_15`: text 768 + 1280 wide, images of 1024 pixels, Euler.

    `narrow` divides the denoiser's channels, as in `stable_diffusion_2_base`.
    """
    from diffusers import StableDiffusionXLPipeline  # only here: its import warns of torchvision, which is not wanted

    channels = [width // narrow for width in XL["block_out_channels"]]
    norm = {"norm_num_groups": 32 // narrow}
    with seeded(0), torch.device("meta"):
        unet = UNet2DConditionModel(**{**XL, **norm, "block_out_channels": channels}, sample_size=128)
    parts = _parts({"width": 768, "layers": 12, "heads": 12}, dtype)
    with seeded(1), torch.device(best_device()):
        second = new_text_encoder(parts["tokenizer"], width=1280, layers=32, heads=20).config
        second.projection_dim = 1280
        second = CLIPTextModelWithProjection(second).to(dtype).eval()
    scheduler = EulerDiscreteScheduler(**_NOISE, timestep_spacing="leading")
    return StableDiffusionXLPipeline(
        **parts,
        unet=_random(unet, dtype),
        scheduler=scheduler,
        tokenizer_2=parts["tokenizer"],
        text_encoder_2=second,
        add_watermarker=False,
    )


def flux(dtype: torch.dtype = torch.float32, narrow: int = 1, double: int = 2, single: int = 4) -> DiffusionPipeline:
    """Make a FLUX.1: blocks of 24 heads of width 128, text of up to 512 tokens, images of 1024 pixels.

    Of its 19 blocks with two streams and 38 with one there are `double` and `single`; the cost of recording is that of
    a block, so its share of the time is the same. `narrow` divides the number of heads. The text encoders are small,
    with the right widths; T5's tokens are letters.
    """
    from diffusers import FluxPipeline  # only here: its import warns of torchvision, which is not wanted

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            num_layers=double, num_single_layers=single, num_attention_heads=24 // narrow, guidance_embeds=True
        )
    parts = _parts({"width": 768, "layers": 2, "heads": 12}, dtype)
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in "\u2581" + _LETTERS)]
    pieces = Tokenizer(models.Unigram(letters, unk_id=2))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    pieces.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    with seeded(1):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8,) * 4,
            latent_channels=16,
            norm_num_groups=4,
            shift_factor=0.1,
        )
        t5 = T5Config(vocab_size=len(letters), d_model=4096, d_kv=64, d_ff=64, num_heads=2, num_layers=1)
        clip = CLIPTextModel(parts["text_encoder"].config)
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
            vae=nn.Module.to(vae, dtype).eval(),
            text_encoder=clip.to(dtype).eval(),
            tokenizer=parts["tokenizer"],
            text_encoder_2=T5EncoderModel(t5).to(dtype).eval(),
            tokenizer_2=PreTrainedTokenizerFast(tokenizer_object=pieces, model_max_length=512, **special),
            transformer=_random(transformer, dtype),
        )


def _pipeline(unet, text, scheduler, dtype):
    from diffusers import StableDiffusionPipeline  # only here: its import warns of torchvision, which is not wanted

    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**_parts(text, dtype), unet=_random(unet, dtype), scheduler=scheduler, **none)


def _parts(text, dtype):
    """Make an autoencoder, a tokenizer and a text encoder."""
    tokenizer = load_pipeline("tiny", device="cpu").tokenizer
    tokenizer.model_max_length = _WINDOW
    with seeded(0):
        encoder = new_text_encoder(tokenizer, **text)
        levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=4, **levels)
    return {
        "vae": nn.Module.to(vae, dtype).eval(),
        "text_encoder": encoder.to(dtype).eval(),
        "tokenizer": tokenizer,
    }


def _random(unet, dtype):
    """Draw weights of the usual size for a model without memory yet: quicker than the library's own start."""
    device = best_device()  # a GPU draws billions of numbers in a second
    unet = nn.Module.to(unet, dtype).to_empty(device=device).eval()  # not its own `to`, which warns of other types
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(float(name.endswith("weight")))  # of norms; a bias is 0
    return unet
