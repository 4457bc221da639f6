"""Traces to tensors and JSON types, and back: what a file of a recording holds.

Names in files are older than names in code: what the code calls an attention mask is "visible" there.
"""

from dataclasses import asdict

import torch

from .. import storage
from .layers import Layer
from .trace import Generation, SelfAttentionSum, Trace
from .words import Word

__all__ = ["pack", "unpack"]


def pack(trace: Trace, prefix: str, tensors: dict[str, torch.Tensor], keys: dict[int, int]) -> dict:
    """Put a trace's tensors into `tensors`, and return what remains of it as JSON types.

    `keys` numbers the layers that were written before, as images share them. ValueError where the model normalizes its
    queries or keys by modules, which cannot be written.
    """
    tensors[prefix + "text"] = trace.text
    if trace.attention_mask is not None:
        tensors[prefix + "visible"] = trace.attention_mask
    layers = {name: _pack_layer(name, layer, tensors, keys) for name, layer in trace.layers.items()}
    for name, queries in trace.queries.items():
        tensors[f"{prefix}queries.{name}"] = torch.stack(list(queries)).cpu()
    for name, total in trace.sums.items():
        tensors[f"{prefix}sum.{name}"] = total
    for i, sums in enumerate(trace.streamed.values()):
        tensors |= {f"{prefix}maps.{i}.{name}": total for name, total in sums.items()}
    for i, attention in enumerate(trace.self_attention.values()):
        tensors[f"{prefix}self.{i}"] = attention.total
    return {
        "sizes": trace.sizes,
        "steps": trace.steps,
        "timesteps": trace.timesteps,
        "streamed": list(trace.streamed),
        "self_attention": [[*size, attention.count] for size, attention in trace.self_attention.items()],
        "words": trace.words and [[word.text, list(word.tokens)] for word in trace.words],
        "generation": asdict(trace.generation),
        "layers": layers,
    }


def _pack_layer(name, layer, tensors, keys):
    if layer.norm_q is not None or layer.norm_k is not None:
        raise ValueError(f"{name} normalizes its queries or keys: a recording of this model cannot be saved")
    number = keys.setdefault(id(layer), len(keys))
    tensors[f"keys.{number}.weight"] = layer.weight
    if layer.bias is not None:
        tensors[f"keys.{number}.bias"] = layer.bias
    return {"keys": number, "heads": layer.heads, "scale": layer.scale}


def unpack(entry: dict, prefix: str, file: storage.File, keys: dict[int, Layer]) -> Trace:
    """Read a trace that `pack` wrote; `keys` holds layers that were read before. Queries stay in the file."""

    def optional(name):
        return file.read(name) if name in file.names else None

    def tensors_of(kind):
        """Names of the layers of which the file holds some kind of tensor, and those tensors' names."""
        return {name: f"{prefix}{kind}.{name}" for name in entry["layers"] if f"{prefix}{kind}.{name}" in file.names}

    for name, layer in entry["layers"].items():
        number = layer["keys"]
        if number not in keys:
            weight, bias = (optional(f"keys.{number}.{part}") for part in ("weight", "bias"))
            keys[number] = Layer(name, layer["heads"], layer["scale"], weight, bias, None, None)
    streamed = {
        text: {name: file.read(tensor) for name, tensor in tensors_of(f"maps.{i}").items()}
        for i, text in enumerate(entry["streamed"])
    }
    self_attention = {
        (height, width): SelfAttentionSum(file.read(f"{prefix}self.{i}"), count)
        for i, (height, width, count) in enumerate(entry["self_attention"])
    }
    size = tuple(entry["generation"]["latent_size"])
    return Trace(
        text=file.read(prefix + "text"),
        attention_mask=optional(prefix + "visible"),
        words=entry["words"] and [Word(text, tuple(tokens)) for text, tokens in entry["words"]],
        generation=Generation(**{**entry["generation"], "latent_size": size}),
        queries={name: file.stored(tensor) for name, tensor in tensors_of("queries").items()},
        sums={name: file.read(tensor) for name, tensor in tensors_of("sum").items()},
        streamed=streamed,
        self_attention=self_attention,
        sizes={name: tuple(size) for name, size in entry["sizes"].items()},
        layers={name: keys[layer["keys"]] for name, layer in entry["layers"].items()},
        steps=entry["steps"],
        timesteps=entry["timesteps"],
    )
