"""Stores: what is kept of each step's attention, the queries themselves or sums that do not grow with the steps.

A store has `take`, which runs while the denoiser does, and `put`, which adds what was taken to an image's trace once
the step is whole: one that is interrupted half-way leaves nothing behind. All of it stays on the model's device and
asks that for no number, so that a GPU is never waited for: queries leave it by a `HostCopy`, a step at a time, and sums
once, at the end of a generation (`Stores.settle`). Axes: head, token, pixel (row-major).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from numbers import Integral
from threading import get_ident

import torch
from torch import nn

from ..pipelines import as_device
from .adapters import Adapter, AttentionCall, JointCall
from .agreement import AgreementStore
from .beside import TextsBeside
from .clip import Text
from .host_copy import HostCopy
from .kept import CallStore, KeptCall
from .layers import KINDS, as_list, attention, check_choice, contributed, exact
from .met import Met
from .texts import TextEncoder
from .trace import SelfAttentionSum, Trace, add_all

__all__ = ["KEEP", "MapStore", "QueryStore", "QuerySum", "SelfAttentionStore", "Stores", "copied"]

KEEP = ("queries", "sum", "maps", "contributions", "calls")  # what `record(keep=...)` may be
SHARES = ("text", "joint")  # what `record(share=...)` may be
_SCORES = 64 * 2**20  # bytes of attention that are computed at a time, at least one layer's
_NO_OUTPUTS = (
    "outputs are kept of joint attention, in which a text asks, too; here words lie in the space of text embeddings: "
    "leave outputs= out, and take linear_daam and fit_token as they are"
)


class QueryStore:
    """Every step's queries, in `dtype`, brought to main memory or wherever `host_copy` leads: for maps of any text."""

    def __init__(self, dtype: torch.dtype | None, host_copy: HostCopy):
        self.dtype, self.host_copy = dtype, host_copy

    def take(self, met: list[Met]) -> list[torch.Tensor]:
        """Copy queries (pixel, head x width)."""
        return copied([one.queries for one in met], self.dtype)

    def put(self, trace: Trace, taken: dict[str, torch.Tensor]) -> None:
        """Append a step's queries, by layer, to a trace."""
        for name, queries in zip(taken, self.host_copy.send(list(taken.values())), strict=True):
            trace.queries.setdefault(name, []).append(queries)


class QuerySum:
    """The sum of all steps' queries in float32, all that Linear DAAM needs."""

    def take(self, met: list[Met]) -> list[torch.Tensor]:
        """Copy queries (pixel, head x width), as they meet the keys."""
        taken = copied([one.queries for one in met], torch.float32)
        normalized = ((one.layer, queries) for one, queries in zip(met, taken, strict=True))
        return [q if layer.norm_q is None else layer.queries(q).transpose(0, 1).flatten(1) for layer, q in normalized]

    def put(self, trace: Trace, taken: dict[str, torch.Tensor]) -> None:
        """Add a step's queries, by layer, to a trace."""
        add_all(trace.sums, taken)


