"""Which pipelines can be recorded: the cross-attentions of their denoisers, and what the rows of their batches are."""

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

SUPPORTED = (
    "supported: pipelines of Stable Diffusion 1.x, 2.x and XL and their kin, with a UNet2DConditionModel and "
    "classifier-free guidance: text-to-image, image-to-image, inpainting"
)
PARTS = {"StableDiffusionInstructPix2PixPipeline": ("conditional", "image", "negative")}
"""Order of the parts of a guided batch, by pipeline class; diffusers' usual one is ("negative", "conditional")."""


def batch_parts(pipe) -> tuple[str, ...]:
    """What the parts of the pipeline's batch are, in order."""
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    if guided is None or getattr(pipe, "do_perturbed_attention_guidance", False):
        raise TypeError(
            f"{type(pipe).__name__} does not say how it guides, so its images cannot be told from what guides them; "
            f"{SUPPORTED}, called as pipe(...)"
        )
    if not guided:
        return ("conditional",)
    return next((PARTS[c.__name__] for c in type(pipe).__mro__ if c.__name__ in PARTS), ("negative", "conditional"))


def cross_attentions(pipe) -> dict[str, Attention]:
    """The cross-attentions of a pipeline's denoiser; TypeError where they cannot be recorded."""
    name, unet = type(pipe).__name__, getattr(pipe, "unet", None)
    if hasattr(unet, "_orig_mod") or any(m._compiled_call_impl for m in getattr(unet, "modules", list)()):
        raise TypeError("the denoiser is compiled, and hooks are not called inside it: record before compiling it")
    if not isinstance(unet, UNet2DConditionModel):
        found = "no unet" if unet is None else type(unet).__name__
        raise TypeError(f"{name} cannot be recorded, it has {found}; {SUPPORTED}")
    if getattr(pipe, "text_encoder_3", None) is not None:
        raise TypeError(f"{name} cannot be recorded, it has three text encoders; {SUPPORTED}")
    if unet.config.encoder_hid_dim_type not in (None, "ip_image_proj"):
        raise TypeError(
            f"{name} cannot be recorded: its text passes {unet.config.encoder_hid_dim_type!r} (encoder_hid_dim_type) "
            f"first; {SUPPORTED}"
        )
    found = {n: m for n, m in unet.named_modules() if isinstance(m, Attention) and m.is_cross_attention}
    for layer, module in found.items():
        if module.norm_cross is not None or module.added_kv_proj_dim is not None:
            raise TypeError(f"{name} cannot be recorded: {layer} normalizes or extends its text; {SUPPORTED}")
    return found
