"""Segmenters: a small SegFormer or U-Net together with the names of its classes; the bundled reference segmenters.

    segmenter = load_segmenter("street")
    segmenter.segment(images)                                # labels, uint8 (image, row, column)
    class_ious(segmenter.evaluate(images, labels))           # `attnlab.metrics.class_ious`

Images are uint8 (image, row, column, rgb) of one size, labels uint8 (image, row, column): class numbers, or 255.
"""

import copy
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from PIL.Image import Image
from safetensors import SafetensorError
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from ..metrics import check_counts, confusion
from ..pipelines import BUNDLED, best_device, mixed_precision
from ..storage import read_rgb, write_text
from .folders import check_classes, checked

__all__ = ["ARCHITECTURES", "IMAGENET", "Segmenter", "UNet", "as_input", "check_weights", "load_segmenter"]
__all__ += ["load_weights", "read_scaling"]

_PLAIN = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # mean and standard deviation that scale 0..1 to -1..1
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation (red, green, blue), in 0..1, by which models of ImageNet's photographs scale images."""
_PROCESSOR = "preprocessor_config.json"  # how images are scaled, as transformers reads it


class UNet(UNet2DModel):
    """U-Net (Ronneberger et al., MICCAI 2015) for segmentation, without attention; its timestep is always 0.

    One that takes more than three channels sees pixel-unshuffled images, and computes in bfloat16 where
    the device has it.
    """

    @classmethod
    def new(cls, num_classes: int, channels: Sequence[int] = (32, 64, 96), shuffle: int = 2, size=None) -> Self:
        """Return an untrained U-Net; of the default size it has 1.7 million parameters.

        Squares of `shuffle` pixels a side become channels, for speed; `size`, of images, is noted in its configuration.
        ValueError where there are no classes, or channels are no multiples of 8.
        """
        check_counts(num_classes=num_classes, shuffle=shuffle, levels=len(channels))
        if any(width not in range(8, 1 << 16, 8) for width in channels):
            raise ValueError(f"channels={tuple(channels)}: give multiples of 8")
        return cls(
            sample_size=size,
            in_channels=3 * shuffle**2,
            out_channels=num_classes * shuffle**2,
            block_out_channels=tuple(channels),
            down_block_types=("DownBlock2D",) * len(channels),
            up_block_types=("UpBlock2D",) * len(channels),
            layers_per_block=1,
            norm_num_groups=8,
            add_attention=False,
        )

    def forward(self, images: torch.Tensor) -> SimpleNamespace:
        """Return `logits`, float32 (image, class, row, column), of images (image, rgb, row, column) in -1..1."""
        shuffle = math.isqrt(self.config.in_channels // 3)
        factor = shuffle * 2 ** (len(self.config.block_out_channels) - 1)
        if any(side % factor for side in images.shape[-2:]):
            raise ValueError(f"images are {tuple(images.shape[-2:])}: give sides that {factor} divides")
        # without shuffling float32, unless the caller has set another precision
        with mixed_precision(images.device) if shuffle > 1 else nullcontext():
            x = F.pixel_unshuffle(images, shuffle)
            return SimpleNamespace(logits=F.pixel_shuffle(super().forward(x, 0).sample, shuffle).float())


def _segformer(num_classes: int) -> SegformerForSemanticSegmentation:
    """SegFormer (Xie et al., NeurIPS 2021), narrower than its smallest: 0.7 million parameters."""
    config = SegformerConfig(
        num_labels=num_classes,
        depths=[2, 2, 2, 2],
        hidden_sizes=[16, 32, 64, 128],
        num_attention_heads=[1, 2, 4, 8],
        patch_sizes=[7, 3, 3, 3],
        strides=[2, 2, 2, 2],  # for images of 64 pixels, where its own 4 would leave little
        decoder_hidden_size=64,
    )
    return SegformerForSemanticSegmentation(config)


ARCHITECTURES = {"segformer": _segformer, "unet": UNet.new}


class Segmenter:
    """A segmentation model with the names of its classes.

    Attributes
    ----------
    model : SegformerForSemanticSegmentation or UNet
        What computes `logits`.
    classes : tuple of str
        Names of the labels 0, 1, ...
    mean, std : tuple of three float
        What images are scaled by before the model sees them, (x - mean) / std, of red, green, blue in 0..1.
    curve : list of (int, float)
        Steps and mIoU on validation pairs of each check of its training, where there were some.
    """

    def __init__(self, model: SegformerForSemanticSegmentation | UNet, classes: Sequence[str], mean=None, std=None):
        self.model, self.classes = model.eval(), tuple(classes)
        self.mean, self.std = tuple(mean or _PLAIN[0]), tuple(std or _PLAIN[1])
        self.curve: list[tuple[int, float]] = []

    @classmethod
    def new(cls, classes: Sequence[str], architecture: str = "segformer", seed: int = 0) -> Self:
        """Return a segmenter with random weights; ValueError for an unknown architecture, or classes twice or none."""
        check_classes(classes)
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture={architecture!r}: choose one of {', '.join(ARCHITECTURES)}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(ARCHITECTURES[architecture](len(classes)), classes)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return scores float32 (image, class, row, column) of images (image, rgb, row, column) in -1..1."""
        found = self.model(self._scaled(images)).logits
        return F.interpolate(found, images.shape[-2:], mode="bilinear", align_corners=False)

    def _scaled(self, images):
        if (self.mean, self.std) == _PLAIN:
            return images
        mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in (self.mean, self.std))
        return ((images + 1) / 2 - mean) / std

    @torch.no_grad()
    def segment(self, images, batch: int = 64) -> np.ndarray:
        """Return the most likely class of each pixel, uint8 (image, row, column), computing `batch` images at once.

        Images are uint8 (image, row, column, rgb), or PIL images of one size; ValueError if they are not.
        """
        check_counts(batch=batch)
        arrays = [read_rgb(image) if isinstance(image, Image) else np.asarray(image) for image in images]
        if len(sizes := {array.shape for array in arrays}) != 1:
            raise ValueError(f"there are images of the sizes {sorted(sizes)}: give one or more of one size")
        pixels = np.stack(arrays)
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
            raise ValueError(f"images are uint8 (image, row, column, rgb), not {pixels.dtype} {pixels.shape}")
        batches = (as_input(pixels[i : i + batch]).to(self.model.device) for i in range(0, len(pixels), batch))
        return np.concatenate([self.logits(x).argmax(1).byte().cpu().numpy() for x in batches])

    def evaluate(self, images: np.ndarray, labels: np.ndarray, batch: int = 64) -> np.ndarray:
        """Count valid pixels by class: confusion matrices, int64 (image, true class, predicted class).

        `batch` images are computed at once.
        """
        images, labels = checked(images, labels, len(self.classes))
        return confusion(labels, self.segment(images, batch), len(self.classes), per_image=True)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write weights (safetensors), their configuration, how images are scaled, and classes.json; return the folder.

        That of a SegFormer is what transformers reads as SegformerForSemanticSegmentation.
        """
        model = torch.nn.Module.to(copy.deepcopy(self.model), dtype)
        if not isinstance(model, UNet):
            model.config.id2label = dict(enumerate(self.classes))
            model.config.label2id = {name: label for label, name in enumerate(self.classes)}
            scaling = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_resize": False}
            scaling |= {
                "image_mean": self.mean,
                "image_std": self.std,
                "image_processor_type": "SegformerImageProcessor",
            }
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_text(Path(folder, _PROCESSOR), json.dumps(scaling, indent=2) + "\n")
        model.save_pretrained(folder)
        return write_text(Path(folder, "classes.json"), json.dumps(self.classes) + "\n").parent

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """Return the segmenter that `save_pretrained` wrote into a folder, in float32.

        FileNotFoundError if there is none, ValueError if files are damaged or of two models.
        """
        if not Path(folder, "classes.json").exists():
            raise FileNotFoundError(f"{folder} holds no segmenter: classes.json is missing")
        try:
            config, classes = (json.loads(Path(folder, f"{n}.json").read_text("utf-8")) for n in ("config", "classes"))
            check_classes(classes)
            segformer = config.get("model_type") == "segformer"
            model = load_weights(SegformerForSemanticSegmentation if segformer else UNet, folder).to(device)
            count = model.config.num_labels if segformer else 3 * model.config.out_channels // model.config.in_channels
            if count != len(classes):
                raise ValueError(f"weights of {count} classes, classes.json of {len(classes)}")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder} has damaged files, or files of two models: {error}") from error
        return cls(model, classes, *read_scaling(Path(folder), _PLAIN))


