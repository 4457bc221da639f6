"""Joint diffusion of images and their label maps (SatSynth: Toker et al., CVPR 2024, arXiv 2403.16605).

    model = JointDiffusion.new(images, labels, classes=("ground", "road"))
    model.fit(images, labels, "runs/joint", Schedule(steps=4000, rate=8e-4), check=held_out)
    images, labels, margins = model.sample(64, seed(0))
    model.save_pretrained("roads"); JointDiffusion.from_pretrained("roads")

One U-Net of diffusers denoises [RGB, label planes] together. Images are uint8 (image, row, column, rgb), labels uint8
(image, row, column): numbers of classes, or 255 where undecided.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from tqdm.auto import tqdm

from .. import training
from ..masks import UNDECIDED
from ..pairs import checked
from ..pipelines import BUNDLED
from .codes import bit_codes, decode, encode, one_hot_codes, touching

PREDICTIONS = ("v_prediction", "epsilon")
SAMPLERS = {"ddim": DDIMScheduler, "ancestral": DDPMScheduler}
CODES = ("bits", "one-hot")
SPREAD = 0.6  # standard deviation of each color channel, that of label planes being about 1
STEPS = 1000  # of the forward process
NOISE = {"num_train_timesteps": STEPS, "beta_schedule": "squaredcos_cap_v2"}
BLUR = 0.1  # noise on the small image that an enlarging model sees in training, as samples are not clean


class JointDiffusion:
    """A denoiser of images with labels.

    Attributes
    ----------
    unet : UNet2DModel over pixel-unshuffled planes
    about : classes, codes (class, plane) as lists, mean and std of the colors (0..1), prediction, shuffle, upscale
    """

    def __init__(self, unet: UNet2DModel, about: dict):
        self.unet, self.about = unet, about
        self.classes, self.codes = tuple(about["classes"]), np.array(about["codes"], np.float32)
        self.schedule = DDPMScheduler(**NOISE)
        mean, std = (torch.tensor(about[name])[:, None, None] for name in ("mean", "std"))
        self._scale, self._shift = SPREAD / std, -SPREAD * mean / std
        self._low, self._high = self._shift, self._scale + self._shift  # of black and white

    @classmethod
    def new(
        cls,
        images: np.ndarray,
        labels: np.ndarray,
        classes: Sequence[str],
        *,
        codes: str = "bits",
        prediction: str = "v_prediction",
        channels: Sequence[int] = (64, 96, 128),
        shuffle: int = 2,
        upscale: int = 1,
        seed: int = 0,
    ) -> "JointDiffusion":
        """An untrained model of the size of `images`, whose colors and neighborhoods of classes it takes over.

        Parameters
        ----------
        codes : "bits", ceil(log2 classes) planes chosen by which classes touch, or "one-hot", a plane a class
        prediction : what the U-Net says: "v_prediction" (Salimans and Ho, ICLR 2022) or "epsilon", the published choice
        channels : of the U-Net's levels; the lowest one has attention
        shuffle : pixels of a square of so many a side become channels (1: none), for speed
        upscale : above 1, a model that makes pairs so much larger, out of small ones

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
        planes = (3 + table.shape[1]) * shuffle**2
        with training.seeded(seed):
            unet = UNet2DModel(
                sample_size=size // shuffle,
                in_channels=planes * (2 if upscale > 1 else 1),
                out_channels=planes,
                block_out_channels=tuple(channels),
                down_block_types=("DownBlock2D",) * (len(channels) - 1) + ("AttnDownBlock2D",),
                up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (len(channels) - 1),
                layers_per_block=1,
            )
        colors = images.reshape(-1, 3) / 255
        about = {"classes": list(classes), "codes": table.tolist(), "prediction": prediction, "shuffle": shuffle}
        about |= {"mean": colors.mean(0).tolist(), "std": colors.std(0).clip(0.02).tolist(), "upscale": upscale}
        return cls(unet.to(memory_format=torch.channels_last), about)

    @property
    def size(self) -> int:
        """Side of its images in pixels."""
        return self.unet.config.sample_size * self.about["shuffle"]

    def fit(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        folder: str | Path,
        schedule: training.Schedule,
        *,
        batch: int = 16,
        turns: bool = True,
        check: tuple[np.ndarray, np.ndarray] | None = None,
        patience: int = 5,
    ) -> "JointDiffusion":
        """Train, or go on in `folder`, and take over the moving average.

        Flips, and with `turns` quarter turns, vary the pairs. `check`: held-out images and labels; the average with the
        least error on them is kept, and training ends after `patience` checkpoints without a better one.

        ValueError for pairs that do not fit, or a folder with a run of another model; FloatingPointError where the loss
        is not finite, with the last checkpoint kept.
        """
        folder = Path(folder)
        images, labels = self._fitting(images, labels)
        self._claim(folder)
        device = next(self.unet.parameters()).device

        def loss(model, generator):
            some = torch.randint(len(images), (batch,), generator=generator)
            x, known = _varied(self.encode(images[some], labels[some]), turns, generator)
            return {"loss": self._loss(model, x, known, generator, device)}

        judge = None
        if check is not None:
            held_out = self._fitting(*check)
            judge = lambda model: self.error(*held_out, model=model)  # noqa: E731
        self.unet = training.train(self.unet, loss, schedule, folder, judge, patience)
        return self

    @torch.no_grad()
    def error(self, images: np.ndarray, labels: np.ndarray, model=None, draws: int = 4, batch: int = 32) -> float:
        """Mean loss on pairs, with the same times and noise at every call: for held-out pairs, the lower the better."""
        model, total = self.unet if model is None else model, 0.0
        device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)
        for _ in range(draws):
            for i in range(0, len(images), batch):
                x = self.encode(images[i : i + batch], labels[i : i + batch])
                with torch.autocast(device.type, torch.bfloat16):
                    total += float(self._loss(model, *x, generator, device)) * len(x[0])
        return total / (draws * len(images))

    def add_noise(self, planes: torch.Tensor, time: int, generator: torch.Generator) -> torch.Tensor:
        """The forward process: planes (image, plane, row, column) as they are at a time, 0 to 999."""
        return self.schedule.add_noise(planes, torch.randn(planes.shape, generator=generator), torch.tensor([time]))

    @torch.no_grad()
    def guess(self, planes: torch.Tensor, time: int, beside: torch.Tensor | None = None) -> torch.Tensor:
        """What the model takes for the clean planes behind those at a time, within the range that such have.

        `beside`: for a model with `upscale`, the planes to enlarge, as large as these.
        """
        a = self.schedule.alphas_cumprod[time]
        with torch.autocast(planes.device.type, torch.bfloat16):
            said = self._said(self.unet, planes, beside, torch.as_tensor(time).to(planes.device)).float()
        if self.about["prediction"] == "epsilon":
            clean = (planes - (1 - a).sqrt() * said) / a.sqrt()
        else:
            clean = a.sqrt() * planes - (1 - a).sqrt() * said
        bits = torch.ones(self.codes.shape[1], 1, 1)
        return clean.clamp(*(torch.cat(x).to(clean.device) for x in ((self._low, -bits), (self._high, bits))))

    @torch.no_grad()
    def sample(
        self,
        count: int,
        generator: torch.Generator,
        *,
        small: tuple[np.ndarray, np.ndarray] | None = None,
        steps: int = 50,
        sampler: str = "ddim",
        batch: int = 32,
        every: int = 0,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw pairs: images uint8, labels uint8, margins float32 (image, row, column), 0 where a class is a toss-up.

        Parameters
        ----------
        generator : draws all noise before anything is computed, so that `batch` changes speed and memory alone (but for
            the ancestral sampler, which draws more on the way)
        small : for a model with `upscale`: the images and labels to enlarge, `count` of them
        sampler : "ddim" (Song et al., ICLR 2021) or "ancestral" (Ho et al., NeurIPS 2020)
        every : above 0, all of it after every so many steps, on the way, with another first axis: (moment, image, ...)
        """
        if sampler not in SAMPLERS or count < 1 or not 1 <= steps <= STEPS:
            known = ", ".join(SAMPLERS)
            raise ValueError(f"{count} samples, {steps} steps, sampler {sampler!r}: 1 or more, 1 to {STEPS}, {known}")
        if (small is not None) != (self.about["upscale"] > 1):
            raise ValueError("small=(images, labels) is for a model with upscale above 1, and for no other")
        scheduler = SAMPLERS[sampler](**NOISE, prediction_type="sample", clip_sample=False)
        scheduler.set_timesteps(steps)
        device = next(self.unet.parameters()).device
        noise = torch.randn(count, 3 + self.codes.shape[1], self.size, self.size, generator=generator)
        moments = []
        for i in tqdm(range(0, count, batch), desc="samples", leave=False):
            x, beside = noise[i : i + batch].to(device), None
            if small is not None:
                beside = self._enlarged(self.encode(small[0][i : i + batch], small[1][i : i + batch])[0]).to(device)
            moments.append(self._denoise(x, beside, scheduler, generator, every))
        moments = [torch.cat(parts) for parts in zip(*moments, strict=True)]
        found = [self.decode(x) for x in moments]
        return tuple(np.stack(parts) for parts in zip(*found, strict=True)) if every else found[-1]

    def encode(self, images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Planes float32 (image, plane, row, column), colors first, and which of them are decided, 0 and 1."""
        colors = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        planes = encode(labels, self.codes)
        decided = torch.from_numpy(labels != UNDECIDED)[:, None].float()
        known = torch.cat([torch.ones_like(colors), decided.expand_as(planes)], 1)
        return torch.cat([colors * self._scale + self._shift, planes], 1), known

    def decode(self, planes: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images, labels and margins of planes."""
        colors = (planes[:, :3].cpu() - self._shift) / self._scale
        images = (colors.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        return images, *decode(planes[:, 3:], self.codes)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> Path:
        """Write weights (safetensors), the U-Net's configuration and joint.json."""
        folder = Path(folder)
        unet = UNet2DModel.from_config(self.unet.config)
        unet.load_state_dict(self.unet.state_dict())
        unet.to(dtype).save_pretrained(folder)
        part = folder / "joint.json.part"
        part.write_text(json.dumps(self.about, indent=1) + "\n")
        part.replace(folder / "joint.json")
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> "JointDiffusion":
        """In float32, from a folder or by the name of a bundled model, "aerial" or "aerial-x2".

        FileNotFoundError where there is none, ValueError where weights and joint.json do not fit.
        """
        folder = BUNDLED / folder if (BUNDLED / folder / "joint.json").exists() else Path(folder)
        if not (folder / "joint.json").exists():
            raise FileNotFoundError(f"{folder} holds no joint model: joint.json is missing")
        about = json.loads((folder / "joint.json").read_text())
        unet = UNet2DModel.from_pretrained(folder, dtype=torch.float32)
        planes = (3 + len(about["codes"][0])) * about["shuffle"] ** 2
        if unet.config.out_channels != planes:
            raise ValueError(
                f"{folder}: the weights have {unet.config.out_channels} channels, joint.json wants {planes}: "
                "they are of two models"
            )
        return cls(unet.to(device, memory_format=torch.channels_last).eval(), about)

    def _fitting(self, images, labels):
        images, labels = checked(images, labels, len(self.classes))
        if images.shape[1:3] != (self.size, self.size):
            raise ValueError(f"images are {images.shape[1:3]}, the model's {self.size} x {self.size}: cut patches")
        return images, labels

    def _claim(self, folder):
        """Make a folder this model's, or ValueError where it holds a run of another."""
        own = json.loads(json.dumps({"about": self.about, "unet": dict(self.unet.config)}, default=str))
        path = folder / "model.json"
        if path.exists() and json.loads(path.read_text()) != own:
            raise ValueError(f"{folder} has a run of another model or data (see {path}): name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(own))

    def _loss(self, model, x, known, generator, device):
        """Mean squared error of what the model says of decided planes, at random times."""
        times = torch.randint(STEPS, (len(x),), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        beside = None
        if self.about["upscale"] > 1:
            small = F.avg_pool2d(x, self.about["upscale"])
            beside = self._enlarged(small + BLUR * torch.randn(small.shape, generator=generator)).to(device)
        noisy = self.schedule.add_noise(x, noise, times)
        epsilon = self.about["prediction"] == "epsilon"
        target = noise if epsilon else self.schedule.get_velocity(x, noise, times)
        said = self._said(model, noisy.to(device), beside, times.to(device))
        return ((said.float() - target.to(device)) ** 2 * known.to(device)).sum() / known.sum()

    def _said(self, model, x, beside, times):
        """The U-Net's answer (image, plane, row, column)."""
        k = self.about["shuffle"]
        x = x if beside is None else torch.cat([x, beside], 1)
        x = F.pixel_unshuffle(x, k).contiguous(memory_format=torch.channels_last)
        return F.pixel_shuffle(model(x, times).sample, k)

    def _enlarged(self, small):
        return F.interpolate(small, scale_factor=self.about["upscale"], mode="nearest")

    def _denoise(self, x, beside, scheduler, generator, every):
        """Planes after every so many steps, the last ones in any case."""
        kept = []
        for number, time in enumerate(scheduler.timesteps, 1):
            x = scheduler.step(self.guess(x, time, beside), time, x, generator=generator).prev_sample
            if number == len(scheduler.timesteps) or (every and number % every == 0):
                kept.append(x.cpu())
        return kept


def _varied(pairs, turns, generator):
    """The batch flipped or not, and turned by quarters."""
    flips = torch.rand(2, generator=generator) < 0.5
    quarters = int(torch.randint(4, (1,), generator=generator)) if turns else 0
    axes = [axis for axis, flip in zip((-1, -2), (flips[0], flips[1] and turns), strict=True) if flip]
    return tuple(torch.rot90(x.flip(axes) if axes else x, quarters, (-2, -1)) for x in pairs)
