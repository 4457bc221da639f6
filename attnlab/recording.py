"""What was recorded of a generation: queries, the text they met, and the weights that turn both into attention.

Axes: step, head, pixel (row-major), token, width (channels of one head, or of the text).
"""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Number

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from . import words
from .texts import Text, TextEncoder

Layers = str | int | Collection[str | int] | None


@dataclass(frozen=True)
class Layer:
    """What turns one layer's queries and a text into scores: copies of its key weights, its heads and its scale."""

    name: str
    heads: int
    scale: float
    weight: torch.Tensor  # (head x width, text width)
    bias: torch.Tensor | None
    norm_q: nn.Module | None
    norm_k: nn.Module | None

    @classmethod
    def of(cls, name: str, attention: Attention, dtype: torch.dtype = torch.float32) -> "Layer":
        """Of a diffusers attention; `dtype` is that of its queries."""
        weight, bias = _linear_map(attention.to_k, dtype)
        norms = copy.deepcopy((attention.norm_q, attention.norm_k))
        return cls(name, attention.heads, attention.scale, weight, bias, *norms)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def same(self, other: "Layer | None") -> bool:
        """Whether both give the same keys."""
        if other is None or self.norm_k is not None:
            return False
        biases = (self.bias is None, other.bias is None)
        return torch.equal(self.weight, other.weight) and (
            all(biases) or (not any(biases) and torch.equal(self.bias, other.bias))
        )

    def queries(self, recorded: torch.Tensor) -> torch.Tensor:
        """Recorded (..., pixel, head x width) to float32 (..., head, pixel, width), normalized where the model does."""
        return self._split(recorded.float(), self.norm_q)

    def keys(self, text: torch.Tensor) -> torch.Tensor:
        """Text (token, text width) to float32 keys (head, token, width)."""
        bias = None if self.bias is None else self.bias.float()
        return self._split(nn.functional.linear(text.float(), self.weight.float(), bias), self.norm_k)

    def _split(self, x, norm):
        x = x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
        if norm is None:
            return x
        parameter = next(norm.parameters(), x)
        with torch.no_grad():
            return norm(x.to(parameter.device, parameter.dtype)).to(x.device, torch.float32)


@dataclass
class Generation:
    """What is known of how an image came about; None where it is not.

    planned, ran : calls of the denoiser, by the schedule and in fact; fewer where the generation was interrupted
    """

    model: str | None
    scheduler: str
    guidance_scale: float | None
    branch: str
    latent_size: tuple[int, int]  # (height, width)
    seed: int | None
    planned: int | None
    ran: int = 0


@dataclass
class Trace:
    """What was recorded of one image.

    text : (token, text width), the text as the denoiser saw it
    token_ids : its tokens; None where it did not come from the pipeline's text encoder (`prompt_embeds=`)
    visible : bool (token,), False for tokens that the model masks; None where it masks none
    queries : of each layer, one tensor (pixel, head x width) a recorded step
    sizes : of each layer, (height, width) of its maps
    layers : of each layer, what turns queries and text into scores
    steps, timesteps : which calls of the denoiser were recorded, and their timesteps
    """

    text: torch.Tensor
    token_ids: list[int] | None
    visible: torch.Tensor | None
    generation: Generation
    queries: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    timesteps: list[int] = field(default_factory=list)


