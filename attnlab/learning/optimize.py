"""Optimize tokens as published: gradient descent on a text embedding, so that its map fits masks.

token = optimize_token(recordings, masks, init="car")                  # the thesis's: one token, linear
token = optimize_token(recordings, masks, init="car", preset="ovam")   # OVAM's: with a background, softmax
"""

import contextlib
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from tqdm import tqdm

from ..maps.heatmaps import resize
from ..maps.linear import Images, LinearMap, linear_maps
from ..recording.layers import attention, exact
from ..tokens import MAP_SETTINGS, Token
from . import targets

__all__ = ["PRESETS", "OptimizerSettings", "optimize_token"]


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of `optimize_token`: what is optimized, and how."""

    softmax: bool  # maps by softmax over the tokens; otherwise linear
    background: bool  # a second token for everything outside the masks, which starts as the start token
    loss: str  # "binary": cross-entropy of the map as a probability; "logits": of the maps of both tokens as logits
    lr: float  # learning rate of gradient descent without momentum
    epochs: int  # passes over all images
    lr_gamma: float = 1.0  # factor on the learning rate after each `lr_step` epochs
    lr_step: int = 120
    minmax: bool = True  # rescale each image's maps, those of all tokens together, to 0..1 before the loss

    def __post_init__(self):
        if self.loss not in ("binary", "logits"):
            raise ValueError(f"loss={self.loss!r}: choose 'binary' or 'logits'")
        if not self.background and (self.softmax or self.loss == "logits"):
            raise ValueError("one token alone is 1 everywhere in a softmax, logits' included: background=True")
        if not (self.epochs >= 1 and self.lr > 0 and self.lr_gamma > 0 and self.lr_step >= 1):
            raise ValueError("epochs and lr_step are 1 or more, lr and lr_gamma positive")


PRESETS = {
    # thesis, UAM 2023: min-max normalized Linear DAAM, cross-entropy
    "thesis": OptimizerSettings(softmax=False, background=False, loss="binary", lr=3, epochs=500),
    # the thesis's second form: tokens for the object and for the rest
    "thesis-softmax": OptimizerSettings(softmax=True, background=True, loss="binary", lr=3, epochs=500),
    # OVAM, CVPR 2024. Its loss takes maps in 0..1 as logits, so that it stays at 0.31 for a perfect mask
    "ovam": OptimizerSettings(softmax=True, background=True, loss="logits", lr=100, epochs=800, lr_gamma=0.7),
}
_QUERIES_AT_ONCE = 2**20  # most query values per product: steps of small layers are computed together
_MIN_PROBABILITY = 1e-4  # probabilities are clamped this far from 0 and 1, so that the loss stays finite


@exact()
def optimize_token(
    recordings: Images,
    masks: Sequence[ArrayLike],
    init: str | Token | torch.Tensor,
    preset: str | OptimizerSettings = "thesis",
    *,
    name: str | None = None,
    collapse: bool = True,
) -> Token:
    """Optimize a token by gradient descent on its map: Marcos-Manchón's thesis (UAM 2023); OVAM (CVPR 2024), 3.3.

    The embedding with the lowest loss of all epochs is kept; an interrupt (the stop button) ends the optimization early
    with the best so far. ValueError as in `fit_token`, and for LinearMaps where softmax maps are asked for, an init
    whose map is flat, and keys that the model normalizes.

    The token has bias 0 and, where there is one, its `background`; its `metadata` has losses (one per epoch), seconds,
    and the highest mean IoU of the training images with its threshold, a fraction of each map's range.

    Parameters
    ----------
    recordings : Sequence[Recording or LinearMap]
        Of one model, one per image; LinearMaps are enough for linear maps.
    masks
        As in `fit_token`; maps are resized to them bilinearly.
    init : str, Token or (text width,) tensor
        Word, token or embedding to start from; with a background also both embeddings, (2, text width).
    preset : str or OptimizerSettings
        "thesis", "thesis-softmax", "ovam", or settings of your own: replace(PRESETS["ovam"], epochs=100).
    name : str, optional
        Name of the token; the word's own, or "token".
    collapse : bool
        Whether all steps, layers and heads of linear maps are added up to one matrix first. Otherwise every epoch
        computes with all queries, as published, with the same result.
    """
    started = time.perf_counter()
    settings = PRESETS.get(preset) if isinstance(preset, str) else preset
    if settings is None:
        raise ValueError(f"preset={preset!r}: choose {', '.join(map(repr, PRESETS))}, or OptimizerSettings")
    maps = _maps_of(recordings, settings, collapse)
    masks = targets.as_masks(masks, maps.size, maps.count)
    x = _initial_embeddings(maps, init, settings.background)
    for i in range(maps.count):
        heats = maps(i, x)
        if not heats.isfinite().all():
            raise ValueError(f"the maps of image {i} hold NaN or infinity: record in float32 or bfloat16")
        if heats.max() == heats.min():
            raise ValueError(f"the map of image {i} is flat where the descent starts: start from a word")
    best, losses = _descend(x, _loss_of(maps, masks, settings), settings)
    threshold, iou = targets.best_threshold_and_iou([maps(i, best)[-1].numpy() for i in range(maps.count)], masks)
    metadata = {"method": "optimize_token", "model": maps.model, **maps.settings, "size": list(maps.size)}
    word = init if isinstance(init, str) else init.name if isinstance(init, Token) else None
    metadata |= {"images": maps.count, "init": word, "descent": asdict(settings)}
    metadata |= {"losses": losses, "threshold": threshold, "iou": iou, "seconds": time.perf_counter() - started}
    name = name or word or "token"
    background = Token(f"background of {name}", best[0], metadata=metadata) if settings.background else None
    return Token(name, best[-1], background=background, metadata=metadata)


class _CollapsedMaps:
    """Linear maps (token, row, column) of embeddings (token, width) on an image, by one matrix per image."""

    def __init__(self, stack: LinearMap):
        self.count, self.size = stack.size[0], stack.size[1:]
        self.matrices = stack.matrix.unflatten(0, (self.count, -1))
        self.biases = stack.bias.unflatten(0, (self.count, -1))
        self.model, self.encoder, self.width = stack.model, stack.encoder, stack.matrix.shape[1]
        self.settings = {name: stack.metadata.get(name) for name in MAP_SETTINGS if name != "size"}

    def __call__(self, i, x):
        return (x @ self.matrices[i].T + self.biases[i]).unflatten(-1, self.size)


class _QueryMaps:
    """Maps (token, row, column) of embeddings (token, width) on an image, from all its recorded queries."""

    def __init__(self, recordings, softmax):
        self.traces = [one.trace for one in recordings]
        self.count, self.softmax = len(self.traces), softmax
        first = self.traces[0]
        self.size = max(first.sizes.values(), key=math.prod)
        self.model, self.encoder, self.width = first.generation.model, recordings[0].encoder, first.text.shape[-1]
        self.settings = {"layers": list(first.sizes), "heads": None, "scaled": True}
        for trace in self.traces:
            if not trace.queries:
                other = "" if softmax else ", or give LinearMaps"
                raise ValueError(f"this recording kept no queries: record with keep='queries'{other}")
            wanted, found = (self.model, first.sizes), (trace.generation.model, trace.sizes)
            if found != wanted:
                raise ValueError(f"recordings differ in model, size or layers: {wanted} and {found}")
            if any(layer.norm_k is not None for layer in trace.layers.values()):
                raise ValueError("this model normalizes its keys, through which no gradient is passed here")

    def __call__(self, i, x):
        trace, total, count = self.traces[i], 0, 0
        for name, recorded in trace.queries.items():
            device = trace.device(name)
            layer = trace.layers[name].to(device)
            keys = layer.keys(x.to(device)) * layer.scale
            group = max(1, _QUERIES_AT_ONCE // recorded[0].numel())  # steps at once
            values = 0
            for first in range(0, len(recorded), group):
                queries = [recorded[k] for k in range(first, min(first + group, len(recorded)))]
                queries = layer.queries(torch.stack(queries))  # (step, head, pixel, width)
                values = values + (attention(queries, keys) if self.softmax else keys @ queries.mT).sum((0, 1))
            total = total + resize(values.unflatten(-1, trace.sizes[name])[None], self.size, "bilinear")[0].cpu()
            count += len(recorded) * layer.heads
        return total / count


def _maps_of(recordings, settings, collapse):
    """Return what computes the maps of embeddings on each image."""
    several = [recordings] if isinstance(recordings, LinearMap) else list(recordings)
    linear = any(isinstance(one, LinearMap) for one in several)
    if settings.softmax and linear:
        raise ValueError("softmax maps need recordings, a LinearMap has none: give those, or preset='thesis'")
    if several and (settings.softmax or not (collapse or linear)):
        return _QueryMaps(several, settings.softmax)
    stack = linear_maps(several)  # which refuses an empty list
    if stack.space == "output":
        raise ValueError("optimize_token learns embeddings of text; in output space fit_token finds the best token")
    return _CollapsedMaps(stack)


def _initial_embeddings(maps, init, background):
    """Return the embeddings to start from, (token, width): the background's first, where there is one."""
    if isinstance(init, Token):
        init.check(maps.width, maps.model)
        init = torch.stack([init.background.value, init.value]) if background and init.background else init.value
    if init is None:
        raise ValueError("init is missing: give the word to start from")
    if not isinstance(init, str):
        x = torch.as_tensor(init).detach().to("cpu", torch.float32).clone()
        if x.shape not in ((maps.width,), (1 + background, maps.width)) or not x.isfinite().all():
            raise ValueError(f"init is a word or a finite embedding ({maps.width},), not {tuple(x.shape)}")
        if x.ndim == 2 or not background:
            return x.reshape(1 + background, maps.width)
    if maps.encoder is None:
        raise ValueError("the recording has no text encoder: give embeddings to start from, with a background both")
    if isinstance(init, str):
        x = maps.encoder.embed(init)
    start = maps.encoder(init if isinstance(init, str) else "a").embedding[0].float()  # of the start token
    return torch.stack([start, x]) if background else x[None]


