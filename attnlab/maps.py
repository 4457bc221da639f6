"""From a recording and its words to heat maps.

Axes: step, head, token, pixel (row-major), then row, column. Tokens never stand on the last axis: with pixels there
the softmax over tokens runs along rows of memory, several times faster on a CPU.
"""

from collections.abc import Collection, Iterator, Sequence
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F

from . import plots, words
from .recording import Layers, Recording, Trace, as_list

CHUNK = 2**24  # most scores held at once: steps are taken in groups of this size


class HeatMaps:
    """The heat maps of a text: `maps["smoke"]` is float32 (row, column), a share of attention in 0..1.

    A word is asked for by name, `maps["red car"]` by phrase, `maps["car", 1]` as the second "car", `maps[3]` as the
    fourth word; each is the mean over its tokens. Iterating gives the words.

    Attributes
    ----------
    values : float32 (token, row, column), start token first, then the text's tokens, then the first end token
    words : the text's words, each with its positions on the token axis
    """

    def __init__(self, values: np.ndarray, text: Sequence[words.Word]):
        self.values = values
        self.words = list(text)

    def __getitem__(self, query: words.Query) -> np.ndarray:
        return self.values[list(words.find(self.words, query))].mean(0)

    def __iter__(self) -> Iterator[words.Query]:
        seen: dict[str, int] = {}
        names = [word.text for word in self.words]
        for name in names:
            seen[name] = seen.get(name, -1) + 1
            yield name if names.count(name) == 1 else (name, seen[name])

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, query: words.Query) -> bool:
        """Whether the text has such a word, once or more often."""
        return isinstance(query, str | tuple | Integral) and bool(words.matches(self.words, query))

    def __repr__(self) -> str:
        tokens, height, width = self.values.shape
        return f"<HeatMaps {height} x {width} of {' '.join(w.text for w in self.words)!r} ({tokens} tokens)>"

    @property
    def start(self) -> np.ndarray:
        """Map of the start token (row, column), where models put what no word claims."""
        return self.values[0]

    @property
    def end(self) -> np.ndarray:
        """Map of the first end token (row, column)."""
        return self.values[-1]

    def upscale(self, size: int | tuple[int, int], mode: str = "bicubic") -> "HeatMaps":
        """The same maps resized to (height, width), `mode` "bicubic" (clamped at 0) or "bilinear"."""
        size = (size, size) if isinstance(size, int) else tuple(size)
        values = resize(torch.from_numpy(self.values)[None], size, mode)[0]
        return HeatMaps(values.numpy(), self.words)

    def overlay(self, image, query: words.Query) -> np.ndarray:
        """`image` under the heat map of a word, uint8 (row, column, rgb) of the image's size."""
        return plots.overlay(image, self[query])


def daam(
    recording: Recording,
    *,
    layers: Layers = None,
    steps: int | Collection[int] | None = None,
    heads: int | Collection[int] | None = None,
    per: str | None = None,
    mode: str = "bicubic",
) -> HeatMaps | dict[object, HeatMaps]:
    """Diffusion attentive attribution maps of every word of the prompt (Tang et al., ACL 2023, equations 4 to 7).

    Softmax over the padded prompt as the model saw it; mean over steps; resized per layer and head to the largest
    recorded map and clamped at 0; mean over layers and heads.

    Parameters
    ----------
    recording : of one image; choose one with recording[i]
    layers : which recorded layers, by name, beginning of a name or map height; None for all
    steps : which recorded steps, by their number in the generation; None for all
    heads : which heads; None for all
    per : None for one result; "step", "layer" or "head" for a dict of one each, keyed by step number, by layer name
        or by (layer name, head)
    mode : "bicubic" or "bilinear"

    Returns
    -------
    HeatMaps of float32 (token, row, column), or a dict of them

    Raises
    ------
    ValueError : several images, a prompt given as embeddings, an unknown layer, step, head, `per` or `mode`
    """
    trace, text = recording.trace, recording.words
    names, steps = recording.choose_layers(layers), recording.choose_steps(steps)
    end = max((p for word in text for p in word.tokens), default=0) + 1
    tokens = list(range(end + 1))  # start, text and the first end token
    size = max((trace.sizes[name] for name in names), key=lambda s: s[0] * s[1])

    def layer_maps(name, steps):
        share = _softmax_share(trace, name, steps, trace.text, trace.visible)
        chosen = _choose_heads(heads, len(share), name)
        return resize(share[chosen][:, tokens].unflatten(-1, trace.sizes[name]), size, mode)

    def reduced(maps):
        return HeatMaps(torch.cat(maps).mean(0).numpy(), text)

    if per is None:
        return reduced([layer_maps(name, steps) for name in names])
    if per == "step":
        return {step: reduced([layer_maps(name, [step]) for name in names]) for step in steps}
    if per == "layer":
        return {name: reduced([layer_maps(name, steps)]) for name in names}
    if per == "head":
        return {
            (name, head): HeatMaps(values.numpy(), text)
            for name in names
            for head, values in zip(
                _choose_heads(heads, trace.layers[name].heads, name), layer_maps(name, steps), strict=True
            )
        }
    raise ValueError(f"per={per!r}: choose 'step', 'layer' or 'head', or leave it out")


def resize(maps: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Maps (n, token, row, column) to another size, pixel centers aligned; bicubic results are clamped at 0."""
    if mode not in ("bicubic", "bilinear"):
        raise ValueError(f"mode={mode!r}: choose 'bicubic' or 'bilinear'")
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    resized = F.interpolate(maps, size, mode=mode, align_corners=False)
    return resized.clamp_(min=0) if mode == "bicubic" else resized


@torch.no_grad()
def _softmax_share(trace: Trace, name: str, steps, text, visible) -> torch.Tensor:
    """Share of attention that each token of `text` gets, mean over steps: float32 (head, token, pixel)."""
    layer, recorded = trace.layers[name], trace.queries[name]
    keys = layer.keys(text) * layer.scale  # (head, token, width)
    index = [trace.steps.index(step) for step in steps]
    group = max(1, CHUNK // (keys.shape[0] * keys.shape[1] * recorded[0].shape[0]))
    total = 0
    for i in range(0, len(index), group):
        queries = layer.queries(torch.stack([recorded[k] for k in index[i : i + group]]).cpu())
        scores = keys @ queries.mT  # (step, head, token, pixel)
        if visible is not None:
            scores.masked_fill_(~visible[:, None], -torch.inf)
        total = total + scores.softmax(-2).sum(0)
    return total / len(index)


def _choose_heads(heads, count: int, name: str) -> list[int]:
    chosen = list(range(count)) if heads is None else as_list(heads)
    unknown = sorted(set(chosen) - set(range(count)))
    if unknown or not chosen:
        raise ValueError(f"heads={unknown or []} cannot be chosen: {name} has {count}, numbered from 0")
    return chosen
