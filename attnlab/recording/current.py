"""One generation while it runs: the calls of the denoiser that make it up, and the layers that are met in it."""

import itertools
from dataclasses import dataclass, field

import torch
from accelerate.utils import recursively_apply

from .adapters import DenoiserCall
from .kept import KeptCall
from .keys import KeyWatch
from .layers import Layer, alike, choose_layers, exact
from .met import Met
from .stores import copied
from .trace import Trace

__all__ = ["CurrentGeneration", "CurrentStep", "check_seen"]


_WAITING = 128 * 2**20  # bytes of queries that wait for one another, at most


@dataclass
class CurrentStep:
    """One call of the denoiser: which rows of its batch are kept, and what has been taken of each layer and image."""

    rows: list[tuple[str, int]]
    timestep: int
    text: torch.Tensor  # (batch, token, text width)
    active: bool  # whether it is recorded
    taken: dict[str, list[list]] = field(default_factory=dict)
    waiting: dict[str, tuple] = field(default_factory=dict)  # by layer, what met in it, until it is taken
    bytes: int = 0  # of the queries that wait
    keys: dict[str, torch.Tensor] = field(default_factory=dict)  # by layer, of the first image's text
    met: dict[str, Layer] = field(default_factory=dict)  # layers first seen in this call, on the model's device
    kept: KeptCall | None = None  # its arguments, where they are kept


class CurrentGeneration:
    """One call of the pipeline: the images that come of it, and the layers that have been met in it."""

    def __init__(self, schedule, call: DenoiserCall, known: dict[str, Layer]):
        self.schedule, self.shape = schedule, call.latents.shape  # timesteps; (batch, ...) of latents
        self.first = call.timestep
        self.traces: list[Trace] = []
        self.text: torch.Tensor | None = None  # of the latest call
        self.step: CurrentStep | None = None
        self.calls = 0
        self.known = known  # layers of the generation before, most of which have the same weights still
        self.layers: dict[str, Layer] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.keys = KeyWatch()  # of the first image's text
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

    @exact()
    def end(self, stores) -> dict[str, Layer]:
        """Bring what is left on a GPU to its place, wait for it, and hold on to nothing else; return the layers."""
        stores.forget()
        stores.settle(self.traces)
        try:
            self.keys.end()
            self._check_keys()
        finally:
            stores.host_copy.wait()
            for name, layer in self.layers.items():
                if layer.same(known := self.known.get(name)):
                    self.layers[name] = known
            self.schedule, self.text, self.step, self.traces, self.known = None, None, None, [], {}
        return self.layers

    def meet(self, name, call, adapter, stores) -> None:
        """Note what met in a layer, which is copied the first time: only inside its forward does a LoRA have its scale.

        What is kept of it is taken together with that of other layers, as each operation costs a GPU's program time.
        """
        step = self.step
        if name not in self.layers:
            with exact():
                step.met[name] = layer = adapter.layer(name, call.query.dtype, stores.values)
                self.layers[name] = layer.moved(stores.host_copy.send)
            self.sizes[name] = adapter.grid(call.count, self.traces[0].generation.latent_size)
        if step.rows and self.traces[0].generation.changed is None:
            keys = call.text_keys(step.rows[0][1])
            if keys is not None:
                step.keys[name] = keys
        if not step.active:
            step.taken[name] = []
            return
        step.waiting[name] = call.lasting(), _version(call.query)
        step.bytes += call.query.nbytes
        # in inference mode changes in place are not seen, and only of diffusers' own processors known not to be made
        own = type(getattr(adapter.attentions[name], "processor", None)).__module__.startswith("diffusers.")
        if stores.at_once or step.bytes > _WAITING or (call.query.is_inference() and not own):
            keys = {name: step.keys[name] for name in step.waiting if name in step.keys}
            step.keys |= zip(keys, copied(list(keys.values())), strict=True)  # which wait on, and hold no whole batch
            self.take(stores)

    @exact()
    def take(self, stores):
        """Take what is kept of the layers that wait for it."""
        step = self.step
        if not step.waiting:
            return
        for name, (call, version) in step.waiting.items():
            if _version(call.query) != version:
                raise RuntimeError(f"the processor of {name} changes its queries in place: give it a copy of them")
        layers = [(step.met.get(name, self.layers[name]), call) for name, (call, _) in step.waiting.items()]
        images = [row for _, row in step.rows]
        met = [Met(*one, trace, row) for row, trace in zip(images, self.traces, strict=True) for one in layers]
        found = stores.take(met)
        for k, name in enumerate(step.waiting):
            step.taken[name] = [[store[k + i * len(layers)] for store in found] for i in range(len(images))]
        step.waiting, step.bytes = {}, 0

    def end_step(self, stores):
        """Put a step into the traces: it is whole only now, one that was interrupted half-way leaves nothing behind."""
        self.keys.compare(self.step.keys, self.calls)
        self._check_keys()
        for i, trace in enumerate(self.traces):
            trace.generation.ran = self.calls + 1
            if self.step.active:
                trace.steps.append(self.calls)
                trace.timesteps.append(self.step.timestep)
                if self.step.kept is not None:
                    trace.calls.append(self.step.kept)
                stores.put(trace, i, {name: self.step.taken[name][i] for name in self.chosen})
        # nothing is held until the next one, nor met where gradient checkpointing runs layers once more
        self.step.active, self.step.taken, self.step.keys = False, {}, {}
        self.calls += 1

    def _check_keys(self):
        """RuntimeError where a layer had other keys of the same text than at first, as far as is known by now."""
        if found := self.keys.changed():
            name, call = found
            if call < self.calls:  # what followed is recorded already, and sums cannot be undone
                for trace in self.traces:
                    trace.clear()
            raise RuntimeError(
                f"the keys of {name} change at step {call}, as where a LoRA is switched on or off or has another "
                f"scale: maps are of one set of weights; record the steps before it alone, steps=range({call})"
            )

    def choose(self, wanted, adapter, step):
        """Choose the layers to keep, once the first step has shown their sizes."""
        check_seen(adapter, adapter.attentions, step)
        sizes = {name: self.sizes[name] for name in step.taken}
        self.chosen = choose_layers(sizes, wanted, adapter.is_default)
        if len(self.chosen) < len(sizes):  # views of what was taken together would keep that of all layers in memory
            step.taken = recursively_apply(torch.clone, {name: step.taken[name] for name in self.chosen})
        for name in set(self.layers) - set(self.chosen):
            del self.layers[name]
        for trace in self.traces:
            trace.sizes = {name: sizes[name] for name in self.chosen}


def _version(tensor):
    """Return how often a tensor was changed in place; None where torch does not count that."""
    return None if tensor.is_inference() else tensor._version


def check_seen(adapter, names, step):
    """RuntimeError where an attention did not meet this text's keys as far as is seen: its maps would be others."""
    if missing := [name for name in names if name not in step.taken]:
        raise RuntimeError(
            f"{len(missing)} of {len(names)} cross-attentions did not meet queries with keys of the text, "
            f"{missing[0]} for one: its block is compiled or was left out (DeepCache), or its attention processor does "
            f"not call to_q, or has keys of its own instead of to_k(text); {adapter.how_seen}"
        )
