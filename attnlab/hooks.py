"""Hooks that record a pipeline's cross-attention while it generates; no other module that users call installs any.

    with record(pipe) as recording:      # hooks exist only inside this block
        image = pipe("a burning house with smoke").images[0]

One forward hook on every cross-attention's own `to_q` copies the queries; what it cannot see is read where it is known:
sizes, timestep and text before the denoiser runs, token ids at the text encoder. Nothing is replaced, so fast attention
kernels stay in use and the image is the same to the last bit.
"""

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from .layers import Layer, Layers, as_list, choose_layers, map_size
from .recording import Generation, Recording, Trace
from .texts import TextEncoder

BRANCHES = ("conditional", "negative")
TEXTS = 32  # latest calls of the text encoder that are remembered, to tell which words an embedding stands for
PARTS = {"StableDiffusionInstructPix2PixPipeline": ("conditional", "image", "negative")}
"""Order of the parts of a guided batch, by pipeline class; diffusers' usual one is ("negative", "conditional")."""


@contextmanager
def record(
    pipe,
    *,
    layers: Layers = None,
    steps: int | Collection[int] | None = None,
    branch: str = "conditional",
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Iterator[Recording]:
    """Record the cross-attention queries of everything that `pipe` generates inside the block.

    Parameters
    ----------
    pipe : diffusers pipeline with one text encoder and a UNet2DConditionModel
    layers : None for every cross-attention of the down and up blocks (as DAAM and OVAM), "all" for the middle too, or
        names, beginnings of names ("up_blocks.1") and map heights (16), one or several
    steps : which calls of the denoiser to record, counted from 0; None for all
    branch : with guidance, the part of the batch to keep: "conditional" or "negative"
    dtype, device : how queries are kept; the pipeline's dtype and main memory unless given
    generator : noted, so that the recording knows its seed; hooks cannot see it. One, or one an image

    Yields
    ------
    Recording : filled as images are generated; usable inside the block and after it

    Raises
    ------
    TypeError : a pipeline that cannot be recorded
    ValueError : an unknown layer, branch or dtype, or a negative branch asked for without guidance
    RuntimeError : an attention whose queries cannot be seen, a text that changes during a generation, or, at the end of
        the block, nothing recorded; the message says why
    """
    recorder = Recorder(pipe, layers, steps, branch, dtype, device, generator)
    with recorder:
        yield recorder.recording
    recorder.check()


class Recorder:
    """The hooks behind `record`, for as long as its own `with` block lasts.

    `parts` names the parts of a batch where the pipeline cannot be asked, because its denoiser is called from outside.
    """

    def __init__(self, pipe, layers, steps, branch, dtype, device, generator=None, parts=None):
        self.attentions = _attentions(pipe)
        if branch not in BRANCHES:
            raise ValueError(f"branch={branch!r}: choose one of {', '.join(BRANCHES)}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype={dtype}: queries are kept in a floating-point type, for example torch.float16")
        choose_layers(dict.fromkeys(self.attentions), layers)  # names are known now, map heights at the first step
        self.pipe, self.wanted, self.branch, self.parts = pipe, layers, branch, parts
        self.steps = None if steps is None else as_list(steps)
        self.dtype, self.device = dtype, device
        generators = [generator] if isinstance(generator, torch.Generator) else generator or []
        self.seeds = [g.initial_seed() for g in generators]
        self.signature = inspect.signature(type(pipe.unet).forward)
        self.encoder = getattr(pipe, "text_encoder", None)
        self.recording = Recording(TextEncoder.of(pipe))
        self.texts: list[tuple[torch.Tensor, list[torch.Tensor]]] = []  # token ids, and what the encoder made of them
        self.layers: dict[str, Layer] = {}  # of the last generation
        self.current: list[Trace] = []  # the images being generated
        self.schedule = self.shape = self.text = self.chosen = None
        self.calls = 0

    def __enter__(self):
        unet = self.pipe.unet
        self.handles = [
            unet.register_forward_pre_hook(self._before_step, with_kwargs=True),
            unet.register_forward_hook(self._after_step),
            *(m.to_q.register_forward_hook(self._on_query(name)) for name, m in self.attentions.items()),
        ]
        if self.encoder is not None:
            self.handles.append(self.encoder.register_forward_hook(self._after_text, with_kwargs=True))
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        self.texts, self.current, self.text = [], [], None

    def check(self):
        """RuntimeError where the block ended well but nothing was recorded."""
        if any(t.steps for t in self.recording.traces):
            return
        if not self.calls:
            raise RuntimeError(
                "nothing was recorded: the denoiser ran no whole step inside the record() block; call pipe(...) in it"
            )
        raise RuntimeError(
            f"nothing was recorded: none of steps={self.steps} occurred; the last generation ran {self.calls} steps"
        )

    def _after_text(self, encoder, args, kwargs, output):
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is not None:
            norm = getattr(getattr(encoder, "text_model", encoder), "final_layer_norm", torch.nn.Identity())
            skipped = [norm(h) for h in getattr(output, "hidden_states", None) or ()]  # what clip_skip= takes
            self.texts = [*self.texts[1 - TEXTS :], (ids.cpu(), [output[0], *skipped])]

    def _before_step(self, unet, args, kwargs):
        call = self.signature.bind(unet, *args, **kwargs).arguments
        sample, text = call["sample"], call["encoder_hidden_states"]
        self.rows = self._rows(sample.shape[0])
        # a pipeline sets its timesteps anew for every generation
        if not self.current or self.pipe.scheduler.timesteps is not self.schedule or sample.shape[1:] != self.shape:
            self._begin(sample, text, call.get("encoder_attention_mask"))
        elif text is not self.text:
            self._check_text(text)
        self.text, self.pending = text, {}
        self.timestep = round(float(torch.as_tensor(call["timestep"]).flatten()[0]))
        self.active = self.steps is None or self.calls in self.steps

    def _rows(self, batch: int) -> range:
        """Rows of the batch that belong to the branch; callbacks may turn guidance off on the way."""
        parts = self.parts or _parts(self.pipe)
        if self.branch not in parts:
            raise ValueError("branch='negative' needs guidance: call the pipeline with a guidance_scale above 1")
        images, rest = divmod(batch, len(parts))
        if rest:
            raise ValueError(f"a batch of {batch} does not divide into the parts {parts} of {type(self.pipe).__name__}")
        first = parts.index(self.branch) * images
        return range(first, first + images)

    def _begin(self, sample, text, visible):
        first = not self.recording.traces
        seeds = self.seeds if first and len(self.seeds) == len(self.rows) else [None] * len(self.rows)
        self.schedule, self.shape = self.pipe.scheduler.timesteps, sample.shape[1:]
        self.calls, self.chosen, self.known, self.layers = 0, None, self.layers, {}
        self.current = [
            Trace(
                text=text[row].detach().to("cpu", copy=True),
                token_ids=self._token_ids(text[row]),
                visible=None if visible is None else visible[row].detach().bool().cpu(),
                generation=self._generation(seed),
                layers=self.layers,
            )
            for row, seed in zip(self.rows, seeds, strict=True)
        ]
        self.recording.traces.extend(self.current)

    def _generation(self, seed) -> Generation:
        pipe = self.pipe
        asked = self.parts is None  # otherwise what the pipeline says is about an earlier call
        return Generation(
            model=str(pipe.name_or_path) if getattr(pipe, "name_or_path", None) else None,
            scheduler=type(pipe.scheduler).__name__,
            guidance_scale=getattr(pipe, "guidance_scale", None) if asked else None,
            branch=self.branch,
            latent_size=tuple(self.shape[-2:]),
            seed=seed,
            planned=getattr(pipe, "num_timesteps", None) if asked else None,
        )

    def _token_ids(self, text):
        """The token ids that the text encoder turned into `text` (token, text width), told by the result itself."""
        for ids, outputs in reversed(self.texts):
            for output in outputs:
                for row in range(len(ids)):
                    made = output[row].to(text)
                    if made.shape == text.shape and (made - text).norm() <= 5e-3 * text.norm():
                        return ids[row].tolist()
        return None

    def _check_text(self, text):
        same = len(self.rows) == len(self.current) and all(
            torch.equal(text[row].cpu(), trace.text) for row, trace in zip(self.rows, self.current, strict=True)
        )
        if not same:
            raise RuntimeError("the text or the batch changed during a generation: a recording has one text an image")

    def _on_query(self, name):
        def hook(module, args, output):
            if not self.active or (self.chosen is not None and name not in self.chosen):
                return
            if name not in self.layers:  # inside the forward: only here does a LoRA have its scale
                layer = Layer.of(name, self.attentions[name], output.dtype)
                self.layers[name] = self.known[name] if layer.same(self.known.get(name)) else layer
            dtype = self.dtype or output.dtype
            # a copy of each row: a view would keep the whole batch, both halves of it, alive
            self.pending[name] = [output[row].detach().to(self.device, dtype, copy=True) for row in self.rows]

        return hook

    def _after_step(self, unet, args, output):
        """The step is whole only now: one that was interrupted half-way leaves nothing behind."""
        if self.active and self.chosen is None:
            self._choose()
        for i, trace in enumerate(self.current):
            trace.generation.ran = self.calls + 1
            if self.active:
                trace.steps.append(self.calls)
                trace.timesteps.append(self.timestep)
                for name in self.chosen:
                    trace.queries[name].append(self.pending[name][i])
        self.calls += 1

    def _choose(self):
        """The layers to keep, once the first recorded step has told their sizes."""
        if missing := [name for name in self.attentions if name not in self.pending]:
            raise RuntimeError(
                f"{len(missing)} of {len(self.attentions)} cross-attentions gave no query, {missing[0]} for one: "
                "its block is compiled, or its attention processor does not call to_q; record without that"
            )
        latent = self.current[0].generation.latent_size
        sizes = {name: map_size(queries[0].shape[0], latent) for name, queries in self.pending.items()}
        self.chosen = choose_layers(sizes, self.wanted)
        for name in set(self.layers) - set(self.chosen):
            del self.layers[name]
        for trace in self.current:
            trace.sizes = {name: sizes[name] for name in self.chosen}
            trace.queries = {name: [] for name in self.chosen}


def _parts(pipe) -> tuple[str, ...]:
    """What the parts of the pipeline's batch are, in order."""
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    if guided is None or getattr(pipe, "do_perturbed_attention_guidance", False):
        raise TypeError(
            f"{type(pipe).__name__} does not say how it guides, so its images cannot be told from what guides them; "
            "supported: pipelines with classifier-free guidance, called as pipe(...)"
        )
    if not guided:
        return ("conditional",)
    return next((PARTS[c.__name__] for c in type(pipe).__mro__ if c.__name__ in PARTS), ("negative", "conditional"))


def _attentions(pipe) -> dict[str, Attention]:
    """The cross-attentions of a pipeline's denoiser; TypeError where they cannot be recorded."""
    name, unet = type(pipe).__name__, getattr(pipe, "unet", None)
    if hasattr(unet, "_orig_mod") or any(m._compiled_call_impl for m in getattr(unet, "modules", list)()):
        raise TypeError("the denoiser is compiled, and hooks are not called inside it: record before compiling it")
    if not isinstance(unet, UNet2DConditionModel):
        found = "no unet" if unet is None else type(unet).__name__
        raise TypeError(f"record() needs a pipeline with a UNet2DConditionModel; {name} has {found}")
    if getattr(pipe, "text_encoder_2", None) is not None:
        raise TypeError(f"record() reads one text encoder; {name} has two")
    if unet.config.encoder_hid_dim_type not in (None, "ip_image_proj"):
        raise TypeError(
            f"record() cannot follow a text through {unet.config.encoder_hid_dim_type!r} (encoder_hid_dim_type)"
        )
    found = {n: m for n, m in unet.named_modules() if isinstance(m, Attention) and m.is_cross_attention}
    for layer, module in found.items():
        if module.norm_cross is not None or module.added_kv_proj_dim is not None:
            raise TypeError(f"record() cannot follow the text of {name}: {layer} normalizes or extends it")
    return found
