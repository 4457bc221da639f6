"""One generation while it runs: the calls of the denoiser that make it up, and the layers that are met in it."""

import itertools
from collections import deque
from dataclasses import dataclass, field

import torch

from .adapters import DenoiserCall
from .layers import Layer, alike, choose_layers
from .trace import Trace
from .transfer import Transfer

__all__ = ["CurrentGeneration", "CurrentStep", "check_seen"]

_ALIKE = 5e-3  # relative distance up to which keys are those of the same weights: half precision rounds


@dataclass
class CurrentStep:
    """One call of the denoiser: which rows of its batch are kept, and what has been taken of each layer and image."""

    rows: list[tuple[str, int]]
    timestep: int
    text: torch.Tensor  # (batch, token, text width)
    active: bool  # whether it is recorded
    taken: dict[str, list[list]] = field(default_factory=dict)
    met: dict[str, Layer] = field(default_factory=dict)  # layers first seen in this call, on the model's device
    drift: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # above 0 where a layer's keys are others than at first


class CurrentGeneration:
    """One call of the pipeline: the images that come of it, and the layers that have been met in it."""

    def __init__(self, schedule, call: DenoiserCall, known: dict[str, Layer]):
        self.schedule, self.shape = schedule, call.latents.shape  # timesteps; (batch, channel, row, column) of latents
        self.first = call.timestep
        self.traces: list[Trace] = []
        self.text: torch.Tensor | None = None  # of the latest call
        self.step: CurrentStep | None = None
        self.calls = 0
        self.known = known  # layers of the generation before, most of which have the same weights still
        self.layers: dict[str, Layer] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.keys: dict[str, torch.Tensor] = {}  # that each layer first had of the first image's text
        self.flags: deque[tuple] = deque()  # (drift, its number in the transfer, call, names) not looked at yet
        self.chosen: list[str] | None = None  # names of the layers to keep, known after the first recorded step

    def goes_on(self, scheduler, call: DenoiserCall, rows, own: bool) -> bool:
        """Return whether a call belongs to this generation: a pipeline sets its timesteps anew for every one.

        A loop of the user's (not `own`) need not: there another text or batch begins another, and its first timestep.
        Of the text, what is recorded counts: null-text inversion has a negative one of its own at every step.
        ValueError where timesteps are set anew in the middle, as where an image is drawn in several views.
        """
        if scheduler.timesteps is not self.schedule:
            if own and self._is_continued(scheduler.timesteps, call):
                raise ValueError(
                    "the pipeline sets its timesteps anew at every step, as a panorama's views do: an image has no one "
                    "map then; record a pipeline that draws the image as one"
                )
            return False
        if own:
            return call.latents.shape[1:] == self.shape[1:]
        returned = call.timestep == self.first != self.step.timestep
        if call.latents.shape != self.shape or returned:
            return False
        return call.text is self.text or all(alike(call.text[row], self.text[row]) for _, row in rows)

    def _is_continued(self, timesteps, call):
        """Whether another copy of the same timesteps stands where this generation's next step would."""
        if self.step is None or not torch.equal(timesteps, self.schedule):
            return False
        order = [round(float(t)) for t in timesteps]
        return (self.step.timestep, call.timestep) in itertools.pairwise(order)

    def end(self):
        """Hold on to nothing of the generation but its layers and how many calls it had; what was sent has arrived."""
        for name, layer in self.layers.items():
            if layer.same(known := self.known.get(name)):
                self.layers[name] = known
        self.schedule, self.text, self.step, self.traces, self.keys, self.known = None, None, None, [], {}, {}

    def meet(self, name, call, adapter, stores) -> Layer:
        """Return a layer, which is copied when it is first met: only inside its forward does a LoRA have its scale."""
        if name not in self.layers:
            self.step.met[name] = layer = adapter.layer(name, call.query.dtype, stores.values)
            self.layers[name] = layer.moved(stores.transfer.send)
            self.sizes[name] = adapter.grid(call.query.shape[1], tuple(self.shape[-2:]))
        if self.step.rows and self.traces[0].generation.changed is None:
            key = call.key[self.step.rows[0][1]].detach()
            first = self.keys.setdefault(name, key.clone()).to(key)
            other = first.shape != key.shape
            self.step.drift[name] = torch.ones(()) if other else (first - key).norm() - _ALIKE * first.norm()
        return self.step.met.get(name, self.layers[name])

    def check_keys(self, flags: Transfer, step: CurrentStep | None) -> None:
        """RuntimeError where a layer had other keys of the same text than at first: maps are of one set of weights.

        Numbers on a GPU are not waited for: they are looked at in a later step, or without a step, at the end.
        """
        if step is not None and step.drift:
            device = next(iter(step.drift.values())).device
            drift = torch.stack([x.to(device, torch.float32, non_blocking=True) for x in step.drift.values()])
            self.flags.append((*flags.send([drift]), flags.sent, self.calls, list(step.drift)))
        while self.flags and self.flags[0][1] <= flags.arrived:
            drift, _, call, names = self.flags.popleft()
            if changed := [name for name, value in zip(names, drift.tolist(), strict=True) if value > 0]:
                if call < self.calls:  # what followed is recorded already, and sums cannot be undone
                    for trace in self.traces:
                        trace.clear()
                raise RuntimeError(
                    f"the keys of {changed[0]} change at step {call}, as where a LoRA is switched on "
                    "or off or has another scale: maps are of one set of weights; record the steps before it alone, "
                    f"steps=range({call})"
                )

    def choose(self, wanted, adapter, step):
        """Choose the layers to keep, once the first step has shown their sizes."""
        check_seen(adapter.attentions, step)
        sizes = {name: self.sizes[name] for name in step.taken}
        self.chosen = choose_layers(sizes, wanted, adapter.is_default)
        for name in set(self.layers) - set(self.chosen):
            del self.layers[name]
        for trace in self.traces:
            trace.sizes = {name: sizes[name] for name in self.chosen}


def check_seen(names, step):
    """RuntimeError where an attention did not ask this text's keys by `to_q` and `to_k`: its maps would be others."""
    if missing := [name for name in names if name not in step.taken]:
        raise RuntimeError(
            f"{len(missing)} of {len(names)} cross-attentions did not meet queries with keys of the text, "
            f"{missing[0]} for one: its block is compiled or was left out (DeepCache), or its attention processor does "
            "not call to_q, or has keys of its own instead of to_k(text); record without that"
        )
