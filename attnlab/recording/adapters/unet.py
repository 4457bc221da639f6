"""U-Nets with cross-attention: Stable Diffusion 1.x, 2.x and XL, and their kin."""

import inspect
from collections.abc import Callable, Sequence

import torch
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from torch.utils.hooks import RemovableHandle

from ..encoded import EncodedTexts
from ..pieces import split
from ..words import Word
from .base import Adapter, AttentionCall, DenoiserCall, Timesteps

__all__ = ["SUPPORTED", "UNetAdapter"]

SUPPORTED = (
    "supported: pipelines of Stable Diffusion 1.x, 2.x and XL and their kin, with a UNet2DConditionModel and "
    "classifier-free guidance: text-to-image, image-to-image, inpainting"
)
_BATCH_PARTS = {"StableDiffusionInstructPix2PixPipeline": ("conditional", "image", "negative")}
"""Order of the parts of a guided batch, by pipeline class; diffusers' usual one is ("negative", "conditional")."""


class UNetAdapter(Adapter):
    """A `UNet2DConditionModel`: queries are the output of `to_q`, so every attention kernel stays in use."""

    alternates, sees_context, how_seen = False, True, "record without that"

    def __init__(self, pipe):
        self.pipe, self.module = pipe, pipe.unet
        self.texts = EncodedTexts(pipe)
        _check_text(pipe)
        self.attentions = {name: m for name, m in _attentions(pipe.unet) if m.is_cross_attention}
        for name, attention in self.attentions.items():
            if attention.norm_cross is not None or attention.added_kv_proj_dim is not None:
                pipeline = type(pipe).__name__
                raise TypeError(f"{pipeline} cannot be recorded: {name} normalizes or extends its text; {SUPPORTED}")
        if any(isinstance(attention.processor, FusedAttnProcessor2_0) for _, attention in _attentions(pipe.unet)):
            raise TypeError("queries and keys are fused into one product: call pipe.unfuse_qkv_projections() first")
        self._timesteps = Timesteps()
        self._signature = inspect.signature(type(pipe.unet).forward)

    def is_default(self, name: str) -> bool:
        """Return whether a layer is one of DAAM's and OVAM's: all but those of the middle block."""
        return "mid_block" not in name

    def read(self, args: tuple, kwargs: dict) -> DenoiserCall:
        """Read a call of the U-Net from its arguments."""
        call = self._signature.bind(self.module, *args, **kwargs).arguments
        timestep = self._timesteps.number(call["timestep"], getattr(self.pipe.scheduler, "timesteps", None))
        sample, text = call["sample"], call["encoder_hidden_states"]
        latents = sample[:, : self.module.config.out_channels]  # behind the noise come conditions, which may differ
        mask = call.get("encoder_attention_mask")
        return DenoiserCall(latents, tuple(sample.shape[-2:]), timestep, text, mask, [(row,) for row in text])

    def parts(self, call: DenoiserCall) -> tuple[str, ...]:
        """Name the parts of a batch by what the pipeline says of its guidance, and by its class."""
        guided = getattr(self.pipe, "do_classifier_free_guidance", None)
        if guided is None or getattr(self.pipe, "enabled_editing_prompts", False):  # parts beside the usual ones
            raise TypeError(
                f"{type(self.pipe).__name__} does not say how it guides, so its images cannot be told from what "
                f"guides them; {SUPPORTED}; or name the parts of its batches: record(pipe, parts=...)"
            )
        # of PAG, behind the usual ones: the prompt once more, with self-attention that is disturbed
        perturbed = ("perturbed",) * bool(getattr(self.pipe, "do_perturbed_attention_guidance", False))
        if not guided:
            return ("conditional", *perturbed)
        classes = [cls.__name__ for cls in type(self.pipe).__mro__]
        usual = next((_BATCH_PARTS[name] for name in classes if name in _BATCH_PARTS), ("negative", "conditional"))
        return *usual, *perturbed

    def words(self, call: DenoiserCall, row: int, encoder, prompts: Sequence[str]) -> tuple[list[Word] | None, bool]:
        """Find the words of one image's text by the token ids that its text encoder read."""
        ids, second = self.texts.token_ids(call.text[row]), self.texts.token_ids(call.text[row], second=True)
        if ids is None:
            return None, True
        if found := split(encoder.tokenizer, ids):
            encoder.reader.check_reading(found, ids, second)
        return found, True

    def tap(self, attention: Attention, receive: Callable[[AttentionCall], None]) -> list[RemovableHandle]:
        """Hand on what `to_q` and `to_k` give in one call of the attention, whichever a processor asks first."""
        waiting = {}  # the query whose key is to come, or the key whose query is

        def keep(**found):
            waiting.update(found)
            if {"query", "key"} <= set(waiting):
                call = AttentionCall(**waiting)
                waiting.clear()
                receive(call)

        # a compiled model leaves its compiled code for each of these, and goes on in it afterwards
        forget, meet_query, meet_key = map(
            torch.compiler.disable,
            (
                lambda module, args: waiting.clear(),
                lambda module, args, query: keep(query=query, hidden=args[0]),
                lambda module, args, key: keep(key=key, context=args[0]),
            ),
        )
        return [
            attention.register_forward_pre_hook(forget),
            attention.to_q.register_forward_hook(meet_query),
            attention.to_k.register_forward_hook(meet_key),
        ]

    def self_attentions(self) -> list[Attention]:
        """List the attentions of the image to itself, in every block."""
        return [attention for _, attention in _attentions(self.module) if not attention.is_cross_attention]

    def self_attention_of(self, name: str) -> Attention:
        """Return the self-attention that runs before a cross-attention, in the same block."""
        found = getattr(self.module.get_submodule(name.rpartition(".")[0]), "attn1", None)
        if found is None or found.is_cross_attention:
            raise TypeError(f"{name} has no self-attention before it: leave agreement= out")
        return found


def _attentions(unet):
    return [(name, module) for name, module in unet.named_modules() if isinstance(module, Attention)]


def _check_text(pipe):
    """TypeError where text reaches the cross-attentions in a way that is not known here."""
    name, kind = type(pipe).__name__, pipe.unet.config.encoder_hid_dim_type
    if getattr(pipe, "text_encoder_3", None) is not None:
        raise TypeError(f"{name} cannot be recorded, it has three text encoders; {SUPPORTED}")
    if kind not in (None, "ip_image_proj"):
        raise TypeError(f"{name} cannot be recorded: text passes {kind!r} (encoder_hid_dim_type) first; {SUPPORTED}")
