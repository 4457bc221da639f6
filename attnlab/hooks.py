"""Hooks that record a pipeline's cross-attention while it generates; the only module that installs any.

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

from .recording import Layer, Layers, Recording, Trace, choose_layers, map_size

BRANCHES = ("conditional", "negative")


@contextmanager
def record(
    pipe,
    *,
    layers: Layers = None,
    steps: Collection[int] | None = None,
    branch: str = "conditional",
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Iterator[Recording]:
    """Record the cross-attention queries of everything that `pipe` generates inside the block.

    Parameters
    ----------
    pipe : diffusers pipeline whose denoiser is a UNet2DConditionModel
    layers : None for every cross-attention of the down and up blocks (as DAAM and OVAM), "all" for the middle too, or
        names, beginnings of names ("up_blocks.1") and map heights (16), one or several
    steps : which calls of the denoiser to record, counted from 0; None for all
    branch : with guidance, the half of the batch to keep: "conditional" or "negative"
    dtype, device : how queries are kept; the pipeline's dtype and main memory unless given
    generator : noted, so that the recording knows its seed; hooks cannot see it

    Yields
    ------
    Recording : filled as images are generated; usable inside the block and after it

    Raises
    ------
    TypeError : a pipeline that cannot be recorded
    ValueError : an unknown layer or branch, or a negative branch asked for without guidance
    RuntimeError : at the end of the block, where nothing was recorded; the message says why
    """
    recorder = Recorder(pipe, layers, steps, branch, dtype, device, generator)
    with recorder:
        yield recorder.recording
    recorder.check()


@torch.no_grad()
def record_image(
    pipe,
    image,
    prompt: str | Sequence[str],
    *,
    timesteps: Sequence[int] = (500, 300, 100),
    layers: Layers = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    generator: torch.Generator | None = None,
) -> Recording:
    """Record what the denoiser asks of an existing picture: encode it, add noise, look once at every timestep.

    Parameters
    ----------
    pipe : as for `record`, with a VAE
    image : one image or several of one size: PIL images, or float arrays (row, column, rgb) in 0..1
    prompt : a text an image
    timesteps : in 0..999 for the usual 1000 training steps; more noise the higher
    layers, dtype, device : as for `record`
    generator : draws the noise; give one for a result that repeats

    Returns
    -------
    Recording : of every image, conditional branch, without guidance

    Raises
    ------
    ValueError : not as many prompts as images, or a timestep that the scheduler does not have
    """
    images, prompts = (list(x) if isinstance(x, list | tuple) else [x] for x in (image, prompt))
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts: give one prompt an image")
    alphas = pipe.scheduler.alphas_cumprod
    if not timesteps or not all(0 <= t < len(alphas) for t in timesteps):
        raise ValueError(f"timesteps={tuple(timesteps)}: give one or more whole numbers in 0..{len(alphas) - 1}")
    where = {"device": pipe.device, "dtype": pipe.unet.dtype}
    pixels = pipe.image_processor.preprocess(images).to(**where)
    latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    with Recorder(pipe, layers, None, "conditional", dtype, device, generator, guided=False) as recorder:
        text, _ = pipe.encode_prompt(prompts, pipe.device, 1, False)
        for timestep in sorted(timesteps, reverse=True):
            noise = torch.randn(latents.shape, generator=generator, device=generator.device if generator else "cpu")
            signal = float(alphas[timestep])
            noisy = signal**0.5 * latents + (1 - signal) ** 0.5 * noise.to(**where)
            pipe.unet(noisy, torch.tensor(timestep, device=pipe.device), encoder_hidden_states=text)
    return recorder.recording


class Recorder:
    """The hooks behind `record`, for as long as its own `with` block lasts."""

    def __init__(self, pipe, layers, steps, branch, dtype, device, generator=None, guided: bool | None = None):
        self.denoiser = _denoiser(pipe)
        if branch not in BRANCHES:
            raise ValueError(f"branch={branch!r}: choose one of {', '.join(BRANCHES)}")
        self.attentions = {
            name: module
            for name, module in self.denoiser.named_modules()
            if isinstance(module, Attention) and module.is_cross_attention
        }
        choose_layers(dict.fromkeys(self.attentions), layers)  # names are known now, map heights at the first step
        self.pipe, self.wanted, self.steps, self.branch = pipe, layers, steps, branch
        self.dtype, self.device, self.guided = dtype, device, guided
        generators = [generator] if isinstance(generator, torch.Generator) else generator or []
        self.seeds = [g.initial_seed() for g in generators]
        self.signature = inspect.signature(type(self.denoiser).forward)
        self.recording = Recording(getattr(pipe, "tokenizer", None))
        self.texts: list[tuple[torch.Tensor, list[torch.Tensor]]] = []  # token ids, and what the encoder made of them
        self.current: list[Trace] = []  # the images being generated
        self.calls, self.last_timestep, self.text_is_new = 0, None, False

    def __enter__(self):
        encoder = getattr(self.pipe, "text_encoder", None)
        self.handles = [
            self.denoiser.register_forward_pre_hook(self._before_step, with_kwargs=True),
            self.denoiser.register_forward_hook(self._after_step),
            *(m.to_q.register_forward_hook(self._on_query(name)) for name, m in self.attentions.items()),
        ]
        if encoder is not None:
            self.handles.append(encoder.register_forward_hook(self._after_text, with_kwargs=True))
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        self.texts, self.current = [], []

    def check(self):
        """RuntimeError where the block ended well but nothing was recorded."""
        if any(t.steps for t in self.recording.traces):
            return
        if not self.calls:
            raise RuntimeError(
                "nothing was recorded: the denoiser did not run inside the record() block; call pipe(...) in it"
            )
        raise RuntimeError(
            f"nothing was recorded: none of steps={self.steps} occurred; the last generation ran {self.calls} steps"
        )

    def _after_text(self, encoder, args, kwargs, output):
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is not None:
            norm = getattr(getattr(encoder, "text_model", encoder), "final_layer_norm", torch.nn.Identity())
            skipped = [norm(h) for h in getattr(output, "hidden_states", None) or ()]  # what clip_skip= takes
            self.texts.append((ids.cpu(), [output[0], *skipped]))
            self.text_is_new = True

    def _before_step(self, denoiser, args, kwargs):
        call = self.signature.bind(denoiser, *args, **kwargs).arguments
        timestep = float(torch.as_tensor(call["timestep"]).flatten()[0])
        if self._begins(timestep, call["sample"]):
            self._begin(call["sample"], call["encoder_hidden_states"], call.get("encoder_attention_mask"))
        self.last_timestep, self.pending = timestep, {}
        self.active = self.steps is None or self.calls in self.steps

    def _begins(self, timestep, sample):
        """Whether this call of the denoiser is the first of a new generation."""
        if not self.current or self.text_is_new or self.calls == self.current[0].info["planned"]:
            return True
        return timestep > self.last_timestep or tuple(sample.shape) != self.shape

    def _begin(self, sample, text, visible):
        guided = self.guided if self.guided is not None else self.pipe.do_classifier_free_guidance
        branches = ("negative", "conditional") if guided else ("conditional",)  # the order of diffusers' batches
        if self.branch not in branches:
            raise ValueError("branch='negative' needs guidance: call the pipeline with a guidance_scale above 1")
        images = sample.shape[0] // len(branches)
        first = branches.index(self.branch) * images
        self.rows = range(first, first + images)
        self.shape, self.calls, self.text_is_new = tuple(sample.shape), 0, False
        if not self.recording.layers:
            self.recording.layers = {name: Layer.of(name, m) for name, m in self.attentions.items()}
        self.chosen = None
        self.current = [
            Trace(
                text=text[row].detach().to("cpu", copy=True),
                token_ids=self._token_ids(text[row]),
                visible=None if visible is None else visible[row].detach().bool().cpu(),
                info=self._info(sample, i),
            )
            for i, row in enumerate(self.rows)
        ]
        self.recording.traces.extend(self.current)

    def _info(self, sample, i):
        pipe, known = self.pipe, self.guided is None
        seed = self.seeds[i] if len(self.seeds) > 1 else (self.seeds or [None])[0]
        return {
            "model": getattr(pipe, "name_or_path", None),
            "scheduler": type(pipe.scheduler).__name__,
            "guidance_scale": pipe.guidance_scale if known else None,
            "branch": self.branch,
            "latent_size": tuple(sample.shape[-2:]),
            "seed": seed,
            "planned": getattr(pipe, "num_timesteps", None) if known else None,
            "ran": 0,
        }

    def _token_ids(self, text):
        """The token ids that the text encoder turned into `text` (token, text width), told by the result itself."""
        for ids, outputs in reversed(self.texts):
            for output in outputs:
                for row in range(len(ids)):
                    made = output[row].to(text)
                    if made.shape == text.shape and (made - text).norm() <= 5e-3 * text.norm():
                        return ids[row].tolist()
        return None

    def _on_query(self, name):
        def hook(module, args, output):
            if self.active and (self.chosen is None or name in self.chosen):
                dtype = self.dtype or output.dtype
                # a copy of each row: a view would keep the whole batch, both halves of it, alive
                self.pending[name] = [output[row].detach().to(self.device, dtype, copy=True) for row in self.rows]

        return hook

    def _after_step(self, denoiser, args, output):
        """The step is whole only now: one that was interrupted half-way leaves nothing behind."""
        if self.active and self.chosen is None:
            latent = self.current[0].info["latent_size"]
            sizes = {name: map_size(queries[0].shape[0], latent) for name, queries in self.pending.items()}
            self.chosen = choose_layers(sizes, self.wanted)
            for trace in self.current:
                trace.sizes = {name: sizes[name] for name in self.chosen}
                trace.queries = {name: [] for name in self.chosen}
        for i, trace in enumerate(self.current):
            trace.info["ran"] = self.calls + 1
            if self.active:
                trace.steps.append(self.calls)
                trace.timesteps.append(round(self.last_timestep))
                for name in self.chosen:
                    trace.queries[name].append(self.pending[name][i])
        self.calls += 1


def _denoiser(pipe) -> UNet2DConditionModel:
    unet = getattr(pipe, "unet", None)
    if hasattr(unet, "_orig_mod"):
        raise TypeError(
            "the denoiser is compiled, and hooks are not called inside it: record before torch.compile(pipe.unet)"
        )
    if not isinstance(unet, UNet2DConditionModel):
        found = "no unet" if unet is None else type(unet).__name__
        raise TypeError(f"record() needs a pipeline with a UNet2DConditionModel; {type(pipe).__name__} has {found}")
    return unet
