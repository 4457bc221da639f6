"""What a denoiser was called with, kept: the arguments of each step, and how they are written to a file."""

from typing import NamedTuple

import torch
from accelerate.utils import recursively_apply

from .host_copy import HostCopy

__all__ = ["CallStore", "KeptCall", "packed", "tensors_in", "unpacked"]


class KeptCall(NamedTuple):
    """The arguments of one call of a denoiser, for all images of its batch."""

    args: tuple
    kwargs: dict
    parts: tuple[str, ...]  # of the batch, in order
    dtype: str  # of the denoiser


class CallStore:
    """Copies of arguments; a tensor that several calls have, as they have the text, is copied once."""

    def __init__(self, host_copy: HostCopy):
        self.host_copy = host_copy
        self._known: list[tuple[torch.Tensor, torch.Tensor]] = []  # of the call before: tensors and their copies

    def keep(self, args: tuple, kwargs: dict, parts: tuple[str, ...], module: torch.nn.Module) -> KeptCall:
        """Copy the arguments of a call of a denoiser, whose type is noted."""
        known, self._known = self._known, []

        def copy(tensor):
            made = next((made for own, made in [*known, *self._known] if own is tensor), None)
            made = self.host_copy.send([tensor.detach().clone()])[0] if made is None else made
            self._known.append((tensor, made))
            return made

        return KeptCall(recursively_apply(copy, args), recursively_apply(copy, kwargs), parts, str(module.dtype))

    def forget(self) -> None:
        """Drop the tensors of an earlier generation."""
        self._known = []


def tensors_in(value) -> list[torch.Tensor]:
    """List the tensors among arguments."""
    found: list[torch.Tensor] = []
    recursively_apply(found.append, value)
    return found


def packed(value, names: dict[int, str]) -> object:
    """Return arguments as JSON types; tensors by `names` of their ids. ValueError for what is no such type."""
    if torch.is_tensor(value):
        return {"tensor": names[id(value)]}
    if isinstance(value, dict):
        return {"dict": {key: packed(part, names) for key, part in value.items()}}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [packed(part, names) for part in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"the denoiser was called with {value!r}, which cannot be written: record without keep='calls'")


def unpacked(value, read) -> object:
    """Return arguments that were `packed`; `read` gives a tensor by its name."""
    if not isinstance(value, dict):
        return value
    (kind, held), *_ = value.items()
    if kind == "tensor":
        return read(held)
    if kind == "dict":
        return {key: unpacked(part, read) for key, part in held.items()}
    return {"list": list, "tuple": tuple}[kind](unpacked(part, read) for part in held)
