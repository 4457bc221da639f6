"""Train a text encoder and a denoiser together, on a CPU or as CUDA graphs on a GPU, and go on after interruptions.

Several trainings can share a GPU: steps as small as these leave it idle while Python launches their kernels. So a step
is captured as a CUDA graph there, and each training has a stream of its own.
"""

import copy
import csv
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from tqdm import tqdm
from transformers import CLIPTokenizer

from attnlab import training
from attnlab.pipelines import mixed_precision
from attnlab.scenes import street

from .text_to_image import TextToLatent, attention_scores, grounding_loss, new_scheduler, off_start

__all__ = ["DenoiserTraining", "Examples", "TextToImageSettings", "tokenize", "train_together"]

_MAX_WORDS = 16  # grounded words per caption
_KEYWORD_VERSIONS = 4  # that are made of each caption, once
_EAGER_STEPS = 3  # on a GPU, before the step is captured
_LOGGED = 10  # steps from one line of the curve to the next: reading a loss waits for the GPU
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextToImageSettings:
    """What a batch holds, and the weight of grounding."""

    batch: int = 32
    grounding: float = 0.15  # weight of the grounding loss; 0 for the plain model
    empty: float = 0.1  # fraction of captions that are dropped, for classifier-free guidance
    keywords: float = 0.0  # fraction of captions that are cut down to one to three of their class words
    hidden: float = 0.0  # fraction of samples in which the end token and the padding are hidden from the denoiser
    contextless: float = 0.5  # fraction of samples whose text bypasses the text encoder's layers (see `draw`)
    price: float = 0.0  # weight of the attention that is not on the start token (see `_losses`)


