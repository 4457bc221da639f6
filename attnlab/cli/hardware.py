"""What a GPU's user has to know: whether torch sees one, in which type to compute, what a recording takes."""

import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from diffusers import UNet2DConditionModel

from ..pipelines import best_device, has_bfloat16
from ..recording.adapters import adapter_of
from ..recording.stores import KEEP

__all__ = ["XL", "describe_hardware", "recording_bytes"]

XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),  # their number, by the library's own account
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# The published U-Nets by name: side of their images in pixels, what differs from the library's defaults
_UNETS = {"Stable Diffusion 1.5": (512, {"cross_attention_dim": 768}), "Stable Diffusion XL": (1024, XL)}
_STEPS, _WORDS = 50, 10


def recording_bytes(unet: UNet2DConditionModel, latent: tuple[int, int], text: int, tokens: int, steps: int) -> dict:
    """Count the bytes that `record` holds of one image, by `keep`: {"queries": bytes, ...}.

    Nothing is computed, so the weights may lie on the "meta" device; their type is that of the recording.

    Parameters
    ----------
    unet : UNet2DConditionModel
        Whose layers are recorded, as by default.
    latent : (height, width)
        Of the latents, 1/8 of the image's.
    text : int
        Tokens that the denoiser reads, padding included.
    tokens : int
        Of these up to the first end token, which is included: as many maps are kept.
    steps : int
        Number of recorded steps.
    """
    adapter, deepest = adapter_of(SimpleNamespace(unet=unet, components={})), len(unet.config.block_out_channels) - 1
    kept = [keep for keep in KEEP if keep != "calls"]  # which hold what the pipeline gives, whatever the layers
    sizes = dict.fromkeys(kept, text * unet.config.cross_attention_dim * unet.dtype.itemsize)
    for name, attention in adapter.attentions.items():
        if not adapter.is_default(name):
            continue
        block, number = name.split(".")[:2]  # latents are halved from one block down to the next
        scale = 2 ** (int(number) if block == "down_blocks" else deepest - int(number))
        pixels = -(-latent[0] // scale) * -(-latent[1] // scale)
        keys = sum(parameter.nbytes for parameter in attention.to_k.parameters())
        whole = keys + sum(parameter.nbytes for parameter in attention.to_v.parameters())
        whole += attention.to_out[0].weight.nbytes
        queries, float32 = pixels * attention.to_q.out_features, torch.float32.itemsize
        sizes["queries"] += whole + steps * queries * unet.dtype.itemsize
        sizes["sum"] += keys + queries * float32
        sizes["maps"] += keys + attention.heads * tokens * pixels * float32
        sizes["contributions"] += whole + (attention.heads + 1) * tokens * pixels * float32
    return sizes


def describe_hardware() -> Iterator[tuple[str, str]]:
    """Give the lines of `attnlab check` about the GPU, the type of weights and a recording's memory: (name, text)."""
    with warnings.catch_warnings(record=True) as said:  # torch warns where a driver does not fit
        warnings.simplefilter("always")
        device = best_device()
    if device != "cuda":
        yield "gpu", _why_none([str(warning.message).splitlines()[0] for warning in said])
    for i in range(torch.cuda.device_count() if device == "cuda" else 0):
        free, total = torch.cuda.mem_get_info(i)
        yield "gpu", f"cuda:{i}, {torch.cuda.get_device_name(i)}: {_gb(total)} of memory, {_gb(free)} free"
    native = has_bfloat16(device)
    if device == "cpu":
        half = 'load_pipeline(..., dtype="bfloat16") halves its memory' if native else "bfloat16 is slow on this one"
        yield "dtype", f"float32 on the CPU; {half}"
    else:
        other = "bfloat16" if native else "float32"
        yield "dtype", f'float16 on {device}; where images come out black, load_pipeline(..., dtype="{other}")'
    yield "memory", f"of a recorded image, {_STEPS} steps of {_WORDS} words in float16, by keep="
    for name, (side, config) in _UNETS.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**config).half()
        sizes = recording_bytes(unet, (side // 8, side // 8), text=77, tokens=_WORDS + 2, steps=_STEPS)
        kept = ", ".join(f'"{keep}" {_gb(size)}' for keep, size in sizes.items())
        weights = sum(parameter.nbytes for parameter in unet.parameters())
        yield "", f"{name}, {side} x {side}: {kept}; beside the U-Net's weights, {_gb(weights)}"
    yield "", 'recordings lie in main memory, not in the GPU\'s, unless record(device="cuda") asks for that'


def _why_none(said):
    """Say why torch sees no NVIDIA GPU, and what to do where there is one."""
    if torch.backends.mps.is_available():
        return "Apple's, by mps, on which attnlab was not tried"
    if torch.version.cuda or torch.version.hip:
        why = " ".join(said) or "Where there is one, nvidia-smi shows it, and whether its driver is new enough"
        return f"none that torch sees, though {torch.__version__} is built for GPUs. {why}"
    get = "pip uninstall torch, then pip install torch: PyPI's wheel for Linux brings CUDA"
    if sys.platform != "linux":
        get = "install the build of torch with CUDA that pytorch.org names for this system"
    return f"none that torch sees: {torch.__version__} is built for the CPU alone. Where there is an NVIDIA GPU: {get}"


def _gb(size):
    return f"{size / 1e9:.{1 if size > 1e9 else 3}f} GB"
