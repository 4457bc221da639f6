"""What is kept of a denoiser's queries, step by step: themselves, their sum, or the softmax maps of texts.

Of each there is a class with `take`, what is computed while the denoiser runs, and `put`, which adds it to the trace
once the step is whole: one that is interrupted half-way leaves nothing behind.

Axes: head, token, pixel (row-major), width (channels of one head, or of the text).
"""

from collections.abc import Sequence

import torch
from diffusers.models.attention_processor import Attention

from .layers import Layer, attention, split_heads
from .recording import Trace
from .texts import Text

KINDS = ("queries", "sum", "maps")


class Queries:
    """Every step's queries, in `dtype` on `device`: maps of any text, of any step."""

    def __init__(self, dtype: torch.dtype | None, device):
        self.dtype, self.device = dtype, device

    def take(self, trace: Trace, layer: Layer, queries: torch.Tensor) -> torch.Tensor:
        # a copy: a view would keep the whole batch, both halves of it, alive
        return queries.to(self.device, self.dtype or queries.dtype, copy=True)

    def put(self, trace: Trace, name: str, taken: torch.Tensor) -> None:
        trace.queries.setdefault(name, []).append(taken)


class Sum:
    """The sum of all steps' queries in float32, all that Linear DAAM needs: constant in the number of steps."""

    def __init__(self, device):
        self.device = device

    def take(self, trace: Trace, layer: Layer, queries: torch.Tensor) -> torch.Tensor:
        return layer.queries(queries).to(self.device, copy=True)  # (head, pixel, width)

    def put(self, trace: Trace, name: str, taken: torch.Tensor) -> None:
        trace.sums[name] = trace.sums[name].add_(taken) if name in trace.sums else taken


class Maps:
    """The sum of all steps' softmax maps of some texts, or of each image's prompt: constant in the number of steps.

    texts : with None for the prompt, as the model sees it; others with start and end token, unpadded, as in `ovam`
    """

    def __init__(self, texts: Sequence[Text | None], device):
        self.texts, self.device = list(texts), device
        self.keys: dict[tuple, torch.Tensor] = {}

    def take(self, trace: Trace, layer: Layer, queries: torch.Tensor) -> list[torch.Tensor]:
        split = layer.queries(queries)
        return [self._share(trace, layer, split, text).to(self.device) for text in self.texts]

    def put(self, trace: Trace, name: str, taken: list[torch.Tensor]) -> None:
        for text, share in zip(self.texts, taken, strict=True):
            sums = trace.streamed.setdefault(text and text.text, {})
            sums[name] = sums[name].add_(share) if name in sums else share

    def _share(self, trace, layer, queries, text):
        """Share (head, token, pixel) of the tokens up to the first end token; a prompt's padding takes part."""
        of = (id(trace) if text is None else id(text), id(layer))
        if of not in self.keys:
            embedding = trace.text if text is None else text.embedding[: text.length]
            self.keys[of] = (layer.keys(embedding) * layer.scale).to(queries.device)
        visible = None if text is not None or trace.visible is None else trace.visible.to(queries.device)
        length = text.length if text else trace.length
        return attention(queries, self.keys[of], visible)[:, :length].contiguous()

    def forget(self) -> None:
        """Drop the keys of an earlier generation: layers and traces may come to lie at the same address."""
        self.keys.clear()


class SelfAttention:
    """The sum over steps and layers of self-attention, mean over heads: (pixel that looks, pixel looked at)."""

    def __init__(self, device):
        self.device = device

    def take(self, module: Attention, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        queries = split_heads(queries, module.heads, module.norm_q)
        keys = split_heads(keys, module.heads, module.norm_k) * module.scale
        total = 0
        for q, k in zip(queries, keys, strict=True):  # one head at a time: these are the largest tensors of all
            total = total + (q @ k.mT).softmax(-1)
        return (total / module.heads).to(self.device)

    def put(self, trace: Trace, size: tuple[int, int], taken: torch.Tensor) -> None:
        held = trace.self_attention.get(size)
        trace.self_attention[size] = taken if held is None else held.add_(taken)
        trace.looks[size] = trace.looks.get(size, 0) + 1