def read_scaling(folder: Path, default: tuple) -> tuple:
    """Read (mean, std), of red, green, blue in 0..1, by which images are to be scaled, from preprocessor_config.json.

    ValueError where that file is damaged. Where there is none, `default` is returned.
    """
    path = folder / _PROCESSOR
    if not path.is_file():
        return default
    try:
        found = json.loads(path.read_text("utf-8"))
        factor = 255 * found.get("rescale_factor", 1 / 255) if found.get("do_rescale", True) else 255.0
        mean, std = found.get("image_mean", IMAGENET[0]), found.get("image_std", IMAGENET[1])
        if not found.get("do_normalize", True):
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        scaling = tuple(tuple(round(float(x) / factor, 12) for x in values) for values in (mean, std))
        if any(len(values) != 3 for values in scaling) or not all(0 < x < math.inf for x in scaling[1]):
            raise ValueError("image_mean and image_std are three numbers each, image_std above 0")
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} does not say how images are scaled: {error}") from error
    return scaling


def check_weights(folder: str | Path) -> None:
    """Raise ValueError where a folder has no weights as .safetensors.

    Parameters
    ----------
    folder : str or Path
        Where weights of diffusers or transformers are to be.
    """
    if not list(Path(folder).glob("*.safetensors")):
        raise ValueError(
            f"{folder} has no weights as .safetensors. A .bin or .pt is a pickle, which may run anything when read; "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), path) makes a .safetensors of one"
        )


