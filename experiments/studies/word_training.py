"""Train a text encoder and a denoiser by the diffusion loss alone, with the captions, context and padding of a variant.

Many short trainings share a GPU: a step is captured as a CUDA graph there, and each training has a stream of its own.
"""

import copy
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTokenizer

from attnlab import seed, training

from ..bundled.text_encoder import PROMPT_LENGTH
from ..bundled.text_to_image import TextToLatent, new_scheduler

__all__ = ["VARIANTS", "Variant", "VariantTraining", "new_model", "tokenize"]

_LATENT_SIDE, _CHANNELS = 16, (64, 96, 160)  # of the denoiser, as the bundled models have them
_EMPTY = 0.1  # fraction of captions that are dropped, for classifier-free guidance
_KEYWORD_VERSIONS = 4  # that are made of each caption, once
_HIDDEN = {"visible": 0.0, "registers": 0.0, "half": 0.5, "hidden": 1.0}  # in this fraction of training samples
_EAGER_STEPS = 3  # on a GPU, before the step is captured
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """What a model learns from, and what its denoiser sees of the text."""

    captions: str  # "sparse", or "dense": see `street.render`
    text_layers: int  # 0: words without context, token and position embedding alone
    padding: str  # from the end token on, in training: "visible", "hidden", "half" of both, or constant "registers"
    keywords: float = 0.0  # fraction of captions that are cut down to one to three of their class words
    window: int = 48  # tokens per prompt

    @property
    def name(self) -> str:
        """What it is called in files and tables."""
        return f"{self.captions}-{self.text_layers}-{self.padding}"


_DENSE = (0, "hidden"), (0, "visible"), (0, "registers"), (1, "visible"), (2, "visible"), (2, "hidden")
_SPARSE = (0, "visible"), (2, "half")  # the second is the recipe of `tiny-plain`
VARIANTS = {
    variant.name: variant
    for variant in (
        *(Variant("dense", layers, padding) for layers, padding in _DENSE),
        *(Variant("sparse", layers, padding, 0.15, PROMPT_LENGTH) for layers, padding in _SPARSE),
    )
}


