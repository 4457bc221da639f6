"""The text encoder and the denoiser, trained together; `grounding` ties a word's attention to its exact mask.

Grounding follows TokenCompose (Wang et al., CVPR 2024): beside the diffusion loss, the cross-attention of every word
that names a class is drawn towards the pixels of that class. Weight 0 trains the plain model.
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

from . import vae
from .data import Scenes
from .text_encoder import LENGTH, new_text_encoder

COARSEST = 8  # side of the smallest maps that the down and up blocks have, and that are grounded; the middle's are not
WORDS = 10  # most grounded words of one caption


@dataclass(frozen=True)
class Recipe:
    batch: int = 32
    grounding: float = 0.15  # weight of the grounding loss; 0 for the plain model
    empty: float = 0.1  # share of captions dropped: what classifier-free guidance needs
    keywords: float = 0.15  # share of captions cut down to some of their class words, in any order
    bare: float = 0.5  # share of samples in which the end token and the padding are hidden from the denoiser


def new_scheduler() -> DDIMScheduler:
    """v-prediction down to zero signal, sampled from the last step on (Lin et al., WACV 2024)."""
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


def new_unet(side: int, channels: tuple[int, ...]) -> UNet2DConditionModel:
    looks = [side // 2**level >= COARSEST for level in range(len(channels))]
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=4,
        out_channels=4,
        down_block_types=tuple("CrossAttnDownBlock2D" if look else "DownBlock2D" for look in looks),
        up_block_types=tuple("CrossAttnUpBlock2D" if look else "UpBlock2D" for look in looks[::-1]),
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
    def new(cls, tokenizer: CLIPTokenizer, side: int, channels: tuple[int, ...]) -> "TextToLatent":
        return cls(new_text_encoder(tokenizer), new_unet(side, channels))

    def forward(self, noisy, timestep, ids, visible):
        """Predicted v (image, channel, row, column) from token ids and visible (image, token)."""
        text = self.text_encoder(ids).last_hidden_state
        return self.unet(noisy, timestep, text, encoder_attention_mask=visible).sample


@dataclass(frozen=True)
class Batches:
    """Everything a step draws from, in main memory: latents (image, channel, row, column), labels and captions."""

    latents: torch.Tensor
    labels: torch.Tensor
    captions: list[str]
    words: list[dict[str, str]]
    tokenizer: CLIPTokenizer

    @classmethod
    def of(cls, scenes: Scenes, autoencoder, tokenizer, cache: Path | None = None) -> "Batches":
        """Batches of scenes, their latents read from the .npy file `cache` where an earlier run left them."""
        if cache and cache.exists():
            latents = torch.from_numpy(np.load(cache))
        else:
            latents = vae.encode(autoencoder, scenes.images) * autoencoder.config.scaling_factor
        if cache and not cache.exists():
            part = cache.with_suffix(".part.npy")
            np.save(part, latents.numpy())
            part.replace(cache)
        return cls(latents, torch.from_numpy(scenes.labels), scenes.captions, scenes.words, tokenizer)

    def draw(self, recipe: Recipe, generator):
        """Latents, token ids, visible tokens, and for grounding the token positions and classes of words (-1: none)."""
        n = recipe.batch
        index = torch.randint(len(self.captions), (n,), generator=generator)
        chance = torch.rand(n, 3, generator=generator)
        texts = [self._caption(int(i), c, recipe, generator) for i, c in zip(index, chance, strict=True)]
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=LENGTH,
            truncation=True,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        length = tokens.attention_mask.sum(1)  # start, words and end
        positions = torch.arange(LENGTH)
        visible = (chance[:, 2:] >= recipe.bare) | (positions < length[:, None] - 1)
        where, what = torch.zeros(n, WORDS, dtype=torch.long), torch.full((n, WORDS), -1)
        for row, (i, text) in enumerate(zip(index, texts, strict=True)):
            spans = [(p, text[a:b]) for p, (a, b) in enumerate(tokens.offset_mapping[row].tolist()) if a < b]
            named = [(p, self.words[int(i)][t]) for p, t in spans if t in self.words[int(i)]][:WORDS]
            for k, (p, name) in enumerate(named):
                where[row, k], what[row, k] = p, street.CLASSES.index(name)
        return self.latents[index], self.labels[index], tokens.input_ids, visible, where, what

    def _caption(self, i, chance, recipe, generator):
        if chance[0] < recipe.empty:
            return ""
        words = list(self.words[i])
        if chance[1] < recipe.keywords and words:
            order = torch.randperm(len(words), generator=generator)
            keep = 1 + int(torch.randint(min(3, len(words)), (1,), generator=generator))
            return " ".join(words[k] for k in order[:keep].tolist())
        return self.captions[i]


@contextmanager
def attention_scores(unet):
    """Within the block, the scores q·k / sqrt(d) of each grounded layer's latest pass, (image, head, pixel, token)."""
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


def grounding_loss(scores, labels, visible, where, what, weight):
    """Mean KL divergence from the uniform distribution over a word's mask to the word's spatial attention.

    scores: of each layer (image, head, pixel, token); labels (image, row, column); visible (image, token); where, what
    (image, word); weight (image,) by how much signal is left at the timestep.
    """
    masks = (labels[:, None] == what[:, :, None, None]).float()  # (image, word, row, column)
    counts = (what >= 0) & masks.flatten(2).any(-1) & visible.gather(1, where)
    total, hidden = 0.0, ~visible[:, None, None, :]

    @cache
    def target(pixels):
        small = F.adaptive_avg_pool2d(masks, math.isqrt(pixels)).flatten(2)
        return small / small.sum(-1, keepdim=True).clamp(min=1e-6)

    for score in scores.values():
        share = score.masked_fill(hidden, -torch.inf).softmax(-1).mean(1)  # (image, pixel, token)
        maps = share.mT.gather(1, where[..., None].expand(-1, -1, share.shape[1]))  # (image, word, pixel)
        maps = maps / maps.sum(-1, keepdim=True).clamp(min=1e-6)
        goal = target(maps.shape[-1])
        total = total + (goal * ((goal + 1e-6).log() - (maps + 1e-6).log())).sum(-1)
    weights = counts * weight[:, None]
    return (total / len(scores) * weights).sum() / counts.sum().clamp(min=1)


def train_denoiser(
    model: TextToLatent, batches: Batches, recipe: Recipe, schedule: training.Schedule, folder: Path
) -> TextToLatent:
    scheduler = new_scheduler()
    device = model.unet.device
    if device.type == "cpu":  # the fast kernels' backward pass is slow there
        model.unet.set_attn_processor(AttnProcessor())
    alphas = scheduler.alphas_cumprod.to(device)

    def loss(model, generator):
        latents, labels, ids, visible, where, what = (t.to(device) for t in batches.draw(recipe, generator))
        n = len(latents)
        # stratified over the batch: every step sees early and late timesteps
        timestep = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * len(alphas)).long()
        timestep = timestep[torch.randperm(n, generator=generator)].to(device)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        noisy = scheduler.add_noise(latents, noise, timestep).contiguous(memory_format=torch.channels_last)
        with attention_scores(model.unet) as scores:
            predicted = model(noisy, timestep, ids, visible)
        diffusion = F.mse_loss(predicted.float(), scheduler.get_velocity(latents, noise, timestep))
        grounding = grounding_loss(scores, labels, visible, where, what, alphas[timestep].sqrt())
        total = diffusion + recipe.grounding * grounding if recipe.grounding else diffusion
        return {"loss": total, "diffusion": diffusion, "grounding": grounding}

    return training.run_training(model, loss, schedule, folder)
