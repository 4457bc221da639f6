"""What was recorded of a generation: queries, the text they met, and the weights that turn both into attention.

Axes: step, head, pixel (row-major), token, width (channels of one head, or of the text).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from . import words

Layers = str | int | Collection[str | int] | None


@dataclass(frozen=True)
class Layer:
    """What turns one layer's queries and a text into scores: its own copy of the key weights, heads and scale."""

    name: str
    heads: int
    scale: float
    weight: torch.Tensor  # (head x width, text width)
    bias: torch.Tensor | None
    norm_q: nn.Module | None = None
    norm_k: nn.Module | None = None

    @classmethod
    def of(cls, name: str, attention: Attention) -> "Layer":
        weight, bias = _linear_map(attention.to_k)
        return cls(name, attention.heads, attention.scale, weight, bias, attention.norm_q, attention.norm_k)

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
class Trace:
    """What was recorded of one image.

    queries : of each layer, one tensor (pixel, head x width) a step
    sizes : of each layer, (height, width) of its maps
    text : (token, text width), the text as the denoiser saw it
    token_ids : its tokens; None where it did not come from the pipeline's text encoder (`prompt_embeds=`)
    visible : bool (token,), False for tokens that the model masks; None where it masks none
    steps, timesteps : which calls of the denoiser were recorded, and their timesteps
    info : what is known of the generation
    """

    text: torch.Tensor
    token_ids: list[int] | None
    visible: torch.Tensor | None
    info: dict
    queries: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    timesteps: list[int] = field(default_factory=list)


class Recording(Sequence):
    """One or more recorded images: `len(recording)` of them, `recording[i]` one, as a recording of its own."""

    def __init__(self, tokenizer=None, layers: dict[str, Layer] | None = None, traces: list[Trace] | None = None):
        self.tokenizer = tokenizer
        self.layers = {} if layers is None else layers
        self.traces = [] if traces is None else traces

    def __len__(self) -> int:
        return len(self.traces)

    def __getitem__(self, i: int) -> "Recording":
        return Recording(self.tokenizer, self.layers, [self.traces[i]])

    def __repr__(self) -> str:
        if len(self) != 1:
            return f"<Recording of {len(self)} images, {self.nbytes / 1e6:.1f} MB>"
        t = self.trace
        text = repr(self.prompt) if t.token_ids is not None else "a text given as embeddings"
        state = "" if self.complete else f", interrupted after {t.info['ran']} of {t.info['planned']} steps"
        return (
            f"<Recording of {text}: {len(t.queries)} layers, {len(t.steps)} steps, {self.nbytes / 1e6:.1f} MB{state}>"
        )

    @property
    def trace(self) -> Trace:
        """The trace of the only image; ValueError where there are several, or none."""
        if len(self) == 1:
            return self.traces[0]
        if not self.traces:
            raise ValueError("the recording is empty: nothing has been generated yet inside the record() block")
        raise ValueError(f"the recording holds {len(self)} images; choose one, for example recording[0]")

    @property
    def words(self) -> list[words.Word]:
        """The words of the prompt, each with its token positions."""
        ids = self.trace.token_ids
        if ids is None:
            raise ValueError(
                "the prompt's words are unknown: it was given as embeddings, not as text, inside the block"
            )
        return words.split(self.tokenizer, ids)

    @property
    def prompt(self) -> str:
        """The text that was recorded, as the tokenizer writes it (CLIP's in lower case)."""
        return " ".join(word.text for word in self.words)

    @property
    def complete(self) -> bool:
        """False where a generation was interrupted."""
        return all(t.info["planned"] in (None, t.info["ran"]) for t in self.traces)

    @property
    def nbytes(self) -> int:
        """Bytes held by the recorded queries."""
        return sum(q.numel() * q.element_size() for t in self.traces for steps in t.queries.values() for q in steps)

    def choose_layers(self, layers: Layers = None) -> list[str]:
        """Names of recorded layers: all (None, "all"), or those of given names, name prefixes or map heights."""
        return choose_layers(self.trace.sizes, layers, default=lambda name: True)


def map_size(pixels: int, latent: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a layer with that many pixels: the latent's size, halved and rounded up until it fits."""
    height, width = latent
    while height * width > pixels:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != pixels:
        raise RuntimeError(f"a layer with {pixels} queries does not fit a latent of {latent[0]} x {latent[1]}")
    return height, width


def choose_layers(sizes: dict, layers: Layers, default=lambda name: "mid_block" not in name) -> list[str]:
    """Those names in `sizes` (name -> (height, width) or None where not yet known) that `layers` asks for.

    Raises
    ------
    ValueError : something in `layers` fits no layer; the message lists what would
    """
    if layers is None:
        return [name for name in sizes if default(name)]
    if layers == "all":
        return list(sizes)
    chosen = set()
    for wanted in [layers] if isinstance(layers, str | int) else layers:
        if isinstance(wanted, str):
            fits = {name for name in sizes if name == wanted or name.startswith(wanted + ".")}
        else:
            fits = {name for name, size in sizes.items() if size is None or size[0] == wanted}
        if not fits:
            heights = sorted({size[0] for size in sizes.values() if size}, reverse=True)
            raise ValueError(
                f"no layer fits {wanted!r}; layers: {', '.join(sizes)}" + f"; map heights: {heights}" * bool(heights)
            )
        chosen |= fits
    return [name for name in sizes if name in chosen]


def _linear_map(module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Copies of the weight and bias of anything that acts as a linear layer: LoRA, offloaded or quantized ones too."""
    if type(module) is nn.Linear and module.weight.device.type != "meta":
        bias = module.bias
        return module.weight.detach().to("cpu", copy=True), None if bias is None else bias.detach().to("cpu", copy=True)
    parameter = next(p for p in module.parameters())
    device = "cpu" if parameter.device.type == "meta" else parameter.device
    inputs = torch.eye(module.in_features, dtype=parameter.dtype, device=device)
    with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
        bias = module(torch.zeros_like(inputs[:1])).cpu()
        weight = module(inputs).cpu() - bias
    return weight.T.contiguous(), bias[0] if bias.any() else None
