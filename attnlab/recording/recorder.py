"""Hooks that record a pipeline's cross-attention while it generates; no other module that users call installs any.

    with record(pipe) as recording:      # hooks exist only inside this block
        image = pipe("a burning house with smoke").images[0]

One tap on every cross-attention copies its queries; what it cannot see is read where it is known: sizes, timestep and
text before the denoiser runs, token ids at the text encoder. Nothing is replaced, so fast attention kernels stay in
use and the image is the same to the last bit. Three objects by lifetime: `Recorder` for the block, `CurrentGeneration`
for one call of the pipeline, `CurrentStep` for one call of the denoiser.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral

import torch

from .adapters import AttentionCall, JointCall, adapter_of
from .adapters.families import family_of
from .calls import BatchParts
from .current import CurrentGeneration, CurrentStep, check_seen
from .frames import given_texts
from .layers import Layers, alike, as_list, check_choice, choose_layers, exact
from .recording import Recording
from .stores import Stores
from .texts import TextEncoder
from .trace import Generation, Trace

__all__ = ["Recorder", "record"]

_HOW_GUIDED = "call the pipeline with a guidance_scale above 1, or record another branch"
_BRANCHES = {"conditional": ("conditional",), "negative": ("negative",), "both": ("conditional", "negative")}


@contextmanager
def record(
    pipe,
    *,
    layers: Layers = None,
    steps: int | Collection[int] | None = None,
    branch: str = "conditional",
    parts: Sequence[str] | None = None,
    keep: str | None = None,
    share: str = "text",
    texts: str | Sequence[str] = (),
    self_attention: int | Collection[int] = (),
    outputs: bool = False,
    agreement: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Iterator[Recording]:
    """Record how everything that `pipe` generates inside the block attends to its text.

    Of cross-attention that is the queries, from which maps of any text follow. In joint attention (FLUX, Stable
    Diffusion 3, Qwen-Image, ...) image and text attend to one another, so that queries alone say nothing of a text:
    there it is the maps of the prompt, and the denoiser's calls for `record_again`.

    Parameters
    ----------
    pipe : DiffusionPipeline
        One whose denoiser is in the table of docs/models.md: Stable Diffusion, FLUX, PixArt, ...
    layers : str, int or several, optional
        Names, beginnings of names ("up_blocks.1") and map heights (16); "all" for every one that reads text. Default:
        of a U-Net those of the down and up blocks, as DAAM and OVAM take them; of others all.
    steps : int or several, optional
        Which steps of denoising to record, counted from 0. Default: all.
    branch : {"conditional", "negative", "both"}
        With guidance, the part of the batch to keep. The words of the negative part are the negative prompt's; for
        "both" see `Recording.branch`; where guidance is a call of its own (FLUX, Qwen-Image) record one of them. Steps
        at which a pipeline ends its guidance early have no negative part, and are left out.
    parts : sequence of str, optional
        Names of the equal parts of a batch in their order, ("negative", "conditional") or ("conditional",), where
        something else than `pipe` itself calls its denoiser: a loop of your own over `pipe.unet`, or a pipeline that
        shares it. There another text, or the first timestep once more, begins another image.
    keep : {"queries", "sum", "maps", "contributions", "calls"}, optional
        "queries", the default of cross-attention unless texts are given: for maps of any text and step afterwards, in
        memory that grows with the steps. What does not grow: "sum", of the queries, all that `linear_daam` needs; of
        the prompt, "maps" for `daam`, or "contributions". "calls", the arguments of the denoiser, for `record_again`:
        little more than the latents of each step. The default of joint attention is both "maps" and "calls".
    share : {"text", "joint"}
        In joint attention, what maps are shares of: of the attention that goes to the text, which adds up to 1 over its
        tokens, or of all attention, as the model computes it. In cross-attention both are the same.
    texts : str or sequence of str
        Texts whose softmax maps are summed up while generating, for `ovam` afterwards; no queries are kept for them.
        With keep="contributions", what is summed up is theirs. In joint attention the model reads them beside the image
        as it is drawn: a step takes as long again for each text.
    self_attention : int or several
        Map heights whose mean self-attention is kept, for `propagate`. A size of h x w takes 4 (h w)^2 bytes, and time.
        In joint attention it is that of pixels among themselves; docs/models.md names the models that have it.
    outputs : bool
        In joint attention, whether sums over steps of what attention gives are kept, for `concept_maps` of the texts,
        and for `linear_daam`: of each layer 4 bytes for each pixel and channel, so choose `layers`.
    agreement : int, optional
        Height of the grid on which the layers' self-attention is compared, for `goca`: 16, or 32, which takes longer.
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
        If the pipeline cannot be recorded, or reads no other texts beside an image (Lumina-Next), or its self-attention
        is not seen.
    ValueError
        For an unknown layer, step, branch, keep or dtype, an empty text or one beyond the encoder's window, outputs of
        cross-attention, a negative branch asked for without guidance, or calls of the denoiser whose batches have
        unknown parts.
    RuntimeError
        If the pipeline is being recorded already, an attention's queries or keys cannot be seen, its weights change
        during a generation, or, at the end of the block, nothing was recorded; the message says why.

    Warns
    -----
    UserWarning
        Where the prompt fills the text encoder's window, so that words may be lost; where SDXL's `prompt_2` is another
        text; where not all vectors of a learned token were read.
    """
    kept = {"keep": keep, "share": share, "texts": texts, "self_attention": self_attention, "outputs": outputs}
    kept |= {"agreement": agreement, "dtype": dtype, "device": device}
    recorder = Recorder(pipe, layers, steps, branch, generator, parts, **kept)
    with recorder:
        yield recorder.recording
    recorder.check()


class Recorder:
    """The hooks behind `record`, for as long as its own `with` block lasts; arguments are those of `record`."""

    def __init__(self, pipe, layers, steps, branch, generator=None, parts: Sequence[str] | None = None, **kept):
        self.adapter = adapter_of(pipe)
        check_choice("branch", branch, _BRANCHES)
        # names are known now, map heights at the first step
        choose_layers(dict.fromkeys(self.adapter.attentions), layers, self.adapter.is_default)
        self._layers, self._steps = layers, _numbers(steps)
        self._batch = BatchParts(self.adapter, _BRANCHES[branch], parts)
        self.recording = Recording(TextEncoder.of(pipe))
        self._stores = Stores(self.adapter, self.recording.encoder, **kept)
        self._seeds = _seeds(generator)
        self.known: tuple | None = None  # what `_read` is to say of every text
        self.prompts: list[str] = []  # of a denoiser that something else than the pipeline calls
        self.skips, self._handles = False, []  # whether the denoiser's call is no step
        self._generation: CurrentGeneration | None = None

    def __enter__(self):
        adapter, self.recording._arrive = self.adapter, self._stores.host_copy.wait
        hooks = adapter.module._forward_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), Recorder) for hook in hooks):
            raise RuntimeError("this pipeline is being recorded already: leave that block first, or ask for more in it")
        self._handles = [
            *self._stores.self_attention.tap(adapter, self._stores.pass_over),  # first, as it may be refused
            *adapter.texts.listen(),
            adapter.module.register_forward_pre_hook(self._before_step, with_kwargs=True),
            *self._stores.listen(),
            adapter.module.register_forward_hook(self._after_step),
            *(handle for name, m in adapter.attentions.items() for handle in adapter.tap(m, self._receiver(name))),
        ]
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        self.adapter.texts.forget()
        try:
            if self._generation is not None:
                self._generation.end(self._stores)
        finally:
            self._stores.host_copy.close()
            self.recording._arrive = None

    def check(self) -> None:
        """Raise RuntimeError where the block ended well but nothing was recorded."""
        if not any(t.steps for t in self.recording._traces):
            calls = 0 if self._generation is None else self._generation.calls
            branch = self._batch.branches[0] if self.skips else None
            raise RuntimeError(f"nothing was recorded: {_why_nothing(calls, self._steps, branch)}")

    @torch.compiler.disable
    @exact()
    def _before_step(self, module, args, kwargs):
        self._stores.begin(False, [], None)  # what runs while a text is read is of no step
        call = self.adapter.read(args, kwargs)
        # of every image to keep; none where guidance, and so a branch, has ended
        rows = [] if call is None else self._batch.rows(call)
        self.skips = call is None or (self.adapter.alternates and not rows)  # another call is this step's
        if self.skips:
            return
        own = self._batch.named is None or self.known is not None  # calls that are asked again are of one generation
        if self._generation is None or not self._generation.goes_on(self.adapter.pipe.scheduler, call, rows, own):
            self._begin(call, rows)
        generation = self._generation
        active = bool(rows) and (self._steps is None or generation.calls in self._steps)
        if active and call.text is not generation.text:
            self._meet_text(call, rows)
        kept = self._stores.keep_call(args, kwargs, self._batch.parts, module) if active else None
        generation.step = CurrentStep(rows, call.timestep, call.text, active, kept=kept)
        self._stores.begin(active, [row for _, row in rows], call.size)

    def _begin(self, call, rows):
        """Begin a generation, with a trace of each image."""
        if not rows:
            raise ValueError(f"the {self._batch.branches[0]} branch needs guidance: {_HOW_GUIDED}")
        images, own = len(rows) // len(self._batch.branches), self._batch.named is None
        first = not self.recording._traces  # a generator's seed is that of what it draws first
        planned = getattr(self.adapter.pipe, "num_timesteps", None) if own else None
        if first and planned and self._steps is not None and min(self._steps) >= planned:
            raise ValueError(f"none of steps={self._steps} will occur: this generation has {planned}, from 0 on")
        seeds = self._seeds if first and len(self._seeds) == images else [None] * images
        noted = self.recording.encoder.reader.note_call() if own and self.recording.encoder is not None else {}
        known = {} if self._generation is None else self._generation.end(self._stores)
        self._generation = CurrentGeneration(self.adapter.pipe.scheduler.timesteps, call, known)
        for i, ((branch, row), seed) in enumerate(zip(rows, seeds * len(self._batch.branches), strict=True)):
            text, words, ends = self._read(call, row, branch)
            mask = None if call.attention_mask is None else call.attention_mask[row].detach().bool().cpu()
            said = {"seed": seed, "planned": planned, "share": self._stores.maps.share, "options": noted}
            facts = _facts(self.adapter, own, branch=branch, latent_size=call.size, **said)
            trace = Trace(text, mask, words, facts, layers=self._generation.layers, ends=ends, row=i % images)
            self._generation.traces.append(trace)
        self.recording._traces.extend(self._generation.traces)
        self._generation.text = call.text

    def _read(self, call, row, branch):
        """Copy a text that the denoiser reads, and find its words, and whether an end token follows them."""
        if self.known is not None:
            return self.known
        prompts = given_texts(self.adapter.pipe, branch) if self._batch.named is None else self.prompts
        words, ends = self.adapter.words(call, row, self.recording.encoder, prompts)
        if words is None and None in self._stores.maps.texts and branch == "conditional":
            raise ValueError(_no_words(self.adapter.joint))
        return call.text[row].detach().to("cpu", copy=True), words, ends

    def _meet_text(self, call, rows):
        """Note for each image whether it goes on with another text, as where a prompt is scheduled."""
        generation, text = self._generation, call.text
        if len(rows) != len(generation.traces):
            raise RuntimeError("the number of images changed during a generation: a recording has all steps of each")
        for (branch, row), trace in zip(rows, generation.traces, strict=True):
            if trace.generation.changed is not None or torch.equal(text[row].cpu(), trace.text):
                continue
            if trace.steps:
                trace.generation.changed = generation.calls
                trace.streamed.pop(None, None)  # sums of its words' maps would be of several texts
            else:
                trace.text, trace.words, trace.ends = self._read(call, row, branch)
                generation.keys.forget()  # which are of the text before
        generation.text = text

    def _receiver(self, name):
        def receive(call: AttentionCall | JointCall) -> None:
            if self.skips or self._stores.pass_over():
                return
            generation, step = self._generation, self._generation.step
            wanted = generation.chosen is None or (step.active and name in generation.chosen)
            if not wanted or (self.adapter.sees_context and not alike(call.context, step.text)):
                return
            generation.meet(name, call, self.adapter, self._stores)

        return receive

    @torch.compiler.disable
    @exact()
    def _after_step(self, module, args, output):
        if self.skips:
            return
        generation, step = self._generation, self._generation.step
        generation.take(self._stores)
        if generation.chosen is None:
            generation.choose(self._layers, self.adapter, step)
            self._stores.self_attention.check(self.adapter.how_seen)
        elif step.active:
            check_seen(self.adapter, generation.chosen, step)
            self._stores.self_attention.check(self.adapter.how_seen)
        generation.end_step(self._stores)
        self._stores.begin(False, [], None)


def _numbers(steps):
    """List the numbers of steps that were asked for; ValueError for what is none."""
    if steps is None:
        return None
    chosen = as_list(steps)
    if not chosen or not all(isinstance(n, Integral) and not isinstance(n, bool) and n >= 0 for n in chosen):
        raise ValueError(f"steps={steps!r}: give numbers of denoising steps, from 0 on, for example [0, 10]")
    return chosen


def _seeds(generator):
    generators = [] if generator is None else generator if isinstance(generator, list | tuple) else [generator]
    if not all(isinstance(g, torch.Generator) for g in generators):
        raise TypeError(f"generator={generator!r}: give a torch.Generator, for example al.seed(7), or one per image")
    return [g.initial_seed() for g in generators]


def _no_words(joint) -> str:
    """Say that a prompt's words are not known, and what to do in its stead."""
    what = "maps and contributions that are summed up are of the prompt's words, which embeddings lack"
    others = "keep='calls', for record_again with any text" if joint else "texts=..., its words"
    return f"{what}: give the prompt as text, or record(pipe, {others})"


def _why_nothing(calls, steps, branch) -> str:
    """Say why a block recorded nothing; `branch` is one that no call of the denoiser was of."""
    if calls:
        return f"none of steps={steps} occurred; the last generation ran {calls} steps"
    if branch:
        return f"no call of the denoiser was of the {branch} branch, which needs guidance"
    return "the denoiser ran no whole step inside the record() block; call pipe(...) in it"


def _facts(adapter, called, **said) -> Generation:
    """Read what a pipeline says of a generation; of guidance only if it was itself called for it."""
    pipe = adapter.pipe
    return Generation(
        model=str(pipe.name_or_path) if getattr(pipe, "name_or_path", None) else None,
        revision=pipe.config.get("_revision"),
        scheduler=type(pipe.scheduler).__name__,
        denoiser=family_of(adapter.module)[0],
        guidance_scale=getattr(pipe, "guidance_scale", None) if called else None,
        **said,
    )
