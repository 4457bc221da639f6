"""What is particular to each kind of transformer: where image and text meet in it. Another kind is one more row."""

from typing import NamedTuple

from torch import nn

__all__ = ["FAMILIES", "Family", "denoiser_of", "family_of"]


class Family(NamedTuple):
    """A kind of denoiser.

    Its image attends to the text by cross-attention ("apart": keys are of the text alone), or by joint attention, in
    which tokens of both meet.
    """

    attentions: tuple[str, ...]  # patterns of the dotted names of the attentions that read text
    image: str  # where its tokens stand among those that meet: "first", "last"; "behind" as keys; "apart", as none
    text: tuple[str, ...] = ("encoder_hidden_states",)  # arguments of the denoiser that hold the text
    twice: bool = False  # whether the last of these is joined twice
    mask: str | None = None  # the argument that says which tokens of cross-attention's text take part
    own: str | None = None  # what the self-attention beside a cross-attention is called, where it can be recorded
    length: str | None = None  # the mask that says how many tokens of each text are joined; None: all
    before: str | None = None  # the mask of other tokens that are joined before the text's, as many as take part
    multiple: int = 1  # the image's tokens are filled up to a multiple of this
    latents: str = "hidden_states"  # the argument that holds the noisy image
    channels_last: bool = False  # whether that is (batch, frame, row, column, channel)
    timestep: str = "timestep"
    changing: bool = False  # whether what a block reads of a text depends on the timestep, or on the block
    image_to_image: str | None = None  # the pipeline's class that noises an image by flow matching


_DOUBLE = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")

FAMILIES = {
    "FluxTransformer2DModel": Family(_DOUBLE, "last", image_to_image="FluxImg2ImgPipeline"),
    "SD3Transformer2DModel": Family(  # whose attn2 is of the image alone
        ("transformer_blocks.*.attn",), "first", image_to_image="StableDiffusion3Img2ImgPipeline"
    ),
    "QwenImageTransformer2DModel": Family(
        ("transformer_blocks.*.attn",), "last", image_to_image="QwenImageImg2ImgPipeline"
    ),
    "ZImageTransformer2DModel": Family(
        ("layers.*.attention",),
        "first",
        ("cap_feats",),
        multiple=32,
        latents="x",
        timestep="t",
        image_to_image="ZImageImg2ImgPipeline",
    ),
    "Flux2Transformer2DModel": Family(_DOUBLE, "last"),
    "ChromaTransformer2DModel": Family(_DOUBLE, "last", image_to_image="ChromaImg2ImgPipeline"),
    "AuraFlowTransformer2DModel": Family(
        ("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"), "last"
    ),
    "CogView4Transformer2DModel": Family(("transformer_blocks.*.attn1",), "last"),
    "Lumina2Transformer2DModel": Family(("layers.*.attn",), "last", length="encoder_attention_mask"),
    "HunyuanImageTransformer2DModel": Family(_DOUBLE, "first", before="encoder_attention_mask_2"),
    "HiDreamImageTransformer2DModel": Family(
        ("double_stream_blocks.*.attn1", "single_stream_blocks.*.attn1"),
        "first",
        ("encoder_hidden_states_t5", "encoder_hidden_states_llama3"),  # Llama's last layer, and one for each block
        twice=True,
        timestep="timesteps",
    ),
    "PixArtTransformer2DModel": Family(
        ("transformer_blocks.*.attn2",), "apart", mask="encoder_attention_mask", own="attn1"
    ),
    "SanaTransformer2DModel": Family(("transformer_blocks.*.attn2",), "apart", mask="encoder_attention_mask"),
    "HunyuanDiT2DModel": Family(
        ("blocks.*.attn2",), "apart", ("encoder_hidden_states", "encoder_hidden_states_t5"), own="attn1"
    ),  # learned padding takes the place of what is masked, so that all tokens take part
    "LuminaNextDiT2DModel": Family(("layers.*.attn2",), "apart", changing=True),
    "Kandinsky5Transformer3DModel": Family(
        ("visual_transformer_blocks.*.cross_attention",), "apart", channels_last=True, changing=True
    ),
    "Kandinsky3UNet": Family(
        ("*_blocks.*.attentions.[1-9]*.attention",),  # the first one, 0, is the image's self-attention
        "apart",
        mask="encoder_attention_mask",
        latents="sample",
    ),
    "UNetMotionModel": Family(
        ("*.attentions.*.attn2",), "apart", latents="sample", own="attn1"
    ),  # not those of motion, over time
    "UNet2DConditionModel, text_proj": Family(("*.attn2",), "apart", latents="sample", own="attn1"),
    "UNet2DConditionModel, added_kv": Family(("*.attentions.[0-9]",), "behind", latents="sample"),
}
"""By the class of the denoiser; U-Nets that read text as Stable Diffusion does have an adapter of their own."""


def denoiser_of(pipe) -> nn.Module | None:
    """Return a pipeline's denoiser; None where it has none of the usual names."""
    found = (getattr(pipe, name, None) for name in ("unet", "transformer"))
    return next((denoiser for denoiser in found if denoiser is not None), None)


def family_of(denoiser) -> tuple[str, Family | None]:
    """Return the name of a denoiser's kind, and its row of the table; None where it has none."""
    kinds = [kind.__name__ for kind in type(denoiser).__mro__]
    if "UNet2DConditionModel" in kinds:
        config = denoiser.config
        blocks = *config.down_block_types, config.mid_block_type, *config.up_block_types
        added = any("SimpleCrossAttn" in block for block in blocks if block)  # text is put behind the image's own keys
        projected = config.encoder_hid_dim_type == "text_proj"
        kinds = ["UNet2DConditionModel" + (", added_kv" if added else ", text_proj" if projected else "")]
    name = next((kind for kind in kinds if kind in FAMILIES), kinds[0])
    return name, FAMILIES.get(name)
