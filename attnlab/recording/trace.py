"""What is kept of one image: its attention, the text it met, and how the image came about."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .kept import KeptCall, tensors_in
from .layers import Layer
from .words import Word

__all__ = ["Generation", "SelfAttentionSum", "TextBeside", "Trace", "add_all", "add_to", "length_of"]


@dataclass
class Generation:
    """What is known of how an image came about; None where it is not."""

    model: str | None  # the pipeline's name, as it was loaded
    revision: str | None
    scheduler: str  # its class
    guidance_scale: float | None
    branch: str  # "conditional" or "negative"
    latent_size: tuple[int, int]  # (height, width)
    seed: int | None
    planned: int | None  # calls of the denoiser by the schedule
    ran: int = 0  # calls in fact; fewer where the generation was interrupted
    denoiser: str | None = None  # its class
    share: str = "text"  # of what maps of joint attention are shares
    options: dict = field(default_factory=dict)  # arguments with which the pipeline read its text, for other texts
    changed: int | None = None  # first recorded call that read another text than the first one; None: all read one


class SelfAttentionSum(NamedTuple):
    """Self-attention of the layers of one size, summed up; divide `total` by `count` for the mean."""

    total: torch.Tensor  # float32 (pixel, pixel), from each row to each column, mean over heads
    count: int  # number of (step, layer) pairs summed


def length_of(words: Iterable[Word], ends: bool) -> int:
    """Return the number of a text's tokens up to the first end token, which is included if one `ends` the text."""
    return max((p for word in words for p in word.tokens), default=0) + 1 + ends


def add_to(sums: dict, key, found: torch.Tensor) -> None:
    """Add a tensor to the sum of a layer, or whatever `key` names."""
    sums[key] = sums[key].add_(found) if key in sums else found


def add_all(sums: dict, found: dict) -> None:
    """Add tensors to the sums of the same keys, in one operation on a GPU."""
    if known := [key for key in found if key in sums]:
        torch._foreach_add_([sums[key] for key in known], [found[key] for key in known])
    sums.update((key, tensor) for key, tensor in found.items() if key not in sums)


@dataclass
class TextBeside:
    """A text that a joint model read beside the image; sums over steps by layer, of its tokens up to the first end."""

    words: list[Word]
    ends: bool  # whether an end token stands behind the last word
    # float32 (token, channel), of what attention gave its tokens
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    # float32 (token, pixel), of the products of that and of what attention gave the pixels
    products: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Number of tokens up to the first end token, which is included."""
        return length_of(self.words, self.ends)

    def mean(self, part: str, layer: str) -> torch.Tensor:
        """Return a layer's "outputs" or "products", mean over all tokens of the text's words."""
        tokens = sorted({token for word in self.words for token in word.tokens})
        return getattr(self, part)[layer][tokens].mean(0)


@dataclass
class Trace:
    """What was recorded of one image, most of it by layer; what `record` was not asked to keep is empty."""

    text: torch.Tensor  # (token, text width), as the denoiser saw it
    attention_mask: torch.Tensor | None  # bool (token,), False for tokens that the model masks; None: it masks none
    words: list[Word] | None  # of the text, with their token positions; None where it came as embeddings
    generation: Generation
    # per layer, one tensor (pixel, head x width) per recorded step; pixels are row-major
    queries: dict[str, Sequence[torch.Tensor]] = field(default_factory=dict)
    # per layer, the sum of the steps' queries, float32 (pixel, head x width), normalized where the model does
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    # per text (None: the prompt) and layer, the sum of the steps' softmax maps, float32 (head, token, pixel), tokens up
    # to the first end token; or of contributions: projections of each head, and behind them the norm of all together
    streamed: dict[str | None, dict[str, torch.Tensor]] = field(default_factory=dict)
    self_attention: dict[tuple[int, int], SelfAttentionSum] = field(default_factory=dict)  # by (height, width)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # (height, width) of each layer's maps
    layers: dict[str, Layer] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)  # which calls of the denoiser were recorded, from 0 on
    timesteps: list[int] = field(default_factory=list)  # of these calls
    ends: bool = True  # whether an end token stands behind the last word
    calls: list[KeptCall] = field(default_factory=list)  # of these steps, where they were kept: for the whole batch
    row: int = 0  # which of the images that were generated together this one is
    beside: dict[str, TextBeside] = field(default_factory=dict)  # by the text; maps of its words are in `streamed`
    # per layer, the sum of the steps' outputs of joint attention, float32 (pixel, channel)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    # per layer, the sum of the steps' agreement of self-attention with the reference, float32 ()
    agreement: dict[str, torch.Tensor] = field(default_factory=dict)
    # per layer of joint attention, the sum of the steps' maps by the heads' agreement, float32 (token, pixel)
    agreed: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int | None:
        """Number of tokens up to the text's first end token, which is included; None where the words are unknown."""
        if self.words is None:
            return None
        return length_of(self.words, self.ends)

    @property
    def joint(self) -> bool:
        """Whether it is of joint attention, whose keys no text has for itself."""
        return any(layer.weight is None for layer in self.layers.values())

    @property
    def contributed(self) -> bool:
        """Whether streamed sums are of contributions, told by one map more than heads."""
        return any(len(x) > self.layers[name].heads for sums in self.streamed.values() for name, x in sums.items())

    def device(self, name: str) -> torch.device:
        """Return where a layer's queries lie; those in a file are read into main memory."""
        queries = self.queries[name]
        return queries[0].device if isinstance(queries, list) else torch.device("cpu")

    def clear(self) -> None:
        """Drop all that was recorded, where it turned out to be wrong."""
        kept = (self.queries, self.self_attention, self.steps, self.timesteps, self.calls, self.beside, self.streamed)
        for each in (*kept, *self.totals()):
            each.clear()

    def totals(self) -> list[dict[str, torch.Tensor]]:
        """List the sums over steps of one tensor per layer."""
        beside = (sums for text in self.beside.values() for sums in (text.outputs, text.products))
        return [self.sums, self.outputs, self.agreement, self.agreed, *self.streamed.values(), *beside]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Give what is held in memory of this image; images that were generated together share their calls."""
        yield self.text
        yield from (q for steps in self.queries.values() if isinstance(steps, list) for q in steps)
        yield from (total for sums in self.totals() for total in sums.values())
        yield from (attention.total for attention in self.self_attention.values())
        yield from tensors_in(self.calls)
