"""The layers of a denoiser: which are chosen, what scores a layer gives a text, and what each token adds to a pixel.

Axes: head, pixel (row-major), token, width (channels of one head, or of the text), channel (of the layer's output).
"""

from collections.abc import Callable, Collection
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from .norms import Norm

__all__ = [
    "KINDS", "Layer", "Layers", "alike", "as_list", "attention", "check_choice", "choose_heads", "choose_layers",
    "contributed", "exact", "head_weights", "heads_agreed", "linear_map", "mean_attention", "split_heads",
]  # fmt: skip

Layers = str | int | Collection[str | int] | None
"""Layers by name, beginning of a name ("up_blocks.1") or map height (16), one or several; None for the usual ones."""

_SCORES = 32 * 2**20  # bytes of attention between pixels that are computed at a time, at least one head's

KINDS = ("projection", "norm")  # how what a token adds to a pixel is measured, see `contributions`


@dataclass(frozen=True)
class Layer:
    """What one layer makes of queries and a text: copies of its weights, and how it uses them."""

    name: str  # the denoiser's own dotted name
    heads: int
    scale: float  # of the products of queries and keys, 1 / sqrt(width) as a rule
    weight: torch.Tensor | None = None  # (head x width, text width); None in joint attention, whose keys change
    bias: torch.Tensor | None = None  # (head x width,)
    norm_q: Norm | None = None  # of recorded queries; None where they are recorded as they meet keys
    norm_k: Norm | None = None
    # for contributions; None where they were not kept
    value: torch.Tensor | None = None  # (head x width, text width)
    value_bias: torch.Tensor | None = None  # (head x width,), None also where the model has none
    out: torch.Tensor | None = None  # (channel, head x width)

    @classmethod
    def of(
        cls,
        name: str,
        attention: Attention,
        dtype: torch.dtype = torch.float32,
        values: bool = False,
        normalized: bool = False,
    ) -> "Layer":
        """Copy the keys' half of a diffusers attention, and the `values`, on its device.

        `dtype` is of its queries, which are recorded as they meet the keys where they are `normalized`.
        """
        weight, bias = linear_map(attention.to_k, dtype)
        width = len(weight) // attention.heads
        norms = None if normalized else Norm.of(attention.norm_q, width), Norm.of(attention.norm_k, width)
        added = (*linear_map(attention.to_v, dtype), linear_map(attention.to_out[0], dtype)[0]) if values else ()
        return cls(name, attention.heads, attention.scale, weight, bias, *norms, *added)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by the names of their attributes."""
        found = {name: getattr(self, name) for name in ("weight", "bias", "value", "value_bias", "out")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(tensor.nbytes for tensor in self.weights.values())

    def moved(self, move: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> "Layer":
        """Return the layer with other tensors for its weights, those that `move` makes of them."""
        weights = self.weights
        return replace(self, **dict(zip(weights, move(list(weights.values())), strict=True)))

    def to(self, device: torch.device) -> "Layer":
        """Return the layer with its weights on a device, the layer itself where they are."""
        if self.weight.device == device:
            return self
        return self.moved(lambda weights: [weight.to(device) for weight in weights])

    def same(self, other: "Layer | None") -> bool:
        """Return whether both layers have the same weights; False where keys are normalized."""
        if other is None or self.norm_k is not None:
            return False
        own, others = self.weights, other.weights
        return own.keys() == others.keys() and all(torch.equal(own[name], others[name]) for name in own)

    def queries(self, recorded: torch.Tensor) -> torch.Tensor:
        """Split recorded queries (..., pixel, head x width) into float32 (..., head, pixel, width), normalized."""
        return split_heads(recorded, self.heads, self.norm_q)

    def keys(self, text: torch.Tensor) -> torch.Tensor:
        """Project a text (token, text width) to float32 keys (head, token, width)."""
        return split_heads(_product(text, self.weight, self.bias), self.heads, self.norm_k)

    def outputs(self, text: torch.Tensor) -> torch.Tensor:
        """Compute what each token of a text (token, text width) adds to a pixel whose attention is all on it.

        float32 (head, token, channel): the token's value, through the layer's output weights. Times the attention, and
        summed over heads and tokens, it is the layer's output without its bias.
        """
        if self.value is None or self.out is None:
            raise ValueError(
                f"this recording has no values of {self.name}, which contributions need: record again with "
                "keep='queries' or keep='contributions'; files of earlier versions have none"
            )
        values = split_heads(_product(text, self.value, self.value_bias), self.heads, None)
        return values @ self.out.float().T.unflatten(0, (self.heads, -1))


@contextmanager
def exact():
    """Compute in the block without gradients, and without the caller's autocast and inference mode.

    Maps are float32 whatever the model computes in, and what is kept can be used anywhere later.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors hold the same values; one and the same tensor is not read for it."""
    return one is other or (one.shape == other.shape and torch.equal(one.to(other), other))


def split_heads(x: torch.Tensor, heads: int, norm: Norm | None) -> torch.Tensor:
    """Split (..., pixel, head x width) into float32 (..., head, pixel, width), normalized by `norm` if there is one."""
    x = x.float()
    if norm is not None and norm.whole:
        x = norm(x)
    x = x.unflatten(-1, (heads, -1)).transpose(-2, -3)
    return x if norm is None or norm.whole else norm(x)


def attention(queries: torch.Tensor, keys: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Compute attention probabilities, the softmax over tokens: float32 (..., head, token, pixel), 0..1.

    Of queries (..., head, pixel, width) and scaled keys (head, token, width); tokens whose attention_mask, bool
    (token,), is False take no part. Tokens never stand on the last axis: with pixels there the softmax runs along rows
    of memory, several times faster.
    """
    scores = keys @ queries.mT
    if attention_mask is not None:
        scores.masked_fill_(~attention_mask[:, None], -torch.inf)
    return scores.softmax(-2)


