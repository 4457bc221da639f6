"""What was recorded of a generation: queries, the text they met, and the weights that turn both into attention.

Axes: step, head, pixel (row-major), token, width (channels of one head, or of the text).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from .. import storage
from .layers import Layer, Layers, as_list, choose_layers
from .texts import Text, TextEncoder
from .words import Word

__all__ = ["Generation", "Recording", "SelfAttentionSum", "Trace"]


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


class SelfAttentionSum(NamedTuple):
    """Self-attention of the layers of one size, summed up; divide `total` by `count` for the mean."""

    total: torch.Tensor  # float32 (pixel, pixel), from each row to each column, mean over heads
    count: int  # number of (step, layer) pairs summed


@dataclass
class Trace:
    """What was recorded of one image, most of it by layer; what `record` was not asked to keep is empty."""

    text: torch.Tensor  # (token, text width), as the denoiser saw it
    attention_mask: torch.Tensor | None  # bool (token,), False for tokens that the model masks; None: it masks none
    words: list[Word] | None  # of the text, with their token positions; None where it came as embeddings
    generation: Generation
    # per layer, one tensor (pixel, head x width) per recorded step
    queries: dict[str, Sequence[torch.Tensor]] = field(default_factory=dict)
    # per layer, the sum of the steps' queries, float32 (pixel, head x width), normalized where the model does
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    # per text (None: the prompt) and layer, the sum of the steps' softmax maps, float32 (head, token, pixel), tokens up
    # to the first end token
    streamed: dict[str | None, dict[str, torch.Tensor]] = field(default_factory=dict)
    self_attention: dict[tuple[int, int], SelfAttentionSum] = field(default_factory=dict)  # by (height, width)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # (height, width) of each layer's maps
    layers: dict[str, Layer] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)  # which calls of the denoiser were recorded, from 0 on
    timesteps: list[int] = field(default_factory=list)  # of these calls

    @property
    def length(self) -> int | None:
        """Number of tokens up to the text's first end token, which is included; None where the words are unknown."""
        if self.words is None:
            return None
        return max((p for word in self.words for p in word.tokens), default=0) + 2

    def tensors(self) -> Iterator[torch.Tensor]:
        """Give what is held in memory of this image alone."""
        yield self.text
        yield from (q for steps in self.queries.values() if isinstance(steps, list) for q in steps)
        yield from self.sums.values()
        yield from (total for layers in self.streamed.values() for total in layers.values())
        yield from (attention.total for attention in self.self_attention.values())


