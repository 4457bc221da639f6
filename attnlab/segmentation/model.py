"""Train and test a segmentation model on any mix of real and synthetic pairs.

    model = train(images, labels, count, seed=0)                     # SegFormer, small, from nothing; or kind="unet"
    model = train(images, labels, count, extra=(more, their_labels)) # half of every batch from each
    confusion = evaluate(model, images, labels, count)               # (image, class, class), pixels
    class_ious(confusion)                                            # (class,)

Images are uint8 (image, row, column, rgb) of one size, labels uint8 (image, row, column): 0 to count - 1, or 255.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from tqdm.auto import tqdm
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from ..masks import IGNORE
from . import augment
from .folders import checked

Pairs = tuple[np.ndarray, np.ndarray]
MIXES = ("half", "pool", "pretrain")


class UNet(UNet2DModel):
    """A U-Net (Ronneberger et al., MICCAI 2015) of pixel-unshuffled images, in bfloat16; its timestep is always 0."""

    def forward(self, images: torch.Tensor) -> SimpleNamespace:
        """`logits` float32 (image, class, row, column) of images (image, rgb, row, column) in -1..1."""
        with torch.autocast(images.device.type, torch.bfloat16):
            x = F.pixel_unshuffle(images, 2)  # channels first: GroupNorm is 20 times slower the other way, on a CPU
            return SimpleNamespace(logits=F.pixel_shuffle(super().forward(x, 0).sample, 2).float())


Segmenter = SegformerForSemanticSegmentation | UNet


def segformer(count: int) -> SegformerForSemanticSegmentation:
    """SegFormer (Xie et al., NeurIPS 2021), narrower than its smallest: 0.7 million parameters."""
    config = SegformerConfig(
        num_labels=count,
        depths=[2, 2, 2, 2],
        hidden_sizes=[16, 32, 64, 128],
        num_attention_heads=[1, 2, 4, 8],
        patch_sizes=[7, 3, 3, 3],
        strides=[2, 2, 2, 2],  # for images of 64 pixels, where its own 4 would leave little
        decoder_hidden_size=64,
    )
    return SegformerForSemanticSegmentation(config)


def unet(count: int, channels: Sequence[int] = (32, 64, 96)) -> UNet:
    """A U-Net without attention, 1.7 million parameters."""
    return UNet(
        in_channels=4 * 3,
        out_channels=4 * count,
        block_out_channels=tuple(channels),
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
    )


KINDS = {"segformer": segformer, "unet": unet}


def new_model(count: int, seed: int = 0, kind: str = "segformer") -> Segmenter:
    """An untrained model of `KINDS` for `count` classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KINDS[kind](count)


def train(
    images: np.ndarray,
    labels: np.ndarray,
    count: int,
    *,
    extra: Pairs | None = None,
    kind: str = "segformer",
    mix: str = "half",
    ways: Sequence[str] = (),
    steps: int = 500,
    batch: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Segmenter:
    """A model trained from nothing for so many steps, whatever the number of pairs: it repeats with its seed.

    Cross-entropy on decided pixels, AdamW with a linearly falling rate, left-right flips.

    Parameters
    ----------
    extra : further pairs
    kind : "segformer" or "unet"
    mix : "half" of every batch from them; "pool": all pairs alike; "pretrain": the first half of the steps on them
        alone, the second on the others
    ways : further augmentations, by their names in `augment.WAYS`, in this order

    Raises
    ------
    ValueError : pairs that do not fit each other or hold other numbers, an unknown kind, mix or way
    """
    augment.check(ways)
    for name, value, known in (("mix", mix, MIXES), ("kind", kind, KINDS)):
        if value not in known:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(known)}")
    sources = [checked(images, labels, count)] + ([checked(*extra, count)] if extra is not None else [])
    if mix == "pool" and extra is not None:
        sources = [tuple(np.concatenate(x) for x in zip(*sources, strict=True))]
    model, rng = new_model(count, seed, kind).to(device).train(), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        for step in tqdm(range(steps), desc="segmenter", leave=False, disable=not progress):
            now = sources[1:] if step < steps // 2 else sources[:1]
            x, y = _draw(now if mix == "pretrain" and len(sources) > 1 else sources, batch, ways, rng)
            loss = F.cross_entropy(_logits(model, x.to(device)), y.to(device), ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return model.eval()


@torch.no_grad()
def predict(model: Segmenter, images: np.ndarray, batch: int = 64) -> np.ndarray:
    """Labels uint8 (image, row, column)."""
    found = []
    for i in range(0, len(images), batch):
        x = as_input(images[i : i + batch]).to(model.device)
        found.append(_logits(model, x).argmax(1).byte().cpu().numpy())
    return np.concatenate(found)


def evaluate(model: Segmenter, images: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Confusion matrix of every image: int64 (image, true class, predicted class), in decided pixels."""
    images, labels = checked(images, labels, count)
    pairs = np.where(labels == IGNORE, -1, labels.astype(int) * count + predict(model, images))
    return np.stack([np.bincount(p[p >= 0], minlength=count**2).reshape(count, count) for p in pairs])


@torch.no_grad()
def features(model: Segmenter, images: np.ndarray, batch: int = 64) -> np.ndarray:
    """What a model's lowest level says of images, mean over pixels: float64 (image, feature)."""
    level, found = model.mid_block if isinstance(model, UNet) else model.segformer, []
    keep = level.register_forward_hook(lambda *call: found.append(getattr(call[-1], "last_hidden_state", call[-1])))
    try:
        predict(model, images, batch)
    finally:
        keep.remove()
    return torch.cat([x.mean((2, 3)).double().cpu() for x in found]).numpy()


def class_ious(confusion: np.ndarray) -> np.ndarray:
    """IoU (class,) over all pixels of all images of (image, true class, predicted class); NaN of a class not there."""
    total = confusion.sum(0)
    common = np.diag(total).astype(float)
    union = total.sum(0) + total.sum(1) - common
    return np.divide(common, union, out=np.full(len(total), np.nan), where=union > 0)


def _logits(model, x):
    return F.interpolate(model(x).logits, x.shape[-2:], mode="bilinear", align_corners=False)


def as_input(images: np.ndarray) -> torch.Tensor:
    """As the model reads them: float32 (image, rgb, row, column), -1..1."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _draw(sources, batch, ways, rng):
    """A batch, as many from each source, each flipped or not and varied."""
    images, labels = [], []
    for k, (x, y) in enumerate(sources):
        some = rng.integers(len(x), size=batch // len(sources) + (k < batch % len(sources)))
        flipped = augment.flip(x[some], y[some], rng)
        images.append(flipped[0])
        labels.append(flipped[1])
    x, y = np.concatenate(images), np.concatenate(labels)
    for way in ways:
        x, y = augment.WAYS[way](x, y, rng)
    return as_input(x), torch.from_numpy(y).long()