def mean_attention(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Compute attention probabilities, mean over heads: float32 (pixel, token), whose rows add up to 1.

    Of queries (head, pixel, width) and scaled keys (head, token, width).
    """
    total = 0
    together = max(1, _SCORES // (4 * queries.shape[-2] * keys.shape[-2]))
    for q, k in zip(queries.split(together), keys.split(together), strict=True):
        total = total + (q @ k.mT).softmax(-1).sum(0)
    return total / len(queries)


def contributed(
    probabilities: torch.Tensor, outputs: torch.Tensor, kind: str, groups: Collection[list[int]]
) -> torch.Tensor:
    """Measure what each token adds to each pixel through groups of heads: float32 (..., group, token, pixel).

    Of `probabilities` (..., head, token, pixel) and a layer's `outputs` (..., head, token, channel); `kind` is one of
    KINDS, see `contributions`. Divided by the length of what the whole layer adds, mean over pixels.
    """
    rows = outputs.flatten(-3, -2)
    total = rows.mT @ probabilities.flatten(-3, -2)  # (..., channel, pixel)
    length = total.norm(dim=-2, keepdim=True).clamp_min_(torch.finfo(total.dtype).tiny)
    groups = [_span(heads) for heads in groups]
    if kind == "norm":
        found = [_norms(probabilities[..., heads, :, :], outputs[..., heads, :, :]) for heads in groups]
    else:
        along = (rows @ (total / length)).view_as(probabilities) * probabilities
        if groups == [_span([head]) for head in range(outputs.shape[-3])]:
            return along / length.mean(-1, keepdim=True).unsqueeze(-3)
        found = [along[..., heads, :, :].sum(-3) for heads in groups]
    return torch.stack(found, -3) / length.mean(-1, keepdim=True).unsqueeze(-3)


def heads_agreed(probabilities: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Average attention over heads by `head_weights`: float32 (..., 1, token, pixel).

    Of `probabilities` (..., head, token, pixel) and a layer's `outputs` (head, token, channel).
    """
    total = outputs.flatten(0, 1).T @ probabilities.flatten(-3, -2)  # (..., channel, pixel)
    along = (outputs.flatten(0, 1) @ total).view_as(probabilities) * probabilities
    return (probabilities * head_weights(along.sum(-2)).unsqueeze(-2)).sum(-3, keepdim=True)


def head_weights(along: torch.Tensor) -> torch.Tensor:
    """Weigh heads at each pixel by the product of what each adds to it and what all add: float32 (..., head, pixel).

    The products are (..., head, pixel), as the weights. These add up to 1 over heads, or are 0 where nothing is added;
    that of a head which works against the others is negative.
    """
    return along / along.sum(-2, keepdim=True).clamp_min_(torch.finfo(along.dtype).tiny)


def _span(heads):
    """Return numbers that follow one another as a slice: a list would be copied to a GPU, which waits for it."""
    follow = heads == list(range(heads[0], heads[0] + len(heads)))
    return slice(heads[0], heads[0] + len(heads)) if follow else heads


def _norms(probabilities, outputs):
    """Length of the sum over heads of probability times output, (..., token, pixel), by products of heads' outputs."""
    outputs, weights = outputs.transpose(-3, -2), probabilities.transpose(-3, -2)  # tokens first
    squares = (outputs @ outputs.mT @ weights * weights).sum(-2)
    return squares.clamp_min_(0).sqrt_()  # rounding may leave a square below 0


def as_list(choice) -> list:
    """Return one number or name as a list of one, several as a list; what is neither as a list of one, for a check."""
    return list(choice) if isinstance(choice, Collection) and not isinstance(choice, str) else [choice]


def check_choice(name: str, value: object, known: Collection[str]) -> None:
    """Raise ValueError where a value is not one of the words that are known."""
    if not (isinstance(value, str) and value in known):
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(known)}")


def choose_layers(sizes: dict, layers: Layers, default: Callable[[str], bool]) -> list[str]:
    """Choose layers by name, beginning of a name or map height; return names in the order of `sizes`.

    `sizes` has the (height, width) of each layer there is, or None where it is not yet known; `default` says of a name
    whether it is meant where nothing is asked for. ValueError where something fits no layer, with what would.
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
    """Choose among a layer's `count` heads, None for all; ValueError where it has no such head."""
    chosen = list(range(count)) if heads is None else as_list(heads)
    unknown = [head for head in chosen if isinstance(head, bool) or head not in range(count)]
    if unknown or not chosen:
        raise ValueError(f"heads={unknown or []} cannot be chosen: {name} has {count}, numbered from 0")
    return chosen


def _product(x, weight, bias):
    return nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())


def linear_map(module, dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Copy the weight and bias of anything that acts as a linear layer: LoRA, offloaded or quantized ones too.

    `dtype` is what quantized weights work in.
    """
    weight = getattr(module, "weight", None)
    plain = type(module) is nn.Linear and type(weight) in (nn.Parameter, torch.Tensor)  # those of torchao are of others
    if plain and weight.device.type != "meta":
        bias = module.bias
        return weight.detach().clone(), None if bias is None else bias.detach().clone()
    parameter = next(module.parameters(), torch.empty(0))  # torch's own quantized layers have none
    dtype = parameter.dtype if parameter.is_floating_point() else dtype
    device = torch.device("cpu" if parameter.device.type == "meta" else parameter.device)
    inputs = torch.eye(module.in_features, dtype=dtype, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        bias = module(torch.zeros_like(inputs[:1]))
        weight = module(inputs) - bias
    return weight.T.contiguous(), bias[0]
