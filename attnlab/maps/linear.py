"""Linear DAAM: one matrix for all steps, layers and heads of a recording; a word's map is a product with it."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from .. import storage
from ..masks import IGNORE
from ..pipelines import bundled
from ..recording import Recording
from ..recording.layers import Layers, as_list, choose_heads, exact, split_heads
from ..recording.texts import TextEncoder, start_of
from ..tokens import Token
from .heatmaps import resize, upscale

__all__ = ["Images", "LinearMap", "linear_daam", "linear_maps"]

_COMMON = ("model", "layers", "heads", "scaled")  # metadata that maps of one stack agree in


class LinearMap:
    """Scores of any text embedding: `linear["smoke"]`, `linear[token]`, `linear @ embedding`: float32 (row, column).

    Scores are not probabilities: they have no unit, can be negative, and do not add up to 1 over words. In joint
    attention words lie in the space of what attention gives: see `vectors`, and `concept_maps`.

    Attributes
    ----------
    matrix : (row x column, text width) tensor of float32
        A map is the product of this matrix and a text embedding, plus `bias`. In output space the width is that of
        outputs of attention.
    bias : (row x column,) tensor of float32
        0 where the model's keys have no bias.
    size : (int, int) or (int, int, int)
        (row, column); (image, row, column) of a stack.
    encoder : TextEncoder, optional
        Turns words into embeddings.
    metadata : dict
        How it was made: model, prompt, seed, layers, steps, heads, scaled, space, ...
    vectors : dict of str to (image, width) tensor of float32
        In output space, of each text that the model read beside the image, what attention gave it: it is each image's.
    """

    def __init__(
        self, matrix, bias, size, encoder: TextEncoder | None = None, metadata: dict | None = None, vectors=None
    ):
        self.matrix, self.bias = matrix, bias
        self.size = tuple(size)
        rows = math.prod(self.size) if all(type(n) is int and n > 0 for n in self.size) else None
        if len(self.size) not in (2, 3) or matrix.ndim != 2 or not (rows,) == matrix.shape[:1] == bias.shape:
            shapes = f"matrix {tuple(matrix.shape)}, bias {tuple(bias.shape)}"
            raise ValueError(f"{shapes} and size {self.size} do not fit: a row of the matrix is a pixel of the map")
        self.encoder, self.metadata, self.vectors = encoder, dict(metadata or {}), dict(vectors or {})
        shape = (1, *self.size)[-3], matrix.shape[1]
        if wrong := [text for text, x in self.vectors.items() if x.shape != shape]:
            raise ValueError(f"vectors of {wrong} are not (image, width), {shape}")

    def __getitem__(self, word: str | Token) -> np.ndarray:
        """Return the map of a token, or of a word or phrase encoded by itself, mean over its tokens.

        The mask of a fitted token is where its map is above 0. ValueError for a token of another model or space.
        """
        if isinstance(word, Token):
            word.check(self.matrix.shape[1], self.model, {**self.metadata, "size": self.size[-2:]}, self.space)
            return self @ word.value + np.float32(word.bias)
        if self.space == "text":
            return self @ self.embed(word)
        vectors = _known(self.vectors, word)[..., None]  # of each image its own
        return (self.matrix.unflatten(0, (len(vectors), -1)) @ vectors).reshape(self.size).numpy()

    def embed(self, word: str) -> torch.Tensor:
        """Return the embedding (text width,) of a word by itself; ValueError where there is no text encoder.

        In output space it is the mean over images; ValueError for a text that was not read beside each.
        """
        if self.space == "output":
            return _known(self.vectors, word).mean(0)
        if self.encoder is None:
            raise ValueError("this LinearMap has no text encoder: load it with one, or multiply it with an embedding")
        return self.encoder.embed(word)

    @property
    def model(self) -> str | None:
        """Name of the recorded model, or None."""
        return self.metadata.get("model")

    @property
    def space(self) -> str:
        """Where its words and tokens lie: "text", among embeddings, or "output", among outputs of joint attention."""
        return self.metadata.get("space") or "text"

    def upscaled(self, word: str | Token, size: int | tuple[int, int]) -> np.ndarray:
        """Return `self[word]` resized bilinearly to (height, width), for each image of a stack."""
        return upscale(self[word], size)

    def labels(self, tokens: Mapping[str, Token], size: int | tuple[int, int]) -> np.ndarray:
        """Return which token's map is highest at each pixel: uint8 (row, column) or (image, row, column).

        0 where no map is above its zero level, 1 for the first token, and so on. ValueError for no token, or above 254.
        """
        if not 0 < len(tokens) < IGNORE:
            raise ValueError(f"{len(tokens)} tokens: give 1 to {IGNORE - 1}, which is as many as labels in uint8")
        maps = np.stack([self.upscaled(token, size) for token in tokens.values()])
        return np.where(maps.max(0) > 0, maps.argmax(0) + 1, 0).astype(np.uint8)

    @exact()
    def __matmul__(self, embedding: torch.Tensor | np.ndarray) -> np.ndarray:
        """Return the map (row, column) of an embedding (text width,), or maps (token, row, column) of several."""
        x = torch.as_tensor(embedding).detach().to("cpu", torch.float32)
        width = self.matrix.shape[1]
        if x.ndim not in (1, 2) or x.shape[-1] != width:
            raise ValueError(f"embeddings are ({width},) or (token, {width}) for this model, not {tuple(x.shape)}")
        if not x.isfinite().all():
            raise ValueError("the embedding holds NaN or infinity")
        return (x @ self.matrix.T + self.bias).unflatten(-1, self.size).numpy()

    @classmethod
    def stack(cls, maps: Sequence["LinearMap"]) -> "LinearMap":
        """Join the maps of several images into one of `size` (image, row, column), for one product per word.

        ValueError where they were not made in one way.
        """
        kinds = {str((m.size, m.matrix.shape[1], m.space, *(m.metadata.get(name) for name in _COMMON))) for m in maps}
        if len(kinds) != 1:
            raise ValueError(f"stack wants one size, text width, model, layers, heads, scale, space: {sorted(kinds)}")
        matrix, bias = torch.cat([m.matrix for m in maps]), torch.cat([m.bias for m in maps])
        metadata = {name: maps[0].metadata.get(name) for name in _COMMON} | {"space": maps[0].space}
        metadata["images"] = [m.metadata for m in maps]
        known = [text for text in maps[0].vectors if all(text in m.vectors for m in maps)]
        vectors = {text: torch.cat([m.vectors[text] for m in maps]) for text in known}
        return cls(matrix, bias, (len(maps), *maps[0].size), maps[0].encoder, metadata, vectors)

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.size))
        megabytes = (self.matrix.nbytes + self.bias.nbytes) / 1e6
        return f"<LinearMap {size}, {self.space} width {self.matrix.shape[1]}, {megabytes:.1f} MB>"

    def save(self, path: str | Path) -> Path:
        """Write to a safetensors file in half precision, with the metadata, and return its path."""
        scale = float(self.matrix.abs().max()) or 1.0  # small scores would lose digits in half precision
        tensors = {"matrix": (self.matrix / scale).half(), "bias": (self.bias / scale).half()}
        tensors |= {f"vector.{i}": x for i, x in enumerate(self.vectors.values())}
        known = {"size": self.size, "scale": scale} | ({"vectors": list(self.vectors)} if self.vectors else {})
        return storage.write(path, "LinearMap", tensors, {**self.metadata, **known})

    @classmethod
    def load(cls, path: str | Path, encoder: TextEncoder | None = None) -> "LinearMap":
        """Read what `save` wrote; FileNotFoundError or ValueError where that fails.

        `encoder` is a `TextEncoder.of(pipe)`; unless given, the recorded model's own is loaded when first needed.
        """
        file = storage.File(path, "LinearMap")
        with storage.intact(path):
            size, scale = (file.metadata.pop(name) for name in ("size", "scale"))
            if not (isinstance(scale, float) and 0 < scale < math.inf):
                raise ValueError(f"its scale is {scale!r}")
            matrix, bias = (file.read(name).float() * scale for name in ("matrix", "bias"))
            vectors = {text: file.read(f"vector.{i}") for i, text in enumerate(file.metadata.pop("vectors", []))}
            models = {file.metadata["model"]} if file.metadata.get("model") else set()
            unknown = [] if models & bundled().keys() else None  # an earlier version's: those models were trained anew
            start = file.metadata.get("start", unknown)
            kind = file.metadata.get("denoiser"), file.metadata.get("options")
            encoder = TextEncoder.fitting(encoder, models, path, start, *kind)
            return cls(matrix, bias, size, encoder, file.metadata, vectors)


def _known(vectors, word):
    """Return a word's vectors, one of each image; ValueError where the model has not read it beside each."""
    if word not in vectors:
        known = ", ".join(map(repr, vectors)) or "none"
        raise ValueError(
            f"in output space a word is what the model made of it beside the image; it has read {known}, and not "
            f"{word!r}: record_again(pipe, recording, texts=[{word!r}], outputs=True)"
        )
    return vectors[word]


