"""Any text in joint attention: the denoiser reads it beside an image that stays as it was.

There a text is rewritten in every block by what it sees of the image, so another text than the prompt has no keys until
the model has read it beside this image. The denoiser is called once more with the other text, and each block is handed
the image's tokens of the real call ("pinned"). So the image is that of the real call, and the text becomes what it
would have been beside it; with the prompt for the text all is the same to the last bit. ConceptAttention (Helbling et
al., ICML 2025) lets concepts read an image in this way.
"""

import inspect
from collections.abc import Callable

import torch

from .adapters import TransformerAdapter

__all__ = ["PinnedImage", "with_text"]

_TEXT = {  # arguments of denoisers that hold a text, or say which of its tokens take part and where they stand
    "encoder_hidden_states", "encoder_hidden_states_2", "encoder_hidden_states_t5", "encoder_hidden_states_llama3",
    "cap_feats", "encoder_hidden_states_mask", "encoder_attention_mask", "encoder_attention_mask_2", "attention_mask",
    "txt_ids", "text_rope_pos",
}  # fmt: skip
_STREAMS = ("hidden_states", "x", "visual_embed")  # arguments of blocks: the image's tokens, in some with the text's
_PLACES = {"txt_ids": 2, "text_rope_pos": 1}  # arguments that may be for all images alike, and their axes then
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
        self.adapter, self.giving = adapter, False  # whether blocks are handed the kept tokens
        self._kept: dict[str, torch.Tensor] = {}  # by the block's name

    def __enter__(self):
        module, blocks = self.adapter.module, list(self.adapter.attentions)
        if self.adapter.family.image != "behind":  # in a U-Net other modules stand between them
            blocks = dict.fromkeys(name.rpartition(".")[0] for name in blocks)
        self._handles = [
            module.get_submodule(block).register_forward_pre_hook(self._hook(block), with_kwargs=True)
            for block in blocks
        ]
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        self._kept = {}

    def keep(self, args: tuple, kwargs: dict) -> None:
        """Call the denoiser, and keep the image's tokens; no hook of whole calls takes part."""
        self.giving = False
        self.adapter.read(args, kwargs)  # tells where the text stands
        self.adapter.module.forward(*args, **kwargs)
        self.giving = True

    def _hook(self, block) -> Callable:
        def hook(module, args, kwargs):
            given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
            name = next(name for name in _STREAMS if name in given)
            stream = given[name]
            alone = self.adapter.family.image == "apart" or given.get("encoder_hidden_states") is not None
            text = slice(0, 0) if alone else self._text(stream.shape[1])
            if not self.giving:
                self._kept[block] = stream[:, text.stop :] if text.start == 0 else stream[:, : text.start]
                return None
            parts = [stream[:, text], self._kept[block]]
            pinned = torch.cat(parts if text.start == 0 else parts[::-1], 1)
            return (args, {**kwargs, name: pinned}) if name in kwargs else ((pinned, *args[1:]), kwargs)

        return hook

    def _text(self, tokens) -> slice:
        """Return where the text stands among a block's tokens; ValueError where that differs from image to image."""
        found = {(place.start, place.stop) for place in self.adapter.places(tokens)[1]}
        if len(found) > 1:
            raise ValueError("texts of several lengths were read together: record one prompt at a time")
        return slice(*found.pop())


def with_text(adapter: TransformerAdapter, args: tuple, kwargs: dict, given: dict, row: int) -> dict:
    """Return the arguments of a call of the denoiser with another text for every image of its batch.

    Parameters
    ----------
    adapter : TransformerAdapter
        Of the denoiser.
    args, kwargs : tuple, dict
        Of the call.
    given : dict
        Arguments of a call that reads the other text.
    row : int
        Which row of its batch does.
    """
    real = dict(inspect.signature(type(adapter.module).forward).bind(adapter.module, *args, **kwargs).arguments)
    del real["self"]
    batch = len(real[adapter.family.text[0]])
    other = {name: _repeated(name, value, row, batch) for name, value in given.items() if name in _TEXT}
    return {name: value for name, value in real.items() if name not in _TEXT} | other


def _repeated(name, value, row, batch):
    """Return one row of an argument for every image of a batch."""
    if isinstance(value, list):
        return [value[row]] * batch
    places = _PLACES.get(name)
    if not torch.is_tensor(value) or value.ndim == places:  # the same for all images
        return value
    if value.ndim == 4:  # of several layers
        return value[:, row : row + 1].expand(-1, batch, -1, -1)
    return value[row : row + 1].expand(batch, *value.shape[1:])
