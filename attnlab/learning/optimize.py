"""Token optimization as published: gradient descent on a text embedding, so that its map fits masks.

token = optimize_token(recordings, masks, init="car")                  # the thesis's: one token, linear
token = optimize_token(recordings, masks, init="car", preset="ovam")   # OVAM's: beside a background, softmax
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
from tqdm.auto import tqdm

from .. import metrics
from ..maps.heatmaps import minmax, resize
from ..maps.linear import Images, LinearMap, linear_maps
from ..recording.layers import attention
from ..tokens import MAP_SETTINGS, Token
from . import targets


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of `optimize_token`: what is optimized, and how."""

    softmax: bool  # maps by softmax over the tokens; else linear
    background: bool  # a second token, for what the masks leave; it starts as the start token
    loss: str  # "binary": cross-entropy of the map read as a probability; "logits": of the maps read as logits
    lr: float  # of gradient descent, without momentum
    epochs: int  # each over all images
    lr_gamma: float = 1.0  # factor of the rate...
    lr_step: int = 120  # ... each so many epochs
    minmax: bool = True  # each image's maps, all tokens' together, to 0..1 before the loss

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
    # its second form: tokens for the object and for the rest
    "thesis-softmax": OptimizerSettings(softmax=True, background=True, loss="binary", lr=3, epochs=500),
    # OVAM, CVPR 2024. Its loss reads maps in 0..1 as logits, so that it stays at 0.31 for a perfect mask
    "ovam": OptimizerSettings(softmax=True, background=True, loss="logits", lr=100, epochs=800, lr_gamma=0.7),
}
CHUNK = 2**20  # most query values taken at once
EDGE = 1e-4  # how near to 0 and 1 a probability may come, for the loss to stay finite


def optimize_token(
    recordings: Images,
    masks: Sequence[ArrayLike],
    init: str | Token | torch.Tensor,
    preset: str | OptimizerSettings = "thesis",
    *,
    name: str | None = None,
    collapse: bool = True,
) -> Token:
    """A token by gradient descent on its map: Marcos-Manchón's thesis (UAM 2023); OVAM (CVPR 2024), section 3.3.

    The embedding with the lowest loss of all epochs is kept. An interrupt (the stop button) ends it early, and the best
    so far is returned.

    Parameters
    ----------
    recordings : of one model, one an image; LinearMaps do for linear maps
    masks : (row, column) of any size that covers the whole image: booleans or 0 and 1, 255 where undecided. Maps are
        resized to it, bilinear
    init : the word or token to start from, or an embedding (text width,); with a background also both, (2, text width)
    preset : "thesis", "thesis-softmax", "ovam", or settings of your own: replace(PRESETS["ovam"], epochs=100)
    name : of the token; the word's own, or "token"
    collapse : of linear maps, whether all steps, layers and heads are added up to one matrix first; if not, every epoch
        goes through all queries, as published. The descent is the same

    Returns
    -------
    Token, with its `background` where there is one; bias 0. Its `metadata` has losses (one an epoch), seconds, and the
    mean IoU of the training images at the threshold that is best for them, a share of each map's range

    Raises
    ------
    ValueError : no image, recordings that differ in model or size; LinearMaps for softmax maps; masks that are not one
        for each, not in the maps' proportions, empty or full; an init that does not fit or whose map is flat; NaN; keys
        that are normalized
    """
    started = time.perf_counter()
    settings = PRESETS.get(preset) if isinstance(preset, str) else preset
    if settings is None:
        raise ValueError(f"preset={preset!r}: choose {', '.join(map(repr, PRESETS))}, or a Descent")
    maps = _source(recordings, settings, collapse)
    masks = targets.as_masks(masks, maps.size, len(maps))
    x = _start(maps, init, settings.background)
    _check_maps(maps, x)
    best, losses = _descend(x, _objective(maps, masks, settings), settings)
    threshold, iou = _score(maps, best, masks)
    metadata = {"method": "optimize_token", "model": maps.model, **maps.settings, "size": list(maps.size)}
    word = init if isinstance(init, str) else init.name if isinstance(init, Token) else None
    metadata |= {"images": len(maps), "init": word, "descent": asdict(settings)}
    metadata |= {"losses": losses, "threshold": threshold, "iou": iou, "seconds": time.perf_counter() - started}
    name = name or word or "token"
    background = Token(f"background of {name}", best[0], metadata=metadata) if settings.background else None
    return Token(name, best[-1], background=background, metadata=metadata)


class _Matrix:
    """Linear maps (token, row, column) of embeddings (token, width), by image number, on collapsed recordings."""

    def __init__(self, stack: LinearMap):
        self.images = stack.matrix.unflatten(0, (stack.size[0], -1))
        self.biases = stack.bias.unflatten(0, (stack.size[0], -1))
        self.size, self.model, self.encoder = stack.size[1:], stack.model, stack.encoder
        self.width = stack.matrix.shape[1]
        self.settings = {name: stack.metadata.get(name) for name in MAP_SETTINGS if name != "size"}

    def __len__(self):
        return len(self.images)

    def __call__(self, i, x):
        return (x @ self.images[i].T + self.biases[i]).unflatten(-1, self.size)