Images = Recording | LinearMap | Iterable[Recording | LinearMap]
"""Recorded images, or their linear maps: one or several."""


def linear_maps(recordings: Images) -> LinearMap:
    """Return the linear maps of all images as one stack; `linear_daam` makes those of recordings.

    ValueError where there are none, or they differ in size, model, layers, heads, scale or space.
    """
    if isinstance(recordings, LinearMap):
        recordings = [recordings]
    maps = [one if isinstance(one, LinearMap) else linear_daam(one) for one in recordings]
    if len(maps) == 1 and len(maps[0].size) == 3:
        return maps[0]
    if not maps:
        raise ValueError("no recordings: give one or more, or LinearMaps")
    return LinearMap.stack(maps)


@exact()
def linear_daam(
    recording: Recording,
    *,
    layers: Layers = None,
    steps: int | Collection[int] | None = None,
    heads: int | Collection[int] | None = None,
    scaled: bool = True,
    mode: str = "bilinear",
) -> LinearMap:
    """Compute Linear DAAM: query-key products without a softmax, so that one matrix holds all steps, layers and heads.

    A(pixel, :) = mean over step, layer, head of resize(q W_k) / sqrt(d); a text embedding x has the map A x (+ b where
    the model's keys have a bias), of the size of the largest chosen layer's maps. ValueError as in `daam`, and for keys
    that the model normalizes: those are not linear.

    Keys of joint attention are no function of a text. There A(pixel, :) = mean over step and layer of the pixel's
    output of attention, of a recording that kept these (``outputs=True``). Words and tokens lie in the space of outputs
    and a word is the mean over step, layer and its tokens of their outputs, as in `concept_maps`.

    Parameters
    ----------
    recording, layers, steps, heads
        As in `daam`; outputs are of all heads.
    scaled : bool
        Whether products are divided by sqrt(d), as in the model's attention and OVAM; the thesis does not divide.
        Outputs are not divided.
    mode : str
        "bilinear" or "bicubic", neither clamped: scores may be negative.
    """
    trace = recording.trace
    names, steps = recording.choose_layers(layers), recording.choose_steps(steps)
    if trace.joint:
        return _of_outputs(recording, names, heads, mode)
    if not (trace.queries or trace.sums):
        raise ValueError("this recording kept no queries and no sum of them: record with keep='sum' or 'queries'")
    index = [trace.steps.index(step) for step in steps]
    sums, count = {}, 0  # by map size: resizing is linear, so all layers of one size are added before it
    for name in names:
        layer, size = trace.layers[name], trace.sizes[name]
        if layer.norm_k is not None:
            raise ValueError(f"{name} normalizes its keys, which is not linear: use ovam")
        chosen = choose_heads(heads, layer.heads, name)
        if trace.queries:
            queries = sum(layer.queries(trace.queries[name][i]) for i in index)  # (head, pixel, width)
        else:  # summed up while recording, normalized already
            queries = split_heads(trace.sums[name], layer.heads, None)
        layer = layer.to(queries.device)
        bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        weights = torch.cat([layer.weight.float(), bias[:, None].float()], 1)  # (head x width, text width + 1)
        weights = weights.unflatten(0, (layer.heads, -1))[chosen].flatten(0, 1)
        scores = (queries[chosen].transpose(0, 1).flatten(1) @ weights).cpu()  # (pixel, text width + 1)
        sums[size] = sums.get(size, 0) + (layer.scale if scaled else 1.0) * scores
        count += len(index) * len(chosen)
    largest = max(sums, key=math.prod)
    resized = [resize(total.T.unflatten(-1, size)[None], largest, mode, clamp=False)[0] for size, total in sums.items()]
    matrix = sum(resized).flatten(1).T / count
    if not matrix.isfinite().all():
        raise ValueError("the recorded queries hold NaN or infinity: generate in float32 or bfloat16")
    choice = {"layers": names, "steps": list(steps), "heads": None if heads is None else as_list(heads)}
    start = start_of(trace) if trace.words is not None else None
    metadata = {**recording.metadata, **choice, "scaled": scaled, "resize": mode, "start": start, "space": "text"}
    metadata["versions"] = storage.versions()
    return LinearMap(matrix[:, :-1].contiguous(), matrix[:, -1].contiguous(), largest, recording.encoder, metadata)


