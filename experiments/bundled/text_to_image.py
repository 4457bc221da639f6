"""Train the text encoder and the denoiser together; `grounding` ties the attention of a word to its exact mask.

Grounding follows TokenCompose (Wang et al., CVPR 2024): a second loss, beside that of diffusion, moves the
cross-attention of each word for a class towards the pixels of that class. Weight 0 trains the plain model.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from attnlab import training
from attnlab.scenes import street
from attnlab.storage import replacing

from . import vae
from .data import Scenes
from .text_encoder import PROMPT_LENGTH, new_text_encoder

__all__ = ["Batches", "TextToImageSettings", "TextToLatent", "attention_scores", "grounding_loss", "new_scheduler"]
__all__ += ["train_denoiser"]

_COARSEST = 8  # side of the smallest attention maps of the down and up blocks; the smaller ones are not grounded
_MAX_WORDS = 10  # grounded words per caption


@dataclass(frozen=True)
class TextToImageSettings:
    """What a batch holds, and the weight of grounding."""

    batch: int = 32
    grounding: float = 0.15  # weight of the grounding loss; 0 for the plain model
    empty: float = 0.1  # fraction of captions that are dropped, for classifier-free guidance
    keywords: float = 0.15  # fraction of captions that are cut down to some of their class words, in any order
    bare: float = 0.5  # fraction of samples in which the end token and the padding are hidden from the denoiser


def new_scheduler() -> DDIMScheduler:
    """Return a scheduler of v-prediction down to zero signal, sampled from the last step on (Lin et al., WACV 2024)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _new_unet(side: int, channels: tuple[int, ...]) -> UNet2DConditionModel:
    attends = [side // 2**level >= _COARSEST for level in range(len(channels))]
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=4,
        out_channels=4,
        down_block_types=tuple("CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if one else "UpBlock2D" for one in attends[::-1]),
        block_out_channels=channels,
        layers_per_block=1,
        attention_head_dim=4,  # in this class of diffusers the number of heads
        cross_attention_dim=128,
    )


class TextToLatent(nn.Module):
    """Text encoder and denoiser as one module, for the optimizer and the moving average."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel):
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet.to(memory_format=torch.channels_last)

    @classmethod
    def new(
        cls, tokenizer: CLIPTokenizer, side: int, channels: tuple[int, ...], text_layers: int = 2
    ) -> "TextToLatent":
        """Return both with random weights, for latents of a side."""
        return cls(new_text_encoder(tokenizer, layers=text_layers), _new_unet(side, channels))

    def forward(self, noisy, timestep, ids, attention_mask):
        """Predict v (image, channel, row, column) from token ids and their attention mask (image, token)."""
        text = self.text_encoder(ids).last_hidden_state
        return self.unet(noisy, timestep, text, encoder_attention_mask=attention_mask).sample


@dataclass(frozen=True)
class Batches:
    """All scenes in memory, to draw batches from: latents (image, channel, row, column), labels and captions."""

    latents: torch.Tensor
    labels: torch.Tensor
    captions: list[str]
    words: list[dict[str, str]]
    tokenizer: CLIPTokenizer

    @classmethod
    def of(cls, scenes: Scenes, autoencoder, tokenizer, cache: Path | None = None) -> "Batches":
        """Encode scenes; their latents are read from the .npy file `cache` where an earlier run left them."""
        if cache and cache.exists():
            latents = torch.from_numpy(np.load(cache))
        else:
            latents = vae.encode_images(autoencoder, scenes.images) * autoencoder.config.scaling_factor
        if cache and not cache.exists():
            with replacing(cache) as part:
                np.save(part, latents.numpy())
        return cls(latents, torch.from_numpy(scenes.labels), scenes.captions, scenes.words, tokenizer)

    def draw(self, settings: TextToImageSettings, generator):
        """Draw latents, labels, token ids, attention mask, and positions and classes (-1: none) of grounded words."""
        n = settings.batch
        index = torch.randint(len(self.captions), (n,), generator=generator)
        chance = torch.rand(n, 3, generator=generator)
        texts = [self._caption(int(i), c, settings, generator) for i, c in zip(index, chance, strict=True)]
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=PROMPT_LENGTH,
            truncation=True,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        length = tokens.attention_mask.sum(1)  # start, words and end
        attention_mask = (chance[:, 2:] >= settings.bare) | (torch.arange(PROMPT_LENGTH) < length[:, None] - 1)
        positions = torch.zeros(n, _MAX_WORDS, dtype=torch.long)
        classes = torch.full((n, _MAX_WORDS), -1)
        for row, (i, text) in enumerate(zip(index, texts, strict=True)):
            spans = [(p, text[a:b]) for p, (a, b) in enumerate(tokens.offset_mapping[row].tolist()) if a < b]
            named = [(p, self.words[int(i)][t]) for p, t in spans if t in self.words[int(i)]][:_MAX_WORDS]
            for k, (p, name) in enumerate(named):
                positions[row, k], classes[row, k] = p, street.CLASSES.index(name)
        return self.latents[index], self.labels[index], tokens.input_ids, attention_mask, positions, classes

    def _caption(self, i, chance, settings, generator):
        if chance[0] < settings.empty:
            return ""
        words = list(self.words[i])
        if chance[1] < settings.keywords and words:
            order = torch.randperm(len(words), generator=generator)
            keep = 1 + int(torch.randint(min(3, len(words)), (1,), generator=generator))
            return " ".join(words[k] for k in order[:keep].tolist())
        return self.captions[i]


@contextmanager
def attention_scores(unet):
    """Yield {layer: scores q·k / sqrt(d) of its latest pass, (image, head, pixel, token)} of the grounded layers."""
    seen, scores, handles = {}, {}, []

    def keep(name, attention, role):
        def hook(module, args, output):
            seen[name, role] = output.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            if role == "key":
                scores[name] = seen.pop((name, "query")) @ seen.pop((name, "key")).mT * attention.scale

        return hook

    for name, module in unet.named_modules():
        if name.endswith("attn2") and "mid_block" not in name:
            handles.append(module.to_q.register_forward_hook(keep(name, module, "query")))
            handles.append(module.to_k.register_forward_hook(keep(name, module, "key")))
    try:
        yield scores
    finally:
        for handle in handles:
            handle.remove()


def grounding_loss(scores, labels, attention_mask, positions, classes, weight):
    """Return the mean KL divergence from the uniform distribution over a word's mask to the word's spatial attention.

    `scores` of each layer are (image, head, pixel, token), `labels` (image, row, column), `attention_mask` (image,
    token), `positions` and `classes` (image, word); `weight` (image,) is the signal that is left at the timestep.
    """
    masks = (labels[:, None] == classes[:, :, None, None]).float()  # (image, word, row, column)
    counts = (classes >= 0) & masks.flatten(2).any(-1) & attention_mask.gather(1, positions)
    total, hidden = 0.0, ~attention_mask[:, None, None, :]

    @cache
    def target(pixels):
        small = F.adaptive_avg_pool2d(masks, math.isqrt(pixels)).flatten(2)
        return small / small.sum(-1, keepdim=True).clamp(min=1e-6)

    for score in scores.values():
        probability = score.masked_fill(hidden, -torch.inf).softmax(-1).mean(1)  # (image, pixel, token)
        index = positions[..., None].expand(-1, -1, probability.shape[1])
        maps = probability.mT.gather(1, index)  # (image, word, pixel)
        maps = maps / maps.sum(-1, keepdim=True).clamp(min=1e-6)
        goal = target(maps.shape[-1])
        total = total + (goal * ((goal + 1e-6).log() - (maps + 1e-6).log())).sum(-1)
    weights = counts * weight[:, None]
    return (total / len(scores) * weights).sum() / counts.sum().clamp(min=1)


def train_denoiser(
    model: TextToLatent, batches: Batches, settings: TextToImageSettings, schedule: training.Schedule, folder: Path
) -> TextToLatent:
    """Train a model by the diffusion loss and, unless its weight is 0, the grounding loss."""
    scheduler = new_scheduler()
    device = model.unet.device
    if device.type == "cpu":  # the fast kernels' backward pass is slow there
        model.unet.set_attn_processor(AttnProcessor())
    alphas = scheduler.alphas_cumprod.to(device)

    def loss(model, generator):
        latents, labels, ids, *words = (t.to(device) for t in batches.draw(settings, generator))
        n, attention_mask = len(latents), words[0]
        # stratified over the batch: every step sees early and late timesteps; a chance just below 1 rounds up to it
        timestep = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * len(alphas)).long()
        timestep = timestep.clamp(max=len(alphas) - 1)
        timestep = timestep[torch.randperm(n, generator=generator)].to(device)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        noisy = scheduler.add_noise(latents, noise, timestep).contiguous(memory_format=torch.channels_last)
        with attention_scores(model.unet) as scores:
            predicted = model(noisy, timestep, ids, attention_mask)
        diffusion = F.mse_loss(predicted.float(), scheduler.get_velocity(latents, noise, timestep))
        grounding = grounding_loss(scores, labels, *words, alphas[timestep].sqrt())
        total = diffusion + settings.grounding * grounding if settings.grounding else diffusion
        return {"loss": total, "diffusion": diffusion, "grounding": grounding}

    return training.run_training(model, loss, schedule, folder)
