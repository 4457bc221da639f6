"""Listen to an attention's own call of `scaled_dot_product_attention`, whatever made its queries and keys.

Between the start and the end of an attention module PyTorch shows every function that is called, by its
`TorchFunctionMode`. So queries and keys are seen as they meet: after fused projections, norms, rotation and
concatenation. Nothing is replaced, and the function gives the same result to the last bit.
"""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["HOW_SEEN", "Attended", "end_interrupted", "listen"]

HOW_SEEN = (
    "record with PyTorch's own attention, pipe.transformer.set_attention_backend('native'), in place of flex, flash, "
    "sage or xformers, without compiled blocks, and without a cache of steps (pipe.transformer.disable_cache())"
)
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")  # of its arguments


class Attended(NamedTuple):
    """What met in one call of the function. Several query heads may share one head of keys and values."""

    query: torch.Tensor  # (batch, head, token, width)
    key: torch.Tensor  # (batch, head, token, width)
    value: torch.Tensor  # (batch, head, token, width)
    # (batch or 1, head or 1, query or 1, key): what is added to scores, or bool, who takes part
    mask: torch.Tensor | None
    scale: float  # factor of query times key
    output: torch.Tensor  # (batch, head, token, width), what came of it


class _Here(threading.local):
    """What goes on in a thread: a module may be called by several, each of which has its own modes."""

    open: tuple["_Listening", ...] = ()  # those of attentions that run, or were interrupted
    receiving = False


_here = _Here()


class _Listening(TorchFunctionMode):
    """Hands on each call of the function inside its block, before what comes of it is used."""

    def __init__(self, receive: Callable[[Attended], None]):
        super().__init__()
        self.receive = receive

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and not _here.receiving:
            given = {**dict(zip(_NAMES, args, strict=False)), **(kwargs or {})}
            query, scale = given["query"], given.get("scale")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            _here.receiving = True  # what a receiver computes by the function itself is nobody's to hear
            try:
                self.receive(Attended(query, given["key"], given["value"], given.get("attn_mask"), scale, output))
            finally:
                _here.receiving = False
        return output


def end_interrupted() -> None:
    """End what Ctrl-C did not let end in this thread: PyTorch calls no hook behind what is no `Exception`."""
    for mode in _here.open:
        mode.__exit__(None, None, None)
    _here.open = ()


def listen(attention: nn.Module, receive: Callable[[Attended], None]) -> list:
    """Hand each attention that a module computes to `receive`; return the handles to remove that by."""

    def begin(module, args):
        _here.open = (*_here.open, _Listening(receive).__enter__())

    def end(module, args, output):
        if own := [mode for mode in _here.open if mode.receive is receive]:
            _here.open = tuple(mode for mode in _here.open if mode is not own[-1])
            own[-1].__exit__(None, None, None)

    return [
        attention.register_forward_pre_hook(begin),
        attention.register_forward_hook(end, always_call=True),  # also where the forward raises
        SimpleNamespace(remove=end_interrupted),
    ]
