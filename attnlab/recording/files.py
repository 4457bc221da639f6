"""Traces to tensors and JSON types, and back: what a file of a recording holds.

Names in files are older than names in code: what the code calls an attention mask is "visible" there.
"""

import math
from dataclasses import asdict
from functools import cache

import torch

from .. import storage
from .kept import KeptCall, packed, tensors_in, unpacked
from .layers import Layer
from .norms import Norm
from .trace import Generation, SelfAttentionSum, TextBeside, Trace
from .words import Word

__all__ = ["pack", "unpack"]

_NORMS = ("norm_q", "norm_k")  # parts of a layer that are themselves made of parts
_SUMS = ("outputs", "agreement", "agreed")  # by layer, and in files by the names of their attributes
_BESIDE = {"outputs": "text outputs", "products": "products"}  # sums of texts beside the image, as files name them


def pack(trace: Trace, prefix: str, tensors: dict[str, torch.Tensor], keys: dict[int, int]) -> dict:
    """Put a trace's tensors into `tensors`, and return what remains of it as JSON types.

    `keys` numbers the layers, and the tensors of calls, that were written before, as images share them.
    """
    given = {id(tensor): tensor for tensor in tensors_in(trace.calls)}
    names = {i: f"call.{keys.setdefault(i, len(keys))}" for i in given}
    tensors |= {names[i]: tensor.cpu().clone(memory_format=torch.contiguous_format) for i, tensor in given.items()}
    tensors[prefix + "text"] = trace.text
    if trace.attention_mask is not None:
        tensors[prefix + "visible"] = trace.attention_mask
    layers = {name: _pack_layer(name, layer, tensors, keys) for name, layer in trace.layers.items()}
    for name, queries in trace.queries.items():
        tensors[f"{prefix}queries.{name}"] = torch.stack(list(queries)).cpu()
    for name, total in trace.sums.items():
        tensors[f"{prefix}sum.{name}"] = total
    for kind in _SUMS:
        tensors |= {f"{prefix}{kind}.{name}": total for name, total in getattr(trace, kind).items()}
    for i, text in enumerate(trace.beside.values()):
        for part, named in _BESIDE.items():
            tensors |= {f"{prefix}{named}.{i}.{name}": total for name, total in getattr(text, part).items()}
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
        "words": trace.words and _pack_words(trace.words),
        "ends": trace.ends,
        "beside": [[text, _pack_words(known.words), known.ends] for text, known in trace.beside.items()],
        "row": trace.row,
        "calls": [packed(tuple(call), names) for call in trace.calls],
        "generation": asdict(trace.generation),
        "layers": layers,
    }


def _pack_words(words):
    return [[word.text, list(word.tokens)] for word in words]


def _unpack_words(entry):
    return [Word(text, tuple(tokens)) for text, tokens in entry]


def _pack_layer(name, layer, tensors, keys):
    number = keys.setdefault(id(layer), len(keys))
    tensors |= {f"keys.{number}.{part}": weights for part, weights in layer.weights.items()}
    norms = {part: vars(getattr(layer, part)) for part in _NORMS if getattr(layer, part) is not None}
    for part, norm in norms.items():
        names = {id(x): f"keys.{number}.{part}.{name}" for name, x in norm.items() if torch.is_tensor(x)}
        tensors |= {names[id(x)]: x for x in tensors_in(norm)}
        norms[part] = packed(norm, names)
    return {"keys": number, "heads": layer.heads, "scale": layer.scale, **norms}


def unpack(entry: dict, prefix: str, file: storage.File, keys: dict[int, Layer]) -> Trace:
    """Read a trace that `pack` wrote; `keys` holds layers that were read before. Queries stay in the file."""

    def optional(name):
        return file.read(name) if name in file.names else None

    @cache
    def read(name):
        return file.read(name)

    def tensors_of(kind):
        """Names of the layers of which the file holds some kind of tensor, and those tensors' names."""
        return {name: f"{prefix}{kind}.{name}" for name in entry["layers"] if f"{prefix}{kind}.{name}" in file.names}

    def beside(i, words, ends):
        sums = {part: tensors_of(f"{named}.{i}") for part, named in _BESIDE.items()}
        read = {part: {name: file.read(tensor) for name, tensor in names.items()} for part, names in sums.items()}
        return TextBeside(_unpack_words(words), ends, **read)

    for name, layer in entry["layers"].items():
        number = layer["keys"]
        if number not in keys:
            parts = ("weight", "bias", "value", "value_bias", "out")
            weights = {part: optional(f"keys.{number}.{part}") for part in parts}
            norms = {part: Norm(**unpacked(layer[part], read)) for part in _NORMS if part in layer}
            keys[number] = Layer(name, layer["heads"], layer["scale"], **norms, **weights)
    streamed = {
        text: {name: file.read(tensor) for name, tensor in tensors_of(f"maps.{i}").items()}
        for i, text in enumerate(entry["streamed"])
    }
    self_attention = {
        (height, width): SelfAttentionSum(file.read(f"{prefix}self.{i}"), count)
        for i, (height, width, count) in enumerate(entry["self_attention"])
    }
    size = tuple(entry["generation"]["latent_size"])
    trace = Trace(
        text=file.read(prefix + "text"),
        attention_mask=optional(prefix + "visible"),
        words=entry["words"] and _unpack_words(entry["words"]),
        generation=Generation(**{**entry["generation"], "latent_size": size}),
        queries={name: file.stored(tensor) for name, tensor in tensors_of("queries").items()},
        sums={name: file.read(tensor) for name, tensor in tensors_of("sum").items()},
        streamed=streamed,
        self_attention=self_attention,
        sizes={name: tuple(size) for name, size in entry["sizes"].items()},
        layers={name: keys[layer["keys"]] for name, layer in entry["layers"].items()},
        steps=entry["steps"],
        timesteps=entry["timesteps"],
        ends=entry.get("ends", True),
        row=entry.get("row", 0),
        beside={text: beside(i, *known) for i, (text, *known) in enumerate(entry.get("beside", []))},
        **{kind: {name: file.read(tensor) for name, tensor in tensors_of(kind).items()} for kind in _SUMS},
        calls=[KeptCall(*unpacked(call, read)) for call in entry.get("calls", [])],
    )
    _check(trace)
    return trace