def load_weights(loader: type, folder: str | Path) -> torch.nn.Module:
    """Load a model of diffusers or transformers in float32 from the safetensors of a folder, whole or not at all.

    ValueError where there are none, or they are damaged or of another model: the libraries would draw what is missing.

    Parameters
    ----------
    loader, folder : type, str or Path
        Class of the model, and where its weights and configuration are.
    """
    check_weights(folder)
    try:
        model, about = loader.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, local_files_only=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: its weights and config.json are damaged or do not fit: {error}") from error
    if wrong := [*about["missing_keys"], *about["unexpected_keys"]]:
        raise ValueError(
            f"{folder}: weights are missing or of another model, {', '.join(sorted(wrong)[:3])} among them"
        )
    return model


def load_segmenter(name: str = "street", device: str | torch.device | None = None) -> Segmenter:
    """Load a bundled reference segmenter: its labels stand for the truth of generated images, which have none.

    FileNotFoundError where there is no such segmenter, or its weights are missing.

    Parameters
    ----------
    name : str
        "street": the 16 classes of `attnlab.scenes.street`; "aerial": the 7 of `attnlab.scenes.aerial`.
    device : str or torch.device, optional
        Where it computes. Default: a GPU if there is one, else the CPU.
    """
    folder = BUNDLED / f"{name}-segmenter"
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} holds no segmenter: choose street or aerial. If that one is missing, install attnlab again, or "
            "train it: python -m experiments.bundled.train_street segmenter (train_aerial for aerial)"
        )
    return Segmenter.from_pretrained(folder, device or best_device())


def as_input(images: np.ndarray) -> torch.Tensor:
    """Scale uint8 (image, row, column, rgb) to float32 (image, rgb, row, column) in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
