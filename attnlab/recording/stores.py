"""What is kept of a denoiser's queries, step by step: themselves, their sum, or the softmax maps of texts.

Of each there is a class with `take`, what is computed while the denoiser runs, and `put`, which adds it to the trace
once the step is whole: one that is interrupted half-way leaves nothing behind.

Axes: head, token, pixel (row-major), width (channels of one head, or of the text).
"""

from collections import Counter
from collections.abc import Collection, Sequence

import torch
from diffusers.models.attention_processor import Attention

from .layers import Layer, attention, map_size, split_heads
from .recording import Trace
from .texts import Text

KINDS = ("queries", "sum", "maps")


class QueryStore:
    """Every step's queries, in `dtype` on `device`: maps of any text, of any step."""

    def __init__(self, dtype: torch.dtype | None, device):
        self.dtype, self.device = dtype, device

    def take(self, trace: Trace, layer: Layer, queries: torch.Tensor) -> torch.Tensor:
        # a copy: a view would keep the whole batch, both halves of it, alive
        return queries.to(self.device, self.dtype or queries.dtype, copy=True)

    def put(self, trace: Trace, name: str, taken: torch.Tensor) -> None:
        trace.queries.setdefault(name, []).append(taken)


class QuerySum:
    """The sum of all steps' queries in float32, all that Linear DAAM needs: constant in the number of steps."""

    def __init__(self, device):
        self.device = device

    def take(self, trace: Trace, layer: Layer, queries: torch.Tensor) -> torch.Tensor:
        return queries.to(self.device, copy=True)

    def put(self, trace: Trace, name: str, taken: torch.Tensor) -> None:
        layer = trace.layers[name]
        if layer.norm_q is not None:  # the sum is of what meets the keys
            taken = layer.queries(taken).transpose(0, 1).flatten(1)
        trace.sums[name] = trace.sums[name].add_(taken) if name in trace.sums else taken.float()


class MapStore:
    """The sum of all steps' softmax maps of some texts, or of each image's prompt: constant in the number of steps.

    texts : with None for the prompt, as the model sees it; others with start and end token, unpadded, as in `ovam`
    """

    def __init__(self, texts: Sequence[Text | None], device):
        self.texts, self.device = list(texts), device
        self.keys: dict[tuple, torch.Tensor] = {}

    def take(self, trace: Trace, layer: Layer, queries: torch.Tensor) -> list[tuple[str | None, torch.Tensor]]:
        split = layer.queries(queries)
        shown = [text for text in self.texts if text or trace.length]  # a negative prompt may be no text at all
        return [(text and text.text, self._share(trace, layer, split, text).to(self.device)) for text in shown]

    def put(self, trace: Trace, name: str, taken: list[tuple[str | None, torch.Tensor]]) -> None:
        for text, share in taken:
            sums = trace.streamed.setdefault(text, {})
            sums[name] = sums[name].add_(share) if name in sums else share

    def _share(self, trace, layer, queries, text):
        """Share (head, token, pixel) of the tokens up to the first end token; a prompt's padding takes part."""
        of = (id(trace) if text is None else id(text), id(layer))
        if of not in self.keys:
            embedding = trace.text if text is None else text.embedding[: text.length]
            self.keys[of] = (layer.keys(embedding) * layer.scale).to(queries.device)
        attention_mask = (
            None if text is not None or trace.attention_mask is None else trace.attention_mask.to(queries.device)
        )
        length = text.length if text else trace.length
        return attention(queries, self.keys[of], attention_mask)[:, :length].contiguous()

    def forget(self) -> None:
        """Drop the keys of an earlier generation: layers and traces may come to lie at the same address."""
        self.keys.clear()


class SelfAttentionStore:
    """The sum over steps and layers of self-attention, mean over heads: (pixel that looks, pixel looked at).

    With hooks of its own, on both sides of a self-attention; `heights` are those of the maps that are wanted.
    """

    def __init__(self, heights: Collection[int], device):
        self.heights, self.device = heights, device
        self.begin(False, [], (1, 1))

    def begin(self, active: bool, rows: list[int], latent: tuple[int, int]) -> None:
        """Before a step: whether it is recorded, the rows of the batch to keep, (height, width) of the latent."""
        self.active, self.rows, self.latent = active, rows, latent
        self.queries: dict[Attention, tuple] = {}  # of those whose keys are to come
        self.totals: dict[tuple[int, int], list[torch.Tensor]] = {}  # of this step, by size, one an image
        self.layers: Counter[tuple[int, int]] = Counter()
        self.met: set[int] = set()  # heights there are

    def hook(self, module: Attention) -> list:
        """Hooks on a self-attention; handles to remove them by."""
        return [
            module.to_q.register_forward_hook(lambda _, args, output: self._query(module, output)),
            module.to_k.register_forward_hook(lambda _, args, output: self._key(module, output)),
        ]

    def _query(self, module, output):
        size = map_size(output.shape[1], self.latent)
        self.met.add(size[0])
        if self.active and size[0] in self.heights:
            self.queries[module] = size, [output[row].detach() for row in self.rows]

    @torch.no_grad()
    def _key(self, module, output):
        if module not in self.queries:
            return
        size, queries = self.queries.pop(module)
        shares = [self._share(module, q, output[row].detach()) for q, row in zip(queries, self.rows, strict=True)]
        before = self.totals.get(size)
        self.totals[size] = shares if before is None else [a.add_(b) for a, b in zip(before, shares, strict=True)]
        self.layers[size] += 1

    def _share(self, module, queries, keys):
        queries = split_heads(queries, module.heads, module.norm_q)
        keys = split_heads(keys, module.heads, module.norm_k) * module.scale
        total = 0
        for q, k in zip(queries, keys, strict=True):  # one head at a time: these are the largest tensors of all
            total = total + (q @ k.mT).softmax(-1)
        return (total / module.heads).to(self.device)

    def put(self, trace: Trace, i: int) -> None:
        """Add a whole step to the trace of image i. ValueError where no self-attention has a height asked for."""
        if lost := set(self.heights) - self.met:
            raise ValueError(f"no self-attention has maps of height {sorted(lost)}; there are {sorted(self.met)}")
        for size, total in self.totals.items():
            held = trace.self_attention.get(size)
            trace.self_attention[size] = total[i] if held is None else held.add_(total[i])
            trace.self_attention_count[size] = trace.self_attention_count.get(size, 0) + self.layers[size]
