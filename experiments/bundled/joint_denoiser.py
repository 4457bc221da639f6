"""Make the model in which text and image attend to one another: Stable Diffusion 3's classes, made small.

Two CLIP text encoders, no T5. Stable Diffusion 3 hands its denoiser the states before an encoder's last layer, and an
encoder's summary of the whole text. Each encoder here has one layer: so a word's state is that of its token and place
alone, and only the summary has read the text. What words mean together, the denoiser's own text stream has to find out.

Where there is no T5, the pipeline joins `ZEROS` tokens that are zero in its stead. They have no places and stay alike
in every block. So one of them, which counts that many times, does the same in training at half of the cost.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .text_encoder import new_text_encoder

__all__ = ["ZEROS", "JointDenoiser", "joint_pipeline", "new_flow_scheduler", "with_patch"]

ZEROS = 256  # default of the pipeline's `max_sequence_length`
_WIDTHS = (128, 64)  # of the text encoders; the denoiser reads both side by side
_HEAD = 64  # channels of an attention head: wider ones are as many times faster on a CPU as they are fewer
_LARGEST = 2  # times the side that is trained, of latents that have places


def new_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return a scheduler of flow matching, whose steps are evenly spaced: images this small need no shift."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


class JointDenoiser(nn.Module):
    """Both text encoders and the denoiser as one module, for the optimizer and the moving average."""

    def __init__(
        self,
        text_encoder: CLIPTextModelWithProjection,
        text_encoder_2: CLIPTextModelWithProjection,
        transformer: SD3Transformer2DModel,
        empty: torch.Tensor,
    ):
        super().__init__()
        self.text_encoder, self.text_encoder_2, self.transformer = text_encoder, text_encoder_2, transformer
        self.register_buffer("empty", empty, persistent=False)  # token ids (1, token) of no text

    @classmethod
    def new(
        cls,
        tokenizer: CLIPTokenizer,
        side: int = 16,
        blocks: int = 6,
        heads: int = 3,
        patch: int = 1,
        words: torch.Tensor | None = None,
    ) -> "JointDenoiser":
        """Return all with random weights.

        Parameters
        ----------
        tokenizer : CLIPTokenizer
            Its vocabulary and window.
        side : int
            Of the latents.
        blocks, heads, patch : int
            Of the denoiser: how many of each, and latents a side that are one token.
        words : torch.Tensor, optional
            What another text encoder knows of each token, (token, 128): the first encoder begins with it.
        """
        encoders = [new_text_encoder(tokenizer, width=n, kind=CLIPTextModelWithProjection) for n in _WIDTHS]
        with torch.no_grad():
            for encoder in encoders:  # no norm stands between these states and the denoiser: as large as the image's
                for embedding in (encoder.text_model.embeddings.token_embedding, _places(encoder)):
                    embedding.weight.div_(encoder.config.initializer_range)
            if words is not None:
                encoders[0].text_model.embeddings.token_embedding.weight.copy_(words / words.std())
        empty = tokenizer([""], padding="max_length", return_tensors="pt").input_ids
        return cls(*encoders, _new_transformer(side, blocks, heads, patch), empty)

    @property
    def matrices(self) -> list[torch.Tensor]:
        """Weights (output, input) within the denoiser's blocks, without those of their norms, which read the time."""
        named = self.transformer.transformer_blocks.named_parameters()
        return [weight for name, weight in named if weight.ndim == 2 and ".norm" not in name]

    def forward(self, noisy, timestep, ids, contextless=None):
        """Predict the velocity (image, channel, row, column) from token ids.

        `contextless`, bool (image,), says who is not told the text's summary, but that of no text.
        """
        text, pooled = self._read(torch.cat([ids, self.empty]))
        if contextless is not None:
            pooled = torch.where(contextless[:, None], pooled[-1:], pooled[:-1])
        else:
            pooled = pooled[:-1]
        text = torch.cat([text[:-1], text.new_zeros(len(ids), 1, text.shape[-1])], 1)
        with _LastKeyCounts(ZEROS):
            return self.transformer(noisy, text, pooled, timestep).sample

    def _read(self, ids):
        """Return states (text, token, width) and summaries (text, width), as the pipeline does."""
        read = [one(ids, output_hidden_states=True) for one in (self.text_encoder, self.text_encoder_2)]
        states = torch.cat([one.hidden_states[-2] for one in read], -1)
        return states, torch.cat([one.text_embeds for one in read], -1)


