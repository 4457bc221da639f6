"""Contribution maps: not where a layer looks for a token, but what it adds to a pixel for it."""

from collections.abc import Collection, Sequence

import torch

from ..recording import Recording
from ..recording.layers import KINDS, Layers, check_choice
from ..tokens import Token
from .heatmaps import HeatMaps
from .softmax import choose_text, heat_maps, prompt_text

__all__ = ["contributions"]


def contributions(
    recording: Recording,
    text: str | torch.Tensor | Token | Sequence[str | Token] | None = None,
    *,
    kind: str = "norm",
    context: str = "{}",
    padded: bool = False,
    special: bool = True,
    layers: Layers = None,
    steps: int | Collection[int] | None = None,
    heads: int | Collection[int] | None = None,
    per: str | None = None,
    mode: str = "bilinear",
) -> HeatMaps | dict[object, HeatMaps]:
    """Compute contribution maps: how much of what attention adds to a pixel comes from each token.

    For each token a head adds its attention times the token's value, through the layer's output weights. The sum over
    heads is the token's vector o(token); the sum over tokens is o, all that the layer adds for the text, but its bias.
    So a token that is looked at, but adds little, counts little. All is divided by the mean length of o over pixels, by
    layer and step: some layers have longer vectors than others, and all count the same.

    Parameters
    ----------
    recording
        As in `daam`, of keep="queries" (the default) or "contributions".
    text : str, tensor, Token or Sequence[str or Token], optional
        The prompt as the model saw it unless given; else anything that `ovam` takes, and o is that of this text.
    kind : str
        "norm", the length of o(token) (Kobayashi et al., EMNLP 2020, in language models); or "projection", the length
        of its part along o, negative where the token works against the others. Projections add up over heads, and over
        tokens, padding included, to the length of o.
    context, padded, special
        As in `ovam`, for a text.
    layers, steps, heads, per, mode
        As in `daam`; of chosen heads, o(token) is the sum, and o is always of all. Bicubic maps are not clamped.

    Returns
    -------
    HeatMaps or dict of HeatMaps
        Values are float32 (token, row, column), mean over steps and layers.

    Raises
    ------
    ValueError
        As `daam` and `ovam`; an unknown `kind`; a recording without values, as in files of earlier versions.
    """
    check_choice("kind", kind, KINDS)
    if text is not None:
        chosen = choose_text(recording, text, context, padded, special)
    elif padded or context != "{}" or not special:
        raise ValueError("padded, context and special are about a text: give text=, or leave them out for the prompt")
    else:
        chosen = prompt_text(recording, steps)
    return heat_maps(recording, chosen, layers, steps, heads, per, mode, kind)
