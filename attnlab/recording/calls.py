"""Whose call of a denoiser it is, and what the parts of its batch are."""

import torch

from .adapters import Adapter, DenoiserCall
from .frames import calling_frame

__all__ = ["BatchParts"]

_HOW = "name them yourself, record(pipe, parts=('negative', 'conditional')), or ('conditional',) without guidance"


class BatchParts:
    """The rows of a batch that belong to some branches.

    A pipeline knows how it guides only while it is itself called: the denoiser may also be called by another pipeline
    that shares it, by a loop of the user's, or by a callback. Those have to name the parts.
    """

    def __init__(self, adapter: Adapter, branches: tuple[str, ...], named: tuple[str, ...] | None = None):
        if named is not None and not (isinstance(named, list | tuple) and all(branch in named for branch in branches)):
            wanted = ", ".join(branches)
            raise ValueError(
                f"parts={named!r}: name every part of a batch in order, {wanted} among them, for example "
                "('negative', 'conditional')"
            )
        self.adapter, self.branches = adapter, branches
        self.named = None if named is None else tuple(named)
        self.parts: tuple[str, ...] = ()  # of the latest call
        self._seen: tuple | None = None  # parts and batch size of that one

    def rows(self, call: DenoiserCall) -> list[tuple[str, int]]:
        """Return (branch, row of the batch) of every image; none where this call lacks one of the branches."""
        parts, batch = self.named or self._parts(call), len(call.latents)
        if self.adapter.alternates and len(self.branches) > len(parts) == 1:
            raise ValueError(
                "each call of this denoiser is of one branch alone: record branch='conditional', or branch='negative'"
            )
        images, rest = divmod(batch, len(parts))
        name = type(self.adapter.pipe).__name__
        if rest:
            how = _HOW if self.named is None else "each call of the denoiser has to hold all parts that are named"
            raise ValueError(f"a batch of {batch} does not divide into the parts {parts} of {name}: {how}")
        if self._seen != (parts, batch) and self.named is None and not self._agree(call, len(parts)):
            raise ValueError(f"the parts {parts} of {name}'s batch do not hold the same images: {_HOW}")
        self.parts, self._seen = parts, (parts, batch)
        branches = self.branches if set(self.branches) <= set(parts) else ()
        return [(branch, parts.index(branch) * images + i) for branch in branches for i in range(images)]

    def _parts(self, call):
        pipe = self.adapter.pipe
        if calling_frame(pipe) is None:
            raise ValueError(
                f"the denoiser was called by something else than {type(pipe).__name__} itself, which cannot say what "
                f"the parts of that batch are: record the pipeline that is called, or {_HOW}"
            )
        return self.adapter.parts(call)

    def _agree(self, call, count):
        """Whether each part holds the same noisy images, as those of guidance do."""
        first, *others = call.latents.chunk(count)
        return all(torch.allclose(first, other, rtol=0, atol=0, equal_nan=True) for other in others)
