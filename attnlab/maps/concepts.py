"""Concept maps: words and pixels compared by what joint attention gives both."""

import math
from collections.abc import Sequence

import torch

from ..recording import Recording
from ..recording.layers import Layers, as_list, exact
from ..recording.words import Word
from .heatmaps import HeatMaps, resize

__all__ = ["concept_maps"]


@exact()
def concept_maps(
    recording: Recording,
    concepts: str | Sequence[str] | None = None,
    *,
    softmax: bool = True,
    layers: Layers = None,
    mode: str = "bilinear",
) -> HeatMaps:
    """Compute concept maps: how alike each pixel's attention output is to a word's (Helbling et al., ICML 2025).

    In joint attention a pixel p gets an output o(p), of all heads side by side, before it is projected; and a token of
    a text that the model reads beside the image gets one, too. A concept c is such a text, and o'(c) the mean over all
    tokens of its words. Its score is A_c(p) = mean over steps and layers of o'(c) · o(p).

    Parameters
    ----------
    recording : Recording
        Of one image, of ``record(pipe, texts=["fox", "snow"], outputs=True)`` or ``record_again`` with these.
    concepts : str or sequence of str, optional
        Some of those texts; all unless given.
    softmax : bool
        Whether concepts share out each pixel, which adds up to 1; else scores, which have no unit and may be negative.
    layers, mode
        As in `daam`; scores are resized before the softmax, and not clamped.

    Returns
    -------
    HeatMaps
        Values are float32 (concept, row, column); `maps["fox"]` is asked by the whole text.

    Raises
    ------
    ValueError
        Several images, no outputs, a text that the model has not read beside the image, one concept alone with
        softmax, an unknown layer or `mode`, or outputs that hold NaN or infinity.
    """
    trace = recording.trace
    wanted = list(dict.fromkeys(trace.beside if concepts is None else as_list(concepts)))  # each once
    _check(trace, wanted, softmax)
    names = recording.choose_layers(layers)
    largest = max((trace.sizes[name] for name in names), key=math.prod)
    total = 0
    for name in names:
        scores = torch.stack([trace.beside[text].mean("products", name) for text in wanted]).cpu()  # (concept, pixel)
        total = total + resize(scores.unflatten(-1, trace.sizes[name])[None], largest, mode, clamp=False)[0]
    scores = total / (len(names) * len(trace.steps))
    if not scores.isfinite().all():
        raise ValueError("the recorded outputs hold NaN or infinity: generate in float32 or bfloat16")
    values = scores.softmax(0) if softmax else scores
    return HeatMaps(values.numpy(), [Word(text, (i,)) for i, text in enumerate(wanted)], special=False)


def _check(trace, wanted, softmax):
    """Raise ValueError where texts have no outputs, or one of them would share out pixels with none."""
    if not trace.joint:
        raise ValueError("concept maps are of joint attention: here take ovam, or linear_daam for scores")
    how = "record_again(pipe, recording, texts=[...], outputs=True), or record(pipe, ...) with these"
    if not trace.outputs:
        raise ValueError(f"this recording kept no outputs of attention: {how}")
    if unknown := [text for text in wanted if text not in trace.beside]:
        known = ", ".join(map(repr, trace.beside)) or "none"
        raise ValueError(f"the model has not read {unknown} beside the image, only {known}: {how}")
    if len(wanted) < 1 + softmax:
        raise ValueError(f"{len(wanted)} concepts: give two or more, as one alone is 1 everywhere, or softmax=False")
