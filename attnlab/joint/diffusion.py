"""Train a joint diffusion of images and their label maps, and sample it (SatSynth: Toker et al., CVPR 2024).

    model = JointDiffusion.new(images, labels, classes=("ground", "road"))
    model.fit(images, labels, "runs/joint", Schedule(steps=4000, lr=8e-4), check=held_out)
    images, labels, margins = model.sample(64, seed(0))
    model.save_pretrained("roads"); JointDiffusion.from_pretrained("roads")

One U-Net of diffusers denoises [RGB, label channels] together. Images are uint8 (image, row, column, rgb), labels
uint8 (image, row, column): class numbers, or 255 where a pixel is ignored.
"""

from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from tqdm import tqdm

from .. import training
from ..metrics import check_counts
from ..pipelines import mixed_precision
from ..segmentation.folders import checked, shrink
from ..storage import claim_folder
from .channels import NUM_TIMES, augment_channels, noise_schedule
from .denoiser import Conditioning, Denoiser, as_settings
from .proportions import DROP_PROBABILITY, blurred, class_proportions, wanted_proportions

__all__ = ["JointDiffusion"]

_SAMPLERS = {"ddim": DDIMScheduler, "ancestral": DDPMScheduler}
_MAX_WEIGHT = 5.0  # of an error of x0; at the most noise the weight is 1
_LOW_RES_STD = 0.1  # of noise on the small pair in training, as samples are not clean


