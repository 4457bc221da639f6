"""What a small pipeline really computes, in float64, and the checks that hold its recording against that.

The answers share no code with attnlab. Every attention is heard where the denoiser asks for it; which keys are the
image's and which the text's is found by trying: another seed changes those of the image, another text those of the
text; and what another negative prompt leaves alone is the prompt's. `docs/models.py` writes a table of these checks.
"""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import attnlab as al

from . import OTHER, PROMPT, SMALL

STEPS = 2
NEGATIVE = "a blue car"  # as many tokens as OTHER
TEXTS = ("encoder_hidden_states", "cap_feats")  # what arguments begin with that hold a text, token by token
_SIGNATURE = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


# What a denoiser computes


class Met(NamedTuple):
    """One attention: what met in it, and what came of that."""

    query: torch.Tensor  # (batch, head, token, width)
    key: torch.Tensor  # (batch, head, token, width)
    value: torch.Tensor  # (batch, head, token, width)
    output: torch.Tensor  # (batch, head, token, width)
    mask: torch.Tensor | None  # to be added to scores, or bool
    scale: float

    def probabilities(self, row: int, queries=slice(None), keys=slice(None)) -> torch.Tensor:
        """Return the softmax over some keys in float64: (head, query, key)."""
        query, key = self.query[row, :, queries].double(), self.key[row].double()
        key = key.repeat_interleave(len(query) // len(key), 0)[:, keys]
        scores = query @ key.mT * self.scale
        if self.mask is None:
            return scores.softmax(-1)
        shape = len(self.query), len(query), self.query.shape[2], self.key.shape[2]
        mask = self.mask.expand(shape)[row][:, queries, keys]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
        return scores.softmax(-1)


class Call(NamedTuple):
    """One call of the denoiser."""

    given: dict[str, object]  # its arguments by name, the noisy image first
    met: dict[str, Met]  # by the name of the module that asked for the attention
    outputs: dict[str, torch.Tensor]  # of these modules

    @property
    def texts(self) -> list:
        """What the denoiser was given of the texts, by rows."""
        values = [value for name, value in self.given.items() if name.startswith(TEXTS) and value is not None]
        values = [value for value in values if isinstance(value, list) or value.ndim > 2]  # the others are masks
        return [value.transpose(0, 1) if torch.is_tensor(value) and value.ndim == 4 else value for value in values]

    @property
    def rows(self) -> int:
        """Number of texts."""
        return len(self.texts[0])


class _Hearing(TorchFunctionMode):
    """Keeps every attention that is asked for in its block, with the module that runs then."""

    def __init__(self):
        super().__init__()
        self.running, self.calls = [], []  # names of modules, the innermost last; calls of the denoiser

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and self.running:
            given = dict(zip(_SIGNATURE, args, strict=False)) | (kwargs or {})
            scale = given.get("scale") or given["query"].shape[-1] ** -0.5
            met, name = self.calls[-1].met, self.running[-1]
            assert name not in met and not given.get("is_causal")
            tensors = (x.clone() for x in (given["query"], given["key"], given["value"], output))
            met[name] = Met(*tensors, given.get("attn_mask"), scale)
        return output


@contextmanager
def watch(denoiser) -> Iterator[list[Call]]:
    """Yield a list that gets every call of a denoiser inside the block."""
    hearing, signature = _Hearing(), inspect.signature(type(denoiser).forward)

    def begin(module, args, kwargs):
        given = signature.bind(module, *args, **kwargs).arguments
        given = {name: _copy(given[name]) for name in list(signature.parameters)[1:] if name in given}
        hearing.calls.append(Call(given, {}, {}))

    def leave(module, args, output):
        name = hearing.running.pop()
        if name in hearing.calls[-1].met:
            hearing.calls[-1].outputs[name] = output

    handles = [denoiser.register_forward_pre_hook(begin, with_kwargs=True)]
    for name, module in _attentions(denoiser).items():
        handles.append(module.register_forward_pre_hook(lambda module, args, name=name: hearing.running.append(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        with hearing:
            yield hearing.calls
    finally:
        for handle in handles:
            handle.remove()


@cache
def _attentions(denoiser) -> dict[str, torch.nn.Module]:
    """Return the modules called attention, "attn2" or "attentions.0", and so those that ask for one."""
    named = denoiser.named_modules()
    return {name: m for name, m in named if "att" in name.rstrip(".0123456789").rpartition(".")[2]}


def _copy(value):
    if isinstance(value, list):
        return [_copy(part) for part in value]
    return value.clone() if torch.is_tensor(value) else value


# What a recording has to be


class _Stopped(Exception):
    """Ends a generation."""


class Part(NamedTuple):
    """Which tokens of an attention are pixels, as queries, and which are the text's, as keys."""

    pixels: slice
    text: slice


class Family:
    """A small pipeline, and what it computes."""

    def __init__(self, name: str):
        self.pipe, self.call = SMALL[name]()
        self.name = name
        self.pipe.set_progress_bar_config(disable=True)
        if name == "qwen_image_edit":  # makes a megapixel of its picture, always the same one
            self.pipe.vae.encode = _once(self.pipe.vae.encode)

    @property
    def denoiser(self) -> torch.nn.Module:
        """The module that draws."""
        return getattr(self.pipe, "transformer", None) or self.pipe.unet

    @property
    def guided(self) -> bool:
        """Whether its call has a negative prompt."""
        return "negative_prompt" in self.call

    def generate(self, seed: int = 7, **change) -> torch.Tensor:
        """Return the latents of a generation, a short one unless told otherwise."""
        call = self.call | {"num_inference_steps": STEPS, "output_type": "latent"} | change
        call = {name: copy(value) for name, value in call.items()}  # ZImagePipeline writes into a list of prompts
        return torch.as_tensor(self.pipe(**call, generator=torch.Generator().manual_seed(seed))[0])

    def watched(self, **change) -> tuple[torch.Tensor, list[Call]]:
        """Return the latents of a generation and the calls that made them."""
        with watch(self.denoiser) as calls:
            image = self.generate(**change)
        return image, calls

    def first_call(self, **change) -> Call:
        """Return the first call of the denoiser, which is stopped there."""

        def stop(module, args):
            raise _Stopped

        with watch(self.denoiser) as calls, suppress(_Stopped):
            handle = self.denoiser.register_forward_pre_hook(stop)
            try:
                self.generate(**change)
            finally:
                handle.remove()
        return calls[0]

    @cached_property
    def plain(self) -> tuple[torch.Tensor, list[Call]]:
        """The latents of a generation without recording, and its calls."""
        return self.watched()

    @cached_property
    def answer(self) -> "Answer":
        """What that generation's maps have to be."""
        return Answer(self)

    @cached_property
    def other_answer(self) -> "Answer":
        """What maps of another prompt have to be."""
        return Answer(self, prompt=OTHER)

    def record(self, change: dict | None = None, **asked) -> al.Recording:
        """Return a recorded generation."""
        with al.record(self.pipe, **asked) as recording:
            self.generate(**(change or {}))
        return recording

    @cached_property
    def recording(self) -> al.Recording:
        """A generation that was recorded as it is recorded by default, in all layers."""
        return self.record(layers="all")


def _once(function):
    """Return a function that runs once, and gives what came of that each time."""
    made = []

    def run(*args):
        if not made:
            made.append(function(*args))
        return made[0]

    return run


class Answer:
    """What the maps of a generation have to be, in float64."""

    def __init__(self, family: Family, branch: str = "conditional", **change):
        self.family = family
        _, self.calls = family.watched(**change) if change else family.plain
        self.rows = [list(range(call.rows)) for call in self.calls]  # of each call, those of the branch
        if family.guided:
            negative = [NEGATIVE] * len(change["prompt"]) if isinstance(change.get("prompt"), list) else NEGATIVE
            _, others = family.watched(**change | {"negative_prompt": negative})
            for call, other, rows in zip(self.calls, others, self.rows, strict=True):
                rows[:] = [row for row in rows if _same_text(call, other, row) == (branch == "conditional")]
        _, self._other_seed = family.watched(**change | {"seed": 8})
        self._parts: dict[tuple, dict[str, Part]] = {}  # by what tells texts that stand at the same places

    @property
    def steps(self) -> list[int]:
        """Numbers of the calls that are of this branch."""
        return [i for i, rows in enumerate(self.rows) if rows]

    def parts(self, number: int, row: int) -> dict[str, Part]:
        """Return where pixels and text stand in each attention that reads the text, found by trying."""
        call = self.calls[number]
        if (alike := (call.rows, row, *(text[row].shape for text in call.texts))) not in self._parts:
            first = next(iter(call.given))
            image = {first: self._other_seed[number].given[first]}
            texts = {name: _noisy(value) for name, value in call.given.items() if name.startswith(TEXTS)}
            tried = [again(self.family.denoiser, call.given | change).met for change in ({}, texts, image)]
            self._parts[alike] = dict(_parts(*tried, row))
        return self._parts[alike]

    def layers(self, image: int = 0) -> list[str]:
        """List the names of the attentions that read the text."""
        return list(self.parts(self.steps[0], self.rows[self.steps[0]][image]))

    def maps(self, name: str, share: str = "text", image: int = 0, steps=None) -> torch.Tensor:
        """Return the maps of all tokens of an image's text, mean over heads and steps: float64 (token, pixel)."""
        found = []
        for number in self.steps if steps is None else [self.steps[i] for i in steps]:
            row, met = self.rows[number][image], self.calls[number].met[name]
            part = self.parts(number, row)[name]
            if share == "text":
                found.append(met.probabilities(row, part.pixels, part.text).mean(0).T)
            else:
                found.append(met.probabilities(row, part.pixels)[..., part.text].mean(0).T)
        return torch.stack(found).mean(0)


def _same_text(call, other, row):
    pairs = [(one[row], two[row]) for one, two in zip(call.texts, other.texts, strict=True)]
    return all(one.shape == two.shape and torch.equal(one, two) for one, two in pairs)


def _noisy(value):
    """Return other values for a text; the same for a mask, or none."""
    if isinstance(value, list):
        return [_noisy(part) for part in value]
    noisy = value is not None and value.is_floating_point() and value.ndim > 1
    return value + torch.randn_like(value) if noisy else value


@torch.no_grad()
def again(denoiser, given) -> Call:
    """Call a denoiser with some arguments."""
    with watch(denoiser) as calls:
        denoiser(**given)
    return calls[0]


def _parts(plain, other_text, other_image, row) -> Iterator[tuple[str, Part]]:
    """Give the parts of every attention from an image to keys that are a text's alone, and of those that follow it.

    Behind the first block every token of a joint attention depends on both; the same number of keys tells it.
    """
    joined: dict[int, Part] = {}  # by the number of keys, where tokens of both meet
    size = None  # number of pixels: where the image attends to itself first, its padding depends on it from then on
    for name, met in plain.items():
        if row >= len(met.query):  # perturbed attention is of other parts of the batch
            continue
        of_text, of_image = (_changed(met.key, other[name].key, row) for other in (other_text, other_image))
        pixels, count = _changed(met.query, other_image[name].query, row), met.key.shape[2]
        alone, size = sorted(set(of_text) - set(of_image)), size or len(of_image)
        if count not in joined and pixels and alone and of_image:
            assert of_image == list(range(of_image[0], of_image[-1] + 1))  # all in a row
            # registers before the text belong to it, reference images behind the image do not
            text = slice(0, of_image[0]) if alone[0] < of_image[0] else slice(alone[0], None)
            joined[count] = Part(slice(pixels[0], pixels[0] + size), text)
        if count in joined:
            yield name, joined[count]
        elif pixels and alone:
            yield name, Part(slice(None), slice(None))


def _changed(one, other, row) -> list[int]:
    """List the tokens of which an image's queries or keys are others."""
    return (one[row] != other[row]).any(-1).any(0).nonzero().flatten().tolist()


# Checks: AssertionError where a recording is not what it has to be


def check_image(family: Family) -> None:
    """Check that recording leaves the image as it is, to the last bit, sees every layer, and leaves nothing behind."""
    plain, _ = family.plain
    before = count_hooks(family.pipe)  # transformers has some of its own from the first call on
    with al.record(family.pipe, layers="all") as recording:
        assert torch.equal(family.generate(), plain)
    assert count_hooks(family.pipe) == before and not function_modes()
    assert list(recording[0].trace.sizes) == family.answer.layers()
    assert all(len(trace.steps) == STEPS for trace in recording.traces)


def check_maps(family: Family) -> None:
    """Check maps of the prompt's words, by both shares, against what the model really computed."""
    assert all([word.text for word in one.words] == PROMPT.split() for one in family.recording)
    for share in ("text", "joint"):
        recording = family.recording if share == "text" else family.record(layers="all", share=share)
        for image in range(len(recording)):
            compare(recording[image], family.answer, share, image)


def compare(recording: al.Recording, answer: Answer, share: str = "text", image: int = 0, steps=None) -> None:
    """Compare the maps of one image with the answer, of each layer; and the mean of layers, if of one size."""
    names, expected = list(recording.trace.sizes), []
    for name in names:
        found = al.daam(recording, layers=[name])
        assert found.values[0].shape == recording.trace.sizes[name]
        expected.append(answer.maps(name, share, image, steps))
        close(found.values, expected[-1][: len(found.values)])
    if len(set(recording.trace.sizes.values())) == 1:
        found = al.daam(recording).values
        close(found, torch.stack(expected).mean(0)[: len(found)])


def check_steps(family: Family) -> None:
    """Check the maps of a single step: of its queries, or of the denoiser's call once more."""
    recording, step = family.recording[0], STEPS - 1
    if not recording.trace.queries:
        again = al.record_again(family.pipe, recording, steps=step, layers="all")
        compare(again, family.answer, steps=[step])
        return
    for name in recording.trace.sizes:
        found = al.daam(recording, layers=[name], steps=step).values
        close(found, family.answer.maps(name, steps=[step])[: len(found)])


def check_other_texts(family: Family) -> None:
    """Check maps of the prompt and of another text, asked for afterwards."""
    recording, text = family.recording[0], OTHER
    again = al.ovam(recording, PROMPT, padded=True, mode="bicubic")
    close(again.values, al.daam(recording).values)
    padded, words = other_text(family)
    for name in recording.trace.sizes:
        found = al.ovam(recording, text, padded=True, layers=[name]).values
        close(found, padded[name][: len(found)])
        found = al.ovam(recording, text, layers=[name]).values
        close(found, words[name](len(found)))


def other_text(family: Family):
    """Return what the prompt's queries give another text's keys: maps of the padded text, and of first tokens."""
    answer, other = family.answer, family.other_answer
    padded, words = {}, {}
    for name in answer.layers():
        met = []
        for number in answer.steps:
            one, two = answer.calls[number], other.calls[number]
            row, at = answer.rows[number][0], other.rows[number][0]
            own, others = one.met[name], two.met[name]
            mask = None if others.mask is None else others.mask[at : at + 1]
            met.append(own._replace(query=own.query[row : row + 1], key=others.key[at : at + 1], mask=mask))
        padded[name] = torch.stack([each.probabilities(0).mean(0).T for each in met]).mean(0)

        def first_tokens(count, met=met):
            found = [each._replace(mask=None).probabilities(0, keys=slice(0, count)).mean(0).T for each in met]
            return torch.stack(found).mean(0)

        words[name] = first_tokens
    return padded, words


def check_text_beside(family: Family) -> None:
    """Check a text that the model reads beside the image: the prompt, and another one in the first layer of a step.

    There a text has not read the image yet, so that its keys are those that it has beside any.
    """
    recording, layer = family.recording[0], family.answer.layers()[0]
    same = al.record_again(family.pipe, recording, text=PROMPT, layers="all")
    close(al.daam(same).values, al.daam(recording).values)
    found = al.record_again(family.pipe, recording, text=OTHER, steps=0, layers=layer)
    assert found.prompt == OTHER
    values = al.daam(found).values
    close(values, beside(family)[: len(values)])


def beside(family: Family) -> torch.Tensor:
    """Return what the pixels give OTHER in the first layer of the first step, mean over heads: (token, pixel)."""
    answer, other = family.answer, family.other_answer
    row, name = other.rows[0][0], answer.layers()[0]
    call, part = answer.calls[0], other.parts(0, row)[name]
    summary = {name: value for name, value in call.given.items() if "pool" in name}  # of the prompt
    met = again(family.denoiser, other.calls[0].given | summary).met[name]
    if family.name == "deepfloyd_if":  # sums up its text itself
        met = met._replace(query=call.met[name].query)
    return met.probabilities(row, part.pixels, part.text).mean(0).T


def check_linear(family: Family) -> None:
    """Check linear maps, a token that is fitted to a mask, and a recording of sums alone, which has the same."""
    recording, other = family.recording[0], family.other_answer
    whole = al.linear_daam(recording)
    text = recording.encode(OTHER)
    for name in recording.trace.sizes:
        scores = []
        for number in family.answer.steps:
            own, others = (each.calls[number].met[name] for each in (family.answer, other))
            query = own.query[family.answer.rows[number][0]].double()
            key = others.key[other.rows[number][0]].double()
            scores.append((query @ key.mT).mean(0).T * own.scale)
        linear = al.linear_daam(recording, layers=[name])
        close(linear @ text.embedding, torch.stack(scores).mean(0), 1e-5)
    summed = al.linear_daam(family.record(keep="sum", layers="all")[0])
    close(summed @ text.embedding, whole @ text.embedding, 1e-5)
    mask = whole @ text.embedding[0]  # where a vector scores high: there is such a token
    mask = mask > np.median(mask)
    token = al.fit_token([recording], [mask], init="smoke", ridge=0.01)
    assert token.metadata["gradient"] < 1e-6  # of a convex loss: no other token has less
    assert ((whole[token] > 0) == mask).mean() > 0.85


def check_file(family: Family, folder) -> None:
    """Check that a file has the same maps."""
    again = al.Recording.load(family.recording.save(folder / family.name), family.recording.encoder)
    assert len(again) == len(family.recording)
    # a pipeline's own arguments come back as lists where they were tuples
    assert json.dumps(again[0].metadata) == json.dumps(family.recording[0].metadata)
    for one, other in zip(family.recording, again, strict=True):
        assert one.words == other.words
        np.testing.assert_array_equal(al.daam(one).values, al.daam(other).values)
    if family.recording[0].trace.queries:
        np.testing.assert_array_equal(al.ovam(one, OTHER).values, al.ovam(other, OTHER).values)


def close(found, expected, tolerance: float = 1e-6) -> None:
    """Compare maps with an answer, (token, pixel); of numbers larger than 1 the tolerance is relative."""
    found = torch.as_tensor(found).flatten(1).double()
    expected = torch.as_tensor(expected).flatten(1).double()
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * max(1, expected.abs().max())


def count_hooks(pipe) -> int:
    """Count the hooks of all modules of a pipeline."""
    modules = [m for part in pipe.components.values() if isinstance(part, torch.nn.Module) for m in part.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def function_modes() -> int:
    """Count the function modes that listen now."""
    return torch._C._len_torch_function_stack()