class VariantTraining:
    """The training of one variant with one seed: optimizer, schedule and moving average of `training.run_training`.

    It has a loop of its own since a run may have to end, with a checkpoint, at any step, and since `run_training` reads
    the loss at every step, for which it waits. Steps as small as these leave a GPU idle while Python launches them:
    there a step is captured as a CUDA graph, and several trainings run side by side, each on a stream of its own.

    Parameters
    ----------
    variant : Variant
        What is trained.
    schedule : training.Schedule
        Steps, rates and the seed, which draws the starting weights and the batches.
    latents : (scene, channel, row, column) tensor
        Of the training scenes.
    captions : list of (str, dict from str to str)
        Captions of the training scenes, each with its words for classes.
    tokenizer : CLIPTokenizer
        With the variant's window.
    path : Path
        File of the checkpoint; if there is one, the training goes on from it.
    device, batch
        Where, and how many scenes per step.
    """

    def __init__(self, variant, schedule, latents, captions, tokenizer, path: Path, device: torch.device, batch=32):
        self.variant, self.schedule, self.path, self.device, self.batch = variant, schedule, path, device, batch
        self.end, self.latents = tokenizer.eos_token_id, latents.to(device)
        self.ids = _token_table(tokenizer, captions, variant.keywords).to(device)
        self.model, self.scheduler = new_model(variant, tokenizer, schedule.seed).to(device).train(), new_scheduler()
        on_gpu = device.type == "cuda"
        if not on_gpu:  # the fast kernels' backward pass is slow there
            self.model.unet.set_attn_processor(AttnProcessor())
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.rate = torch.tensor(schedule.lr, device=device) if on_gpu else None  # a graph reads it
        options = {"weight_decay": schedule.weight_decay, "fused": True, "capturable": on_gpu}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), schedule.lr, (0.9, 0.99), **options)
        self.done, self.seconds, self.loss = 0, 0.0, torch.zeros(())
        if path.exists():
            saved = training.load_checkpoint(path, self._modules, self.optimizer)
            self.done, self.seconds = saved["done"], saved["seconds"]
        self.graph, self.eager_steps, self.stream = None, 0, torch.cuda.Stream() if on_gpu else None
        if on_gpu:
            self.stream.wait_stream(torch.cuda.current_stream())

    def save(self, seconds: float) -> None:
        """Write a checkpoint, after so many further seconds; FloatingPointError if the loss is not finite."""
        if self.stream:
            self.stream.synchronize()
        if not self.loss.isfinite():
            raise FloatingPointError(f"the loss of {self.path.stem} is {float(self.loss)} at step {self.done}")
        self.seconds += seconds
        metadata = {"done": self.done, "seconds": self.seconds}
        training.save_checkpoint(self.path, self._modules, self.optimizer, metadata)

    @property
    def _modules(self):
        return {"model": self.model, "average": self.average}

    def advance(self) -> None:
        """Make one step, which depends on the seed and its number alone; on a GPU it goes on after this returns."""
        rate = self.schedule.lr * self.schedule.factor(self.done)
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            inputs = self.draw()
            for group in self.optimizer.param_groups:
                group["lr"] = rate if self.rate is None else self.rate.fill_(rate)
            if self.graph:
                torch._foreach_copy_(self.inputs, inputs)
                self.graph.replay()
            else:
                self.inputs, self.eager_steps = inputs, self.eager_steps + 1
                self._update()
        self.done += 1
        if self.stream and not self.graph and self.eager_steps == _EAGER_STEPS:
            self._capture()

    def _capture(self):
        """Capture the step, which changes nothing now; a replay reads what is in self.inputs then."""
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)  # so that gradients are part of the graph's memory
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self._update()
        except RuntimeError as error:
            _log.warning("%s goes on without a CUDA graph, slower: %s", self.path.stem, error)
        else:
            self.graph = graph

    def draw(self) -> tuple[torch.Tensor, ...]:
        """Draw latents, token ids, attention mask, timesteps and noise of the next step, on the device."""
        generator = torch.Generator(self.device).manual_seed(self.schedule.seed * 1_000_003 + self.done)
        given, n, count = {"generator": generator, "device": self.device}, self.batch, len(self.latents)
        index, chance = torch.randint(count, (n,), **given), torch.rand(n, 4, **given)
        version = torch.randint(1, _KEYWORD_VERSIONS + 1, (n,), **given)
        row = torch.where(chance[:, 0] < self.variant.keywords, index + version * count, index)
        ids = self.ids[torch.where(chance[:, 1] < _EMPTY, len(self.ids) - 1, row)]
        attention_mask = (chance[:, 2:3] >= _HIDDEN[self.variant.padding]) | _before_end(ids, self.end)
        # stratified over the batch: every step sees early and late timesteps; a chance just below 1 rounds up to it
        count = len(self.scheduler.alphas_cumprod)
        timestep = ((torch.arange(n, device=self.device) + chance[:, 3]) / n * count).long().clamp(max=count - 1)
        noise = torch.randn(n, *self.latents.shape[1:], **given)
        return self.latents[index], ids, attention_mask, timestep, noise

    def _update(self):
        latents, ids, attention_mask, timestep, noise = self.inputs
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):  # a cache would outlive its graph
            noisy = self.scheduler.add_noise(latents, noise, timestep).contiguous(memory_format=torch.channels_last)
            predicted = self.model(noisy, timestep, ids, attention_mask)
            loss = F.mse_loss(predicted.float(), self.scheduler.get_velocity(latents, noise, timestep))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters, average = list(self.model.parameters()), list(self.average.parameters())
        torch.nn.utils.clip_grad_norm_(parameters, self.schedule.clip)
        self.optimizer.step()
        with torch.no_grad():  # the average begins as a copy of the first step's weights
            torch._foreach_lerp_(average, parameters, 1 - self.schedule.ema if self.done else 1.0)
        self.loss = loss.detach()


def _token_table(tokenizer, captions, keywords):
    """Return token ids (row, token) of all captions, if wanted of those cut to keywords, and of no text."""
    rng, texts = np.random.default_rng(0), [caption for caption, _ in captions]
    for _ in range(_KEYWORD_VERSIONS if keywords else 0):
        kept = ((caption, rng.permutation(list(words))[: rng.integers(1, 4)]) for caption, words in captions)
        texts += [" ".join(words) or caption for caption, words in kept]
    return tokenize(tokenizer, [*texts, ""]).input_ids


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], **options):
    """Return token ids (text, token) of the tokenizer's whole window, and what `options` ask for beside them."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt", **options)


def _before_end(ids, end):
    """Return where start and words of texts are: bool, in the shape of `ids`. Padding has the end token's id."""
    return (ids == end).cumsum(-1) == 0


def new_model(variant: Variant, tokenizer: CLIPTokenizer, start: int) -> TextToLatent:
    """Return the untrained model of a variant; registers are what untrained positions alone would look like."""
    with training.seeded(start):
        model = TextToLatent.new(tokenizer, _LATENT_SIDE, _CHANNELS, variant.text_layers)
    if variant.padding == "registers":
        constants = torch.randn(variant.window, model.text_encoder.config.hidden_size, generator=seed(0))
        model.text_encoder.register_buffer("registers", F.layer_norm(constants, constants.shape[1:]))
        model.text_encoder.register_forward_hook(partial(_put_registers, tokenizer.eos_token_id), with_kwargs=True)
    return model


def _put_registers(end, encoder, args, options, output):
    words = _before_end(args[0] if args else options["input_ids"], end)[..., None]
    output.last_hidden_state = torch.where(words, output.last_hidden_state, encoder.registers)
    return output
