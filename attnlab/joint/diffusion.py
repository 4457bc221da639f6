"""Joint diffusion of images and their label maps (SatSynth: Toker et al., CVPR 2024, arXiv 2403.16605).

    model = JointDiffusion.new(images, labels, classes=("ground", "road"))
    model.fit(images, labels, "runs/joint", Schedule(steps=4000, lr=8e-4), check=held_out)
    images, labels, margins = model.sample(64, seed(0))
    model.save_pretrained("roads"); JointDiffusion.from_pretrained("roads")

One U-Net of diffusers denoises [RGB, label planes] together. Images are uint8 (image, row, column, rgb), labels uint8
(image, row, column): numbers of classes, or 255 where undecided.
"""

import json
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from tqdm.auto import tqdm

from .. import training
from ..segmentation.folders import checked, shrink
from .denoiser import Denoiser, Given
from .planes import STEPS, noise_levels, varied
from .shares import UNTOLD, blurred, checked_shares, class_shares

SAMPLERS = {"ddim": DDIMScheduler, "ancestral": DDPMScheduler}
HEAVIEST = 5.0  # weight of an error of the clean planes, beside 1 at the most noise
BLUR = 0.1  # noise on the small image that an enlarging model sees in training, as samples are not clean


class JointDiffusion(Denoiser):
    """A denoiser of images with labels that learns from pairs and draws new ones."""

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
    ) -> Self:
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
            x, known, small = varied(self._planes(*pairs, some), turns, generator)
            shares = self._shares(pairs[1][some])
            given = Given(small, shares if shares is None else blurred(shares, generator, UNTOLD))
            twice = self.metadata["self_conditioning"] and bool(torch.rand((), generator=generator) < 0.5)
            return {"loss": self._loss(model, x, known, given, generator, device, twice)}

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
                x, known, small = self._planes(images, labels, slice(i, i + batch))
                given = Given(small, self._shares(labels[i : i + batch]))
                with torch.autocast(device.type, torch.bfloat16):
                    one = self._loss(model, x, known, given, generator, device, self.metadata["self_conditioning"])
                total += float(one) * len(x)
        return total / (draws * len(images))

    @torch.no_grad()
    def sample(
        self,
        count: int,
        generator: torch.Generator,
        *,
        small: tuple[np.ndarray, np.ndarray] | None = None,
        shares: np.ndarray | None = None,
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
        shares : of a model that is told them: how much of a pair each class is to have, (class,) or (image, class),
            0..1; a row of NaN: whatever comes. None: as in the scenes it learned from, each of them equally often
        sampler : "ddim" (Song et al., ICLR 2021) or "ancestral" (Ho et al., NeurIPS 2020)
        every : above 0, all of it after every so many steps, on the way, with another first axis: (moment, image, ...)

        Raises
        ------
        ValueError : no samples, unknown samplers, `small` or `shares` for a model that takes none, shares that do not
            sum to 1
        """
        if sampler not in SAMPLERS or count < 1 or not 1 <= steps <= STEPS:
            known = ", ".join(SAMPLERS)
            raise ValueError(f"{count} samples, {steps} steps, sampler {sampler!r}: 1 or more, 1 to {STEPS}, {known}")
        if (small is not None) != (self.metadata["upscale"] > 1):
            raise ValueError("small=(images, labels) is for a model with upscale above 1, and for no other")
        if shares is not None and "shares" not in self.metadata:
            raise ValueError("this model is not told shares of classes: leave shares out, or make one with shares=True")
        told = self._wanted(shares, count, generator)
        scheduler = SAMPLERS[sampler](**noise_levels(), prediction_type="sample", clip_sample=False)
        scheduler.set_timesteps(steps)
        device = next(self.unet.parameters()).device
        noise = torch.randn(count, len(self.planes), self.size, self.size, generator=generator)
        moments = []
        for i in tqdm(range(0, count, batch), desc="samples", leave=False):
            some = slice(i, i + batch)
            beside = None if small is None else self._beside(small[0][some], small[1][some]).to(device)
            given = Given(beside, None if told is None else told[some])
            moments.append(self._denoise(noise[some].to(device), given, scheduler, generator, every))
        moments = [torch.cat(parts) for parts in zip(*moments, strict=True)]
        found = [self.planes.decode(x) for x in moments]
        return tuple(np.stack(parts) for parts in zip(*found, strict=True)) if every else found[-1]

    def _fitting(self, images, labels):
        images, labels = checked(images, labels, len(self.classes))
        if images.shape[1:3] != (self.size, self.size):
            raise ValueError(f"images are {images.shape[1:3]}, the model's {self.size} x {self.size}: cut patches")
        return images, labels

    def _claim(self, folder):
        """Make a folder this model's, or ValueError where it holds a run of another."""
        config = {name: value for name, value in self.unet.config.items() if not name.startswith("_")}  # in no order
        own = json.loads(json.dumps({"about": self.metadata, "unet": config}))
        path = folder / "model.json"
        if path.exists() and json.loads(path.read_text()) != own:
            raise ValueError(f"{folder} has a run of another model or data (see {path}): name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(own))

    def _planes(self, images, labels, some):
        """Of some pairs: their planes, which of them are decided, and what a model with `upscale` is given, or None."""
        pair, factor = (images[some], labels[some]), self.metadata["upscale"]
        return *self.planes.encode(*pair), self._beside(*shrink(*pair, factor)) if factor > 1 else None

    def _beside(self, images, labels):
        """Planes of small pairs in the size of the large ones."""
        return F.interpolate(
            self.planes.encode(images, labels)[0], scale_factor=self.metadata["upscale"], mode="nearest"
        )

    def _shares(self, labels):
        """Shares of classes in labels, which a model that is told them sees, or None."""
        return torch.from_numpy(class_shares(labels, len(self.classes))) if "shares" in self.metadata else None

    def _wanted(self, shares, count, generator):
        """Shares (image, class) that samples are to have; None for a model that is not told them."""
        if "shares" not in self.metadata:
            return None
        if shares is not None:
            return torch.tensor(checked_shares(shares, count, len(self.classes)))
        known = torch.tensor(self.metadata["shares"]).reshape(-1, len(self.classes))
        if not len(known):  # it learned from images alone
            return None
        rounds = [torch.randperm(len(known), generator=generator) for _ in range(-(-count // len(known)))]
        return blurred(known[torch.cat(rounds)[:count]], generator)

    def _loss(self, model, x, known, given, generator, device, twice):
        """Mean squared error of what the model says of decided planes, at random times; `twice`: of its second guess.

        Times are stratified over the batch: every step sees early and late ones.
        """
        times = (torch.randperm(len(x), generator=generator) + torch.rand(len(x), generator=generator)) / len(x) * STEPS
        times, noise = times.long(), torch.randn(x.shape, generator=generator)
        small = given.small
        if small is not None:
            given = given._replace(small=(small + BLUR * torch.randn(x.shape, generator=generator)).to(device))
        noisy, before = self.schedule.add_noise(x, noise, times).to(device), None
        if twice:
            with torch.no_grad():
                before = self._clean(noisy, times, self._said(model, noisy, None, given, times).float(), given)
        said = self._said(model, noisy, before, given, times).float()
        match self.metadata["prediction"]:
            case "sample":  # weighted as an error of v is, but for the least noise
                target = x if small is None else x - small
                weight = (1 / (1 - self.schedule.alphas_cumprod[times])).clamp(max=HEAVIEST)
                known = known * weight[:, None, None, None]
            case "epsilon":
                target = noise
            case _:
                target = self.schedule.get_velocity(x, noise, times)
        return ((said - target.to(device)) ** 2 * known.to(device)).sum() / known.sum()

    def _denoise(self, x, given, scheduler, generator, every):
        """Planes after every so many steps, the last ones in any case."""
        kept, clean = [], None
        for number, time in enumerate(scheduler.timesteps, 1):
            clean = self.guess(x, time, clean, given)
            x = scheduler.step(clean, time, x, generator=generator).prev_sample
            if number == len(scheduler.timesteps) or (every and number % every == 0):
                kept.append(x.cpu())
        return kept