class _LastKeyCounts(TorchFunctionMode):
    """Let the last key of every attention count so many times: its score rises by the logarithm."""

    def __init__(self, times):
        super().__init__()
        self.bias = math.log(times)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            query, key = args[:2]
            mask = query.new_zeros(query.shape[2], key.shape[2])
            mask[:, -1] = self.bias
            kwargs = {**kwargs, "attn_mask": mask}
        return function(*args, **(kwargs or {}))


def _places(encoder):
    return encoder.text_model.embeddings.position_embedding


def _new_transformer(side, blocks, heads, patch):
    model = SD3Transformer2DModel(
        sample_size=side,
        patch_size=patch,
        in_channels=4,
        out_channels=4,
        num_layers=blocks,
        attention_head_dim=_HEAD,
        num_attention_heads=heads,
        joint_attention_dim=sum(_WIDTHS),
        caption_projection_dim=_HEAD * heads,
        pooled_projection_dim=sum(_WIDTHS),
        pos_embed_max_size=_LARGEST * side // patch,
        qk_norm="rms_norm",
    )
    with torch.no_grad():  # every block begins as the identity (Peebles and Xie, ICCV 2023, "adaLN-Zero")
        names = ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")
        for name, module in model.named_modules():
            if name.endswith(names):
                module.weight.zero_()
                module.bias.zero_()
    return model


def with_patch(model: SD3Transformer2DModel, patch: int) -> SD3Transformer2DModel:
    """Return a denoiser whose tokens are smaller, so that there are more of them, with the blocks of another.

    Each new token is read as the old one would have been if all of it had been alike, and says what the old one said on
    the average; places are between the old ones. So training goes on from there instead of from nothing.
    ValueError where the old token is not made of whole new ones.
    """
    config, state = model.config, model.state_dict()
    times, rest = divmod(config.patch_size, patch)
    if rest:
        raise ValueError(f"tokens of {config.patch_size} latents a side do not divide into tokens of {patch}")
    rows = {"patch_size": patch, "pos_embed_max_size": times * config.pos_embed_max_size}
    finer = SD3Transformer2DModel.from_config(config, **rows)
    split = (patch, times, patch, times)
    kernel, places = state["pos_embed.proj.weight"], state["pos_embed.pos_embed"]
    state["pos_embed.proj.weight"] = kernel.unflatten(3, split[2:]).unflatten(2, split[:2]).sum((3, 5))
    for name in ("proj_out.weight", "proj_out.bias"):  # their rows: row, column and channel within a token
        state[name] = state[name].unflatten(0, (*split, config.out_channels)).mean((1, 3)).flatten(0, 2)
    grid = places.unflatten(1, (config.pos_embed_max_size, -1)).permute(0, 3, 1, 2)
    between = F.interpolate(grid, scale_factor=times, mode="bilinear")
    state["pos_embed.pos_embed"] = between.flatten(2).transpose(1, 2).contiguous()
    finer.load_state_dict(state)
    return finer


def joint_pipeline(model: JointDenoiser, tokenizer: CLIPTokenizer, autoencoder: AutoencoderKL):
    """Return the StableDiffusion3Pipeline of a model, which calls it as it was trained."""
    from diffusers import StableDiffusion3Pipeline  # only here: its import warns of torchvision, which is not wanted

    autoencoder.register_to_config(shift_factor=0.0)  # this pipeline wants a number; of latents as they were trained on
    return StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=new_flow_scheduler(),
        vae=autoencoder,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