class Recording(Sequence):
    """One or more recorded images: `len(recording)` of them, `recording[i]` one, as a recording of its own."""

    def __init__(self, encoder: TextEncoder | None = None, traces: Sequence[Trace] = ()):
        self.encoder = encoder
        self.traces = list(traces)

    def __len__(self) -> int:
        return len(self.traces)

    def __getitem__(self, i: int | slice) -> "Recording":
        return Recording(self.encoder, self.traces[i] if isinstance(i, slice) else [self.traces[i]])

    def __repr__(self) -> str:
        if len(self) != 1:
            return f"<Recording of {len(self)} images, {self.nbytes / 1e6:.1f} MB>"
        t, g = self.traces[0], self.traces[0].generation
        known = t.token_ids is not None
        text = (
            repr(" ".join(w.text for w in words.split(self.encoder.tokenizer, t.token_ids))) if known else "embeddings"
        )
        state = "" if self.complete else f", interrupted after {g.ran} of {g.planned} steps"
        size = f"{len(t.queries)} layers, {len(t.steps)} steps, {self.nbytes / 1e6:.1f} MB"
        return f"<Recording of {text}: {size}{state}>"

    @property
    def trace(self) -> Trace:
        """The trace of the only image; ValueError where there are several, none, or nothing recorded of it."""
        if not self.traces:
            raise ValueError("the recording is empty: nothing has been generated yet inside the record() block")
        if len(self) > 1:
            raise ValueError(f"the recording holds {len(self)} images; choose one, for example recording[0]")
        if not self.traces[0].steps:
            raise ValueError(
                "no step of this image was recorded: it was interrupted in its first one, or those that were asked of "
                "record(steps=...) did not occur in it"
            )
        return self.traces[0]

    @property
    def words(self) -> list[words.Word]:
        """The words of the prompt, each with its token positions."""
        ids = self.trace.token_ids
        if ids is None:
            raise ValueError("the prompt's words are unknown: in the block it was given as embeddings, not as text")
        return words.split(self.encoder.tokenizer, ids)

    def encode(self, text: str) -> Text:
        """Any text as the recorded model's text encoder gives it; ValueError where there is none."""
        if self.encoder is None:
            raise ValueError(
                "the recording has no text encoder: its pipeline was given embeddings, give embeddings here"
            )
        return self.encoder(text)

    @property
    def prompt(self) -> str:
        """The text that was recorded, as the tokenizer writes it (CLIP's in lower case)."""
        return " ".join(word.text for word in self.words)

    @property
    def about(self) -> dict:
        """What is known of how the image came about, as JSON types."""
        known = self.trace.token_ids is not None
        return {**asdict(self.trace.generation), "prompt": self.prompt if known else None}

    @property
    def complete(self) -> bool:
        """False where a generation was interrupted."""
        return all(t.generation.planned in (None, t.generation.ran) for t in self.traces)

    @property
    def nbytes(self) -> int:
        """Bytes held: queries, texts, and key weights (once where images share them)."""
        layers = {id(layer): layer.nbytes for t in self.traces for layer in t.layers.values()}
        queries = sum(q.nbytes for t in self.traces for steps in t.queries.values() for q in steps)
        return queries + sum(t.text.nbytes for t in self.traces) + sum(layers.values())

    def choose_layers(self, layers: Layers = None) -> list[str]:
        """Names of recorded layers: all (None, "all"), or those of given names, name prefixes or map heights."""
        return choose_layers(self.trace.sizes, layers, default=lambda name: True)

    def choose_steps(self, steps: int | Collection[int] | None = None) -> list[int]:
        """Recorded steps: all (None), or the given ones; ValueError where one was not recorded."""
        recorded = self.trace.steps
        chosen = recorded if steps is None else as_list(steps)
        unknown = [step for step in chosen if step not in recorded]
        if unknown or not chosen:
            raise ValueError(f"steps={unknown or []} cannot be chosen; recorded: {recorded}")
        return chosen


def as_list(choice) -> list:
    """One number or name as a list of one; several as a list."""
    return [choice] if isinstance(choice, str | Number) else list(choice)


def map_size(pixels: int, latent: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a layer with that many pixels: the latent's size, halved and rounded up until it fits."""
    height, width = latent
    while height * width > pixels:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != pixels:
        raise RuntimeError(f"a layer with {pixels} queries does not fit a latent of {latent[0]} x {latent[1]}")
    return height, width


def in_down_or_up_block(name: str) -> bool:
    """DAAM's and OVAM's layers: every cross-attention but that of the middle."""
    return "mid_block" not in name


def choose_layers(sizes: dict, layers: Layers, default: Callable[[str], bool] = in_down_or_up_block) -> list[str]:
    """Those names in `sizes` (name -> (height, width), or None where not yet known) that `layers` asks for.

    Raises
    ------
    ValueError : nothing asked for, or something that fits no layer; the message lists what would
    """
    if layers is None:
        return [name for name in sizes if default(name)]
    if layers == "all":
        return list(sizes)
    heights = sorted({size[0] for size in sizes.values() if size}, reverse=True)
    known = f"layers: {', '.join(sizes)}" + (f"; map heights: {heights}" if heights else "")
    chosen = set()
    for wanted in as_list(layers):
        if isinstance(wanted, str):
            fits = {name for name in sizes if name == wanted or name.startswith(wanted + ".")}
        else:
            fits = {name for name, size in sizes.items() if size is None or size[0] == wanted}
        if not fits:
            raise ValueError(f"no layer fits {wanted!r}; {known}")
        chosen |= fits
    if not chosen:
        raise ValueError(f"layers={layers!r} chooses nothing; {known}")
    return [name for name in sizes if name in chosen]


def choose_heads(heads: int | Collection[int] | None, count: int, name: str) -> list[int]:
    """Those of a layer's heads that `heads` asks for; ValueError where it has no such head."""
    chosen = list(range(count)) if heads is None else as_list(heads)
    unknown = sorted(set(chosen) - set(range(count)))
    if unknown or not chosen:
        raise ValueError(f"heads={unknown or []} cannot be chosen: {name} has {count}, numbered from 0")
    return chosen


def _linear_map(module, dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Copies of the weight and bias of anything that acts as a linear layer: LoRA, offloaded or quantized ones too.

    `dtype` is what quantized weights work in.
    """
    if type(module) is nn.Linear and module.weight.device.type != "meta":
        bias = module.bias
        return module.weight.detach().to("cpu", copy=True), None if bias is None else bias.detach().to("cpu", copy=True)
    parameter = next(module.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else dtype
    device = torch.device("cpu" if parameter.device.type == "meta" else parameter.device)
    inputs = torch.eye(module.in_features, dtype=dtype, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        bias = module(torch.zeros_like(inputs[:1])).cpu()
        weight = module(inputs).cpu() - bias
    return weight.T.contiguous(), bias[0] if bias.any() else None