def _check(trace: Trace) -> None:
    """Raise ValueError where the parts of a trace that was read do not fit one another."""
    (tokens, width), known, layers, words = trace.text.shape, trace.generation, trace.layers, trace.words or []
    pixels = {name: height * width for name, (height, width) in trace.sizes.items()}
    channels = {name: 0 if layer.weight is None else len(layer.weight) for name, layer in layers.items()}
    wide = next((x.shape[-1] for x in trace.outputs.values()), 0)  # channels of outputs, in all layers the same
    maps = [(name, x) for of_text in trace.streamed.values() for name, x in of_text.items()]
    sums = [(h * w, x) for (h, w), x in trace.self_attention.items()]
    counts = [*known.latent_size, *(x.heads for x in layers.values()), *(x.count for _, x in sums)]
    counts += [n for size in trace.sizes.values() for n in size]
    optional = [n for n in (known.planned, known.changed) if n is not None]
    fits = {
        "model": all(name is None or isinstance(name, str) for name in (known.model, known.denoiser))
        and isinstance(known.options, dict)
        and isinstance(known.share, str),
        "sizes and counts": all(type(n) is int and n > 0 for n in counts) and len(known.latent_size) == 2,
        "steps": all(type(n) is int for n in [*trace.steps, *trace.timesteps, known.ran, *optional])
        and len(trace.steps) == len(trace.timesteps),
        "words": type(trace.ends) is bool and _words_fit(words, tokens),
        "attention mask": trace.attention_mask is None or trace.attention_mask.shape == (tokens,),
        "layers": set(trace.sizes) <= set(layers)
        and all(_weights_fit(x, width) for x in layers.values())
        and all(type(x.scale) is float and math.isfinite(x.scale) for x in layers.values()),
        "queries": all(q.shape == [len(trace.steps), pixels[n], channels[n]] for n, q in trace.queries.items()),
        "sums": all(x.shape == (pixels[name], channels[name]) for name, x in trace.sums.items()),
        "maps": all(x[:, 0].shape == (layers[name].heads + trace.contributed, pixels[name]) for name, x in maps),
        "outputs": all(x.shape == (pixels[name], wide) for name, x in trace.outputs.items()),
        "agreement": set(trace.agreement) in (set(), set(trace.sizes))
        and all(x.shape == () for x in trace.agreement.values())
        and all(x.shape == (trace.length, pixels[name]) for name, x in trace.agreed.items()),
        "texts beside": all(_beside_fits(trace, text, pixels, wide) for text in trace.beside),
        "self-attention": all(x.total.shape == (n, n) for n, x in sums),
    }
    if wrong := [name for name, right in fits.items() if not right]:
        raise ValueError(f"its {', '.join(wrong)} do not fit the rest")


def _words_fit(words, count):
    """Whether words stand at tokens, of which there are so many."""
    return all(isinstance(w.text, str) and w.tokens and set(w.tokens) <= set(range(count)) for w in words)


def _beside_fits(trace, text, pixels, wide):
    """Whether what is known of a text beside the image fits its maps."""
    known, maps = trace.beside[text], trace.streamed.get(text, {})
    return (
        type(known.ends) is bool
        and set(maps) == set(trace.sizes)
        and _words_fit(known.words, known.length)
        and all(x.shape[1] == known.length for x in maps.values())
        and all(x.shape == (known.length, pixels[name]) for name, x in known.products.items())
        and all(x.shape == (known.length, wide) for x in known.outputs.values())
    )


def _weights_fit(layer, width):
    """Whether a layer's weights fit one another and texts of some width; in a U-Net it gives what it takes, in size."""
    channels = 0 if layer.weight is None else len(layer.weight)
    shapes = dict.fromkeys(("weight", "value"), (channels, width)) | dict.fromkeys(("bias", "value_bias"), (channels,))
    shapes["out"] = (channels, channels)
    norms = [
        (norm, channels if norm.whole else channels // layer.heads) for norm in (layer.norm_q, layer.norm_k) if norm
    ]
    return (
        channels % layer.heads == 0
        and all(x.shape == shapes[part] for part, x in layer.weights.items())
        and all(norm.fits(size) for norm, size in norms)
    )
