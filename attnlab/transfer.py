"""What learned words are worth on other images, and which words of the dictionary come near."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from . import metrics, targets, words
from .heatmaps import stretch, upscale
from .linear import LinearMap, linear_maps
from .recording import Recording
from .texts import TextEncoder
from .tokens import Token

Images = Recording | LinearMap | Iterable[Recording | LinearMap]


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
    """IoU of each token's linear map on each image: float (token, image), 0..1.

    Group the images as you like, by prompt, class or origin, and take means over the columns of a group.

    Parameters
    ----------
    tokens : learned ones or words; by name, or in a row
    recordings : of one model, or LinearMaps, one an image
    masks : of each image, (row, column) of any size that covers the image; 255 where undecided, which does not count
    threshold : a share of each map's range, of all or of each by name; None for the zero level of fitted tokens

    Raises
    ------
    ValueError : no token or image, a word without a threshold, masks or recordings as `fit_token` refuses them
    """
    named = tokens if isinstance(tokens, Mapping) else {getattr(t, "name", t): t for t in tokens}
    if not named:
        raise ValueError("no tokens: give learned ones, or words")
    cuts = {name: threshold.get(name) if isinstance(threshold, Mapping) else threshold for name in named}
    bare = [n for n, t in named.items() if cuts[n] is None and (isinstance(t, str) or "threshold" in t.about)]
    if bare:
        raise ValueError(f"{', '.join(map(repr, bare))}: no fitted zero level, give a threshold, such as 0.5")
    stack = linear_maps(recordings)
    masks = targets.as_masks(masks, stack.size[1:], stack.size[0])
    rows = [[_iou(h, m, cuts[name]) for h, m in zip(stack[t], masks, strict=True)] for name, t in named.items()]
    return np.array(rows)


def _iou(heat, mask, cut):
    known = mask != targets.UNDECIDED
    found = upscale(heat, mask.shape) > 0 if cut is None else stretch(heat, mask.shape) >= cut
    return metrics.iou(found[known], mask[known] == 1)


def best_words(recordings: Images, masks: Sequence[ArrayLike], among: Sequence[str | Token]) -> list[Match]:
    """Words, or tokens, by how well their Linear DAAM maps fit regions: the thesis's search for descriptive words.

    Each at the threshold that is best for it on these images, with the mean IoU there; to know what the word is worth,
    take `transfer_matrix` of it on others.

    Parameters
    ----------
    recordings, masks : as for `transfer_matrix`
    among : words and phrases to try, `words.vocabulary(tokenizer)` for example
    """
    stack = linear_maps(recordings)
    masks = targets.as_masks(masks, stack.size[1:], stack.size[0])
    truths = [mask == 1 for mask in masks]
    found = []
    for word in tqdm(among, desc="words", leave=False):
        heats = [stretch(heat, mask.shape) for heat, mask in zip(stack[word], masks, strict=True)]
        ious = metrics.miou_curve(heats, truths)
        cut = metrics.best_threshold(metrics.THRESHOLDS, ious)
        found.append(Match(getattr(word, "name", word), float(ious.mean(1).max()), cut))
    return sorted(found, key=lambda match: -match.iou)


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
