"""Measure tokens and words on other images, and find the words of the dictionary that are nearest to a token."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from tqdm import tqdm

from ..maps.linear import Images, LinearMap, linear_maps
from ..maps.softmax import ovam
from ..recording import words
from ..recording.layers import exact
from ..recording.texts import TextEncoder
from ..tokens import Token
from . import targets

__all__ = ["Match", "best_words", "nearest_words", "transfer_matrix"]


class Match(NamedTuple):
    """A word, or a token by its name, and how well its maps fit regions."""

    word: str
    iou: float  # mean over images, at the threshold
    threshold: float  # fraction of each map's range


def transfer_matrix(
    tokens: Mapping[str, str | Token] | Sequence[str | Token],
    recordings: Images,
    masks: Sequence[ArrayLike],
    threshold: float | Mapping[str, float] | None = None,
) -> np.ndarray:
    """Measure the IoU of each token's map on each image's valid pixels: float64 (token, image), 0..1.

    Maps are linear, except those of tokens that were learned with a background: they are softmax maps over both. For
    results by prompt, class or origin take means over the columns of a group of images. ValueError as in `fit_token`,
    and without a token, or without a threshold for what has no fitted zero level.

    Parameters
    ----------
    tokens : Mapping[str, str or Token] or Sequence[str or Token]
        Learned ones or words, by name or in a row.
    recordings : Sequence[Recording or LinearMap]
        Of one model, one per image; softmax maps need recordings.
    masks
        As in `fit_token`.
    threshold : float in 0..1 or Mapping[str, float], optional
        Fraction of each map's range, of all tokens or of each by name; the zero level of fitted tokens unless given.
    """
    rows = _named(tokens)
    thresholds = [threshold.get(name) if isinstance(threshold, Mapping) else threshold for name, _ in rows]
    if bare := [name for (name, token), t in zip(rows, thresholds, strict=True) if t is None and not _fitted(token)]:
        raise ValueError(f"{', '.join(map(repr, bare))}: no fitted zero level, give a threshold, such as 0.5")
    maps_of, masks = _masked_images(recordings, masks)
    found = []
    for (_, token), t in zip(rows, thresholds, strict=True):
        found.append([targets.valid_iou(heat, mask, t) for heat, mask in zip(maps_of(token), masks, strict=True)])
    return np.array(found)


def best_words(recordings: Images, masks: Sequence[ArrayLike], among: Sequence[str | Token]) -> list[Match]:
    """Rank words or tokens by the IoU of their maps with regions, highest first: the thesis's search for words.

    Each has the threshold that is best for it on these images, and the mean IoU there. To know what a word is worth on
    others, take `transfer_matrix`.

    Parameters
    ----------
    recordings, masks
        As in `transfer_matrix`.
    among : Sequence[str or Token]
        Words, phrases and tokens to try, `words.vocabulary(tokenizer)` for example.
    """
    maps_of, masks = _masked_images(recordings, masks)
    found = []
    for name, word in tqdm(_named(among), desc="words", leave=False, delay=1):
        threshold, iou = targets.best_threshold_and_iou(maps_of(word), masks)
        found.append(Match(name, iou, threshold))
    return sorted(found, key=lambda match: -match.iou)


def _masked_images(recordings, masks):
    """Return a function that gives the maps of a word or token, one (row, column) per image, and the checked masks."""
    several = [recordings] if isinstance(recordings, LinearMap) else list(recordings)
    stack = linear_maps(several)

    def maps_of(token):
        if getattr(token, "background", None) is None:
            return stack[token]
        if any(isinstance(one, LinearMap) for one in several):
            raise ValueError(f"token {token.name!r} was learned for softmax maps, with a background: give recordings")
        return [ovam(one, token)[token] for one in several]

    return maps_of, targets.as_masks(masks, stack.size[1:], stack.size[0])


def _named(tokens) -> list[tuple[str, str | Token]]:
    tokens = [tokens] if isinstance(tokens, str | Token) else tokens
    rows = list(tokens.items()) if isinstance(tokens, Mapping) else [(getattr(one, "name", one), one) for one in tokens]
    if not rows:
        raise ValueError("no tokens: give learned ones, or words")
    return rows


def _fitted(token) -> bool:
    """Return whether a token's maps have a zero level."""
    return isinstance(token, Token) and (token.bias != 0 or token.metadata.get("method") in ("fit_token", "fit_tokens"))


@exact()
def nearest_words(
    token: Token,
    encoder: TextEncoder,
    among: Sequence[str] | None = None,
    recordings: Images | None = None,
    count: int = 10,
) -> list[tuple[str, float]]:
    """Return the words nearest to a token, nearest first, each with its cosine similarity, -1..1.

    What all words have in common is taken out of each before they are compared. ValueError for a token of another text
    width or model than the encoder.

    Parameters
    ----------
    token : Token
        Learned token.
    encoder : TextEncoder
        `TextEncoder.of(pipe)`, or a recording's.
    among : Sequence[str], optional
        Words to compare with; the tokenizer's whole words unless given (tens of thousands in CLIP: minutes).
    recordings : Sequence[Recording or LinearMap], optional
        Compare maps on these images, their spatial means taken out. Otherwise embeddings are compared, which tells
        less: most directions of their space leave no trace in a map.
    count : int
        How many words to return.
    """
    token.check(encoder.embed("a").shape[-1], encoder.model)
    among = words.vocabulary(encoder.tokenizer) if among is None else list(among)
    embeddings = [encoder.embed(word) for word in tqdm(among, desc="words", leave=False, delay=1)]
    compared = torch.stack([*embeddings, token.value])
    if recordings is not None:
        compared = compared @ linear_maps(recordings).matrix.T
        compared = compared - compared.mean(1, keepdim=True)
    common = F.normalize(compared[:-1].mean(0), dim=0)
    compared = F.normalize(compared - torch.outer(compared @ common, common), dim=1)
    near = zip(among, (compared[:-1] @ compared[-1]).tolist(), strict=True)
    return sorted(near, key=lambda pair: -pair[1])[:count]
