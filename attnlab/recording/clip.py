"""Texts as Stable Diffusion reads them: by CLIP's text encoder, two of them side by side in XL."""

import warnings
from dataclasses import dataclass

import torch
from diffusers.loaders import TextualInversionLoaderMixin

from .pieces import split
from .words import Word

__all__ = ["TEXT_PARTS", "ClipReader", "Text"]

TEXT_PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")  # of a pipeline, by name
_NAMED = 5  # words beyond the window that an error names


@dataclass(frozen=True)
class Text:
    """An encoded text, padded to the encoder's window where it is so to the denoiser."""

    text: str  # as it was given
    ids: list[int]  # of its tokens, start, end and padding included; none where several encoders have read it
    embedding: torch.Tensor  # (token, text width), as the denoiser reads it
    words: list[Word]  # each with its token positions
    ends: bool = True  # whether an end token stands behind the last word
    attention_mask: torch.Tensor | None = None  # bool (token,), which of them take part in a padded text

    @property
    def length(self) -> int:
        """Number of tokens up to the first end token, which is included."""
        return max(p for word in self.words for p in word.tokens) + 1 + self.ends


class ClipReader:
    """The tokenizers and text encoders of a pipeline, by their names in it."""

    def __init__(self, parts: dict[str, object]):
        numbers = [n for n in ("", "_2") if parts.get(f"text_encoder{n}") is not None]
        self.tokenizers, self.encoders = (
            [parts[f"{kind}{n}"] for n in numbers] for kind in ("tokenizer", "text_encoder")
        )
        self.penultimate = "_2" in numbers  # whether the last layer but one is read, as in SDXL

    @property
    def tokenizer(self):
        """The first tokenizer, whose tokens words are told by."""
        return self.tokenizers[0]

    @property
    def window(self) -> int:
        """Largest number of tokens in a text, start and end included."""
        return self.tokenizer.model_max_length

    def read(self, text: str) -> Text:
        """Encode a text; ValueError where it has no word, or more tokens than the window holds."""
        parts = [self._encode(*pair, text) for pair in zip(self.tokenizers, self.encoders, strict=True)]
        ids = parts[0][0]
        found = split(self.tokenizer, ids)
        _check_vectors(self.tokenizer, found)
        if not found:
            raise ValueError(f"text={text!r}: the tokenizer finds no word in it")
        return Text(text, ids, torch.cat([part for _, part in parts], -1), found)

    def words_of(self, text: str) -> list[Word]:
        """List the words of a text with their token positions; errors are those of `read`."""
        return self.read(text).words

    def lost(self, text: str) -> list[str]:
        """List the words of a text that would fall outside the window, in order."""
        return max((self._outside(one, _expanded(one, text)[1]) for one in self.tokenizers), key=len)

    def note_call(self) -> dict:
        """Return how the pipeline was called: texts are read in one way."""
        return {}

    def check_reading(self, found: list[Word], ids: list[int], second: list[int] | None = None) -> None:
        """Warn where a model read less than a prompt, or another text beside it, by the token ids of its encoders.

        `found` are the words that the first encoder's `ids` spell.

        Less, where the window is full, so that more may have been cut off. Another text, where the second encoder had
        one of its own (`prompt_2`): its words stand at the same places, so that each map is of both.
        """
        _check_vectors(self.tokenizer, found)
        if found and len(ids) == self.window and found[-1].tokens[-1] == self.window - 2:
            end = f"the prompt fills the model's window of {self.window} tokens: it was read up to {found[-1].text!r}"
            warnings.warn(f"{end}; any word behind that is lost, and has no map", stacklevel=2)
        other = found if second is None else split(self.tokenizers[-1], second)
        if [word.text for word in other] != [word.text for word in found]:
            read = " ".join(word.text for word in other)
            warnings.warn(
                f"prompt_2 puts other words at the same places, {read!r}: the map of a word of the prompt is as much "
                "that of the tokens of prompt_2 there; leave prompt_2 out for maps of one text",
                stacklevel=2,
            )

    def _outside(self, tokenizer, ids):
        """Words of which a token is outside the window, whose last place the end token takes."""
        if len(ids) <= self.window:
            return []
        return [word.text for word in split(tokenizer, ids) if word.tokens[-1] >= self.window - 1]

    def _encode(self, tokenizer, encoder, text):
        expanded, ids = _expanded(tokenizer, text)
        if lost := [repr(word) for word in self._outside(tokenizer, ids)]:
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
            output_hidden_states=self.penultimate,
        )
        embedding = output.hidden_states[-2] if self.penultimate else output[0]
        return padded.input_ids[0].tolist(), embedding[0].cpu()


def _expanded(tokenizer, text):
    """Return a text with all vectors of its learned tokens, as a pipeline writes it, and its token ids."""
    expanded = TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer)
    return expanded, tokenizer(expanded).input_ids


def _check_vectors(tokenizer, found):
    """Warn where a text has some vectors of a learned token only: diffusers adds those of names in small letters."""
    learned = tokenizer.get_added_vocab()
    for name in {word.text for word in found if f"{word.text}_{len(word.tokens)}" in learned} & set(learned):
        small = f"pipe.load_textual_inversion(..., token={name.lower()!r})"
        warnings.warn(f"the text has some of the vectors of {name!r} only: load it with {small}", stacklevel=3)