class MapStore:
    """The sum of all steps' softmax maps of some texts, or of each image's prompt, or of their contributions.

    `texts` has None for the prompt, as the model sees it; others have start and end token and no padding, as in `ovam`.
    """

    def __init__(
        self, texts: Sequence[Text | None], host_copy: HostCopy, contributions: bool = False, share: str = "text"
    ):
        self.texts, self.host_copy, self.contributions, self.share = list(texts), host_copy, contributions, share
        self._keys: dict[tuple, list[torch.Tensor]] = {}  # of a text in a layer; behind them, its outputs

    def take(self, met: list[Met]) -> list[dict[str | None, torch.Tensor]]:
        """Compute each text's maps (head, token, pixel) of each image in a layer."""
        found = [{} for _ in met]
        for text in self.texts:
            # a negative prompt may be no text at all, and one that changes has no sum
            shown = [
                k for k, one in enumerate(met) if text or (one.trace.length and one.trace.generation.changed is None)
            ]
            for some in _alike(met, shown, text):
                maps = self._maps([met[k] for k in some], text)
                for k, one in zip(some, maps, strict=True):
                    found[k][text and text.text] = one
        return found

    def put(self, trace: Trace, taken: dict[str, dict[str | None, torch.Tensor]]) -> None:
        """Add a step's maps, by layer, to a trace."""
        for text in next(iter(taken.values()), ()):
            add_all(trace.streamed.setdefault(text, {}), {name: maps[text] for name, maps in taken.items()})

    def forget(self) -> None:
        """Drop the keys of an earlier generation: layers and traces may come to lie at the same address."""
        self._keys.clear()

    def _maps(self, met, text):
        """Compute maps of tokens up to the first end token; a prompt's padding takes part in the softmax."""
        if isinstance(met[0].call, JointCall):  # of its own text alone, and the mean over heads
            return [one.call.shares(one.row, self.share, kept=one.trace.length)[None] for one in met]
        queries = met[0].layer.queries(torch.stack([one.queries for one in met]))  # (layer of an image, head, ...)
        known = [self._known(one.trace, one.layer, text, queries.device) for one in met]
        mask = met[0].trace.attention_mask if text is None else None
        mask = None if mask is None else mask.to(queries.device, non_blocking=True)
        lengths = [text.length if text else one.trace.length for one in met]
        keys = torch.stack([one[0] for one in known])
        found = attention(queries.flatten(0, 1), keys.flatten(0, 1), mask).unflatten(0, queries.shape[:2])
        if self.contributions:  # projections of each head, and behind them the norm of all heads together
            every = list(range(queries.shape[1]))
            groups, outputs = ([[head] for head in every], [every]), torch.stack([one[1] for one in known])
            found = torch.cat([contributed(found, outputs, *one) for one in zip(KINDS, groups, strict=True)], -3)
        if len(set(lengths)) == 1:
            return found[:, :, : lengths[0]].contiguous().unbind()
        return [one[:, :length].contiguous() for one, length in zip(found, lengths, strict=True)]

    def _known(self, trace, layer, text, device):
        """Return a text's scaled keys in a layer and, for contributions, its outputs."""
        of = (id(trace) if text is None else id(text), layer.name)
        if of not in self._keys:
            if layer.weight.device != device:  # of an earlier step, and perhaps still on its way
                self.host_copy.wait()
                layer = layer.to(device)
            embedding = trace.text if text is None else text.embedding[: text.length]
            embedding = embedding.to(device, non_blocking=True)
            self._keys[of] = [layer.keys(embedding) * layer.scale]
            self._keys[of] += [layer.outputs(embedding)] if self.contributions else []
        return self._keys[of]


