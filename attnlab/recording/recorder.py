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
from diffusers.models.attention_processor import Attention

from . import stores as keeping
from .adapters.unet import batch_parts, cross_attentions
from .layers import Layer, Layers, as_list, choose_layers, map_size
from .recording import Generation, Recording, Trace
from .texts import TextEncoder
from .words import split, text_span

BRANCHES = {"conditional": ("conditional",), "negative": ("negative",), "both": ("conditional", "negative")}
TEXTS = 32  # latest calls of the text encoder that are remembered, to tell which words an embedding stands for


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
    pipe : Stable Diffusion 1.x, 2.x or XL, or another diffusers pipeline with CLIP text encoders and a
        UNet2DConditionModel
    layers : None for every cross-attention of the down and up blocks (as DAAM and OVAM), "all" for the middle too, or
        names, beginnings of names ("up_blocks.1") and map heights (16), one or several
    steps : which calls of the denoiser to record, counted from 0; None for all
    branch : with guidance, the part of the batch to keep: "conditional", "negative" (whose words are the
        negative prompt's), or "both", see `Recording.branch`
    keep : "queries" (unless texts are given): maps of any text and step afterwards, in memory that grows with the
        steps. What does not grow: "sum", of the queries, all that `linear_daam` needs; "maps", of the prompt, for
        `daam`
    texts : softmax maps of these are summed up while generating, for `ovam` afterwards; no queries are kept for them
    self_attention : map heights, one or several, whose mean self-attention is kept, for `propagate`. A size of h x w
        takes 4 (h w)^2 bytes, and time
    dtype, device : how queries are kept; the pipeline's dtype and main memory unless given. Sums are float32
    generator : noted, so that the recording knows its seed; hooks cannot see it. One, or one an image

    Yields
    ------
    Recording : filled as images are generated; usable inside the block and after it

    Raises
    ------
    TypeError : a pipeline that cannot be recorded
    ValueError : an unknown layer, branch, keep or dtype, an empty text or one beyond the encoder's window, or a
        negative branch asked for without guidance
    RuntimeError : a pipeline that is being recorded already, an attention whose queries cannot be seen, a text that
        changes during a generation, or, at the end of the block, nothing recorded; the message says why
    """
    recorder = Recorder(pipe, layers, steps, branch, (keep, texts, self_attention), dtype, device, generator)
    with recorder:
        yield recorder.recording
    recorder.check()


class Recorder:
    """The hooks behind `record`, for as long as its own `with` block lasts.

    `kept` is (keep, texts, self_attention) as in `record`; `parts` names the parts of a batch where the pipeline cannot
    be asked, because its denoiser is called from outside.
    """

    def __init__(self, pipe, layers, steps, branch, kept, dtype, device, generator=None, parts=None):
        self.attentions = cross_attentions(pipe)
        if branch not in BRANCHES:
            raise ValueError(f"branch={branch!r}: choose one of {', '.join(BRANCHES)}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype={dtype}: queries are kept in a floating-point type, for example torch.float16")
        choose_layers(dict.fromkeys(self.attentions), layers)  # names are known now, map heights at the first step
        self.pipe, self.wanted, self.branches, self.parts = pipe, layers, BRANCHES[branch], parts
        self.steps = None if steps is None else as_list(steps)
        self.dtype, self.device = dtype, device
        generators = [generator] if isinstance(generator, torch.Generator) else generator or []
        self.seeds = [g.initial_seed() for g in generators]
        self.signature = inspect.signature(type(pipe.unet).forward)
        self.encoder = getattr(pipe, "text_encoder", None) or getattr(pipe, "text_encoder_2", None)
        self.recording = Recording(TextEncoder.of(pipe))
        self._choose_what_to_keep(*kept)
        self.texts: list[tuple[torch.Tensor, list[torch.Tensor]]] = []  # token ids, and what the encoder made of them
        self.layers: dict[str, Layer] = {}  # of the last generation
        self.current: list[Trace] = []  # the images being generated
        self.schedule = self.shape = self.text = self.chosen = None
        self.calls = 0

    def _choose_what_to_keep(self, kind, texts, heights):
        if kind not in (None, *keeping.KINDS):
            raise ValueError(f"keep={kind!r}: choose one of {', '.join(keeping.KINDS)}, or leave it out")
        texts = dict.fromkeys([texts] if isinstance(texts, str) else texts)  # each once
        if texts and self.recording.encoder is None:
            raise ValueError("texts= needs a pipeline with a text encoder")
        streamed = [None] * (kind == "maps") + [self.recording.encode(text) for text in texts]
        queries = kind == "queries" or (kind is None and not texts)
        self.maps = keeping.MapStore(streamed, self.device)
        self.keeps = [keeping.QueryStore(self.dtype, self.device)] * queries
        self.keeps += [keeping.QuerySum(self.device)] * (kind == "sum") + [self.maps] * bool(streamed)
        self.self_attention = keeping.SelfAttentionStore(as_list(heights), self.device)

    def __enter__(self):
        unet = self.pipe.unet
        if any(isinstance(getattr(hook, "__self__", None), Recorder) for hook in unet._forward_pre_hooks.values()):
            raise RuntimeError("this pipeline is being recorded already: leave that block first, or ask for more in it")
        self.handles = [
            unet.register_forward_pre_hook(self._before_step, with_kwargs=True),
            unet.register_forward_hook(self._after_step),
            *(m.to_q.register_forward_hook(self._on_query(name)) for name, m in self.attentions.items()),
        ]
        if self.self_attention.heights:
            for module in unet.modules():
                if isinstance(module, Attention) and not module.is_cross_attention:
                    self.handles += self.self_attention.hook(module)
        if self.encoder is not None:
            self.handles.append(self.encoder.register_forward_hook(self._after_text, with_kwargs=True))
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        self.texts, self.current, self.text = [], [], None
        self.pending = {}
        self.maps.forget()
        self.self_attention.begin(False, [], (1, 1))

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
            hidden = getattr(output, "hidden_states", None) or ()
            skipped = [made for h in hidden for made in (norm(h), h)]  # what clip_skip= takes, and SDXL
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
        self.self_attention.begin(self.active, [row for _, row in self.rows], tuple(self.shape[-2:]))

    def _rows(self, batch: int) -> list[tuple[str, int]]:
        """(branch, row of the batch) of every image to keep; callbacks may turn guidance off on the way."""
        parts = self.parts or batch_parts(self.pipe)
        if missing := set(self.branches) - set(parts):
            raise ValueError(
                f"the {missing.pop()} branch needs guidance: call the pipeline with a guidance_scale above 1, or "
                "record with branch='conditional'"
            )
        images, rest = divmod(batch, len(parts))
        if rest:
            raise ValueError(f"a batch of {batch} does not divide into the parts {parts} of {type(self.pipe).__name__}")
        return [(branch, parts.index(branch) * images + i) for branch in self.branches for i in range(images)]

    def _begin(self, sample, text, attention_mask):
        first, images = not self.recording.traces, len(self.rows) // len(self.branches)
        seeds = self.seeds if first and len(self.seeds) == images else [None] * images
        self.schedule, self.shape = self.pipe.scheduler.timesteps, sample.shape[1:]
        self.calls, self.chosen, self.known, self.layers, self.sizes = 0, None, self.layers, {}, {}
        self.maps.forget()
        self.current = [
            self._new_trace(branch, seed, text[row], None if attention_mask is None else attention_mask[row])
            for (branch, row), seed in zip(self.rows, seeds * len(self.branches), strict=True)
        ]
        self.recording.traces.extend(self.current)

    def _new_trace(self, branch, seed, text, attention_mask) -> Trace:
        ids = self._token_ids(text)
        if ids is None and None in self.maps.texts and branch == "conditional":
            raise ValueError(
                "keep='maps' is of the prompt's words, which embeddings do not tell: give the prompt as text"
            )
        tokenizer = None if ids is None else self.recording.encoder.tokenizer
        return Trace(
            text=text.detach().to("cpu", copy=True),
            token_ids=ids,
            attention_mask=None if attention_mask is None else attention_mask.detach().bool().cpu(),
            generation=self._generation(branch, seed),
            layers=self.layers,
            words=None if ids is None else split(tokenizer, ids),
            length=None if ids is None else text_span(tokenizer, ids).stop + 1,
        )

    def _generation(self, branch, seed) -> Generation:
        pipe = self.pipe
        asked = self.parts is None  # otherwise what the pipeline says is about an earlier call
        return Generation(
            model=str(pipe.name_or_path) if getattr(pipe, "name_or_path", None) else None,
            revision=pipe.config.get("_revision"),
            scheduler=type(pipe.scheduler).__name__,
            guidance_scale=getattr(pipe, "guidance_scale", None) if asked else None,
            branch=branch,
            latent_size=tuple(self.shape[-2:]),
            seed=seed,
            planned=getattr(pipe, "num_timesteps", None) if asked else None,
        )

    def _token_ids(self, text):
        """The token ids that the text encoder turned into `text` (token, text width), told by the result itself.

        Where there are two text encoders, by the result of the first, which `text` begins with.
        """
        for ids, outputs in reversed(self.texts):
            for output in outputs:
                for row in range(len(ids)):
                    made, asked = output[row].to(text), text[..., : output.shape[-1]]
                    if made.shape == asked.shape and (made - asked).norm() <= 5e-3 * asked.norm():
                        return ids[row].tolist()
        return None

    def _check_text(self, text):
        same = len(self.rows) == len(self.current) and all(
            torch.equal(text[row].cpu(), trace.text) for (_, row), trace in zip(self.rows, self.current, strict=True)
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
                self.sizes[name] = map_size(output.shape[1], self.current[0].generation.latent_size)
            layer = self.layers[name]
            with torch.no_grad():
                self.pending[name] = [
                    [keep.take(trace, layer, output[row].detach()) for keep in self.keeps]
                    for (_, row), trace in zip(self.rows, self.current, strict=True)
                ]

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
                self._put(i, trace)
        self.calls += 1

    def _put(self, i, trace):
        for name in self.chosen:
            for keep, taken in zip(self.keeps, self.pending[name][i], strict=True):
                keep.put(trace, name, taken)
        if self.self_attention.heights:
            self.self_attention.put(trace, i)

    def _choose(self):
        """The layers to keep, once the first recorded step has told their sizes."""
        if missing := [name for name in self.attentions if name not in self.pending]:
            raise RuntimeError(
                f"{len(missing)} of {len(self.attentions)} cross-attentions gave no query, {missing[0]} for one: "
                "its block is compiled, or its attention processor does not call to_q; record without that"
            )
        self.chosen = choose_layers({name: self.sizes[name] for name in self.pending}, self.wanted)
        for name in set(self.layers) - set(self.chosen):
            del self.layers[name]
        for trace in self.current:
            trace.sizes = {name: self.sizes[name] for name in self.chosen}