class _Queries:
    """Maps (token, row, column) of embeddings (token, width), by image number, through all queries of recordings."""

    def __init__(self, recordings, softmax):
        self.traces = [one.trace for one in recordings]
        self.softmax = softmax
        first = self.traces[0]
        self.size = max(first.sizes.values(), key=math.prod)
        self.model, self.encoder, self.width = first.generation.model, recordings[0].encoder, first.text.shape[-1]
        self.settings = {"layers": list(first.sizes), "heads": None, "scaled": True}
        for trace in self.traces:
            self._check(trace)

    def _check(self, trace):
        if not trace.queries:
            other = "" if self.softmax else ", or give LinearMaps"
            raise ValueError(f"this recording kept no queries: record with keep='queries'{other}")
        if (trace.generation.model, trace.sizes) != (self.model, self.traces[0].sizes):
            raise ValueError(
                f"recordings of one model, size and layers are wanted: {self.model}, {self.traces[0].sizes} and "
                f"{trace.generation.model}, {trace.sizes}"
            )
        if any(layer.norm_k is not None for layer in trace.layers.values()):
            raise ValueError("this model normalizes its keys, through which no gradient is passed here")

    def __len__(self):
        return len(self.traces)

    def __call__(self, i, x):
        trace, total, count = self.traces[i], 0, 0
        for name, recorded in trace.queries.items():
            layer = trace.layers[name]
            keys = layer.keys(x) * layer.scale
            group = max(
                1, CHUNK // recorded[0].numel()
            )  # steps at once: small layers' together, large ones' one by one
            share = 0
            for first in range(0, len(recorded), group):
                queries = [recorded[k].cpu() for k in range(first, min(first + group, len(recorded)))]
                queries = layer.queries(torch.stack(queries))  # (step, head, pixel, width)
                share = share + (attention(queries, keys) if self.softmax else keys @ queries.mT).sum((0, 1))
            total = total + resize(share.unflatten(-1, trace.sizes[name])[None], self.size, "bilinear")[0]
            count += len(recorded) * layer.heads
        return total / count


def _source(recordings, settings, collapse):
    several = [recordings] if isinstance(recordings, LinearMap) else list(recordings)
    if not several:
        raise ValueError("no recordings: give one or more, or LinearMaps")
    if settings.softmax and any(isinstance(one, LinearMap) for one in several):
        raise ValueError("softmax maps need recordings, a LinearMap has none: give those, or preset='thesis'")
    if settings.softmax or not (collapse or any(isinstance(one, LinearMap) for one in several)):
        return _Queries(several, settings.softmax)
    return _Matrix(linear_maps(several))


def _start(maps, init, background):
    """Embeddings to start from, (token, width)."""
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
    start = maps.encoder(init if isinstance(init, str) else "a").embedding[0].float()
    return torch.stack([start, x]) if background else x[None]


@torch.no_grad()
def _check_maps(maps, x):
    """ValueError where what a descent starts from is no map."""
    for i in range(len(maps)):
        heats = maps(i, x)
        if not heats.isfinite().all():
            raise ValueError(f"the maps of image {i} hold NaN or infinity: record in float32 or bfloat16")
        if heats.max() == heats.min():
            raise ValueError(f"the map of image {i} is flat where the descent starts: start from a word")


def _objective(maps, masks, settings):
    """The loss as a function of embeddings (token, width): mean over images, and over decided pixels of each."""
    planes = [torch.from_numpy((mask == 1).astype(np.float32)) for mask in masks]
    targets_of = [torch.stack([1 - plane, plane]) if settings.background else plane[None] for plane in planes]
    decided = [torch.from_numpy(mask != targets.IGNORE) for mask in masks]

    def loss(x):
        total = 0
        for i, (target, known) in enumerate(zip(targets_of, decided, strict=True)):
            heats = resize(maps(i, x)[None], tuple(known.shape), "bilinear")[0]
            if settings.minmax:
                heats = (heats - heats.min()) / (heats.max() - heats.min()).clamp(min=1e-12)
            heats, target = heats[:, known], target[:, known]
            if settings.loss == "logits":
                total = total - (target * heats.log_softmax(0)).sum(0).mean()
            else:
                total = total + F.binary_cross_entropy(heats.clamp(EDGE, 1 - EDGE), target)
        return total / len(decided)

    return loss


def _descend(x, loss, settings):
    """Best embeddings and the loss of every epoch, before its step."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.SGD([x], lr=settings.lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, settings.lr_step, settings.lr_gamma)
    best, losses = x.detach().clone(), []
    with contextlib.suppress(KeyboardInterrupt), torch.enable_grad():
        for _ in (progress := tqdm(range(settings.epochs), desc="epochs", leave=False)):
            optimizer.zero_grad()
            value = loss(x)
            number = float(value.detach())
            if not math.isfinite(number):
                warnings.warn(f"the loss became {number} after {len(losses)} epochs: lower lr", stacklevel=3)
                break
            if not losses or number < min(losses):
                best = x.detach().clone()
            losses.append(number)
            progress.set_postfix(loss=f"{min(losses):.4f}", refresh=False)
            value.backward()
            optimizer.step()
            scheduler.step()
    return best, losses


@torch.no_grad()
def _score(maps, x, masks):
    """Threshold with the highest mean IoU of the last token's maps, as a share of each map's range; and that IoU."""
    heats = [minmax(maps(i, x)[-1].numpy(), mask.shape) for i, mask in enumerate(masks)]
    valid = [mask != targets.IGNORE for mask in masks]
    ious = metrics.miou_curve(heats, [mask == 1 for mask in masks], valid=valid)
    threshold = metrics.best_threshold(metrics.THRESHOLDS, ious)
    return threshold, float(ious.mean(1).max())