class SelfAttentionStore:
    """The sum over steps and layers of self-attention, mean over heads, for map heights that are asked for."""

    def __init__(self, heights: Collection[int]):
        self.heights, self._count = heights, 0
        self.begin(False, [], None)

    def tap(self, adapter: Adapter, passed_over: Callable[[], bool]) -> list:
        """Listen to self-attentions, except in calls that are passed over; return the handles to remove that by."""
        if not self.heights:
            return []
        modules = adapter.self_attentions()
        self._count = len(modules)
        return [handle for m in modules for handle in adapter.tap(m, self._receiver(m, adapter, passed_over))]

    def begin(self, active: bool, rows: list[int], latent: tuple[int, int] | None) -> None:
        """Begin a step: whether it is recorded, its rows of the batch, the latent's (height, width); None: no step."""
        self._active, self._rows, self._latent = active, rows, latent
        self._step: dict[tuple[int, int], list[torch.Tensor]] = {}  # this step's sums by size, one per image
        self._layers: Counter[tuple[int, int]] = Counter()
        self._met: Counter[int] = Counter()  # heights of the attentions that ran

    def check(self, how_seen: str) -> None:
        """Check a step: ValueError for a height that no layer has, RuntimeError where a layer was not seen."""
        if not self.heights:
            return
        if self._met and (lost := set(self.heights) - set(self._met)):
            raise ValueError(f"no self-attention has maps of height {sorted(lost)}; there are {sorted(self._met)}")
        if (seen := self._met.total()) != self._count:
            raise RuntimeError(
                f"{self._count - seen} of {self._count} self-attentions were not seen: they were left out (DeepCache), "
                f"or have a processor with keys that are not the image's own; {how_seen}, or without self_attention="
            )

    def put(self, trace: Trace, i: int) -> None:
        """Add a whole step to the trace of image i."""
        for size, totals in self._step.items():
            before, count = trace.self_attention.get(size, (None, 0))
            total = totals[i] if before is None else before.add_(totals[i])
            trace.self_attention[size] = SelfAttentionSum(total, count + self._layers[size])

    def _receiver(self, module: nn.Module, adapter: Adapter, passed_over: Callable[[], bool]):
        @exact()
        def receive(call: AttentionCall | JointCall) -> None:
            if passed_over() or self._latent is None or not call.among_pixels:
                return
            size = adapter.grid(call.count, self._latent)
            self._met[size[0]] += 1
            if not self._active or size[0] not in self.heights:
                return
            found = [call.self_attention(row, module) for row in self._rows]
            before = self._step.get(size)
            self._step[size] = found if before is None else [a.add_(b) for a, b in zip(before, found, strict=True)]
            self._layers[size] += 1

        return receive


class Stores:
    """All that a recording keeps: chosen by what `record` was asked for, see there."""

    def __init__(
        self, adapter: Adapter, encoder: TextEncoder | None, keep, share, texts, self_attention, dtype, device, outputs,
        agreement,
    ):  # fmt: skip
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype={dtype}: queries are kept in a floating-point type, for example torch.float16")
        device = as_device(device)
        if keep is not None:
            check_choice("keep", keep, KEEP)
        check_choice("share", share, SHARES)
        texts, heights = as_list(texts), as_list(self_attention)
        joint, calls = adapter.joint, keep == "calls" or (adapter.joint and keep is None)
        if joint:
            keep = "maps" if keep is None else keep
            _check_joint(keep)
        elif outputs:
            raise ValueError(_NO_OUTPUTS)
        if texts and encoder is None:
            raise ValueError("texts= needs a pipeline with a text encoder")
        if not all(isinstance(height, Integral) and height > 0 for height in heights):
            raise ValueError(f"self_attention={self_attention!r}: give heights of maps, for example 16 or [16, 32]")
        self.beside = TextsBeside(adapter, encoder, texts, share, outputs) if joint and (texts or outputs) else None
        encoded = {} if joint else {text.text: text for text in map(encoder, texts)}  # each once
        streamed = [None] * (keep in ("maps", "contributions")) + list(encoded.values())
        self.host_copy = HostCopy(device)
        self.calls = CallStore(self.host_copy) if calls else None
        self.maps = MapStore(streamed, self.host_copy, keep == "contributions", share)
        self.self_attention = SelfAttentionStore(heights)
        self._stores = [self.maps] if streamed else []
        if keep == "sum":
            self._stores.insert(0, QuerySum())
        if queries := keep == "queries" or (keep is None and not texts):
            self._stores.insert(0, QueryStore(dtype, self.host_copy))
        if agreement is not None and not (joint or queries):
            raise ValueError("with agreement= the queries of all steps are needed: add keep='queries'")
        self._agreement = None if agreement is None else AgreementStore(adapter, agreement, share)
        self._stores += [] if agreement is None else [self._agreement]
        self.values = queries or keep == "contributions"  # whether layers are kept with their values
        self._thread = 0  # which draws
        self.at_once = joint or agreement is not None  # whether what meets in a layer is gone once it has ended

    def take(self, met: list[Met]) -> list[list]:
        """Take what each store wants of each image in each layer."""
        return [store.take(met) for store in self._stores]

    def put(self, trace: Trace, i: int, taken: dict[str, list]) -> None:
        """Put what was taken, by layer, into the trace of image i."""
        for store, parts in zip(self._stores, zip(*taken.values(), strict=True), strict=True):
            store.put(trace, dict(zip(taken, parts, strict=True)))
        self.self_attention.put(trace, i)
        if self.beside is not None:
            self.beside.put(trace, i)

    def begin(self, active: bool, rows: list[int], size: tuple[int, int] | None) -> None:
        """Begin a step: whether it is recorded, its rows of the batch, the latent's (height, width); None: no step."""
        self._thread = get_ident()
        self.self_attention.begin(active, rows, size)
        if self.beside is not None:
            self.beside.begin(active, rows)

    def listen(self) -> list:
        """Listen to what is not the image's own attention to its text; return the handles to remove that by."""
        handles = [] if self.beside is None else self.beside.listen()
        return handles if self._agreement is None else [*handles, *self._agreement.listen(self.pass_over)]

    def pass_over(self) -> bool:
        """Return whether what runs is of other texts beside the image, or another thread, which may read a text."""
        return get_ident() != self._thread or (self.beside is not None and self.beside.asking)

    def keep_call(self, *called) -> KeptCall | None:
        """Keep a call of the denoiser, see `CallStore.keep`, where that is asked for."""
        return None if self.calls is None else self.calls.keep(*called)

    def settle(self, traces: Iterable[Trace]) -> None:
        """Bring the sums of a generation that has ended to where they are kept; they are there after a `wait`."""
        for trace in traces:
            for sums in trace.totals():
                sums.update(zip(sums, self.host_copy.send(list(sums.values())), strict=True))
            for size, (total, count) in trace.self_attention.items():
                trace.self_attention[size] = SelfAttentionSum(*self.host_copy.send([total]), count)

    def forget(self) -> None:
        """Drop what belongs to one generation alone."""
        self.maps.forget()
        if self.calls is not None:
            self.calls.forget()
        self.self_attention.begin(False, [], None)
        if self.beside is not None:
            self.beside.forget()


