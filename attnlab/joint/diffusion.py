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
from diffusers.models.attention_processor import Attention, AttnProcessor
from tqdm.auto import tqdm

from .. import training
from ..pairs import checked, shrink
from ..pipelines import BUNDLED
from .codes import bit_codes, one_hot_codes, touching
from .planes import STEPS, Planes, noise_levels, varied

PREDICTIONS = ("sample", "v_prediction", "epsilon")
SAMPLERS = {"ddim": DDIMScheduler, "ancestral": DDPMScheduler}
CODES = ("bits", "one-hot")
HEAVIEST = 5.0  # weight of an error of the clean planes, beside 1 at the most noise
BLUR = 0.1  # noise on the small image that an enlarging model sees in training, as samples are not clean


class JointDiffusion:
    """A denoiser of images with labels.

    Attributes
    ----------
    unet : UNet2DModel over pixel-unshuffled planes
    about : classes, codes (class, plane) as lists, mean and std of the colors (0..1), prediction, shuffle, upscale,
        self_conditioning
    """

    def __init__(self, unet: UNet2DModel, about: dict):
        self.unet, self.about, self.classes = unet, about, tuple(about["classes"])
        self.planes = Planes(about["codes"], about["mean"], about["std"])
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
        seed: int = 0,
    ) -> "JointDiffusion":
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
            )
        colors = images.reshape(-1, 3) / 255
        about = {"classes": list(classes), "codes": table.tolist(), "prediction": prediction, "shuffle": shuffle}
        about |= {"mean": colors.mean(0).tolist(), "std": colors.std(0).clip(0.02).tolist(), "upscale": upscale}
        return cls(unet, about | {"self_conditioning": self_conditioning})

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
        pairs = self._fitting(images, labels)
        check = check and self._fitting(*check)
        self._claim(folder)
        device = next(self.unet.parameters()).device

        def loss(model, generator):
            some = torch.randint(len(images), (batch,), generator=generator)
            planes = varied(self._planes(*pairs, some), turns, generator)
            twice = self.about["self_conditioning"] and bool(torch.rand((), generator=generator) < 0.5)
            return {"loss": self._loss(model, *planes, generator, device, twice)}

        judge = check and (lambda model: self.error(*check, model=model))
        self.unet = training.train(self.unet, loss, schedule, folder, judge, patience)
        return self

    @torch.no_grad()
    def error(self, images: np.ndarray, labels: np.ndarray, model=None, draws: int = 4, batch: int = 32) -> float:
        """Mean loss on pairs, with the same times and noise at every call: for held-out pairs, the lower the better."""
        model, total = self.unet if model is None else model, 0.0
        device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)
        for _ in range(draws):
            for i in range(0, len(images), batch):
                planes = self._planes(images, labels, slice(i, i + batch))
                with torch.autocast(device.type, torch.bfloat16):
                    one = self._loss(model, *planes, generator, device, self.about["self_conditioning"])
                total += float(one) * len(planes[0])
        return total / (draws * len(images))

    def add_noise(self, planes: torch.Tensor, time: int, generator: torch.Generator) -> torch.Tensor:
        """The forward process: planes (image, plane, row, column) as they are at a time, 0 to 999."""
        return self.schedule.add_noise(planes, torch.randn(planes.shape, generator=generator), torch.tensor([time]))

    @torch.no_grad()
    def guess(
        self,
        planes: torch.Tensor,
        time: int,
        before: torch.Tensor | None = None,
        beside: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the model takes for the clean planes behind those at a time, within the range that such have.

        `before`: its guess a step earlier. `beside`: for a model with `upscale`, the planes to enlarge, as large as
        these.
        """
        times = torch.full((len(planes),), int(time))
        with torch.autocast(planes.device.type, torch.bfloat16):
            return self._clean(planes, times, self._said(self.unet, planes, before, beside, times).float(), beside)

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
        scheduler = SAMPLERS[sampler](**noise_levels(), prediction_type="sample", clip_sample=False)
        scheduler.set_timesteps(steps)
        device = next(self.unet.parameters()).device
        noise = torch.randn(count, len(self.planes), self.size, self.size, generator=generator)
        moments = []
        for i in tqdm(range(0, count, batch), desc="samples", leave=False):
            x, beside = noise[i : i + batch].to(device), None
            if small is not None:
                beside = self._beside(small[0][i : i + batch], small[1][i : i + batch]).to(device)
            moments.append(self._denoise(x, beside, scheduler, generator, every))
        moments = [torch.cat(parts) for parts in zip(*moments, strict=True)]
        found = [self.planes.decode(x) for x in moments]
        return tuple(np.stack(parts) for parts in zip(*found, strict=True)) if every else found[-1]

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> Path:
        """Write weights (safetensors), the U-Net's configuration and joint.json."""
        folder = Path(folder)
        unet = UNet2DModel.from_config(self.unet.config)
        unet.load_state_dict(self.unet.state_dict())
        torch.nn.Module.to(unet, dtype).save_pretrained(folder)  # diffusers' own `to` warns of layers it does not have
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
        return cls(unet.to(device).eval(), about)

    def _fitting(self, images, labels):
        images, labels = checked(images, labels, len(self.classes))
        if images.shape[1:3] != (self.size, self.size):
            raise ValueError(f"images are {images.shape[1:3]}, the model's {self.size} x {self.size}: cut patches")
        return images, labels

    def _claim(self, folder):
        """Make a folder this model's, or ValueError where it holds a run of another."""
        config = {name: value for name, value in self.unet.config.items() if not name.startswith("_")}  # in no order
        own = json.loads(json.dumps({"about": self.about, "unet": config}))
        path = folder / "model.json"
        if path.exists() and json.loads(path.read_text()) != own:
            raise ValueError(f"{folder} has a run of another model or data (see {path}): name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(own))

    def _planes(self, images, labels, some):
        """Of some pairs: their planes, which of them are decided, and what a model with `upscale` is given, or None."""
        pair, factor = (images[some], labels[some]), self.about["upscale"]
        return *self.planes.encode(*pair), self._beside(*shrink(*pair, factor)) if factor > 1 else None

    def _beside(self, images, labels):
        """Planes of small pairs in the size of the large ones."""
        return F.interpolate(self.planes.encode(images, labels)[0], scale_factor=self.about["upscale"], mode="nearest")

    def _loss(self, model, x, known, beside, generator, device, twice):
        """Mean squared error of what the model says of decided planes, at random times; `twice`: of its second guess.

        Times are stratified over the batch: every step sees early and late ones.
        """
        times = (torch.randperm(len(x), generator=generator) + torch.rand(len(x), generator=generator)) / len(x) * STEPS
        times, noise = times.long(), torch.randn(x.shape, generator=generator)
        small = beside
        if small is not None:
            beside = (small + BLUR * torch.randn(x.shape, generator=generator)).to(device)
        noisy, before = self.schedule.add_noise(x, noise, times).to(device), None
        if twice:
            with torch.no_grad():
                before = self._clean(noisy, times, self._said(model, noisy, None, beside, times).float(), beside)
        said = self._said(model, noisy, before, beside, times).float()
        match self.about["prediction"]:
            case "sample":  # weighted as an error of v is, but for the least noise
                target = x if small is None else x - small
                weight = (1 / (1 - self.schedule.alphas_cumprod[times])).clamp(max=HEAVIEST)
                known = known * weight[:, None, None, None]
            case "epsilon":
                target = noise
            case _:
                target = self.schedule.get_velocity(x, noise, times)
        return ((said - target.to(device)) ** 2 * known.to(device)).sum() / known.sum()

    def _said(self, model, x, before, beside, times):
        """The U-Net's answer (image, plane, row, column)."""
        k, given = self.about["shuffle"], [x]
        if self.about["self_conditioning"]:
            given.append(torch.zeros_like(x) if before is None else before)
        if beside is not None:
            given.append(beside)
        # channels first, which GroupNorm is fast with on a CPU
        return F.pixel_shuffle(model(F.pixel_unshuffle(torch.cat(given, 1), k), times.to(x.device)).sample, k)

    def _clean(self, x, times, said, beside):
        """The clean planes that an answer to planes at some times stands for.

        A model with `upscale` says them as what is to be added to the small pair.
        """
        a = self.schedule.alphas_cumprod[times][:, None, None, None].to(x.device)
        match self.about["prediction"]:
            case "epsilon":
                said = (x - (1 - a).sqrt() * said) / a.sqrt()
            case "v_prediction":
                said = a.sqrt() * x - (1 - a).sqrt() * said
            case _ if beside is not None:
                said = said + beside
        return self.planes.clamp(said)

    def _denoise(self, x, beside, scheduler, generator, every):
        """Planes after every so many steps, the last ones in any case."""
        kept, clean = [], None
        for number, time in enumerate(scheduler.timesteps, 1):
            clean = self.guess(x, time, clean, beside)
            x = scheduler.step(clean, time, x, generator=generator).prev_sample
            if number == len(scheduler.timesteps) or (every and number % every == 0):
                kept.append(x.cpu())
        return kept
