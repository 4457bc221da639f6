"""The seam between recording and the kinds of denoisers: what a recorder asks of one, a subclass of `Adapter`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..layers import Layer

__all__ = ["Adapter", "AttentionCall", "DenoiserCall", "Timesteps"]


class DenoiserCall(NamedTuple):
    """One call of a denoiser: what a recorder has to know of it."""

    latents: torch.Tensor  # (batch, channel, row, column), noisy
    timestep: int
    text: torch.Tensor  # (batch, token, text width), as the attentions read it
    attention_mask: torch.Tensor | None  # (batch, token), which tokens take part; None where the model masks none


class AttentionCall(NamedTuple):
    """One call of an attention: as much of it as the adapter's tap sees, None for the rest."""

    query: torch.Tensor  # (batch, pixel, head x width)
    key: torch.Tensor | None = None  # (batch, token or pixel, head x width)
    value: torch.Tensor | None = None  # as the keys
    mask: torch.Tensor | None = None  # what is added to the scores
    scale: float | None = None  # factor of query times key
    output: torch.Tensor | None = None  # (batch, pixel, head x width), probabilities times values
    hidden: torch.Tensor | None = None  # (batch, pixel, channel), what the queries were made of
    context: torch.Tensor | None = None  # (batch, token or pixel, channel), what the keys were made of


class Timesteps:
    """Timesteps of a denoiser's calls as numbers, without a GPU being asked for each: that waits for all its work.

    A pipeline hands on an element of its scheduler's list, whose place in memory tells which one it is; so the list
    alone is read, once. What is no element of it is read by itself.
    """

    def __init__(self):
        self._list: tuple | None = None  # the scheduler's tensor, and its numbers

    def number(self, timestep: torch.Tensor | float, known: torch.Tensor | None) -> int:
        """Return a timestep as a whole number; `known` is the scheduler's list."""
        if _holds(known, timestep):
            if self._list is None or self._list[0] is not known:
                self._list = known, known.tolist()
            return round(self._list[1][timestep.storage_offset() - known.storage_offset()])
        return round(float(torch.as_tensor(timestep).flatten()[0]))


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

    @abstractmethod
    def is_default(self, name: str) -> bool:
        """Return whether a layer is recorded where none is asked for by name."""

    @abstractmethod
    def read(self, args: tuple, kwargs: dict) -> DenoiserCall:
        """Read a call of the denoiser from its arguments."""

    @abstractmethod
    def parts(self, call: DenoiserCall) -> tuple[str, ...]:
        """Name the equal parts of a call's batch in order, "negative", ...; TypeError where that cannot be known."""

    @abstractmethod
    def tap(self, attention: nn.Module, receive: Callable[[AttentionCall], None]) -> list[RemovableHandle]:
        """Hand each call of an attention to `receive`: its queries and keys, and what both were made of."""

    @abstractmethod
    def grid(self, pixels: int, latent: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) of a layer with so many queries, for latents of (height, width)."""

    @abstractmethod
    def self_attentions(self) -> list[nn.Module]:
        """List the attentions of the image to itself."""

    def layer(self, name: str, dtype: torch.dtype, values: bool) -> Layer:
        """Copy what makes a text's keys, and its `values`, in a layer where these depend on the text alone.

        Called while the layer runs: only there does a LoRA have its scale.
        """
        return Layer.of(name, self.attentions[name], dtype, values)
