"""A U-Net that says what the clean planes of images with labels are, and how it is asked.

One U-Net of diffusers denoises [RGB, label planes] together; see `attnlab.joint.planes` for these.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor

from .. import training
from ..pipelines import BUNDLED
from ..segmentation.folders import checked
from .codes import bit_codes, one_hot_codes, touching
from .planes import Planes, noise_levels
from .shares import class_shares, embed

PREDICTIONS = ("sample", "v_prediction", "epsilon")
CODES = ("bits", "one-hot")
MOST = 2000  # scenes whose shares of classes are kept with a model


class Given(NamedTuple):
    """What a model knows of the pairs besides the noisy planes.

    small : of a model with `upscale`, the planes to enlarge, as large as the noisy ones
    shares : of a model that is told them, what each class is to have, (image, class); NaN or None: nothing is said
    """

    small: torch.Tensor | None = None
    shares: torch.Tensor | None = None


NOTHING = Given()


class Denoiser:
    """A denoiser of images with labels.

    Attributes
    ----------
    unet : UNet2DModel over pixel-unshuffled planes
    metadata : classes, codes (class, plane) as lists, mean and std of the colors (0..1), prediction, shuffle, upscale,
        self_conditioning; of one that is told shares of classes, shares (scene, class) of the scenes it learned from
    """

    def __init__(self, unet: UNet2DModel, metadata: dict):
        self.unet, self.metadata, self.classes = unet, metadata, tuple(metadata["classes"])
        self.planes = Planes(metadata["codes"], metadata["mean"], metadata["std"])
        self.schedule = DDPMScheduler(**noise_levels())
        if unet.device.type == "cpu":  # the fast kernels are slow there, their backward pass above all
            for part in unet.modules():
                if isinstance(part, Attention):
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
        shares: bool = True,
        seed: int = 0,
    ) -> Self:
        """An untrained model of the size of `images`, whose colors and neighborhoods of classes it takes over.

        Parameters
        ----------
        codes : "bits", ceil(log2 classes) planes chosen by which classes touch, or "one-hot", a plane a class
        prediction : what the U-Net says: "sample", the clean planes, which a narrow U-Net of unshuffled pixels can say
            where it cannot repeat their noise (Li and He, arXiv 2511.13720), "v_prediction" (Salimans and Ho, ICLR
            2022), or "epsilon", the published choice
        channels : of the U-Net's levels; all but the first one have attention
        shuffle : pixels of a square of so many a side become channels (1: none), for speed
        upscale : above 1, a model that makes pairs so much larger, out of small ones
        self_conditioning : the U-Net also sees what it took for the clean planes a step earlier (Chen, Zhang and
            Hinton, ICLR 2023)
        shares : the U-Net is told how much of the image each class is to have, so that rare classes come as often as
            they should, or as one asks; the published model is not. One with `upscale` sees it in the small pair

        Raises
        ------
        ValueError : one class, unknown options, images and labels that do not fit, a size that cannot be halved often
            enough
        """
        images, labels = checked(images, labels, len(classes))
        size, factor = images.shape[1], shuffle * 2 ** (len(channels) - 1)
        if len(classes) < 2 or codes not in CODES or prediction not in PREDICTIONS:
            raise ValueError(
                f"{len(classes)} classes, codes={codes!r}, prediction={prediction!r}: give two classes or more, one of "
                f"{', '.join(CODES)} and one of {', '.join(PREDICTIONS)}"
            )
        if images.shape[1] != images.shape[2] or size % (factor * upscale):
            raise ValueError(f"images are {images.shape[1:3]}: give squares whose side {factor * upscale} divides")
        table = one_hot_codes(len(classes)) if codes == "one-hot" else bit_codes(touching(labels, len(classes)))
        told = shares and upscale == 1
        planes, inputs = (3 + table.shape[1]) * shuffle**2, 1 + self_conditioning + (upscale > 1)
        with training.seeded(seed):
            unet = UNet2DModel(
                sample_size=size // shuffle,
                in_channels=planes * inputs,
                out_channels=planes,
                block_out_channels=tuple(channels),
                down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * (len(channels) - 1),
                up_block_types=("AttnUpBlock2D",) * (len(channels) - 1) + ("UpBlock2D",),
                layers_per_block=1,
                attention_head_dim=32,
                class_embed_type="identity" if told else None,
                # added before GroupNorm, what the U-Net is told would be taken away again
                resnet_time_scale_shift="scale_shift" if told else "default",
            )
        colors = images.reshape(-1, 3) / 255
        metadata = {"classes": list(classes), "codes": table.tolist(), "prediction": prediction, "shuffle": shuffle}
        metadata |= {"mean": colors.mean(0).tolist(), "std": colors.std(0).clip(0.02).tolist(), "upscale": upscale}
        metadata["self_conditioning"] = self_conditioning
        if told:
            found = class_shares(labels, len(classes))
            metadata["shares"] = found[~np.isnan(found[:, 0])][:MOST].round(4).tolist()
        return cls(unet, metadata)

    @property
    def size(self) -> int:
        """Side of its images in pixels."""
        return self.unet.config.sample_size * self.metadata["shuffle"]

    def add_noise(self, planes: torch.Tensor, time: int, generator: torch.Generator) -> torch.Tensor:
        """The forward process: planes (image, plane, row, column) as they are at a time, 0 to 999."""
        return self.schedule.add_noise(planes, torch.randn(planes.shape, generator=generator), torch.tensor([time]))

    @torch.no_grad()
    def guess(
        self,
        planes: torch.Tensor,
        time: int,
        before: torch.Tensor | None = None,
        given: Given = NOTHING,
    ) -> torch.Tensor:
        """What the model takes for the clean planes behind those at a time, within the range that such have.

        `before`: its guess a step earlier. `given`: what else it knows of the pairs, see `Given`.
        """
        times = torch.full((len(planes),), int(time))
        with torch.autocast(planes.device.type, torch.bfloat16):
            said = self._said(self.unet, planes, before, given, times).float()
        return self._clean(planes, times, said, given)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> Path:
        """Write weights (safetensors), the U-Net's configuration and joint.json."""
        folder = Path(folder)
        unet = UNet2DModel.from_config(self.unet.config)
        unet.load_state_dict(self.unet.state_dict())
        torch.nn.Module.to(unet, dtype).save_pretrained(folder)  # diffusers' own `to` warns of layers it does not have
        part = folder / "joint.json.part"
        part.write_text(json.dumps(self.metadata, indent=1) + "\n")
        part.replace(folder / "joint.json")
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """In float32, from a folder or by the name of a bundled model, "aerial" or "aerial-x2".

        FileNotFoundError where there is none, ValueError where weights and joint.json do not fit.
        """
        folder = BUNDLED / folder if (BUNDLED / folder / "joint.json").exists() else Path(folder)
        if not (folder / "joint.json").exists():
            raise FileNotFoundError(f"{folder} holds no joint model: joint.json is missing")
        metadata = json.loads((folder / "joint.json").read_text())
        unet = UNet2DModel.from_pretrained(folder, dtype=torch.float32)
        planes = (3 + len(metadata["codes"][0])) * metadata["shuffle"] ** 2
        if unet.config.out_channels != planes:
            raise ValueError(
                f"{folder}: the weights have {unet.config.out_channels} channels, joint.json wants {planes}: "
                "they are of two models"
            )
        return cls(unet.to(device).eval(), metadata)

    def _said(self, model, x, before, given, times):
        """The U-Net's answer (image, plane, row, column)."""
        k, seen, extra = self.metadata["shuffle"], [x], {}
        if self.metadata["self_conditioning"]:
            seen.append(torch.zeros_like(x) if before is None else before)
        if given.small is not None:
            seen.append(given.small)
        if "shares" in self.metadata:
            told = torch.full((len(x), len(self.classes)), torch.nan) if given.shares is None else given.shares
            width = self.unet.time_embedding.linear_2.out_features
            extra["class_labels"] = embed(told.cpu(), width).to(x.device)
        # channels first, which GroupNorm is fast with on a CPU
        seen = F.pixel_unshuffle(torch.cat(seen, 1), k)
        return F.pixel_shuffle(model(seen, times.to(x.device), **extra).sample, k)

    def _clean(self, x, times, said, given):
        """The clean planes that an answer to planes at some times stands for.

        A model with `upscale` says them as what is to be added to the small pair.
        """
        a = self.schedule.alphas_cumprod[times][:, None, None, None].to(x.device)
        match self.metadata["prediction"]:
            case "epsilon":
                said = (x - (1 - a).sqrt() * said) / a.sqrt()
            case "v_prediction":
                said = a.sqrt() * x - (1 - a).sqrt() * said
            case _ if given.small is not None:
                said = said + given.small
        return self.planes.clamp(said)
