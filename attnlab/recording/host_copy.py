"""Bring what is recorded on a GPU to main memory while the model goes on drawing.

A copy into ordinary memory makes the program wait until the GPU has done everything before it; a copy into page-locked
memory does not, but there is little of that. So tensors pass through a few page-locked slots, and a thread empties
these, in order, into ordinary memory. Where all slots are full the next copy waits for one, so memory stays bounded.
"""

from collections.abc import Callable, Sequence
from queue import Queue
from threading import Thread

import torch

__all__ = ["CudaLink", "HostCopy", "link_between"]

_SLOTS = 4
_SLOT_BYTES = 32 * 2**20


class CudaLink:
    """Copies from an NVIDIA or AMD GPU into page-locked memory, on a stream of their own."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)

    def slot(self, size: int) -> torch.Tensor:
        """Return page-locked memory of so many bytes."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def start(self, source: torch.Tensor, slot: torch.Tensor) -> Callable[[], None]:
        """Begin to copy bytes into a slot, once what made them is done; return what waits for the end of it."""
        self._stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(self._stream):
            slot[: len(source)].copy_(source, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # a thread that waits sleeps, and leaves the core to the model
            done.record()
        source.record_stream(self._stream)  # its memory is not used again before
        return done.synchronize


def link_between(source: torch.device, target: torch.device) -> CudaLink | None:
    """Return how tensors come from one device to another without waiting; None where there is no such way."""
    return CudaLink(source) if source.type == "cuda" and target.type == "cpu" else None


class HostCopy:
    """Tensors on their way to `target`; the order in which they were sent is that in which they arrive.

    Parameters
    ----------
    target : torch.device
        Where they are to be.
    slot : int
        Bytes of each of the page-locked slots.
    """

    def __init__(self, target: torch.device, slot: int = _SLOT_BYTES):
        self.target, self.slot = target, slot
        self._links: dict[torch.device, CudaLink | None] = {}
        self._free: Queue[torch.Tensor] = Queue()  # slots that may be filled
        self._full: Queue[tuple | None] = Queue()  # copies that were begun, in order
        self._sent = self._arrived = 0
        self._error: Exception | None = None
        self._thread: Thread | None = None

    def send(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors as they will be on the target, which hold their values after `wait`.

        The given ones must not change any more; those that lie on the target already are returned as they are. An error
        of an earlier copy is raised here.
        """
        self._raise()
        link = self._link(tensors[0].device) if tensors else None
        if link is None:
            return [tensor.to(self.target) for tensor in tensors]
        if len({tensor.dtype for tensor in tensors}) > 1:
            return [arriving for tensor in tensors for arriving in self.send([tensor])]
        source = torch.cat([tensor.flatten() for tensor in tensors]).view(torch.uint8)  # one copy for all of them
        whole = torch.empty(source.numel(), dtype=torch.uint8, device=self.target)
        for part, into in zip(source.split(self.slot), whole.split(self.slot), strict=True):
            self._start(link, part, into)
        parts = whole.view(tensors[0].dtype).split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    @property
    def sent(self) -> int:
        """Number of copies so far; what was sent is there when as many have arrived."""
        return self._sent

    @property
    def arrived(self) -> int:
        """Number of copies that have ended; to ask for it waits for nothing."""
        return self._arrived

    def wait(self) -> None:
        """Wait until all that was sent is there; raise what went wrong on the way."""
        self._full.join()
        self._raise()

    def close(self) -> None:
        """End the thread, after all that was sent."""
        if self._thread is not None:
            self._full.put(None)
            self._thread.join()
            self._thread = None

    def _link(self, device):
        if device not in self._links:
            self._links[device] = link_between(device, self.target)
        return self._links[device]

    def _start(self, link, source, into):
        if self._thread is None:
            if self._free.empty():
                for _ in range(_SLOTS):
                    self._free.put(link.slot(self.slot))
            self._thread = Thread(target=self._drain, name="attnlab host copy", daemon=True)
            self._thread.start()
        slot = self._free.get()  # waits where all are full
        try:
            wait = link.start(source, slot)
        except BaseException:  # an interrupt, too, must not cost a slot: the next copies would wait for ever
            self._free.put(slot)
            raise
        self._sent += 1
        self._full.put((wait, slot, into))

    def _drain(self):
        while (copy := self._full.get()) is not None:
            wait, slot, into = copy
            try:
                if self._error is None:  # after one error what follows is of no use, and must not block
                    wait()
                    into.copy_(slot[: len(into)])
            except Exception as error:
                self._error = error
            finally:
                self._free.put(slot)
                self._arrived += 1
                self._full.task_done()
        self._full.task_done()

    def _raise(self):
        if self._error is not None:
            raise RuntimeError(f"what was recorded could not be brought to {self.target}") from self._error