class JointDiffusion(Denoiser):
    """A denoiser of images with labels that learns from pairs and draws new ones.

    Attributes
    ----------
    metadata : dict
        classes, codes (class, label channel), mean and std of the colors (0..1), prediction, shuffle, upscale,
        self_conditioning; if it is conditioned on them, class proportions (scene, class) of its training set.
    classes : tuple of str
        Names of the labels 0, 1, ...
    """

    def fit(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        folder: str | Path,
        schedule: training.Schedule,
        *,
        rotate90: bool = True,
        check: tuple[np.ndarray, np.ndarray] | None = None,
        batch: int = 16,
        patience: int = 5,
    ) -> Self:
        """Train, or go on in `folder`, and take over the moving average.

        ValueError where pairs do not fit, or the folder has a run of another model; others as in `run_training`.

        Parameters
        ----------
        images, labels : array of uint8
            Pairs.
        folder, schedule : str or Path, Schedule
            Where checkpoints and curves are written; steps and learning rates.
        rotate90 : bool
            Augment pairs by rotations and upside-down flips, besides left-right flips.
        check : (images, labels), optional
            Held-out pairs: the average with the least error on them is kept.
        batch, patience : int
            Pairs per step. Checkpoints without a lower error after which training ends.
        """
        check_counts(batch=batch, patience=patience)
        images, labels = self._fitting(images, labels)
        check = check and self._fitting(*check)
        config = {name: value for name, value in self.unet.config.items() if not name.startswith("_")}  # in no order
        claim_folder(folder, {"about": as_settings(self.metadata), "unet": config}, "model.json")

        def loss(unet, generator):
            some = torch.randint(len(images), (batch,), generator=generator)
            x0, valid, (low_res, proportions) = self._encoded(images[some], labels[some])
            x0, valid, low_res = augment_channels((x0, valid, low_res), rotate90, generator)
            proportions = None if proportions is None else blurred(proportions, generator, DROP_PROBABILITY)
            twice = self.metadata["self_conditioning"] and bool(torch.rand((), generator=generator) < 0.5)
            return {"loss": _loss(self, unet, x0, valid, Conditioning(low_res, proportions), generator, twice)}

        held_out = check and (lambda unet: self.error(*check, unet=unet))
        self.unet = training.run_training(self.unet, loss, schedule, Path(folder), held_out, patience)
        return self

    @torch.no_grad()
    def error(self, images: np.ndarray, labels: np.ndarray, unet=None, draws: int = 4, batch: int = 32) -> float:
        """Return the mean loss on held-out pairs, over `draws` times and noises per pair, the same at every call."""
        check_counts(images=len(images), draws=draws, batch=batch)
        unet = self.unet if unet is None else unet
        total, generator = 0.0, torch.Generator().manual_seed(0)
        for _ in range(draws):
            for i in range(0, len(images), batch):
                encoded = self._encoded(images[i : i + batch], labels[i : i + batch])
                with mixed_precision(unet.device):
                    loss = _loss(self, unet, *encoded, generator, self.metadata["self_conditioning"])
                total += float(loss) * len(images[i : i + batch])
        return total / (draws * len(images))

    @torch.no_grad()
    def sample(
        self,
        count: int,
        generator: torch.Generator,
        *,
        small: tuple[np.ndarray, np.ndarray] | None = None,
        proportions: np.ndarray | None = None,
        sampler: str = "ddim",
        steps: int = 50,
        batch: int = 32,
        every: int = 0,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw pairs: images uint8, labels uint8, and float32 margins, 0 where two classes are equally likely.

        ValueError where an argument is out of range, or is for another kind of model.

        Parameters
        ----------
        count : int
            Number of pairs.
        generator : torch.Generator
            Draws all noise before anything is computed, so that `batch` changes speed and memory alone (but for the
            ancestral sampler, which draws more on the way).
        small : (images, labels), optional
            `count` pairs to enlarge, for a model with `upscale`.
        proportions : (class,) or (image, class) array, optional
            Fraction of the pixels that each class is to have, 0..1; a row of NaN is unconditional. Default: those of
            the training scenes, each equally often.
        sampler : str
            "ddim" (Song et al., ICLR 2021) or "ancestral" (Ho et al., NeurIPS 2020).
        steps, batch : int
            Steps of the sampler, 1 to 1000; pairs that are computed at once.
        every : int
            Above 0: return also what there is after every so many steps, with another first axis (moment, image, ...).
        """
        check_counts(count=count, steps=steps, batch=batch)
        check_counts(0, every=every)
        if sampler not in _SAMPLERS or steps > NUM_TIMES:
            raise ValueError(f"{steps} steps, sampler={sampler!r}: give 1 to {NUM_TIMES}, {' or '.join(_SAMPLERS)}")
        if len(small[0] if small else ()) != (count if self.metadata["upscale"] > 1 else 0):
            raise ValueError(f"small=(images, labels), {count} of each, is for a model with upscale, and for no other")
        small = small and self._fitting(*small, self.metadata["upscale"])
        if proportions is not None and "proportions" not in self.metadata:
            raise ValueError("this model takes no proportions: leave them out, or make one with proportions=True")
        known = np.array(self.metadata.get("proportions", ()), np.float32).reshape(-1, len(self.classes))
        wanted = wanted_proportions(proportions, known, count, generator)
        scheduler = _SAMPLERS[sampler](**noise_schedule(), prediction_type="sample", clip_sample=False)
        scheduler.set_timesteps(steps)
        noise = torch.randn(count, self.codec.num_channels, self.size, self.size, generator=generator)
        moments = []
        for i in tqdm(range(0, count, batch), desc="samples", leave=False, delay=1):
            some = slice(i, i + batch)
            low_res = None if small is None else self._enlarged(small[0][some], small[1][some]).to(self.unet.device)
            conditioning = Conditioning(low_res, None if wanted is None else wanted[some])
            moments.append(_denoised(self, noise[some].to(self.unet.device), conditioning, scheduler, generator, every))
        found = [self.codec.decode(torch.cat(parts)) for parts in zip(*moments, strict=True)]
        return tuple(np.stack(parts) for parts in zip(*found, strict=True)) if every else found[-1]

    def _fitting(self, images, labels, factor=1):
        (images, labels), side = checked(images, labels, len(self.classes)), self.size // factor
        if images.shape[1:3] != (side, side):
            raise ValueError(f"images are {images.shape[1:3]}, the model's {side} x {side}: cut patches")
        return images, labels

    def _encoded(self, images, labels):
        """Return the channels of pairs, which of them are valid, and what the model is conditioned on."""
        factor, conditional = self.metadata["upscale"], "proportions" in self.metadata
        proportions = torch.from_numpy(class_proportions(labels, len(self.classes))) if conditional else None
        low_res = self._enlarged(*shrink(images, labels, factor)) if factor > 1 else None
        return *self.codec.encode(images, labels), Conditioning(low_res, proportions)

    def _enlarged(self, images, labels):
        """Return the channels of small pairs in the size of the large ones."""
        channels, _ = self.codec.encode(images, labels)
        return F.interpolate(channels, scale_factor=self.metadata["upscale"], mode="nearest")


def _loss(model, unet, x0, valid, conditioning, generator, twice):
    """Return the mean squared error of the prediction of valid channels; `twice`: of a self-conditioned one.

    Times are stratified over the batch: every step sees early and late ones.
    """
    low_res, previous = conditioning.low_res, None
    times = (torch.randperm(len(x0), generator=generator) + torch.rand(len(x0), generator=generator)) / len(x0)
    # a random number just below 1 is rounded up to it
    times, noise = (times * NUM_TIMES).long().clamp(max=NUM_TIMES - 1), torch.randn(x0.shape, generator=generator)
    if low_res is not None:
        noised = low_res + _LOW_RES_STD * torch.randn(x0.shape, generator=generator)
        conditioning = conditioning._replace(low_res=noised.to(unet.device))
    noisy = model.schedule.add_noise(x0, noise, times).to(unet.device)
    if twice:
        with torch.no_grad():
            first = model.predict(unet, noisy, None, conditioning, times)
            previous = model.as_x0(first, noisy, times, conditioning.low_res)
    prediction = model.predict(unet, noisy, previous, conditioning, times)
    match model.metadata["prediction"]:
        case "sample":  # weighted as an error of v is, but for the least noise
            target = x0 if low_res is None else x0 - low_res
            weight = (1 / (1 - model.schedule.alphas_cumprod[times])).clamp(max=_MAX_WEIGHT)
            valid = valid * weight[:, None, None, None]
        case "epsilon":
            target = noise
        case _:
            target = model.schedule.get_velocity(x0, noise, times)
    return ((prediction - target.to(unet.device)) ** 2 * valid.to(unet.device)).sum() / valid.sum()


def _denoised(model, noisy, conditioning, scheduler, generator, every):
    """Return the channels after every so many steps, the last ones in any case."""
    kept, x0 = [], None
    for number, time in enumerate(scheduler.timesteps, 1):
        x0 = model.predict_x0(noisy, time, x0, conditioning)
        noisy = scheduler.step(x0, time, noisy, generator=generator).prev_sample
        if number == len(scheduler.timesteps) or (every and number % every == 0):
            kept.append(noisy.cpu())
    return kept
