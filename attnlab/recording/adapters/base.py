"""The seam between recording and the kinds of denoisers: what a recorder asks of one, a subclass of `Adapter`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..encoded import EncodedTexts
from ..layers import Layer, alike, mean_attention, split_heads
from ..norms import Norm
from ..words import Word

__all__ = ["Adapter", "AttentionCall", "DenoiserCall", "JointCall", "Timesteps", "arguments_of"]


class DenoiserCall(NamedTuple):
    """One call of a denoiser: what a recorder has to know of it."""

    latents: torch.Tensor  # (batch, channel, row, column), noisy; packed (batch, image token, channel) in some models
    size: tuple[int, int]  # (height, width) of the latents, or of the image tokens of packed ones
    timestep: int
    text: Sequence[torch.Tensor]  # of each row of the batch (token, text width), as the attentions read it
    attention_mask: torch.Tensor | None  # (batch, token), which tokens take part; None where the model masks none
    # of each row of the batch, as the text encoders gave it: one tensor (token, width), or one of each encoder
    encoded: Sequence[tuple[torch.Tensor, ...]]


class AttentionCall(NamedTuple):
    """One call of an attention whose keys are of the image or of the text alone; None for what a tap does not see."""

    query: torch.Tensor  # (batch, pixel, head x width)
    key: torch.Tensor  # (batch, token or pixel, head x width)
    hidden: torch.Tensor | None = None  # (batch, pixel, channel), what the queries were made of
    context: torch.Tensor | None = None  # (batch, token or pixel, channel), what the keys were made of

    @property
    def count(self) -> int:
        """Number of pixels."""
        return self.query.shape[1]

    @property
    def among_pixels(self) -> bool:
        """Whether pixels meet pixels of the same image in it."""
        return alike(self.context, self.hidden)

    def lasting(self) -> "AttentionCall":
        """Return the call without what only it keeps in memory, and without gradients."""
        return AttentionCall(self.query.detach(), self.key.detach())

    def text_keys(self, row: int) -> torch.Tensor | None:
        """Return the keys (token, head x width) of one image, which are those of its text."""
        return self.key[row].detach()

    def self_attention(self, row: int, module: nn.Module) -> torch.Tensor:
        """Compute one image's self-attention in a module, mean over heads: float32 (pixel, pixel)."""
        norms = (Norm.of(norm, self.query.shape[-1] // module.heads) for norm in (module.norm_q, module.norm_k))
        given = zip((self.query, self.key), norms, strict=True)
        queries, keys = (split_heads(x[row].detach(), module.heads, norm) for x, norm in given)
        return mean_attention(queries, keys * module.scale)


class JointCall(NamedTuple):
    """One call of an attention in which pixels attend to pixels and to text: what one image's pixels give its text.

    In a self-attention of the image alone there is no text.
    """

    query: torch.Tensor  # (batch, head, token, width), of all tokens
    key: torch.Tensor  # (batch, head, token, width), of all tokens; several heads of queries may share one
    # (batch or 1, head or 1, query or 1, key): what is added to scores, or bool, who takes part
    mask: torch.Tensor | None
    scale: float  # factor of query times key
    pixels: Sequence[slice]  # of each row of the batch, which tokens are the image's pixels
    text: Sequence[slice]  # of each row of the batch, which tokens are the text's
    output: torch.Tensor | None = None  # (batch, head, token, width), of all queries

    among_pixels = True  # pixels meet pixels in it; it has as many keys as queries, else a tap does not hand it on

    @property
    def count(self) -> int:
        """Number of pixels."""
        return self.query[0, 0, self.pixels[0]].shape[0]

    def lasting(self) -> "JointCall":
        """Return the call."""
        return self

    def text_keys(self, row: int) -> torch.Tensor | None:
        """Return None: keys change from step to step, as they answer to the image."""
        return None

    def outputs(self, row: int, tokens: slice) -> torch.Tensor:
        """Return what attention gives some tokens of one image, before its output projection: (token, head x width)."""
        return self.output[row, :, tokens].detach().transpose(0, 1).flatten(1)

    def shares(
        self,
        row: int,
        share: str,
        count: int | None = None,
        weights: torch.Tensor | None = None,
        kept: int | None = None,
    ) -> torch.Tensor:
        """Compute how one image's pixels share out their attention among its text, mean over heads.

        float32 (token, pixel), 0..1: of all attention (share="joint"), as the model does, or of what goes to the text
        ("text"), which adds up to 1 over tokens. Of the first `count` tokens of the text, if it is given; heads count
        by `weights` (head, pixel). Only the first `kept` tokens are returned, which may take far less time.
        """
        first = self.text[row].start or 0
        text = self.text[row] if count is None else slice(first, first + count)
        query, key = self._met(row)
        mask = None if self.mask is None else self._mask(row)
        if share == "text":
            mask = None if mask is None else mask[..., text]
            found = _text_shares(query.float(), key[:, text].float() * self.scale, mask, kept)
        else:
            tokens = torch.arange(key.shape[1], device=key.device)[text][:kept]
            found = _joint_shares(query, key, mask, self.scale, tokens).float().mT
        return found.mean(0) if weights is None else (found * weights[:, None]).sum(0)

    def self_attention(self, row: int, module: nn.Module | None = None) -> torch.Tensor:
        """Compute how one image's pixels attend to one another, mean over heads: float32 (pixel, pixel).

        Softmax over pixels alone, all of which take part, whatever the mask says of the text. The module is not asked:
        queries and keys are normalized already.
        """
        query, key = self._met(row)
        return mean_attention(query.float(), key[:, self.pixels[row]].float() * self.scale)

    def _met(self, row):
        """Return the queries of an image's pixels and the keys of all tokens, as many heads of both."""
        query, key = self.query[row, :, self.pixels[row]].detach(), self.key[row].detach()
        return query, key.repeat_interleave(len(query) // len(key), 0) if len(key) != len(query) else key

    def _mask(self, row):
        """Return an image's own mask, (head or 1, pixel or 1, key)."""
        mask = self.mask.detach().reshape((1,) * (4 - self.mask.ndim) + self.mask.shape)
        mask = mask[row if len(mask) > 1 else 0]
        return mask if mask.shape[1] == 1 else mask[:, self.pixels[row]]


def _text_shares(query, key, mask, kept=None):
    """Compute the softmax over the text's tokens: (head, token, pixel), with pixels last, which is the faster order.

    Where few tokens are `kept`, the others are not written once more.
    """
    scores = key @ query.mT
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask.mT, -torch.inf)
    elif mask is not None:
        scores += mask.mT.float()
    if kept is None or 2 * kept > scores.shape[-2]:
        return scores.softmax(-2)[:, :kept]
    return (scores[:, :kept] - scores.logsumexp(-2, keepdim=True)).exp_()


def _joint_shares(query, key, mask, scale, tokens):
    """Compute the softmax over all tokens, as the model does, of those that are asked for: (head, pixel, token).

    Attention whose values say which token a key is of gives its probabilities, without a matrix of all of them. Values
    as wide as keys go through the kernels that are fast.
    """
    values = (torch.arange(key.shape[1], device=key.device)[:, None] == tokens).to(query.dtype)
    values = F.pad(values, (0, max(0, query.shape[-1] - len(tokens)))).expand(len(query), -1, -1)
    found = F.scaled_dot_product_attention(query[None], key[None], values[None], mask, scale=scale)[0]
    return found[..., : len(tokens)]


class _EnoughSeen(Exception):
    """Ends a call where what it was made for has been seen."""


def arguments_of(module: nn.Module, run: Callable[[], object]) -> tuple[tuple, dict]:
    """Return the arguments with which `run` first calls a module, and end it there; RuntimeError where it does not."""
    found, thread = [], get_ident()

    def stop(module, args, kwargs):
        if get_ident() == thread:  # others may be drawing images with it
            found.append((args, kwargs))
            raise _EnoughSeen

    handle = module.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    except _EnoughSeen:
        return found[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(module).__name__} was not called where it should be")


class Timesteps:
    """Timesteps of a denoiser's calls as numbers, without a GPU being asked for each: that waits for all its work.

    A pipeline hands on an element of its scheduler's list, whose place in memory tells which one it is; so the list
    alone is read, once. What is no element of it is read by itself.
    """

    def __init__(self):
        self._list: tuple | None = None  # the scheduler's tensor, and its numbers

    def number(self, timestep: torch.Tensor | float, known: torch.Tensor | None, at: int | None = None) -> int:
        """Return a timestep as a whole number; `known` is the scheduler's list.

        `at` is a place in the list, for a denoiser that is told the time in units of its own.
        """
        if _holds(known, timestep):
            at = timestep.storage_offset() - known.storage_offset()
        if at is None or known is None:
            return round(float(torch.as_tensor(timestep).flatten()[0]))
        if self._list is None or self._list[0] is not known:
            self._list = known, known.tolist()
        return round(self._list[1][at])


def _holds(known, timestep):
    """Whether a tensor of one value, maybe expanded, is an element of a list in the same memory."""
    if not (torch.is_tensor(timestep) and torch.is_tensor(known)) or known.dtype != timestep.dtype:
        return False
    if timestep.numel() != 1 and any(timestep.stride()):  # several values
        return False
    same = known.untyped_storage().data_ptr() == timestep.untyped_storage().data_ptr()
    return same and 0 <= timestep.storage_offset() - known.storage_offset() < len(known) and known.is_contiguous()


class Adapter(ABC):
    """What is particular to one kind of denoiser; the pipeline's calls go through it unchanged."""

    pipe: object  # the pipeline that is recorded
    module: nn.Module  # its denoiser
    attentions: dict[str, nn.Module]  # those that read text, by the denoiser's own dotted names
    texts: EncodedTexts  # what the pipeline's text encoders read
    alternates: bool  # whether one step may be several calls, each of one part of guidance
    joint = False  # whether keys of a text depend on more than the text
    sees_context = False  # whether the tap also hands on what keys were made of, by which texts are told apart
    how_seen: str  # what to do where an attention was not seen

    def is_default(self, name: str) -> bool:
        """Return whether a layer is recorded where none is asked for by name: all, unless it is known better."""
        return True

    @abstractmethod
    def read(self, args: tuple, kwargs: dict) -> DenoiserCall | None:
        """Read a call of the denoiser from its arguments; None for one that is no step of its own."""

    @abstractmethod
    def parts(self, call: DenoiserCall) -> tuple[str, ...]:
        """Name the equal parts of a call's batch in order, "negative", ...; TypeError where that cannot be known."""

    @abstractmethod
    def words(self, call: DenoiserCall, row: int, encoder, prompts: Sequence[str]) -> tuple[list[Word] | None, bool]:
        """Find the words of one image's text, and whether an end token follows them; None where they are not known.

        `encoder` is the pipeline's `TextEncoder`; one of the `prompts` is what a template may be around.
        """

    @abstractmethod
    def tap(
        self, attention: nn.Module, receive: Callable[["AttentionCall | JointCall"], None]
    ) -> list[RemovableHandle]:
        """Hand each call of an attention to `receive`: its queries and keys, and what both were made of."""

    def grid(self, pixels: int, latent: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) of a layer with so many queries, for latents of (height, width).

        The latent's size, halved and rounded up until it fits; RuntimeError where none does. Never a square root:
        images need not be square.
        """
        height, width = latent
        while height * width > pixels:
            height, width = -(-height // 2), -(-width // 2)
        if height * width != pixels:
            raise RuntimeError(f"a layer with {pixels} queries does not fit a latent of {latent[0]} x {latent[1]}")
        return height, width

    def self_attentions(self) -> list[nn.Module]:
        """List the attentions of the image to itself, here those that belong to attentions which read text."""
        return [self.self_attention_of(name) for name in self.attentions]

    @abstractmethod
    def self_attention_of(self, name: str) -> nn.Module:
        """Return the self-attention that belongs to an attention which reads text; TypeError where none is seen."""

    def layer(self, name: str, dtype: torch.dtype, values: bool) -> Layer:
        """Copy what makes a text's keys, and its `values`, in a layer where these depend on the text alone.

        Called while the layer runs: only there does a LoRA have its scale.
        """
        return Layer.of(name, self.attentions[name], dtype, values)
