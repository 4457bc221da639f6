"""What was recorded of a generation: queries, the text they met, and the weights that turn both into attention.

Axes: step, head, pixel (row-major), token, width (channels of one head, or of the text).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .. import storage
from .layers import Layer, Layers, as_list, choose_layers
from .texts import Text, TextEncoder
from .words import Word


@dataclass
class Generation:
    """What is known of how an image came about; None where it is not.

    planned, ran : calls of the denoiser, by the schedule and in fact; fewer where the generation was interrupted
    """

    model: str | None
    revision: str | None
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
    attention_mask : bool (token,), False for tokens that the model masks; None where it masks none
    queries : of each layer, a sequence of one tensor (pixel, head x width) a recorded step
    sizes : of each layer, (height, width) of its maps
    layers : of each layer, what turns queries and text into scores
    steps, timesteps : which calls of the denoiser were recorded, and their timesteps
    words : its words, each with its token positions; None where token_ids is
    length : tokens up to the text's first end token, which is included; None where token_ids is
    sums : of each layer, the sum of the steps' queries, normalized where the model does, float32 (pixel, head x width);
        for keep="sum"
    streamed : of each text, of each layer, the sum of the steps' softmax maps, float32 (head, token, pixel), tokens up
        to the first end token; None stands for the prompt
    self_attention : by (height, width), the sum of what each pixel's self-attention gives each pixel, mean over heads,
        float32 (pixel that looks, pixel looked at); `self_attention_count`: how many steps and layers it is the sum of
    """

    text: torch.Tensor
    token_ids: list[int] | None
    attention_mask: torch.Tensor | None
    generation: Generation
    queries: dict[str, Sequence[torch.Tensor]] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    timesteps: list[int] = field(default_factory=list)
    words: list[Word] | None = None
    length: int | None = None
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    streamed: dict[str | None, dict[str, torch.Tensor]] = field(default_factory=dict)
    self_attention: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    self_attention_count: dict[tuple[int, int], int] = field(default_factory=dict)

    def tensors(self) -> Iterator[torch.Tensor]:
        """What is held in memory of this image alone."""
        yield self.text
        yield from (q for steps in self.queries.values() if isinstance(steps, list) for q in steps)
        yield from self.sums.values()
        yield from (share for layers in self.streamed.values() for share in layers.values())
        yield from self.self_attention.values()


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
            state = "" if self.complete else ", not all of them complete"
            return f"<Recording of {len(self)} images, {self.nbytes / 1e6:.1f} MB{state}>"
        t, g = self.traces[0], self.traces[0].generation
        text = "embeddings" if t.words is None else repr(" ".join(word.text for word in t.words))
        state = "" if self.complete else f", interrupted after {g.ran} of {g.planned} steps"
        size = f"{len(t.sizes)} layers, {len(t.steps)} steps, {self.nbytes / 1e6:.1f} MB"
        return f"<Recording of {text}: {size}{state}>"

    def save(self, path: str | Path) -> Path:
        """Write everything to a safetensors file: queries, texts, key weights, and how the images came about.

        ValueError where the model normalizes its queries or keys by modules, which cannot be written.
        """
        tensors, keys = {}, {}
        traces = [_pack(trace, f"{i}.", tensors, keys) for i, trace in enumerate(self.traces)]
        return storage.write(path, "Recording", tensors, {"versions": storage.versions(), "traces": traces})

    @classmethod
    def load(cls, path: str | Path, encoder: TextEncoder | None = None) -> "Recording":
        """Read what `save` wrote; queries stay in the file until they are asked for.

        Parameters
        ----------
        encoder : for texts, `TextEncoder.of(pipe)`; or the recorded model's own, loaded when it is first needed

        Raises
        ------
        FileNotFoundError : no such file
        ValueError : a file that is cut short, is no recording, was written by a later version, or an encoder of another
            model than the recorded one
        """
        file, keys = storage.File(path, "Recording"), {}
        traces = [_unpack(entry, f"{i}.", file, keys) for i, entry in enumerate(file.metadata["traces"])]
        models = {t.generation.model for t in traces} - {None}
        return cls(TextEncoder.fitting(encoder, models, path), traces)

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
    def words(self) -> list[Word]:
        """The words of the prompt, each with its token positions."""
        if self.trace.words is None:
            raise ValueError("the prompt's words are unknown: in the block it was given as embeddings, not as text")
        return self.trace.words

    def encode(self, text: str) -> Text:
        """Any text as the recorded model's text encoder gives it; ValueError where there is none."""
        if self.encoder is None:
            raise ValueError(
                "the recording has no text encoder: give embeddings, or load it with Recording.load(path, "
                "TextEncoder.of(pipe))"
            )
        return self.encoder(text)

    @property
    def prompt(self) -> str:
        """The text that was recorded, as the tokenizer writes it (CLIP's in lower case)."""
        return " ".join(word.text for word in self.words)

    @property
    def metadata(self) -> dict:
        """What is known of how the image came about, as JSON types."""
        return {**asdict(self.trace.generation), "prompt": None if self.trace.words is None else self.prompt}

    @property
    def complete(self) -> bool:
        """False where a generation was interrupted."""
        return all(t.generation.planned in (None, t.generation.ran) for t in self.traces)

    @property
    def nbytes(self) -> int:
        """Bytes held: all but what is still in a file; key weights once where images share them."""
        layers = {id(layer): layer.nbytes for t in self.traces for layer in t.layers.values()}
        return sum(x.nbytes for t in self.traces for x in t.tensors()) + sum(layers.values())

    def choose_layers(self, layers: Layers = None) -> list[str]:
        """Names of recorded layers: all (None, "all"), or those of given names, name prefixes or map heights."""
        return choose_layers(self.trace.sizes, layers, default=lambda name: True)

    def branch(self, name: str) -> "Recording":
        """The images' "conditional" or "negative" part, of a recording of both."""
        chosen = [t for t in self.traces if t.generation.branch == name]
        if not chosen:
            known = sorted({t.generation.branch for t in self.traces})
            raise ValueError(f"branch {name!r} was not recorded, only {', '.join(known)}: record(pipe, branch='both')")
        return Recording(self.encoder, chosen)

    def self_attention(self, height: int | None = None) -> tuple[torch.Tensor, tuple[int, int]]:
        """Mean self-attention of the layers of one size, and that size (height, width).

        float32 (pixel that looks, pixel looked at), rows add up to 1. `height`: of the maps; the largest recorded
        unless given. ValueError where it was not recorded.
        """
        trace = self.trace
        known = {size[0]: size for size in trace.self_attention}
        if not known:
            raise ValueError("no self-attention was recorded: ask for it, for example record(pipe, self_attention=16)")
        if height not in (None, *known):
            raise ValueError(f"self-attention of height {height} was not recorded, only of {sorted(known)}")
        size = known[height or max(known)]
        return trace.self_attention[size].cpu() / trace.self_attention_count[size], size

    def choose_steps(self, steps: int | Collection[int] | None = None) -> list[int]:
        """Recorded steps: all (None), or the given ones; ValueError where one was not recorded, or summed up."""
        recorded = self.trace.steps
        if not (steps is None or self.trace.queries):
            raise ValueError("this recording kept sums over its steps: leave steps= out, or record with keep='queries'")
        chosen = recorded if steps is None else as_list(steps)
        unknown = [step for step in chosen if step not in recorded]
        if unknown or not chosen:
            raise ValueError(f"steps={unknown or []} cannot be chosen; recorded: {recorded}")
        return chosen