@dataclass(frozen=True)
class Examples:
    """All training scenes and their captions as token ids, in memory.

    `latents` is float32 (scene, channel, row, column). `ids` is int64 (text, token): the captions in the order of the
    scenes, as many once more for each version that is cut to keywords, and last no text. For grounding: `labels`, uint8
    (scene, row, column), and `positions` and `classes` of each caption's words for classes, int64 (scene, word), class
    -1 where there is no further word.
    """

    latents: torch.Tensor
    ids: torch.Tensor
    end: int  # id of the end token, which padding has too
    labels: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    classes: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        latents: torch.Tensor,
        captions: Sequence[tuple[str, dict[str, str]]],
        tokenizer: CLIPTokenizer,
        labels: np.ndarray | None = None,
        keywords: bool = False,
    ) -> "Examples":
        """Tokenize captions, each with its words for classes, and where wanted versions cut to some of these words."""
        rng, texts = np.random.default_rng(0), [caption for caption, _ in captions]
        for _ in range(_KEYWORD_VERSIONS if keywords else 0):
            kept = ((caption, rng.permutation(list(words))[: rng.integers(1, 4)]) for caption, words in captions)
            texts += [" ".join(words) or caption for caption, words in kept]
        tokens = tokenize(tokenizer, [*texts, ""], return_offsets_mapping=True)
        given = latents, tokens.input_ids, tokenizer.eos_token_id
        if labels is None:
            return cls(*given)
        return cls(*given, torch.from_numpy(labels), *_class_words(captions, tokens.offset_mapping.tolist()))

    def to(self, device: torch.device) -> "Examples":
        """Return the same on a device."""
        moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in vars(self).items()}
        return Examples(**moved)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], **options):
    """Return token ids (text, token) of the tokenizer's whole window, and what `options` ask for beside them."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt", **options)


def _class_words(captions, offsets):
    """Return the positions and classes (caption, word) of words for classes."""
    positions = torch.zeros(len(captions), _MAX_WORDS, dtype=torch.long)
    classes = torch.full_like(positions, -1)
    for row, (caption, words) in enumerate(captions):
        spans = [(p, caption[a:b]) for p, (a, b) in enumerate(offsets[row]) if a < b]
        named = [(p, words[text]) for p, text in spans if text in words][:_MAX_WORDS]
        for k, (p, name) in enumerate(named):
            positions[row, k], classes[row, k] = p, street.CLASSES.index(name)
    return positions, classes


class DenoiserTraining:
    """One training: optimizer, schedule and moving average of `training.run_training`, which it may share a GPU with.

    It has a loop of its own since a run may have to end, with a checkpoint, at any step, and since `run_training` reads
    the loss at every step, for which it waits.

    Parameters
    ----------
    model : TextToLatent
        With its starting weights.
    examples : Examples
        What is trained on; with labels, the grounding loss is logged, and minimized where its weight is above 0.
    settings, schedule : TextToImageSettings, training.Schedule
        What a batch holds; steps, rates and the seed, which draws the batches.
    path : Path
        File of the checkpoint; if there is one, the training goes on from it. The curve is written beside it.
    device : torch.device
        Where.
    """

    def __init__(
        self,
        model: TextToLatent,
        examples: Examples,
        settings: TextToImageSettings,
        schedule: training.Schedule,
        path: Path,
        device: torch.device,
    ):
        self.settings, self.schedule, self.path, self.device = settings, schedule, path, device
        self.examples, self.model, on_gpu = examples.to(device), model.to(device).train(), device.type == "cuda"
        self._prepare()
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.rate = torch.tensor(schedule.lr, device=device) if on_gpu else None  # a graph reads it
        self.optimizer = self._new_optimizer()
        self.done, self.seconds, self.terms, self.lines = 0, 0.0, {"loss": torch.zeros(())}, []
        if path.exists():
            saved = training.load_checkpoint(path, self._modules, self.optimizer)
            self.done, self.seconds, self.lines = saved["done"], saved["seconds"], saved["curve"]
        self.graph, self.eager_steps, self.stream = None, 0, torch.cuda.Stream() if on_gpu else None
        if on_gpu:
            self.stream.wait_stream(torch.cuda.current_stream())

    def _prepare(self):
        self.scheduler = new_scheduler()
        self.signal = self.scheduler.alphas_cumprod.to(self.device).sqrt()
        if self.device.type != "cuda":  # the fast kernels' backward pass is slow there
            self.model.unet.set_attn_processor(AttnProcessor())

    def _new_optimizer(self):
        options = {"weight_decay": self.schedule.weight_decay, "fused": True, "capturable": self.device.type == "cuda"}
        return torch.optim.AdamW(self.model.parameters(), self.schedule.lr, (0.9, 0.99), **options)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.path.stem if self.path.stem != "checkpoint" else self.path.parent.name

    def save(self, seconds: float) -> None:
        """Write a checkpoint, after so many further seconds; FloatingPointError if the loss is not finite."""
        if self.stream:
            self.stream.synchronize()
        if not self.terms["loss"].isfinite():
            raise FloatingPointError(f"the loss of {self.name} is {float(self.terms['loss'])} at step {self.done}")
        self.seconds += seconds
        metadata = {"done": self.done, "seconds": self.seconds, "curve": self.lines}
        training.save_checkpoint(self.path, self._modules, self.optimizer, metadata)

    def write_curve(self, path: Path) -> None:
        """Write the losses as CSV, a line every few steps."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", *self.terms])
            writer.writerows(self.lines)

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
                torch._foreach_copy_(list(self.inputs.values()), list(inputs.values()))
                self.graph.replay()
            else:
                self.inputs, self.eager_steps = inputs, self.eager_steps + 1
                self._update()
        if self.done % _LOGGED == 0:
            if self.stream:
                self.stream.synchronize()
            self.lines.append([self.done, *(round(float(term), 5) for term in self.terms.values())])
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
            _log.warning("%s goes on without a CUDA graph, slower: %s", self.name, error)
        else:
            self.graph = graph

    def draw(self) -> dict[str, torch.Tensor]:
        """Draw the next step's inputs, on the device: tensors of `settings.batch` samples, by name.

        Where words are read without context half of the time (as LayerDrop does to all layers of a transformer, Fan et
        al., ICLR 2020), a thing is best looked for in its own word, so its map is about it. Context, which the other
        half has, is left for what a word cannot know by itself: that the car is the red one.
        """
        generator = torch.Generator(self.device).manual_seed(self.schedule.seed * 1_000_003 + self.done)
        given, n, settings = {"generator": generator, "device": self.device}, self.settings.batch, self.settings
        count, examples = len(self.examples.latents), self.examples
        index, chance = torch.randint(count, (n,), **given), torch.rand(n, 5, **given)
        version = torch.randint(1, _KEYWORD_VERSIONS + 1, (n,), **given)
        row = torch.where(chance[:, 0] < settings.keywords, index + version * count, index)
        row = torch.where(chance[:, 1] < settings.empty, len(examples.ids) - 1, row)
        # stratified over the batch: every step sees early and late timesteps
        timestep = self._timesteps((torch.arange(n, device=self.device) + chance[:, 3]) / n)
        noise = torch.randn(n, *examples.latents.shape[1:], **given)
        drawn = {"latents": examples.latents[index], "ids": examples.ids[row], "timestep": timestep, "noise": noise}
        if settings.hidden:
            shown = chance[:, 2:3] >= settings.hidden
            drawn["attention_mask"] = shown | ((drawn["ids"] == examples.end).cumsum(-1) == 0)
        if settings.contextless:
            drawn["contextless"] = chance[:, 4] < settings.contextless
        if examples.labels is not None:
            named = torch.where((row == index)[:, None], examples.classes[index], -1)
            drawn |= {"labels": examples.labels[index], "positions": examples.positions[index], "classes": named}
        return drawn

    def _timesteps(self, chance):
        """Return the timestep (image,) of each chance in 0..1, which rounds up to 1 where it is just below."""
        steps = len(self.signal)
        return (chance * steps).long().clamp(max=steps - 1)

    def _losses(self, drawn):
        """Return named terms, of which "loss" is minimized.

        The start token is the same in every text, so a pixel that looks there learns nothing from words. Where looking
        anywhere else has a price, a pixel looks at a word because it uses it, mostly where the word's thing is.
        """
        settings = self.settings
        latents, noise, timestep, mask = (drawn.get(k) for k in ("latents", "noise", "timestep", "attention_mask"))
        contextless = drawn.get("contextless")
        noisy = self.scheduler.add_noise(latents, noise, timestep).contiguous(memory_format=torch.channels_last)
        watched = "labels" in drawn or settings.price
        with attention_scores(self.model.unet) if watched else nullcontext() as scores:
            predicted = self.model(noisy, timestep, drawn["ids"], mask, contextless)
        loss = F.mse_loss(predicted.float(), self.scheduler.get_velocity(latents, noise, timestep))
        terms, total = {"diffusion": loss}, loss
        if "labels" in drawn:
            words = drawn["labels"], mask, drawn["positions"], drawn["classes"]
            with torch.set_grad_enabled(settings.grounding > 0):
                terms["grounding"] = grounding_loss(scores, *words, self.signal[timestep])
            total = total + settings.grounding * terms["grounding"] if settings.grounding else total
        if settings.price:
            terms["off start"] = off_start(scores, mask)
            total = total + settings.price * terms["off start"]
        return {"loss": total, **terms} if len(terms) > 1 else {"loss": loss}

    def _update(self):
        with mixed_precision(self.device, cache_enabled=False):  # a cache would outlive its graph
            terms = self._losses(self.inputs)
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        parameters, average = list(self.model.parameters()), list(self.average.parameters())
        torch.nn.utils.clip_grad_norm_(parameters, self.schedule.clip)
        self.optimizer.step()
        with torch.no_grad():  # the average begins as a copy of the first step's weights
            torch._foreach_lerp_(average, parameters, 1 - self.schedule.ema if self.done else 1.0)
        self.terms = {name: term.detach() for name, term in terms.items()}


def train_together(runs: Sequence[DenoiserTraining], deadline: float = float("inf"), interval: float = 120.0) -> None:
    """Make a step of each training in turn, to their end or to `deadline` (as `time.time` counts), and save them.

    Checkpoints are written every `interval` seconds.
    """
    total = sum(run.schedule.steps for run in runs)
    bar = tqdm(total=total, initial=sum(run.done for run in runs), mininterval=5)
    saved = time.time()
    while (left := [run for run in runs if run.done < run.schedule.steps]) and time.time() < deadline:
        for run in left:
            run.advance()
        bar.update(len(left))
        if left[0].stream and left[0].done % 20 == 0:
            torch.cuda.synchronize()  # Python is far ahead otherwise, and learns too late that time is up
        if time.time() - saved >= interval:
            saved = _save(runs, saved)
    _save(runs, saved)
    bar.close()


def _save(runs, since):
    """Write the checkpoints of runs that went on since a time; return the time."""
    for run in runs:
        run.save(time.time() - since)
    return time.time()
