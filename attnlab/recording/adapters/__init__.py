"""Adapters: what is particular to each kind of denoiser. A new kind is one row of a table, or one module here."""

from diffusers import UNet2DConditionModel

from .base import Adapter, AttentionCall, DenoiserCall, JointCall
from .families import FAMILIES, denoiser_of, family_of
from .transformer import TransformerAdapter
from .unet import SUPPORTED, UNetAdapter

__all__ = ["Adapter", "AttentionCall", "DenoiserCall", "JointCall", "TransformerAdapter", "adapter_of"]


def adapter_of(pipe) -> Adapter:
    """Choose the adapter by the class of a pipeline's denoiser; TypeError where it is compiled or of another kind."""
    denoiser = denoiser_of(pipe)
    name = "unet" if denoiser is getattr(pipe, "unet", None) else "transformer"
    if hasattr(denoiser, "_orig_mod") or any(m._compiled_call_impl for m in getattr(denoiser, "modules", list)()):
        raise TypeError(
            "the denoiser is compiled, and hooks that come later are not called inside it: record before compiling it, "
            f"or compile it inside the record() block, pipe.{name}.compile()"
        )
    family = None if denoiser is None else family_of(denoiser)[1]
    if family is not None:
        return TransformerAdapter(pipe, denoiser, family)
    if isinstance(denoiser, UNet2DConditionModel):
        return UNetAdapter(pipe)
    found = "neither a unet nor a transformer" if denoiser is None else type(denoiser).__name__
    transformers = ", ".join(name for name in FAMILIES if "UNet2D" not in name)
    raise TypeError(f"{type(pipe).__name__} cannot be recorded, it has {found}; {SUPPORTED}, or with {transformers}")
