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
        self._limits: dict[str, torch.Tensor] = {}  # how far others may be from them
        self._sent: deque[tuple] = deque()  # (drift, its number among the copies, call, names), not looked at yet

    def compare(self, met: dict[str, torch.Tensor], call: int) -> None:
        """Compare the keys (token, head x width) that layers had in a call of the denoiser with their first ones."""
        for name, key in met.items():
            if name not in self._first:
                self._first[name] = key.clone()
                self._limits[name] = _ALIKE * key.norm()
        if others := [name for name, key in met.items() if self._first[name].shape != key.shape]:
            self._sent.append((torch.ones(len(others)), 0, call, others))
        elif met:  # all layers at once: on a GPU each operation costs the program time
            keys = list(met.values())
            firsts = [self._first[name].to(key) for name, key in met.items()]
            drift = torch._foreach_norm(torch._foreach_sub(firsts, keys))
            torch._foreach_sub_(drift, [self._limits[name] for name in met])
            drift = [value.to(drift[0].device, torch.float32, non_blocking=True) for value in drift]
            arriving = self._copy.send([torch.stack(drift)])
            self._sent.append((*arriving, self._copy.sent, call, list(met)))

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