def _loss_of(maps, masks, settings):
    """Return the loss as a function of embeddings (token, width): mean over images, and over valid pixels of each."""
    inside = [torch.from_numpy((mask == 1).astype(np.float32)) for mask in masks]
    truths = [torch.stack([1 - one, one]) if settings.background else one[None] for one in inside]
    valid_pixels = [torch.from_numpy(mask != targets.IGNORE) for mask in masks]

    def loss(x):
        total = 0
        for i, (truth, valid) in enumerate(zip(truths, valid_pixels, strict=True)):
            heats = resize(maps(i, x)[None], tuple(valid.shape), "bilinear")[0]
            if settings.minmax:
                heats = (heats - heats.min()) / (heats.max() - heats.min()).clamp(min=1e-12)
            heats, truth = heats[:, valid], truth[:, valid]
            if settings.loss == "logits":
                total = total - (truth * heats.log_softmax(0)).sum(0).mean()
            else:
                total = total + F.binary_cross_entropy(heats.clamp(_MIN_PROBABILITY, 1 - _MIN_PROBABILITY), truth)
        return total / len(masks)

    return loss


def _descend(x, loss, settings):
    """Return the best embeddings, and the loss of every epoch before its step."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.SGD([x], lr=settings.lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, settings.lr_step, settings.lr_gamma)
    best, losses = x.detach().clone(), []
    with contextlib.suppress(KeyboardInterrupt), torch.enable_grad():
        for _ in (progress := tqdm(range(settings.epochs), desc="epochs", leave=False, delay=1)):
            optimizer.zero_grad()
            value = loss(x)
            number = float(value.detach())
            if not math.isfinite(number):
                warnings.warn(f"the loss became {number} after {len(losses)} epochs: lower lr", stacklevel=4)
                break
            if not losses or number < min(losses):
                best = x.detach().clone()
            losses.append(number)
            progress.set_postfix(loss=f"{min(losses):.4f}", refresh=False)
            value.backward()
            optimizer.step()
            scheduler.step()
    return best, losses
