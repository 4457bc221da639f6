"""U-Net that predicts the clean image and label channels (x0) from noisy ones, and what it is conditioned on."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor

from ..metrics import check_counts
from ..pipelines import BUNDLED, mixed_precision
from ..segmentation.folders import check_classes, checked
from ..segmentation.model import load_weights
from ..storage import write_text
from ..training import seeded
from .channels import NUM_TIMES, ChannelCodec, bit_codes, noise_schedule, touching
from .proportions import class_proportions, embed

__all__ = ["PREDICTIONS", "Conditioning", "Denoiser", "as_settings"]

PREDICTIONS = ("sample", "v_prediction", "epsilon")
_CODES = ("bits", "one-hot")
_MAX_SCENES = 2000  # whose class proportions are kept with a model


class Conditioning(NamedTuple):
    """What a model knows of the pairs besides their noisy channels."""

    low_res: torch.Tensor | None = None  # with `upscale`: channels of the small pairs, in the size of the large ones
    proportions: torch.Tensor | None = None  # (image, class) that pairs are to have; NaN, or None: unconditional


class Denoiser:
    """The network of a `JointDiffusion`, which describes it: how it is made, predicts, is saved and loaded."""

    def __init__(self, unet: UNet2DModel, metadata: dict):
        self.unet, self.metadata, self.classes = unet, metadata, tuple(metadata["classes"])
        self.codec = ChannelCodec(metadata["codes"], metadata["mean"], metadata["std"])
        self.schedule = DDPMScheduler(**noise_schedule())
        if unet.device.type == "cpu":  # where the fast kernels are slow, their backward pass above all
            for part in [one for one in unet.modules() if isinstance(one, Attention)]:
                part.set_processor(AttnProcessor())

    @classmethod
    def new(
        cls,
        images: np.ndarray,
        labels: np.ndarray,
        classes: Sequence[str],
        *,
        codes: str = "bits",
        prediction: str = "sample",
        channels: Sequence[int] = (64, 96, 160),
        shuffle: int = 2,
        upscale: int = 1,
        self_conditioning: bool = True,
        proportions: bool = True,
        seed: int = 0,
    ) -> Self:
        """Return an untrained model for pairs of a size, whose colors and neighborhoods of classes it takes over.

        Parameters
        ----------
        images, labels : array of uint8
            Pairs of square images; ValueError if their side cannot be halved often enough, or another argument is out
            of range.
        classes : sequence of str
            Names of the labels 0, 1, ...; two or more.
        codes : str
            "bits": ceil(log2 classes) label channels, chosen by which classes touch, for up to 64 classes; "one-hot":
            one per class.
        prediction : str
            "sample": x0, which a narrow U-Net can predict where it cannot repeat the noise (Li and He, arXiv
            2511.13720); "v_prediction" (Salimans and Ho, ICLR 2022); "epsilon": as published.
        channels : sequence of int
            Width of each level of the U-Net, a multiple of 32; all levels but the first have attention.
        shuffle, upscale : int
            Side of the squares of pixels that become channels, for speed (1: none); how many times larger pairs are
            than those that they are drawn from (1: they are drawn from noise alone).
        self_conditioning : bool
            The U-Net also sees its x0 prediction of the step before (Chen, Zhang and Hinton, ICLR 2023).
        proportions : bool
            Condition it on class proportions, as the published model is not, so that rare classes come as often as
            they should, or as one asks. With `upscale` the small pair shows them.
        seed : int
            Draws the starting weights.
        """
        images, labels = checked(images, labels, len(classes))
        if len(classes) < 2 or codes not in _CODES or prediction not in PREDICTIONS:
            wanted = f"two classes or more, one of {', '.join(_CODES)} and one of {', '.join(PREDICTIONS)}"
            raise ValueError(f"{len(classes)} classes, codes={codes!r}, prediction={prediction!r}: give {wanted}")
        check_classes(classes)
        check_counts(shuffle=shuffle, upscale=upscale, levels=len(channels))
        if any(width not in range(32, 1 << 16, 32) for width in channels):
            raise ValueError(f"channels={tuple(channels)}: give multiples of 32")
        if proportions and upscale == 1:
            embed(torch.zeros(1, len(classes)), 4 * channels[0])  # says now if they do not fit
        (_, height, width, _), factor = images.shape, shuffle * 2 ** (len(channels) - 1) * upscale
        if height != width or height % factor:
            raise ValueError(f"images are {(height, width)}: give squares whose side {factor} divides")
        table = 2 * np.eye(len(classes)) - 1 if codes == "one-hot" else bit_codes(touching(labels, len(classes)))
        colors = images.reshape(-1, 3) / 255
        metadata = {"classes": list(classes), "codes": table.tolist(), "prediction": prediction, "shuffle": shuffle}
        metadata |= {"mean": colors.mean(0).tolist(), "std": colors.std(0).clip(0.02).tolist(), "upscale": upscale}
        metadata["self_conditioning"] = self_conditioning
        if proportions and upscale == 1:
            found = class_proportions(labels, len(classes))
            metadata["proportions"] = found[~np.isnan(found[:, 0])][:_MAX_SCENES].round(4).tolist()
        with seeded(seed):
            return cls(_new_unet(height // shuffle, channels, metadata), metadata)

    @property
    def size(self) -> int:
        """Side of its images in pixels."""
        return self.unet.config.sample_size * self.metadata["shuffle"]

    def add_noise(self, x0: torch.Tensor, time: int, generator: torch.Generator) -> torch.Tensor:
        """Return channels (image, channel, row, column) as the forward process leaves them at a time, 0 to 999."""
        return self.schedule.add_noise(x0, torch.randn(x0.shape, generator=generator), _as_times(time, 1))

    @torch.no_grad()
    def predict_x0(self, noisy: torch.Tensor, time: int, previous=None, conditioning=None) -> torch.Tensor:
        """Predict the clean channels behind noisy ones, clamped; `previous`: the prediction of the step before."""
        conditioning, times = conditioning or Conditioning(), _as_times(time, len(noisy))
        with mixed_precision(noisy.device):
            prediction = self.predict(self.unet, noisy, previous, conditioning, times)
        return self.as_x0(prediction, noisy, times, conditioning.low_res)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> Path:
        """Write weights (safetensors), the U-Net's configuration and joint.json; return the folder."""
        # diffusers' own `to` warns of layers it does not have
        torch.nn.Module.to(copy.deepcopy(self.unet), dtype).save_pretrained(folder)
        return write_text(Path(folder, "joint.json"), json.dumps(as_settings(self.metadata), indent=1) + "\n").parent

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """Load a model in float32 from a folder, or by the name of a bundled one, "aerial" or "aerial-x2".

        FileNotFoundError if there is none, ValueError if weights and joint.json do not fit, or are damaged.
        """
        path = (BUNDLED / folder if (BUNDLED / folder / "joint.json").exists() else Path(folder)) / "joint.json"
        if not path.exists():
            raise FileNotFoundError(f"{folder} holds no joint model: joint.json is missing")
        unet = load_weights(UNet2DModel, path.parent).to(device).eval()
        found = unet.config.in_channels, unet.config.out_channels
        try:
            metadata = json.loads(path.read_text("utf-8"))
            if "shares" in metadata:
                metadata["proportions"] = metadata.pop("shares")
            if _widths(metadata) != found or len(metadata["codes"]) != len(metadata["classes"]):
                raise ValueError(f"weights have {found} channels, joint.json {_widths(metadata)}")
            return cls(unet, metadata)
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"{path} is damaged, or of another model than the weights beside it: {error!r}") from error

    def predict(self, unet, noisy, previous, conditioning, times):
        """Return what `unet`, its own one or one in training, says: float32 (image, channel, row, column)."""
        shuffle, inputs, extra = self.metadata["shuffle"], [noisy], {}
        if self.metadata["self_conditioning"]:
            inputs.append(torch.zeros_like(noisy) if previous is None else previous)
        if conditioning.low_res is not None:
            inputs.append(conditioning.low_res)
        if "proportions" in self.metadata:
            unconditional = torch.full((len(noisy), len(self.classes)), torch.nan)
            proportions = unconditional if conditioning.proportions is None else conditioning.proportions.cpu()
            extra["class_labels"] = embed(proportions, self.unet.time_embedding.linear_2.out_features).to(noisy.device)
        # channels first, which GroupNorm is fast with on a CPU
        x = F.pixel_unshuffle(torch.cat(inputs, 1), shuffle)
        return F.pixel_shuffle(unet(x, times.to(noisy.device), **extra).sample, shuffle).float()

    def as_x0(self, prediction, noisy, times, low_res):
        """Return the clamped x0 that a prediction stands for; a model with `upscale` predicts what `low_res` lacks."""
        a = self.schedule.alphas_cumprod[times][:, None, None, None].to(noisy.device)
        match self.metadata["prediction"]:
            case "epsilon":
                x0 = (noisy - (1 - a).sqrt() * prediction) / a.sqrt()
            case "v_prediction":
                x0 = a.sqrt() * noisy - (1 - a).sqrt() * prediction
            case _:
                x0 = prediction if low_res is None else prediction + low_res
        return self.codec.clamp(x0)