def _pack(trace: Trace, prefix: str, tensors: dict, keys: dict) -> dict:
    """Put a trace's tensors into `tensors`; what remains of it, as JSON types. `keys` numbers layers written before."""
    tensors[prefix + "text"] = trace.text
    if trace.attention_mask is not None:
        tensors[prefix + "visible"] = trace.attention_mask
    layers = {}
    for name, layer in trace.layers.items():
        if layer.norm_q is not None or layer.norm_k is not None:
            raise ValueError(f"{name} normalizes its queries or keys: a recording of this model cannot be saved")
        number = keys.setdefault(id(layer), len(keys))
        tensors[f"keys.{number}.weight"] = layer.weight
        if layer.bias is not None:
            tensors[f"keys.{number}.bias"] = layer.bias
        layers[name] = {"keys": number, "heads": layer.heads, "scale": layer.scale}
    for name, queries in trace.queries.items():
        tensors[f"{prefix}queries.{name}"] = torch.stack(list(queries)).cpu()
    for name, total in trace.sums.items():
        tensors[f"{prefix}sum.{name}"] = total
    for i, shares in enumerate(trace.streamed.values()):
        tensors |= {f"{prefix}maps.{i}.{name}": total for name, total in shares.items()}
    for i, total in enumerate(trace.self_attention.values()):
        tensors[f"{prefix}self.{i}"] = total
    plain = {name: getattr(trace, name) for name in ("token_ids", "sizes", "steps", "timesteps", "length")}
    kept = {
        "streamed": list(trace.streamed),
        "self_attention": [[*size, n] for size, n in trace.self_attention_count.items()],
    }
    text = trace.words and [[word.text, list(word.tokens)] for word in trace.words]
    return {**plain, **kept, "words": text, "generation": asdict(trace.generation), "layers": layers}


def _unpack(entry: dict, prefix: str, file: storage.File, keys: dict[int, Layer]) -> Trace:
    """The reverse of `_pack`; `keys` holds layers that were read before."""
    generation = Generation(**{**entry["generation"], "latent_size": tuple(entry["generation"]["latent_size"])})

    def optional(name):
        return file.read(name) if name in file.names else None

    def held(kind):
        """Names of the layers of which the file holds some kind of tensor, and those tensors' names."""
        return {name: f"{prefix}{kind}.{name}" for name in entry["layers"] if f"{prefix}{kind}.{name}" in file.names}

    for name, layer in entry["layers"].items():
        number = layer["keys"]
        if number not in keys:
            weight, bias = (optional(f"keys.{number}.{part}") for part in ("weight", "bias"))
            keys[number] = Layer(name, layer["heads"], layer["scale"], weight, bias, None, None)
    return Trace(
        text=file.read(prefix + "text"),
        token_ids=entry["token_ids"],
        attention_mask=optional(prefix + "visible"),
        generation=generation,
        queries={name: file.stored(tensor) for name, tensor in held("queries").items()},
        sums={name: file.read(tensor) for name, tensor in held("sum").items()},
        streamed={
            text: {name: file.read(tensor) for name, tensor in held(f"maps.{i}").items()}
            for i, text in enumerate(entry["streamed"])
        },
        self_attention={(h, w): file.read(f"{prefix}self.{i}") for i, (h, w, _) in enumerate(entry["self_attention"])},
        self_attention_count={(h, w): n for h, w, n in entry["self_attention"]},
        words=entry["words"] and [Word(text, tuple(tokens)) for text, tokens in entry["words"]],
        length=entry["length"],
        sizes={name: tuple(size) for name, size in entry["sizes"].items()},
        layers={name: keys[layer["keys"]] for name, layer in entry["layers"].items()},
        steps=entry["steps"],
        timesteps=entry["timesteps"],
    )