def _of_outputs(recording, names, heads, mode) -> LinearMap:
    """Return the linear map of joint attention, in the space of its outputs; ValueError where none were kept."""
    trace = recording.trace
    if not trace.outputs:
        raise ValueError(
            "in joint attention keys change with the image, so a recording has no linear map of texts: use daam; or "
            "one of outputs of attention, record_again(pipe, recording, texts=[...], outputs=True)"
        )
    if heads is not None:
        raise ValueError("outputs are of all heads side by side: leave heads= out")
    size, count = max((trace.sizes[name] for name in names), key=math.prod), len(names) * len(trace.steps)
    maps = [trace.outputs[name].cpu().T.unflatten(-1, trace.sizes[name])[None] for name in names]
    matrix = sum(resize(found, size, mode, clamp=False)[0] for found in maps).flatten(1).T / count
    if not matrix.isfinite().all():
        raise ValueError("the recorded outputs hold NaN or infinity: generate in float32 or bfloat16")
    vectors = {
        text: sum(beside.mean("outputs", name).cpu() for name in names)[None] / count
        for text, beside in trace.beside.items()
    }
    metadata = {**recording.metadata, "layers": names, "steps": list(trace.steps), "heads": None, "scaled": None}
    metadata |= {"resize": mode, "start": None, "space": "output", "versions": storage.versions()}
    return LinearMap(matrix.contiguous(), torch.zeros(len(matrix)), size, recording.encoder, metadata, vectors)
