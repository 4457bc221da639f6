"""Make the denoiser and its text encoder, and measure or ground the attention of their words.

Grounding follows TokenCompose (Wang et al., CVPR 2024): a second loss, beside that of diffusion, moves the
cross-attention of each word for a class towards the pixels of that class. Weight 0 trains the plain model.
"""

import math
from collections.abc import Collection
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from .text_encoder import new_text_encoder, without_context

__all__ = ["TextToLatent", "attention_scores", "grounding_loss", "new_scheduler", "off_start"]

_CHANNELS = (64, 96, 160)  # of the denoiser's levels


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


def _new_unet(side: int, heights: Collection[int], width: int) -> UNet2DConditionModel:
    attends = [side // 2**level in heights for level in range(len(_CHANNELS))]
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=4,
        out_channels=4,
        down_block_types=tuple("CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends),
        mid_block_type="UNetMidBlock2DCrossAttn" if side // 2 ** (len(_CHANNELS) - 1) in heights else "UNetMidBlock2D",
        up_block_types=tuple("CrossAttnUpBlock2D" if one else "UpBlock2D" for one in attends[::-1]),
        block_out_channels=_CHANNELS,
        layers_per_block=1,
        attention_head_dim=4,  # in this class of diffusers the number of heads
        cross_attention_dim=width,
    )


class TextToLatent(nn.Module):
    """Text encoder and denoiser as one module, for the optimizer and the moving average."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel):
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet.to(memory_format=torch.channels_last)

    @classmethod
    def new(
        cls,
        tokenizer: CLIPTokenizer,
        side: int = 16,
        heights: Collection[int] = (16,),
        text_layers: int = 1,
        places: float = 0.2,
    ) -> "TextToLatent":
        """Return both with random weights.

        Parameters
        ----------
        tokenizer : CLIPTokenizer
            Its vocabulary and window.
        side : int
            Of the latents.
        heights : collection of int
            Of the maps of cross-attention: levels of the denoiser with other heights have none.
        text_layers : int
            Of the text encoder; with 0 a word's embedding is that of its token and its place alone.
        places : float
            How large the embeddings of places are at the start, beside those of tokens.
        """
        text_encoder = new_text_encoder(tokenizer, text_layers, places)
        return cls(text_encoder, _new_unet(side, heights, text_encoder.config.hidden_size))

    def forward(self, noisy, timestep, ids, attention_mask=None, contextless=None):
        """Predict v (image, channel, row, column) from token ids and, if some are hidden, their attention mask.

        `contextless`, bool (image,), says whose text bypasses the layers of the text encoder.
        """
        text = self.text_encoder(ids).last_hidden_state
        if contextless is not None:
            text = torch.where(contextless[:, None, None], without_context(self.text_encoder, ids), text)
        return self.unet(noisy, timestep, text, encoder_attention_mask=attention_mask).sample


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
    token) or None, `positions` and `classes` (image, word); `weight` (image,) is the signal that is left at the
    timestep.
    """
    masks = (labels[:, None] == classes[:, :, None, None]).float()  # (image, word, row, column)
    counts, total = (classes >= 0) & masks.flatten(2).any(-1), 0.0
    if attention_mask is not None:
        counts &= attention_mask.gather(1, positions)

    @cache
    def target(pixels):
        small = F.adaptive_avg_pool2d(masks, math.isqrt(pixels)).flatten(2)
        return small / small.sum(-1, keepdim=True).clamp(min=1e-6)

    for score in scores.values():
        if attention_mask is not None:
            score = score.masked_fill(~attention_mask[:, None, None, :], -torch.inf)
        probability = score.softmax(-1).mean(1)  # (image, pixel, token)
        index = positions[..., None].expand(-1, -1, probability.shape[1])
        maps = probability.mT.gather(1, index)  # (image, word, pixel)
        maps = maps / maps.sum(-1, keepdim=True).clamp(min=1e-6)
        goal = target(maps.shape[-1])
        total = total + (goal * ((goal + 1e-6).log() - (maps + 1e-6).log())).sum(-1)
    weights = counts * weight[:, None]
    return (total / len(scores) * weights).sum() / counts.sum().clamp(min=1)


def off_start(scores, attention_mask=None):
    """Return the share of attention that is not on the start token: the mean over layers, images, heads and pixels.

    `scores` of each layer are (image, head, pixel, token), `attention_mask` (image, token) or None.
    """
    total = 0.0
    for score in scores.values():
        if attention_mask is not None:
            score = score.masked_fill(~attention_mask[:, None, None, :], -torch.inf)
        total = total + 1 - score.float().softmax(-1)[..., 0].mean()
    return total / len(scores)
