"""Adapters: what is particular to each kind of denoiser. A new kind is one module here and one line in the table."""

from diffusers import UNet2DConditionModel

from .base import Adapter, AttentionCall, DenoiserCall
from .unet import SUPPORTED, UNetAdapter

__all__ = ["Adapter", "AttentionCall", "DenoiserCall", "adapter_of"]

_ADAPTERS = {UNet2DConditionModel: UNetAdapter}


def adapter_of(pipe) -> Adapter:
    """Choose the adapter by the class of a pipeline's denoiser; TypeError where it is compiled or of another kind."""
    denoiser = getattr(pipe, "unet", None)
    if hasattr(denoiser, "_orig_mod") or any(m._compiled_call_impl for m in getattr(denoiser, "modules", list)()):
        raise TypeError(
            "the denoiser is compiled, and hooks that come later are not called inside it: record before compiling it, "
            "or compile it inside the record() block, pipe.unet.compile()"
        )
    for kind, adapter in _ADAPTERS.items():
        if isinstance(denoiser, kind):
            return adapter(pipe)
    found = "no unet" if denoiser is None else type(denoiser).__name__
    raise TypeError(f"{type(pipe).__name__} cannot be recorded, it has {found}; {SUPPORTED}")
