"""Text to embeddings, at any time, as the denoiser of a pipeline reads them."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from diffusers.loaders import TextualInversionLoaderMixin

from ..pipelines import load_parts
from . import words
from .layers import exact

__all__ = ["Text", "TextEncoder"]

_PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
_NAMED = 5  # words beyond the window that an error names


@dataclass(frozen=True)
class Text:
    """An encoded text, padded to the encoder's window."""

    text: str  # as it was given
    ids: list[int]  # of its tokens, start, end and padding included
    embedding: torch.Tensor  # (token, text width), as the denoiser reads it
    words: list[words.Word]  # each with its token positions

    @property
    def length(self) -> int:
        """Number of tokens up to the first end token, which is included."""
        return max(p for word in self.words for p in word.tokens) + 2


@lru_cache(maxsize=2)
def _parts_of(model: str) -> dict[str, object]:
    return load_parts(model, _PARTS)


class TextEncoder:
    """The tokenizers and text encoders of a pipeline; two of them side by side in SDXL.

    Made of a pipeline it refers to the pipeline's own modules: a LoRA or an embedding loaded later takes part from then
    on. Made of a model's name it loads the modules, those alone, when it is first asked.
    """

    def __init__(self, load: Callable[[], dict[str, object]], model: str | None = None):
        self._load = load
        self.model = model  # its name, where that is known

    @cached_property
    def _parts(self):
        """Tokenizers, text encoders, and whether the last layer but one is read, as in SDXL."""
        parts = self._load()
        numbers = [n for n in ("", "_2") if parts.get(f"text_encoder{n}") is not None]
        found = ([parts[f"{kind}{n}"] for n in numbers] for kind in ("tokenizer", "text_encoder"))
        return *found, "_2" in numbers

    @classmethod
    def of(cls, pipe) -> "TextEncoder | None":
        """Take a diffusers pipeline's own; None where it has no text encoder and reads embeddings alone."""
        parts = {name: pipe.components.get(name) for name in _PARTS}
        if all(parts.get(name) is None for name in ("text_encoder", "text_encoder_2")):
            return None
        return cls(lambda: parts, getattr(pipe, "name_or_path", None) or None)

    @classmethod
    def named(cls, model: str | Path) -> "TextEncoder":
        """Name a model as `load_pipeline` takes it; nothing is loaded yet."""
        return cls(lambda: _parts_of(str(model)), str(model))

    @classmethod
    def fitting(cls, encoder: "TextEncoder | None", models: Collection[str], path) -> "TextEncoder | None":
        """Choose the text encoder for a file made with some models: the given one, or the model's own.

        None where the model is not known; ValueError where the given one is of another model.
        """
        if encoder is None:
            return cls.named(*models) if len(models) == 1 else None
        if encoder.model and set(models) - {encoder.model}:
            made = ", ".join(models)
            raise ValueError(
                f"{path} was recorded from {made}: {encoder.model}'s texts do not fit it. If both are one model "
                f"by two names, set encoder.model = {made!r}"
            )
        return encoder

    @property
    def tokenizer(self):
        """The first tokenizer, whose tokens words are told by."""
        return self._parts[0][0]

    @property
    def window(self) -> int:
        """Largest number of tokens in a text, start and end included."""
        return self.tokenizer.model_max_length

    @exact()
    def __call__(self, text: str) -> Text:
        """Encode a text; ValueError where it has no word, or more tokens than the window holds."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text={text!r}: give at least one word")
        tokenizers, encoders, penultimate = self._parts
        parts = [self._encode(*pair, text, penultimate) for pair in zip(tokenizers, encoders, strict=True)]
        ids = parts[0][0]
        found = words.split(self.tokenizer, ids)
        if not found:
            raise ValueError(f"text={text!r}: the tokenizer finds no word in it")
        return Text(text, ids, torch.cat([part for _, part in parts], -1), found)

    def embed(self, word: str) -> torch.Tensor:
        """Embed a word or phrase by itself, in [start, word, end, padding]: float32 (text width,).

        The mean over its tokens. Raises the errors of a text.
        """
        text = self(word)
        return text.embedding[[p for w in text.words for p in w.tokens]].float().mean(0)

    def _encode(self, tokenizer, encoder, text, penultimate):
        expanded = TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer)
        ids = tokenizer(expanded).input_ids
        if len(ids) > self.window:
            inside = self.window - 1  # the end token takes the last place
            lost = [repr(w.text) for w in words.split(tokenizer, ids) if w.tokens[-1] >= inside]
            named = lost if len(lost) <= _NAMED else [*lost[:_NAMED], f"{len(lost) - _NAMED} more words"]
            sizes = f"the text has {len(ids)} tokens, the window {self.window}"
            raise ValueError(f"{sizes}: {', '.join(named)} would fall outside")
        padded = tokenizer(expanded, padding="max_length", max_length=self.window, return_tensors="pt")
        if encoder.device.type != "meta":  # an offloaded encoder fetches its input itself
            padded = padded.to(encoder.device)
        masked = getattr(encoder.config, "use_attention_mask", False)
        output = encoder(
            padded.input_ids,
            attention_mask=padded.attention_mask if masked else None,
            output_hidden_states=penultimate,
        )
        embedding = output.hidden_states[-2] if penultimate else output[0]
        return padded.input_ids[0].tolist(), embedding[0].cpu()
