"""Whether a layer keeps the keys that it first had of a text: maps are of one set of weights."""

from collections import deque

import torch

from .host_copy import HostCopy

__all__ = ["KeyWatch"]

_ALIKE = 5e-3  # relative distance up to which keys are those of the same weights: half precision rounds
_SLOT = 4096  # bytes, more than a number per layer takes


class KeyWatch:
    """The keys of one text while a generation runs; numbers on a GPU are looked at once they have come from there."""

    def __init__(self):
        self._copy = HostCopy(torch.device("cpu"), _SLOT)
        self._first: dict[str, torch.Tensor] = {}  # keys of each layer
        self._drift: dict[str, torch.Tensor] = {}  # of this step: above 0 where keys are others
        self._sent: deque[tuple] = deque()  # (drift, its number among the copies, call, names), not looked at yet

    def meet(self, name: str, key: torch.Tensor) -> None:
        """Compare a layer's keys (token, head x width) with the first ones."""
        first = self._first.setdefault(name, key.clone()).to(key)
        alike = first.shape == key.shape
        self._drift[name] = (first - key).norm() - _ALIKE * first.norm() if alike else torch.ones(())

    def end_step(self, call: int) -> None:
        """Send on what was found in a call of the denoiser."""
        if self._drift:
            device = next(iter(self._drift.values())).device
            drift = [value.to(device, torch.float32, non_blocking=True) for value in self._drift.values()]
            arriving = self._copy.send([torch.stack(drift)])
            self._sent.append((*arriving, self._copy.sent, call, list(self._drift)))
            self._drift = {}

    def changed(self) -> tuple[str, int] | None:
        """Return the first layer, and call, that had other keys, as far as is known by now."""
        while self._sent and self._sent[0][1] <= self._copy.arrived:
            drift, _, call, names = self._sent.popleft()
            if found := [name for name, value in zip(names, drift.tolist(), strict=True) if value > 0]:
                return found[0], call
        return None

    def forget(self) -> None:
        """Begin anew with another text."""
        self._first.clear()

    def end(self) -> None:
        """Wait until all is known; raise what went wrong on the way."""
        self._first.clear()
        try:
            self._copy.wait()
        finally:  # its thread ends after an error, too
            self._copy.close()
