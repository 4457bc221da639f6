"""Diffusion transformers: those whose image attends to the text by cross-attention, and those with joint attention."""

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..encoded import EncodedTexts
from ..layers import Layer, alike, linear_map
from ..pieces import words_in
from ..words import Word
from .base import Adapter, AttentionCall, DenoiserCall, JointCall, Timesteps, arguments_of
from .families import Family
from .tap import HOW_SEEN, Attended, end_interrupted, listen

__all__ = ["TransformerAdapter"]

_LEAVE_OUT = "leave self_attention= and agreement= out"
_REMEMBERED = 4  # texts of the latest calls: guidance has two, and a batch may lose one of them on the way


class _Text(NamedTuple):
    """The text of a call of the denoiser, in rows of the batch."""

    given: list[torch.Tensor]  # the arguments themselves
    encoded: list[tuple[torch.Tensor, ...]]  # as `DenoiserCall.encoded`
    read: Sequence[torch.Tensor]  # as `DenoiserCall.text`
    before: list[int]  # how many other tokens stand before the text's, where tokens meet
    ends: list[int]  # where the text's tokens end, those before included


class TransformerAdapter(Adapter):
    """A transformer of the table of families: queries and keys are seen where the attention itself is computed."""

    alternates, how_seen = True, HOW_SEEN

    def __init__(self, pipe, denoiser: nn.Module, family: Family):
        self.pipe, self.module, self.family = pipe, denoiser, family
        self.attentions = {
            name: module
            for name, module in denoiser.named_modules()
            if any(fnmatch(name, pattern) for pattern in family.attentions)
        }
        self.joint = family.image != "apart" or family.changing
        self.texts = EncodedTexts(pipe)
        self._guidance = _Guidance(self)
        self._timesteps = Timesteps()
        self._known: list[_Text] = []  # of the latest calls, the latest one first
        self._pixels, self._filled = 0, 0  # numbers of image tokens in this call, and of all in their place
        self._ids: tuple | None = None  # the places of packed image tokens, and the size that they tell

    def read(self, args: tuple, kwargs: dict) -> DenoiserCall | None:
        """Read a call of the denoiser from its arguments; None for one of skip-layer guidance, which is no step."""
        end_interrupted()  # a call before this one
        given = inspect.signature(type(self.module).forward).bind(self.module, *args, **kwargs).arguments
        if given.get("skip_layers") is not None:
            return None
        latents = given[self.family.latents]
        latents = torch.stack(latents) if isinstance(latents, list) else latents
        if self.family.channels_last:
            latents = latents.movedim(-1, 1)
        if latents.ndim == 5:  # (batch, channel, frame, row, column): each frame is an image
            latents = latents.transpose(1, 2).flatten(0, 1)
        size = self._size(given, latents)
        self._pixels = math.prod(size) if latents.ndim == 3 else math.prod(n // _patch(self.module) for n in size)
        self._filled = latents.shape[1] if latents.ndim == 3 else self._pixels
        text = self._text(given, args, kwargs, len(latents))
        mask = None if self.family.mask is None else given.get(self.family.mask)
        return DenoiserCall(latents, size, self._timestep(given), text.read, mask, text.encoded)

    def parts(self, call: DenoiserCall) -> tuple[str, ...]:
        """Name the parts of a batch by its texts: the conditional one is the first of a generation to be encoded."""
        return self._guidance.parts(call)

    def words(self, call: DenoiserCall, row: int, encoder, prompts: Sequence[str]) -> tuple[list[Word] | None, bool]:
        """Find the words of one image's text by what its text encoders read."""
        found = self.texts.read(call.encoded[row], prompts)
        if found is None:
            return None, False
        whole = min((len(words_in(prompt)) for prompt in prompts), default=0)
        if encoder is not None and 0 < len(found.words) < whole:
            end = f"the prompt does not fit the model's window: it was read up to {found.words[-1].text!r}"
            warnings.warn(f"{end}; any word behind that is lost, and has no map", stacklevel=2)
        lengths = [len(_last(part)) for part in call.encoded[row]]
        places = self._known[0].before[row], sum(lengths), lengths[-1] * self.family.twice
        return [word._replace(tokens=_placed(word.tokens, *places)) for word in found.words], found.ends

    def tap(self, attention: nn.Module, receive: Callable[[AttentionCall | JointCall], None]) -> list[RemovableHandle]:
        """Hand on what meets in each call of the attention."""
        own = all(attention is not one for one in self.attentions.values())

        def hear(met: Attended) -> None:
            tokens, among_pixels = met.key.shape[2], own or self.family.image in ("first", "last")
            # keys of an image prompt, which a processor asks for apart, or of other images, which it joins
            if (among_pixels and met.query.shape[2] != tokens) or (not own and tokens < self._least()):
                return
            places = _all_pixels(len(met.query)) if own else self.places(tokens) if self.joint else None
            receive(_call_of(met, places))

        return listen(attention, hear)

    def self_attention_of(self, name: str) -> nn.Module:
        """Return the joint attention itself, or what is beside a cross-attention; TypeError where that is not known."""
        if self.family.image in ("first", "last"):
            return self.attentions[name]
        if self.family.own is None:
            raise TypeError(f"self-attention of {type(self.module).__name__} is not recorded: {_LEAVE_OUT}")
        return self.module.get_submodule(f"{name.rpartition('.')[0]}.{self.family.own}")

    def output_weight(self, name: str, channels: int) -> torch.Tensor:
        """Return the weights (channel, head x width) that follow so many channels of a joint attention."""
        module, block = self.attentions[name], self.module.get_submodule(name.rpartition(".")[0])
        found = getattr(module, "to_out", None)
        found = block.proj_out if found is None else found[0] if isinstance(found, nn.ModuleList) else found
        return linear_map(found, self.module.dtype)[0][:, :channels]  # what a block joins to them stands behind

    def layer(self, name: str, dtype: torch.dtype, values: bool) -> Layer:
        """Copy what makes a text's keys, and its `values`; in joint attention these do not depend on text alone."""
        if self.joint:
            return Layer(name, heads=1, scale=1.0)  # maps are the mean over heads
        return Layer.of(name, self.attentions[name], dtype, values, normalized=True)

    def _text(self, given, args, kwargs, batch) -> _Text:
        """Read a call's text, or find it among the latest ones: then all of it is the same objects."""
        values = [given[name] for name in self.family.text if given.get(name) is not None]
        leaves = [leaf for value in values for leaf in (value if isinstance(value, list) else [value])]
        text = next((known for known in self._known if _same_objects(known.given, leaves)), None)
        if text is None:
            encoded = [tuple(_row(value, row) for value in values) for row in range(len(values[0]))]
            encoded = [row for row in encoded for _ in range(batch // len(encoded))]  # frames of a video share one
            before = _counts(given, self.family.before) or [_registers(self.module)] * batch
            lengths = _counts(given, self.family.length) or [sum(len(part) for part in row) for row in encoded]
            ends = [a + b for a, b in zip(before, lengths, strict=True)]
            parts = [(*row, *row[-1:] * self.family.twice) for row in encoded]
            read = [_as_one(row, n) for row, n in zip(parts, before, strict=True)]
            text = _Text(leaves, encoded, read if self.joint else _as_read(self, args, kwargs), before, ends)
        self._known = [text, *(known for known in self._known if known is not text)][:_REMEMBERED]
        return text

    def _least(self) -> int:
        """Return how many tokens there are, at least, among the keys of an attention that reads text."""
        image = {"first": self._filled + 1, "last": self._pixels}.get(self.family.image, 0)
        return image + (0 if self.family.image == "first" else min(self._known[0].ends))

    def places(self, tokens: int) -> tuple[list[slice], list[slice]]:
        """Return which of so many tokens are pixels, and which are text, of each row of the batch."""
        ends, image = self._known[0].ends, self.family.image
        if image == "apart":
            return [slice(None)] * len(ends), [slice(None)] * len(ends)
        if image == "behind":
            return [slice(None)] * len(ends), [slice(0, end) for end in ends]
        if image == "last":
            return [slice(end, end + self._pixels) for end in ends], [slice(0, end) for end in ends]
        # HiDream fills up an image that is not square; all that is behind it is text
        behind = tokens - len(self._known[0].read[0]) if self.family.twice else self._filled
        behind = -(-behind // self.family.multiple) * self.family.multiple
        return [slice(0, self._pixels)] * len(ends), [slice(behind, tokens)] * len(ends)

    def _size(self, given, latents):
        """Return (height, width) of the noisy image: in tokens where these are packed, else in latents."""
        if latents.ndim != 3:
            return tuple(latents.shape[-2:])
        if given.get("img_sizes") is not None:
            return tuple(int(n) for n in given["img_sizes"][0])
        if given.get("img_shapes") is not None:  # (frames, height, width) of the image, and behind it of references
            shape = given["img_shapes"][0]
            return tuple((shape[0] if isinstance(shape, list) else shape)[-2:])
        ids = given["img_ids"]
        if self._ids is None or self._ids[0] is not ids:
            self._ids = ids, _size_of(ids)
        return self._ids[1]

    def _timestep(self, given) -> int:
        """Return the timestep by the scheduler's own count of steps: models are told it in units of their own."""
        scheduler, known = self.pipe.scheduler, getattr(self.pipe.scheduler, "timesteps", ())
        counts = (getattr(scheduler, name, None) for name in ("step_index", "begin_index"))
        at = next((count for count in counts if count is not None), 0)
        at = at if at < len(known) else None  # where a generation has ended, and its calls are asked again
        return self._timesteps.number(given[self.family.timestep], known if len(known) else None, at)


def _as_read(adapter: TransformerAdapter, args: tuple, kwargs: dict) -> torch.Tensor:
    """Return a call's text (batch, token, text width) as its blocks read it, by a call that stops where one does."""
    first = next(iter(adapter.attentions.values()))
    # not the module itself, whose hooks are for whole calls
    positional, named = arguments_of(first, lambda: adapter.module.forward(*args, **kwargs))
    text = named["encoder_hidden_states"] if "encoder_hidden_states" in named else positional[1]
    return text.view(len(text), -1, text.shape[-1])


class _Guidance:
    """Which rows of a batch, or calls of a step, are of the prompt, and which of what guides away from it.

    Some pipelines ask the denoiser once for both, in either order, others twice. The text of the prompt is what a
    generation asks for first, and what its text encoder reads first.
    """

    def __init__(self, adapter: TransformerAdapter):
        self.adapter = adapter
        self._schedule: torch.Tensor | None = None  # timesteps of this generation
        self._prompt: list[tuple[torch.Tensor, ...]] = []  # its prompt, in rows
        self._ahead: bool | None = None  # whether that is the first half of a batch, once this is known
        self._found: list[tuple] = []  # (rows of text, size of the batch, parts) of the latest calls in it

    def parts(self, call: DenoiserCall) -> tuple[str, ...]:
        """Name the parts of a call's batch in order."""
        if (schedule := self.adapter.pipe.scheduler.timesteps) is not self._schedule:
            self._schedule, self._prompt, self._ahead, self._found = schedule, [], None, []
        batch = len(call.latents)
        for encoded, size, parts in self._found:
            if encoded is call.encoded and size == batch:
                return parts
        parts = self._perturbed(call) or self._parts(call, batch // 2)
        self._found = [*self._found[1 - _REMEMBERED :], (call.encoded, batch, parts)]
        return parts

    def _perturbed(self, call):
        """Name the parts where the last one is the prompt once more, with self-attention that is disturbed (PAG)."""
        if not getattr(self.adapter.pipe, "do_perturbed_attention_guidance", False):
            return ()
        thirds = call.latents.chunk(3)
        guided = len(thirds) == 3 and all(torch.equal(thirds[0], other) for other in thirds[1:])
        return *("negative",) * guided, "conditional", "perturbed"

    def _parts(self, call, half):
        if len(call.latents) == 2 * half and torch.equal(call.latents[:half], call.latents[half:]):
            # a prompt may be another one from some step on, at the same place
            self._ahead = ahead = self._is_ahead(call, half) if self._ahead is None else self._ahead
            self._prompt = self._prompt or (call.encoded[:half] if ahead else call.encoded[half:])
            return ("conditional", "negative") if ahead else ("negative", "conditional")
        self._prompt = self._prompt or call.encoded
        same = len(self._prompt) == len(call.encoded) and all(map(_same_text, self._prompt, call.encoded))
        return ("conditional",) if same else ("negative",)

    def _is_ahead(self, call, half):
        """Whether the first half of a batch is of the prompt."""
        if self._prompt:
            return all(map(_same_text, self._prompt, call.encoded[:half]))
        first, second = (self.adapter.texts.read(call.encoded[row], ()) for row in (0, half))
        if first is None or second is None or first.order == second.order:  # embeddings, or both encoded at once
            return False  # as is usual
        return first.order < second.order


def _call_of(met: Attended, places: tuple[list[slice], list[slice]] | None) -> AttentionCall | JointCall:
    """Return what met as a call; `places` are those of pixels and text in each row, None in cross-attention."""
    if places is None:
        return AttentionCall(*(x.transpose(1, 2).flatten(2) for x in (met.query, met.key)))
    return JointCall(met.query, met.key, met.mask, met.scale, *places, met.output)


def _all_pixels(count: int) -> tuple[list[slice], list[slice]]:
    """Return the places in a self-attention of so many images, which has no text."""
    return [slice(None)] * count, [slice(0, 0)] * count


def _patch(module) -> int:
    """Return the side in latents of what becomes one token."""
    config = module.config
    size = next((config[name] for name in ("patch_size", "all_patch_size") if config.get(name) is not None), 1)
    return size if isinstance(size, int) else size[-1]


def _registers(module) -> int:
    """Return how many learned tokens stand before the text."""
    tokens = getattr(module, "register_tokens", None)
    return 0 if tokens is None else tokens.shape[1]


def _counts(given, name) -> list[int] | None:
    """Count the tokens that take part by a mask among the arguments, in each row of the batch."""
    return None if given.get(name) is None else given[name].bool().sum(-1).tolist()


def _row(value, row):
    """Return one image's text; hidden states of several layers, (layer, batch, token, width), keep all of them."""
    if torch.is_tensor(value) and value.ndim == 4:
        return value[:, row]
    return value[row]


def _last(text: torch.Tensor) -> torch.Tensor:
    """Return a text (token, width), of several layers (layer, token, width) the last."""
    return text[-1] if text.ndim == 3 else text


def _placed(tokens, before: int, rows: int, twice: int) -> tuple[int, ...]:
    """Return where tokens stand behind `before` others; the last `twice` of all rows stand there once more."""
    again = [token + twice for token in tokens if token >= rows - twice] if twice else []
    return tuple(before + token for token in [*tokens, *again])


def _as_one(parts, before: int) -> torch.Tensor:
    """Join the texts of one image's text encoders into one (token, width), behind rows of 0 for what has no text."""
    parts = list(map(_last, parts))
    width = max(part.shape[-1] for part in parts)
    parts = [F.pad(part, (0, width - part.shape[-1])) for part in parts]
    return torch.cat([parts[0].new_zeros(before, width), *parts])


def _size_of(ids: torch.Tensor) -> tuple[int, int]:
    """Return (height, width) of the image whose packed tokens come first, by their places.

    `ids` are ([batch,] token, axis); the first axis tells images of one sequence apart, then row and column.
    """
    ids = ids if ids.ndim == 2 else ids[0]
    own = ids[ids[:, 0] == ids[0, 0]]
    height, width = (own.amax(0) - own.amin(0) + 1)[1:3].tolist()
    return int(height), int(width)


def _same_objects(one, other) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _same_text(one, other) -> bool:
    return len(one) == len(other) and all(map(alike, one, other))