class Recording(Sequence):
    """One or more recorded images: `len(recording)` of them, `recording[i]` one, as a recording of its own.

    Attributes
    ----------
    encoder : TextEncoder or None
        The text encoder of the recorded model, for other texts.
    traces : list of Trace
        What was recorded of each image.
    """

    def __init__(self, encoder: TextEncoder | None = None, traces: Sequence[Trace] = ()):
        self.encoder = encoder
        self.traces = list(traces)

    def __len__(self) -> int:
        return len(self.traces)

    def __getitem__(self, i: int | slice) -> "Recording":
        return Recording(self.encoder, self.traces[i] if isinstance(i, slice) else [self.traces[i]])

    def __repr__(self) -> str:
        if len(self) != 1:
            state = "" if self.complete else ", not all of them complete"
            return f"<Recording of {len(self)} images, {self.nbytes / 1e6:.1f} MB{state}>"
        trace = self.traces[0]
        text = "embeddings" if trace.words is None else repr(" ".join(word.text for word in trace.words))
        ran, planned = trace.generation.ran, trace.generation.planned
        state = "" if self.complete else f", interrupted after {ran} of {planned} steps"
        size = f"{len(trace.sizes)} layers, {len(trace.steps)} steps, {self.nbytes / 1e6:.1f} MB"
        return f"<Recording of {text}: {size}{state}>"

    def save(self, path: str | Path) -> Path:
        """Write everything to a safetensors file: queries, texts, key weights, and how the images came about.

        ValueError where the model normalizes its queries or keys by modules, which cannot be written.
        """
        from .files import pack  # late: that module knows this one's classes

        tensors, keys = {}, {}
        traces = [pack(trace, f"{i}.", tensors, keys) for i, trace in enumerate(self.traces)]
        return storage.write(path, "Recording", tensors, {"versions": storage.versions(), "traces": traces})

    @classmethod
    def load(cls, path: str | Path, encoder: TextEncoder | None = None) -> "Recording":
        """Read what `save` wrote; queries stay in the file until they are asked for.

        Texts are encoded by `encoder`, for example `TextEncoder.of(pipe)`; unless given, by the recorded model's own,
        which is loaded when it is first needed. FileNotFoundError where there is no such file; ValueError where it is
        cut short, is no recording or of a later version, or where the encoder is of another model.
        """
        from .files import unpack

        file, keys = storage.File(path, "Recording"), {}
        traces = [unpack(entry, f"{i}.", file, keys) for i, entry in enumerate(file.metadata["traces"])]
        models = {t.generation.model for t in traces} - {None}
        return cls(TextEncoder.fitting(encoder, models, path), traces)

    @property
    def trace(self) -> Trace:
        """The trace of the only image; ValueError where there are several, none, or nothing recorded of it."""
        if not self.traces:
            raise ValueError("the recording is empty: nothing has been generated yet inside the record() block")
        if len(self) > 1:
            raise ValueError(f"the recording holds {len(self)} images; choose one, for example recording[0]")
        if not self.traces[0].steps:
            raise ValueError(
                "no step of this image was recorded: it was interrupted in its first one, or those that were asked of "
                "record(steps=...) did not occur in it"
            )
        return self.traces[0]

    @property
    def words(self) -> list[Word]:
        """The words of the prompt, each with its token positions."""
        if self.trace.words is None:
            raise ValueError("the prompt's words are unknown: in the block it was given as embeddings, not as text")
        return self.trace.words

    def encode(self, text: str) -> Text:
        """Encode any text as the recorded model reads it; ValueError where there is no text encoder."""
        if self.encoder is None:
            raise ValueError(
                "the recording has no text encoder: give embeddings, or load it with Recording.load(path, "
                "TextEncoder.of(pipe))"
            )
        return self.encoder(text)

    @property
    def prompt(self) -> str:
        """The text that was recorded, as the tokenizer writes it (CLIP's in lower case)."""
        return " ".join(word.text for word in self.words)

    @property
    def metadata(self) -> dict:
        """What is known of how the image came about, as JSON types."""
        return {**asdict(self.trace.generation), "prompt": None if self.trace.words is None else self.prompt}

    @property
    def complete(self) -> bool:
        """False where a generation was interrupted."""
        return all(t.generation.planned in (None, t.generation.ran) for t in self.traces)

    @property
    def nbytes(self) -> int:
        """Bytes held: all but what is still in a file; key weights once where images share them."""
        layers = {id(layer): layer.nbytes for t in self.traces for layer in t.layers.values()}
        return sum(x.nbytes for t in self.traces for x in t.tensors()) + sum(layers.values())

    def choose_layers(self, layers: Layers = None) -> list[str]:
        """Name recorded layers: all (None, "all"), or those of given names, beginnings of names or map heights."""
        return choose_layers(self.trace.sizes, layers, default=lambda name: True)

    def branch(self, name: str) -> "Recording":
        """Return the images' "conditional" or "negative" part, of a recording of both."""
        chosen = [t for t in self.traces if t.generation.branch == name]
        if not chosen:
            known = sorted({t.generation.branch for t in self.traces})
            raise ValueError(f"branch {name!r} was not recorded, only {', '.join(known)}: record(pipe, branch='both')")
        return Recording(self.encoder, chosen)

    def self_attention(self, height: int | None = None) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return the mean self-attention of the layers of one size, and that size, (height, width).

        It is float32 (pixel, pixel), from each pixel (row) to each pixel (column), and rows add up to 1. `height` is
        that of the maps, the largest recorded unless given. ValueError where it was not recorded.
        """
        trace = self.trace
        known = {size[0]: size for size in trace.self_attention}
        if not known:
            raise ValueError("no self-attention was recorded: ask for it, for example record(pipe, self_attention=16)")
        if height not in (None, *known):
            raise ValueError(f"self-attention of height {height} was not recorded, only of {sorted(known)}")
        size = known[height or max(known)]
        total, count = trace.self_attention[size]
        return total.cpu() / count, size

    def choose_steps(self, steps: int | Collection[int] | None = None) -> list[int]:
        """Choose recorded steps: all (None), or the given ones; ValueError where one was not recorded, or summed up."""
        recorded = self.trace.steps
        if not (steps is None or self.trace.queries):
            raise ValueError("this recording kept sums over its steps: leave steps= out, or record with keep='queries'")
        chosen = recorded if steps is None else as_list(steps)
        unknown = [step for step in chosen if step not in recorded]
        if unknown or not chosen:
            raise ValueError(f"steps={unknown or []} cannot be chosen; recorded: {recorded}")
        return chosen
