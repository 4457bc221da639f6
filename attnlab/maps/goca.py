"""GoCA's maps: heads weighed by their agreement with the layer, layers by that of their self-attention."""

import math
from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch

from ..recording import Recording
from ..recording.layers import Layers, as_list, exact
from ..recording.words import Query, Word
from ..tokens import Token
from .heatmaps import HeatMaps, minmax, resize
from .softmax import choose_text, heat_maps, prompt_text

__all__ = ["goca"]


@exact()
def goca(
    recording: Recording,
    text: str | torch.Tensor | Token | Sequence[str | Token] | None = None,
    *,
    words: Query | Sequence[Query] | None = None,
    rescaled: bool = True,
    layers: Layers = None,
    mode: str = "bilinear",
) -> HeatMaps:
    """Compute maps whose heads and layers count by how far they agree with the whole (GoCA, Meng et al., CVPR 2026).

    At a pixel, head h of a layer adds o_h, its attention times values through the layer's output weights, and all of
    them add o. Its weight is o_h · o, divided by the sum over heads. A layer's weight is the sum over all pairs of
    pixels of S · R, divided by the sum over layers: S is its self-attention, mean over heads; R, the reference, is the
    softmax of f · f' / sqrt(channels), where f is what self-attention gives the pixels in the middle one of the
    recorded layers (the paper chooses one for each model). S and f are resized to the grid of ``record(pipe,
    agreement=16)``; rows of S are not divided anew, so that those of small layers add up to more. The weighted mean of
    maps is clamped at 0. Rescaling keeps some words, divides them by their sum at each pixel, and stretches each to
    0..1. All is of sums over steps; the paper has one step, of a photo.

    Parameters
    ----------
    recording : Recording
        Of one image, of ``record(pipe, agreement=16)``, `record_image` or `record_again` with it.
    text : str, tensor, Token or Sequence[str or Token], optional
        The prompt as the model saw it unless given; in cross-attention, anything that `ovam` takes.
    words : str or sequence of str, optional
        Words that share out each pixel, two or more, asked for as in `HeatMaps`; all of the text unless given. Best
        are those of things and grounds, "house", "sky", without "a" and "with".
    rescaled : bool
        Whether maps are rescaled; else they are attention, of all tokens as in `daam`.
    layers, mode
        As in `daam`; maps are resized by layer, of all heads.

    Returns
    -------
    HeatMaps
        Values are float32 (word, row, column), 0..1; or (token, row, column), where they are not rescaled.

    Raises
    ------
    ValueError
        As `daam` and `ovam`; no agreement in the recording, fewer than two words, another text in joint attention.
    KeyError
        For a word that the text does not have.
    """
    trace, names = recording.trace, recording.choose_layers(layers)
    _check(trace, text)
    chosen = prompt_text(recording, None) if text is None else choose_text(recording, text, "{}", False, True)
    if trace.joint:
        largest = max((trace.sizes[name] for name in names), key=math.prod)
        sums = {name: trace.agreed[name].cpu().unflatten(-1, trace.sizes[name])[None] for name in names}
        maps = {name: resize(x / len(trace.steps), largest, mode, clamp=False)[0] for name, x in sums.items()}
    else:
        found = heat_maps(recording, chosen, names, None, None, "layer", mode, "agreement")
        maps = {name: torch.from_numpy(one.values) for name, one in found.items()}
    weights = torch.stack([trace.agreement[name] for name in names]).cpu()
    weights = weights / weights.sum()
    values = sum(weight * maps[name] for weight, name in zip(weights, names, strict=True)).clamp_(0)
    if not values.isfinite().all():
        raise ValueError("what was recorded holds NaN or infinity: generate in float32 or bfloat16")
    found = HeatMaps(values.numpy(), chosen.words, chosen.special)
    one = isinstance(words, tuple) and [*map(type, words)] == [str, int]  # ("house", 1), the second one
    asked = list(found) if words is None else [words] if one else as_list(words)
    return _rescaled(found, asked) if rescaled else found


def _rescaled(maps: HeatMaps, asked: list) -> HeatMaps:
    """Share out each pixel among some words, and stretch each word's map to 0..1."""
    if len(asked) < 2:
        raise ValueError(f"{len(asked)} words: give two or more, as one alone is 1 everywhere, or rescaled=False")
    values = np.stack([maps[query] for query in asked])
    values = values / np.maximum(values.sum(0), np.finfo(values.dtype).tiny)
    texts = [maps.words[query].text if isinstance(query, Integral) else query for query in asked]
    names = [text[0] if isinstance(text, tuple) else text for text in texts]
    return HeatMaps(minmax(values, values.shape[1:]), [Word(name, (i,)) for i, name in enumerate(names)], special=False)


def _check(trace, text):
    """Raise ValueError where a recording has no weights of layers, or no maps of a text."""
    if not trace.agreement:
        raise ValueError(
            "this recording does not say how far its layers agree: record(pipe, agreement=16), or "
            "record_again(pipe, recording, agreement=16) where it kept calls"
        )
    if trace.joint and text is not None:
        raise ValueError(
            "in joint attention heads are weighed while the model reads a text: leave text= out, after "
            f"record_again(pipe, recording, text={text!r}, agreement=16)"
        )
