"""Existing images for models of flow matching: their own image-to-image pipeline says how the denoiser is called."""

import inspect

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from .adapters import Adapter
from .adapters.base import arguments_of

__all__ = ["FlowCalls"]

_MULTIPLE = 2  # of latents a side become one image token


class _OneLevel(FlowMatchEulerDiscreteScheduler):
    """A schedule of one timestep: x(t) = (1 - t) image + t noise, with t in 0..1."""

    level = 1.0

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        super().set_timesteps(sigmas=[self.level], device=device)


class FlowCalls:
    """Calls of a pipeline's denoiser for noisy copies of an existing image.

    TypeError where diffusers has no image-to-image pipeline of the kind, or of its latents none is known here.
    """

    def __init__(self, pipe, adapter: Adapter):
        name = adapter.family.image_to_image if adapter.alternates else None
        if name is None:
            raise TypeError(
                f"{type(pipe).__name__} cannot record an existing image: of its kind no image-to-image pipeline is "
                "known here; those of Stable Diffusion, FLUX, Qwen-Image, Z-Image and Chroma are"
            )
        kind = getattr(diffusers, name)
        wanted = inspect.signature(kind.__init__).parameters
        self.pipe = kind(**{part: module for part, module in pipe.components.items() if part in wanted})
        self.pipe.scheduler = _OneLevel(shift=1.0)
        self.pipe.set_progress_bar_config(disable=True)
        self.denoiser = adapter.module
        self._options = {"guidance_scale": 0.0}
        parameters = inspect.signature(pipe.__call__).parameters
        if "true_cfg_scale" in parameters:  # what else is called so is told to a distilled model, and guides nothing
            self._options = {"guidance_scale": parameters["guidance_scale"].default, "true_cfg_scale": 0.0}

    def call(self, pixels, prompt: str, timestep: int, generator: torch.Generator | None) -> tuple[tuple, dict]:
        """Return the arguments with which the denoiser is called for an image (row, column, rgb) in 0..1."""
        side = self.pipe.vae_scale_factor * _MULTIPLE
        height, width = (max(1, round(n / side)) * side for n in pixels.shape[:2])
        self.pipe.scheduler.level = timestep / self.pipe.scheduler.config.num_train_timesteps
        options = self._options | {"strength": 1.0, "num_inference_steps": 1, "output_type": "latent"}
        options |= {"height": height, "width": width, "generator": generator}
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        return arguments_of(self.denoiser, lambda: self.pipe(prompt=prompt, image=image, **options))
