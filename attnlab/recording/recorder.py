"""Hooks that record a pipeline's cross-attention while it generates; no other module that users call installs any.

    with record(pipe) as recording:      # hooks exist only inside this block
        image = pipe("a burning house with smoke").images[0]

One tap on every cross-attention copies its queries; what it cannot see is read where it is known: sizes, timestep and
text before the denoiser runs, token ids at the text encoder. Nothing is replaced, so fast attention kernels stay in
use and the image is the same to the last bit. Three objects by lifetime: `Recorder` for the block, `_CurrentGeneration`
for one call of the pipeline, `_CurrentStep` for one call of the denoiser.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .adapters import AttentionCall, DenoiserCall, adapter_of
from .layers import Layer, Layers, as_list, choose_layers
from .recording import Recording
from .stores import Stores
from .texts import TextEncoder
from .trace import Generation, Trace
from .words import split

__all__ = ["Recorder", "record"]

_BRANCHES = {"conditional": ("conditional",), "negative": ("negative",), "both": ("conditional", "negative")}
_REMEMBERED = 32  # latest calls of the text encoder, to tell which words an embedding stands for
_ALIKE = 5e-3  # relative distance up to which an embedding is one that the text encoder gave: half precision rounds


@contextmanager
def record(
    pipe,
    *,
    layers: Layers = None,
    steps: int | Collection[int] | None = None,
    branch: str = "conditional",
    keep: str | None = None,
    texts: str | Sequence[str] = (),
    self_attention: int | Collection[int] = (),
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Iterator[Recording]:
    """Record the cross-attention queries of everything that `pipe` generates inside the block.

    Parameters
    ----------
    pipe : DiffusionPipeline
        Stable Diffusion 1.x, 2.x or XL, or another pipeline with CLIP text encoders and a UNet2DConditionModel.
    layers : str, int or several, optional
        Names, beginnings of names ("up_blocks.1") and map heights (16); "all" for every cross-attention. Default:
        those of the down and up blocks, as DAAM and OVAM take them.
    steps : int or several, optional
        Which calls of the denoiser to record, counted from 0. Default: all.
    branch : {"conditional", "negative", "both"}
        With guidance, the part of the batch to keep. The words of the negative part are the negative prompt's; for
        "both" see `Recording.branch`.
    keep : {"queries", "sum", "maps"}, optional
        "queries", the default unless texts are given: for maps of any text and step afterwards, in memory that grows
        with the steps. What does not grow: "sum", of the queries, all that `linear_daam` needs; "maps", of the
        prompt, for `daam`.
    texts : str or sequence of str
        Texts whose softmax maps are summed up while generating, for `ovam` afterwards; no queries are kept for them.
    self_attention : int or several
        Map heights whose mean self-attention is kept, for `propagate`. A size of h x w takes 4 (h w)^2 bytes, and time.
    dtype : torch.dtype, optional
        Floating-point type of kept queries; the pipeline's own unless given. Sums are float32.
    device : str or torch.device
        Where queries and sums are kept; main memory unless given.
    generator : torch.Generator or sequence of them, optional
        Noted, so that the recording knows its seed, which hooks cannot see. One, or one per image.

    Yields
    ------
    Recording
        Filled as images are generated; usable inside the block and after it.

    Raises
    ------
    TypeError
        If the pipeline cannot be recorded.
    ValueError
        For an unknown layer, branch, keep or dtype, an empty text or one beyond the encoder's window, or a negative
        branch asked for without guidance.
    RuntimeError
        If the pipeline is being recorded already, queries of an attention cannot be seen, a text changes during a
        generation, or, at the end of the block, nothing was recorded; the message says why.
    """
    kept = {"keep": keep, "texts": texts, "self_attention": self_attention, "dtype": dtype, "device": device}
    recorder = Recorder(pipe, layers, steps, branch, generator, **kept)
    with recorder:
        yield recorder.recording
    recorder.check()


class Recorder:
    """The hooks behind `record`, for as long as its own `with` block lasts.

    Arguments are those of `record`. `parts` names the parts of a batch where the pipeline cannot be asked, because its
    denoiser is called from outside.
    """

    def __init__(self, pipe, layers, steps, branch, generator=None, parts: tuple[str, ...] | None = None, **kept):
        self.adapter = adapter_of(pipe)
        if branch not in _BRANCHES:
            raise ValueError(f"branch={branch!r}: choose one of {', '.join(_BRANCHES)}")
        # names are known now, map heights at the first step
        choose_layers(dict.fromkeys(self.adapter.attentions), layers, self.adapter.is_default)
        self.recording = Recording(TextEncoder.of(pipe))
        self._layers, self._branches, self._parts = layers, _BRANCHES[branch], parts
        self._steps = None if steps is None else as_list(steps)
        self._stores = Stores(self.recording.encoder, **kept)
        generators = [generator] if isinstance(generator, torch.Generator) else generator or []
        self._seeds = [g.initial_seed() for g in generators]
        self._texts = _EncodedTexts()
        self._generation: _CurrentGeneration | None = None
        self._handles: list = []

    def __enter__(self):
        adapter = self.adapter
        hooks = adapter.module._forward_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), Recorder) for hook in hooks):
            raise RuntimeError("this pipeline is being recorded already: leave that block first, or ask for more in it")
        self._handles = [
            adapter.module.register_forward_pre_hook(self._before_step, with_kwargs=True),
            adapter.module.register_forward_hook(self._after_step),
            *(handle for name, m in adapter.attentions.items() for handle in adapter.tap(m, self._receiver(name))),
            *self._stores.self_attention.tap(adapter),
        ]
        encoder = getattr(adapter.pipe, "text_encoder", None) or getattr(adapter.pipe, "text_encoder_2", None)
        if encoder is not None:
            self._handles.append(encoder.register_forward_hook(self._texts.remember, with_kwargs=True))
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        self._texts.calls = []
        self._stores.forget()
        if self._generation is not None:
            self._generation.end()

    def check(self) -> None:
        """Raise RuntimeError where the block ended well but nothing was recorded."""
        if any(t.steps for t in self.recording.traces):
            return
        calls = 0 if self._generation is None else self._generation.calls
        reason = "the denoiser ran no whole step inside the record() block; call pipe(...) in it"
        if calls:
            reason = f"none of steps={self._steps} occurred; the last generation ran {calls} steps"
        raise RuntimeError(f"nothing was recorded: {reason}")

    def _before_step(self, module, args, kwargs):
        call = self.adapter.read(args, kwargs)
        rows = self._rows(call)
        if self._generation is None or not self._generation.goes_on(self.adapter.pipe.scheduler, call):
            self._begin(call, rows)
        elif call.text is not self._generation.text:
            self._generation.check_text(call.text, rows)
        generation = self._generation
        generation.text = call.text
        active = self._steps is None or generation.calls in self._steps
        generation.step = _CurrentStep(rows, call.timestep, active)
        self._stores.self_attention.begin(active, [row for _, row in rows], tuple(call.latents.shape[-2:]))

    def _rows(self, call: DenoiserCall) -> list[tuple[str, int]]:
        """(branch, row of the batch) of every image to keep; callbacks may turn guidance off on the way."""
        parts = self._parts or self.adapter.parts(call)
        if missing := set(self._branches) - set(parts):
            asked = f"the {missing.pop()} branch needs guidance"
            raise ValueError(f"{asked}: call the pipeline with a guidance_scale above 1, or record another branch")
        batch = len(call.latents)
        images, rest = divmod(batch, len(parts))
        if rest:
            name = type(self.adapter.pipe).__name__
            raise ValueError(f"a batch of {batch} does not divide into the parts {parts} of {name}")
        return [(branch, parts.index(branch) * images + i) for branch in self._branches for i in range(images)]

    def _begin(self, call, rows):
        """Begin a generation, with a trace of each image."""
        images = len(rows) // len(self._branches)
        first = not self.recording.traces  # a generator's seed is that of what it draws first
        seeds = self._seeds if first and len(self._seeds) == images else [None] * images
        known = {} if self._generation is None else self._generation.layers
        self._stores.forget()
        self._generation = _CurrentGeneration(self.adapter.pipe.scheduler.timesteps, call.latents.shape[1:], known)
        for (branch, row), seed in zip(rows, seeds * len(self._branches), strict=True):
            self._generation.traces.append(self._new_trace(call, branch, row, seed))
        self.recording.traces.extend(self._generation.traces)

    def _new_trace(self, call, branch, row, seed) -> Trace:
        text, mask = call.text[row], call.attention_mask
        ids = self._texts.token_ids(text)
        if ids is None and None in self._stores.maps.texts and branch == "conditional":
            raise ValueError("keep='maps' is of the prompt's words, which embeddings lack: give the prompt as text")
        return Trace(
            text=text.detach().to("cpu", copy=True),
            attention_mask=None if mask is None else mask[row].detach().bool().cpu(),
            words=None if ids is None else split(self.recording.encoder.tokenizer, ids),
            generation=_facts(self.adapter.pipe, self._parts is None, branch, seed, tuple(call.latents.shape[-2:])),
            layers=self._generation.layers,
        )

    def _receiver(self, name):
        @torch.no_grad()
        def receive(call: AttentionCall) -> None:
            generation, step = self._generation, self._generation.step
            if not step.active or (generation.chosen is not None and name not in generation.chosen):
                return
            layer = generation.meet(name, call, self.adapter)
            step.taken[name] = [
                self._stores.take(trace, layer, call.query[row].detach())
                for (_, row), trace in zip(step.rows, generation.traces, strict=True)
            ]

        return receive

    def _after_step(self, module, args, output):
        """Put a step into the traces: it is whole only now, one that was interrupted half-way leaves nothing behind."""
        generation, step = self._generation, self._generation.step
        if step.active and generation.chosen is None:
            generation.choose(self._layers, self.adapter, step)
        for i, trace in enumerate(generation.traces):
            trace.generation.ran = generation.calls + 1
            if step.active:
                trace.steps.append(generation.calls)
                trace.timesteps.append(step.timestep)
                self._stores.put(trace, {name: step.taken[name][i] for name in generation.chosen})
                self._stores.self_attention.put(trace, i)
        generation.calls += 1


def _facts(pipe, called, branch, seed, latent_size) -> Generation:
    """Read what a pipeline says of a generation; of guidance and steps only if it was itself called for it."""
    return Generation(
        model=str(pipe.name_or_path) if getattr(pipe, "name_or_path", None) else None,
        revision=pipe.config.get("_revision"),
        scheduler=type(pipe.scheduler).__name__,
        guidance_scale=getattr(pipe, "guidance_scale", None) if called else None,
        branch=branch,
        latent_size=latent_size,
        seed=seed,
        planned=getattr(pipe, "num_timesteps", None) if called else None,
    )


@dataclass
class _CurrentStep:
    """One call of the denoiser: which rows of its batch are kept, and what has been taken of each layer and image."""

    rows: list[tuple[str, int]]
    timestep: int
    active: bool  # whether it is recorded
    taken: dict[str, list[list]] = field(default_factory=dict)


class _CurrentGeneration:
    """One call of the pipeline: the images that come of it, and the layers that have been met in it."""

    def __init__(self, schedule, shape, known: dict[str, Layer]):
        self.schedule, self.shape = schedule, shape  # timesteps; (channel, row, column) of the latents
        self.traces: list[Trace] = []
        self.text: torch.Tensor | None = None  # of the latest call
        self.step: _CurrentStep | None = None
        self.calls = 0
        self.known = known  # layers of the generation before, most of which have the same weights still
        self.layers: dict[str, Layer] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.chosen: list[str] | None = None  # names of the layers to keep, known after the first recorded step

    def goes_on(self, scheduler, call: DenoiserCall) -> bool:
        """Return whether a call belongs to this generation: a pipeline sets its timesteps anew for every one."""
        return scheduler.timesteps is self.schedule and call.latents.shape[1:] == self.shape

    def end(self):
        """Hold on to nothing of the generation but its layers and how many calls it had."""
        self.schedule, self.text, self.step, self.traces = None, None, None, []

    def check_text(self, text, rows):
        """RuntimeError where another text than before is read."""
        same = len(rows) == len(self.traces) and all(
            torch.equal(text[row].cpu(), trace.text) for (_, row), trace in zip(rows, self.traces, strict=True)
        )
        if not same:
            raise RuntimeError("the text or the batch changed during a generation: a recording has one text per image")

    def meet(self, name, call, adapter) -> Layer:
        """Return a layer, which is copied when it is first met: only inside its forward does a LoRA have its scale."""
        if name not in self.layers:
            layer, known = adapter.layer(name, call.query.dtype), self.known.get(name)
            self.layers[name] = known if layer.same(known) else layer
            self.sizes[name] = adapter.grid(call.query.shape[1], tuple(self.shape[-2:]))
        return self.layers[name]

    def choose(self, wanted, adapter, step):
        """Choose the layers to keep, once the first recorded step has told their sizes."""
        if missing := [name for name in adapter.attentions if name not in step.taken]:
            raise RuntimeError(
                f"{len(missing)} of {len(adapter.attentions)} cross-attentions gave no query, {missing[0]} for one: "
                "its block is compiled, or its attention processor does not call to_q; record without that"
            )
        sizes = {name: self.sizes[name] for name in step.taken}
        self.chosen = choose_layers(sizes, wanted, adapter.is_default)
        for name in set(self.layers) - set(self.chosen):
            del self.layers[name]
        for trace in self.traces:
            trace.sizes = {name: sizes[name] for name in self.chosen}


class _EncodedTexts:
    """The latest calls of a text encoder: which token ids became which embeddings."""

    def __init__(self):
        self.calls: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def remember(self, encoder, args, kwargs, output):
        """Note a call; a hook of the text encoder."""
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is not None:
            norm = getattr(getattr(encoder, "text_model", encoder), "final_layer_norm", torch.nn.Identity())
            hidden = getattr(output, "hidden_states", None) or ()
            skipped = [made for h in hidden for made in (norm(h), h)]  # what clip_skip= takes, and SDXL
            self.calls = [*self.calls[1 - _REMEMBERED :], (ids.cpu(), [output[0], *skipped])]

    def token_ids(self, text: torch.Tensor) -> list[int] | None:
        """Find the token ids that became `text` (token, text width), told by the result itself.

        Where there are two text encoders, by the result of the first, which `text` begins with.
        """
        for ids, outputs in reversed(self.calls):
            for output in outputs:
                for row in range(len(ids)):
                    made, asked = output[row].to(text), text[..., : output.shape[-1]]
                    if made.shape == asked.shape and (made - asked).norm() <= _ALIKE * asked.norm():
                        return ids[row].tolist()
        return None
