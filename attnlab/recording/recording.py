"""`Recording`: what was recorded of one or more images, and its file."""

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .. import storage
from .clip import Text
from .files import pack, unpack
from .layers import Layers, as_list, choose_layers
from .texts import TextEncoder, start_of
from .trace import Trace
from .words import Word

__all__ = ["Recording"]


class Recording(Sequence):
    """One or more recorded images: `len(recording)` of them, `recording[i]` one, as a recording of its own.

    Attributes
    ----------
    encoder : TextEncoder or None
        The text encoder of the recorded model, for other texts.
    """

    def __init__(self, encoder: TextEncoder | None = None, traces: Sequence[Trace] = (), arrive=None):
        self.encoder, self._traces = encoder, list(traces)
        self._arrive = arrive  # what to wait by, while more is recorded, for what is on its way

    @property
    def traces(self) -> list[Trace]:
        """What was recorded of each image; inside the block this waits for what is on its way from a GPU."""
        if self._arrive is not None:
            self._arrive()
        return self._traces

    def __len__(self) -> int:
        return len(self.traces)

    def __getitem__(self, i: int | slice) -> "Recording":
        return Recording(self.encoder, self.traces[i] if isinstance(i, slice) else [self.traces[i]], self._arrive)

    def __repr__(self) -> str:
        if len(self) != 1:
            state = "" if self.complete else ", not all of them complete"
            return f"<Recording of {len(self)} images, {self.nbytes / 1e6:.1f} MB{state}>"
        trace, made = self.traces[0], self.traces[0].generation
        text = "embeddings" if trace.words is None else repr(" ".join(word.text for word in trace.words))
        state = "" if self.complete else f", interrupted after {made.ran} of {made.planned} steps"
        size = f"{len(trace.sizes)} layers, {len(trace.steps)} steps, {self.nbytes / 1e6:.1f} MB"
        return f"<Recording of {text}: {size}{state}>"

    def save(self, path: str | Path) -> Path:
        """Write everything to a safetensors file: queries, texts, weights of layers, and how the images came about."""
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
        file, keys = storage.File(path, "Recording"), {}
        with storage.intact(path):
            traces = [unpack(entry, f"{i}.", file, keys) for i, entry in enumerate(file.metadata["traces"])]
        models = {t.generation.model for t in traces} - {None}
        start = next((start_of(t) for t in traces if t.words is not None), None)
        kinds = [(t.generation.denoiser, t.generation.options) for t in traces[:1]]
        return cls(TextEncoder.fitting(encoder, models, path, start, *(kind for one in kinds for kind in one)), traces)

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
            raise ValueError(
                "the prompt's words are unknown: in the block it was given as embeddings, not as text; "
                "ovam(recording, prompt) maps the words of any text"
            )
        return self.trace.words

    def encode(self, text: str) -> Text:
        """Encode any text as the recorded model reads it; ValueError where there is no text encoder."""
        if self.encoder is None:
            raise ValueError(_without_encoder(self.traces, text))
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
        """Bytes held: all but what is still in a file; weights of layers once where images share them."""
        layers = {id(layer): layer.nbytes for t in self.traces for layer in t.layers.values()}
        held = {id(x): x.nbytes for t in self.traces for x in t.tensors()}
        return sum(held.values()) + sum(layers.values())

    def choose_layers(self, layers: Layers = None) -> list[str]:
        """Name recorded layers: all (None, "all"), or those of given names, beginnings of names or map heights."""
        return choose_layers(self.trace.sizes, layers, default=lambda name: True)

    def branch(self, name: str) -> "Recording":
        """Return the images' "conditional" or "negative" part, of a recording of both."""
        chosen = [t for t in self.traces if t.generation.branch == name]
        if not chosen:
            known = sorted({t.generation.branch for t in self.traces})
            raise ValueError(f"branch {name!r} was not recorded, only {', '.join(known)}: record(pipe, branch='both')")
        return Recording(self.encoder, chosen, self._arrive)

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
            how = "record_again(pipe, recording, steps=...)" if self.trace.calls else "record with keep='queries'"
            raise ValueError(f"this recording kept sums over its steps: leave steps= out, or {how}")
        chosen = recorded if steps is None else as_list(steps)
        unknown = [step for step in chosen if isinstance(step, bool) or step not in recorded]
        if unknown or not chosen:
            raise ValueError(f"steps={unknown or []} cannot be chosen; recorded: {recorded}")
        return chosen


def _without_encoder(traces, text) -> str:
    """Say what to do about a text where there is no text encoder."""
    if any(trace.joint for trace in traces):
        return f"the model reads another text by record_again(pipe, recording, texts={text!r})"
    load = "Recording.load(path, TextEncoder.of(pipe))"
    return f"the recording has no text encoder: give embeddings, or load it with {load}"
