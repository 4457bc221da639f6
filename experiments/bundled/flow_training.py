"""Train a denoiser by flow matching, as Stable Diffusion 3 was (Esser et al., ICML 2024)."""

import torch
import torch.nn.functional as F

from .denoiser_training import DenoiserTraining
from .muon import MuonAndAdamW

__all__ = ["FlowTraining", "flow_times"]

_UNITS = 1000  # timesteps are the fraction of noise in thousandths, as the pipeline tells them


def flow_times(chance: torch.Tensor) -> torch.Tensor:
    """Return timesteps in 0..1000 of uniform chances in 0..1: the fraction of noise is logit-normal.

    So the middle, where the direction is hardest to tell, is trained most (section 3.1 there, location 0, scale 1).
    """
    least = torch.finfo(chance.dtype).eps
    return _UNITS * torch.special.ndtri(chance.clamp(least, 1 - least)).sigmoid()


class FlowTraining(DenoiserTraining):
    """The training of a `JointDenoiser`: the error of its velocity, noise - image, at x = (1 - s) image + s noise.

    Of `TextToImageSettings`, `contextless` is the fraction of samples that are not told the text's summary: Stable
    Diffusion 3 left out each text encoder in 46 % of its training. No mask takes part.
    """

    def _prepare(self):
        if self.settings.grounding or self.settings.hidden:
            raise ValueError("flow matching here knows no grounding and no hidden padding: set both to 0")

    def _new_optimizer(self):
        if self.device.type == "cuda":  # whose graphs cannot hold Muon's steps
            return super()._new_optimizer()
        return MuonAndAdamW(self.model, self.model.matrices, self.schedule.lr, self.schedule.weight_decay)

    def _timesteps(self, chance):
        return flow_times(chance)

    def _losses(self, drawn):
        latents, noise, timestep = drawn["latents"], drawn["noise"], drawn["timestep"]
        fraction = (timestep / _UNITS)[:, None, None, None]
        noisy = (1 - fraction) * latents + fraction * noise
        predicted = self.model(noisy, timestep, drawn["ids"], drawn.get("contextless"))
        return {"loss": F.mse_loss(predicted.float(), noise - latents)}