def copied(tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Copy tensors, those of a kind in one operation; a view would keep the whole batch alive."""
    found = [None] * len(tensors)
    for some in _grouped((tensor.device, tensor.dtype) for tensor in tensors):
        flat = torch.cat([tensors[k].flatten() for k in some])
        parts = flat.to(dtype or flat.dtype).split([tensors[k].numel() for k in some])
        for k, part in zip(some, parts, strict=True):
            found[k] = part.view(tensors[k].shape)
    return found


def _alike(met, shown, text):
    """Group numbers of `met` whose maps are computed together: a norm is of its layer, and a mask of its image."""
    tokens = [text.length if text else len(met[k].trace.text) for k in shown]
    groups = _grouped((_kind(met[k], text), count) for k, count in zip(shown, tokens, strict=True))
    for some in groups:
        layer, call, *_ = met[shown[some[0]]]
        together = max(1, _SCORES // (4 * tokens[some[0]] * layer.heads * call.count))
        yield from ([shown[k] for k in some[i : i + together]] for i in range(0, len(some), together))


def _kind(one, text):
    """Say what the computation of maps depends on, but for numbers."""
    query, masked = one.call.query, text is None and one.trace.attention_mask is not None
    shape = query.device, query.dtype, query.shape, one.layer.heads
    return *shape, one.layer.norm_q and one.layer.name, masked and id(one.trace)


def _grouped(kinds):
    """Group the numbers of those that are of one kind."""
    found = defaultdict(list)
    for k, kind in enumerate(kinds):
        found[kind].append(k)
    return found.values()


def _check_joint(keep):
    """Raise ValueError for what queries of joint attention alone do not tell."""
    if keep not in ("maps", "calls"):
        raise ValueError(
            "image and text attend to one another in this model, so its queries alone say nothing of a text: record "
            "maps of the prompt, record(pipe), or of other texts, record(pipe, texts=...), without keep="
        )
