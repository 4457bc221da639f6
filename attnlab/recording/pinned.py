"""Any text in joint attention: the denoiser reads it beside an image that stays as it was.

There a text is rewritten in every block by what it sees of the image, so another text than the prompt has no keys until
the model has read it beside this image. The denoiser is called once more with the other text, and each block is handed
the image's tokens of the real call ("pinned"). So the image is that of the real call, and the text becomes what it
would have been beside it; with the prompt for the text all is the same to the last bit. ConceptAttention (Helbling et
al., ICML 2025) lets concepts read an image in this way.
"""

import inspect
from collections.abc import Callable, Sequence

import torch
from accelerate.utils import recursively_apply

from .adapters import TransformerAdapter

__all__ = ["PinnedImage", "joined_texts", "named_arguments", "with_text"]

_TEXT = {  # arguments of denoisers that hold a text, or say which of its tokens take part and where they stand
    "encoder_hidden_states", "encoder_hidden_states_2", "encoder_hidden_states_t5", "encoder_hidden_states_llama3",
    "cap_feats", "encoder_hidden_states_mask", "encoder_attention_mask", "encoder_attention_mask_2", "attention_mask",
    "txt_ids", "text_rope_pos",
}  # fmt: skip
_STREAMS = ("hidden_states", "x", "visual_embed")  # arguments of blocks: the image's tokens, in some with the text's
# arguments that may be for all images alike, and how many axes they have then
_ALIKE = {"txt_ids": 2, "text_rope_pos": 1, "img_ids": 2}
_LISTS = ("img_shapes", "txt_seq_lens")  # arguments that are lists of one entry per image
_TIMED = ("LuminaNextDiT2DModel",)  # denoisers whose time is told together with the text, so that the image hears of it


class PinnedImage:
    """The image's tokens that each block was given in one call of a denoiser, for calls with other texts.

    TypeError for a denoiser whose image answers to the text by another way than attention.
    """

    def __init__(self, adapter: TransformerAdapter):
        if type(adapter.module).__name__ in _TIMED:
            raise TypeError(
                f"{type(adapter.module).__name__} tells the time by the text, so no other text fits an image"
            )
        self.adapter = adapter
        self.phase = "rest"  # what is done with the tokens of a call: "keep" them, "give" kept ones to it, or neither
        self.rows: list[int] | None = None  # of the kept batch, those to give; None: all as they are
        self._kept: dict[str, torch.Tensor] = {}  # by the block's name

    def __enter__(self):
        self._handles = self.listen()
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        self.forget()

    def listen(self) -> list:
        """Listen to the blocks; return the handles to remove that by."""
        module, blocks = self.adapter.module, list(self.adapter.attentions)
        if self.adapter.family.image != "behind":  # in a U-Net other modules stand between them
            blocks = dict.fromkeys(name.rpartition(".")[0] for name in blocks)
        return [
            module.get_submodule(block).register_forward_pre_hook(self._hook(block), with_kwargs=True)
            for block in blocks
        ]

    def keep(self, args: tuple, kwargs: dict) -> None:
        """Call the denoiser, and keep the image's tokens, to give them from now on; no hook of whole calls hears it."""
        self.phase = "keep"
        self.adapter.read(args, kwargs)  # tells where the text stands
        self.adapter.module.forward(*args, **kwargs)
        self.phase = "give"

    def forget(self) -> None:
        """Drop the tokens, and do nothing."""
        self.phase, self._kept = "rest", {}

    def _hook(self, block) -> Callable:
        @torch.compiler.disable
        def hook(module, args, kwargs):
            if self.phase == "rest":
                return None
            given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
            name = next(name for name in _STREAMS if name in given)
            stream = given[name]
            alone = self.adapter.family.image == "apart" or given.get("encoder_hidden_states") is not None
            text = slice(0, 0) if alone else self._text(stream.shape[1])
            if self.phase == "keep":
                self._kept[block] = stream[:, text.stop :] if text.start == 0 else stream[:, : text.start]
                return None
            kept = self._kept[block] if self.rows is None else self._kept[block][self.rows]
            parts = [stream[:, text], kept]
            pinned = torch.cat(parts if text.start == 0 else parts[::-1], 1)
            return (args, {**kwargs, name: pinned}) if name in kwargs else ((pinned, *args[1:]), kwargs)

        return hook

    def _text(self, tokens) -> slice:
        """Return where the text stands among a block's tokens; ValueError where that differs from image to image."""
        found = {(place.start, place.stop) for place in self.adapter.places(tokens)[1]}
        if len(found) > 1:
            raise ValueError("texts of several lengths were read together: record one prompt at a time")
        return slice(*found.pop())


def named_arguments(adapter: TransformerAdapter, args: tuple, kwargs: dict) -> dict:
    """Return the arguments of a call of the denoiser by their names."""
    named = dict(inspect.signature(type(adapter.module).forward).bind(adapter.module, *args, **kwargs).arguments)
    return {name: value for name, value in named.items() if name != "self"}


def joined_texts(texts: Sequence[tuple[dict, int]], count: int) -> dict:
    """Join texts of one length to arguments of a call of the denoiser: each of them for `count` images in turn.

    A text is the arguments of a call that reads it, by name, and which row of its batch does.
    """
    return {name: _joined(name, [(given[name], row) for given, row in texts], count) for name in texts[0][0]
            if name in _TEXT}  # fmt: skip


def with_text(
    adapter: TransformerAdapter, args: tuple, kwargs: dict, text: dict, rows: Sequence[int] | None = None
) -> dict:
    """Return the arguments of a call of the denoiser with another text.

    Parameters
    ----------
    adapter : TransformerAdapter
        Of the denoiser.
    args, kwargs : tuple, dict
        Of the call.
    text : dict
        Of the other call, what `joined_texts` gives.
    rows : sequence of int, optional
        Rows of the call's batch of which the other one is made; all of them unless given.
    """
    real = {name: value for name, value in named_arguments(adapter, args, kwargs).items()}
    batch = len(real[adapter.family.text[0]])
    other = {name: value for name, value in real.items() if name not in _TEXT}
    if rows is not None and list(rows) != list(range(batch)):
        lists = (*_LISTS, adapter.family.latents)
        other = {name: _chosen(name, value, list(rows), batch, lists) for name, value in other.items()}
    return other | text


def _joined(name, given, count):
    """Join one argument of several texts, a row of each for every image."""
    first, _ = given[0]
    if isinstance(first, list):
        return [value[row] for value, row in given for _ in range(count)]
    if not torch.is_tensor(first) or first.ndim == _ALIKE.get(name):
        return first
    axis = 1 if first.ndim == 4 else 0  # of several layers
    return torch.cat([value.narrow(axis, row, 1) for value, row in given for _ in range(count)], axis)


def _chosen(name, value, rows, batch, lists):
    """Choose rows of a batch from one argument, where it has them."""
    if torch.is_tensor(value):
        return value[rows] if value.ndim not in (0, _ALIKE.get(name)) and len(value) == batch else value
    if name in lists and isinstance(value, list):
        return [value[row] for row in rows]
    return recursively_apply(lambda x: x[rows] if x.ndim > 1 and len(x) == batch else x, value)