def as_settings(metadata: dict) -> dict:
    """Return metadata as files hold it: there class proportions are called shares."""
    return {"shares" if name == "proportions" else name: value for name, value in metadata.items()}


def _as_times(time, count):
    if not 0 <= int(time) < NUM_TIMES:  # -1 would be the last one
        raise ValueError(f"time={time}: give a whole number, 0 to {NUM_TIMES - 1}")
    return torch.full((count,), int(time))


def _widths(metadata):
    """Return how many channels the U-Net takes and gives."""
    pair = (3 + len(metadata["codes"][0])) * metadata["shuffle"] ** 2
    return pair * (1 + metadata["self_conditioning"] + (metadata["upscale"] > 1)), pair


def _new_unet(side, channels, metadata):
    """Return an untrained U-Net for inputs of a side in pixels."""
    (inputs, outputs), conditional = _widths(metadata), "proportions" in metadata
    return UNet2DModel(
        sample_size=side,
        in_channels=inputs,
        out_channels=outputs,
        block_out_channels=tuple(channels),
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * (len(channels) - 1),
        up_block_types=("AttnUpBlock2D",) * (len(channels) - 1) + ("UpBlock2D",),
        layers_per_block=1,
        attention_head_dim=32,
        class_embed_type="identity" if conditional else None,
        # added before GroupNorm, an embedding would be taken away again
        resnet_time_scale_shift="scale_shift" if conditional else "default",
    )
