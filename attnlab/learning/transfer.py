"""What learned words are worth on other images, and which words of the dictionary come near."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from .. import metrics
from ..maps.heatmaps import minmax, upscale
from ..maps.linear import Images, LinearMap, linear_maps
from ..maps.softmax import ovam
from ..recording import words
from ..recording.texts import TextEncoder
from ..tokens import Token
from . import targets


class Match(NamedTuple):
    """A word, or a token by its name, for a region: its mean IoU at `threshold`, a share of each map's range."""

    word: str
    iou: float
    threshold: float


def transfer_matrix(
    tokens: Mapping[str, str | Token] | Sequence[str | Token],
    recordings: Images,
    masks: Sequence[ArrayLike],
    threshold: float | Mapping[str, float] | None = None,
) -> np.ndarray:
    """IoU of each token's map on each image: float (token, image), 0..1.

    Maps are linear, but for tokens that were learned beside a background: those are softmax maps beside it. Group the
    images as you like, by prompt, class or origin, and take means over the columns of a group.

    Parameters
    ----------
    tokens : learned ones or words; by name, or in a row
    recordings : of one model, or LinearMaps, one an image; softmax maps need recordings
    masks : of each image, (row, column) of any size that covers the image; 255 where undecided, which does not count
    threshold : a share of each map's range, of all or of each by name; None for the zero level of fitted tokens

    Raises
    ------
    ValueError : no token or image, no threshold for what has no fitted zero level, masks or recordings as `fit_token`
        refuses them
    """
    rows = _named(tokens)
    cuts = [threshold.get(name) if isinstance(threshold, Mapping) else threshold for name, _ in rows]
    if bare := [name for (name, token), cut in zip(rows, cuts, strict=True) if cut is None and not _fitted(token)]:
        raise ValueError(f"{', '.join(map(repr, bare))}: no fitted zero level, give a threshold, such as 0.5")
    seen = _Seen(recordings)
    masks = targets.as_masks(masks, seen.stack.size[1:], seen.stack.size[0])
    found = [
        [_iou(heat, mask, cut) for heat, mask in zip(seen.maps(token), masks, strict=True)]
        for (_, token), cut in zip(rows, cuts, strict=True)
    ]
    return np.array(found)


def best_words(recordings: Images, masks: Sequence[ArrayLike], among: Sequence[str | Token]) -> list[Match]:
    """Words, or tokens, by how well their maps fit regions: the thesis's search for descriptive words.

    Each at the threshold that is best for it on these images, with the mean IoU there; to know what the word is worth,
    take `transfer_matrix` of it on others.

    Parameters
    ----------
    recordings, masks : as for `transfer_matrix`
    among : words and phrases to try, `words.vocabulary(tokenizer)` for example
    """
    seen = _Seen(recordings)
    masks = targets.as_masks(masks, seen.stack.size[1:], seen.stack.size[0])
    truths, valid = [mask == 1 for mask in masks], [mask != targets.IGNORE for mask in masks]
    found = []
    for name, word in tqdm(_named(among), desc="words", leave=False):
        heats = [minmax(heat, mask.shape) for heat, mask in zip(seen.maps(word), masks, strict=True)]
        ious = metrics.miou_curve(heats, truths, valid=valid)
        cut = metrics.best_threshold(metrics.THRESHOLDS, ious)
        found.append(Match(name, float(ious.mean(1).max()), cut))
    return sorted(found, key=lambda match: -match.iou)


class _Seen:
    """Images in which words and tokens are looked for."""

    def __init__(self, recordings):
        self.several = [recordings] if isinstance(recordings, LinearMap) else list(recordings)
        self.stack = linear_maps(self.several)

    def maps(self, token):
        """One map (row, column) an image."""
        if getattr(token, "background", None) is None:
            return self.stack[token]
        if any(isinstance(one, LinearMap) for one in self.several):
            raise ValueError(f"token {token.name!r} was learned for softmax maps, beside a background: give recordings")
        return [ovam(one, token)[token] for one in self.several]


def _named(tokens) -> list[tuple[str, str | Token]]:
    if isinstance(tokens, Mapping):
        rows = list(tokens.items())
    else:
        tokens = [tokens] if isinstance(tokens, str | Token) else tokens
        rows = [(getattr(token, "name", token), token) for token in tokens]
    if not rows:
        raise ValueError("no tokens: give learned ones, or words")
    return rows


def _fitted(token) -> bool:
    """Whether 0 means something on its maps."""
    return isinstance(token, Token) and (token.bias != 0 or token.metadata.get("method") in ("fit_token", "fit_tokens"))


def _iou(heat, mask, cut):
    known = mask != targets.IGNORE
    found = upscale(heat, mask.shape) > 0 if cut is None else minmax(heat, mask.shape) >= cut
    return metrics.iou(found[known], mask[known] == 1)


def nearest_words(
    token: Token,
    encoder: TextEncoder,
    among: Sequence[str] | None = None,
    recordings: Images | None = None,
    count: int = 10,
) -> list[tuple[str, float]]:
    """Words nearest to a token, with their similarity, -1..1, nearest first.

    Parameters
    ----------
    encoder : `TextEncoder.of(pipe)`, or a recording's
    among : words to compare with; the tokenizer's whole words unless given (tens of thousands in CLIP: minutes)
    recordings : similarity is the cosine of both maps over these images, spatial mean taken out; without, of both
        embeddings, which says less: most directions of the space leave no trace in a map. What all words have in common
        is taken out of both
    count : how many words to return

    Raises
    ------
    ValueError : a token of another text width or model than the encoder
    """
    token.check(encoder.embed("a").shape[-1], encoder.model)
    among = words.vocabulary(encoder.tokenizer) if among is None else list(among)
    embeddings = [encoder.embed(word) for word in tqdm(among, desc="words", leave=False)]
    seen = torch.stack([*embeddings, token.value])
    if recordings is not None:
        seen = seen @ linear_maps(recordings).matrix.T
        seen = seen - seen.mean(1, keepdim=True)
    common = F.normalize(seen[:-1].mean(0), dim=0)
    seen = F.normalize(seen - torch.outer(seen @ common, common), dim=1)
    near = zip(among, (seen[:-1] @ seen[-1]).tolist(), strict=True)
    return sorted(near, key=lambda pair: -pair[1])[:count]
