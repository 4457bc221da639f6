"""Other texts beside an image while it is drawn, in joint attention, and what attention gives to text and image.

Behind each call of the denoiser that is recorded, it is called again with the other texts, as many as fit in a batch,
and with the image's tokens of the real call (`PinnedImage`). What comes of that call is used for maps alone.
"""

from collections.abc import Callable, Sequence

import torch

from .adapters import JointCall, TransformerAdapter
from .clip import Text
from .layers import exact
from .pinned import PinnedImage, joined_texts, with_text
from .texts import TextEncoder
from .trace import TextBeside, Trace, add_to

__all__ = ["TextsBeside"]

_AT_ONCE = 4  # texts in one call, which needs memory for a batch of so many images


class TextsBeside:
    """Texts that are read beside every image of a generation, and the outputs of attention, if these are asked for.

    ValueError for what is no text, or for outputs where texts have none; TypeError as from `PinnedImage`.
    """

    def __init__(
        self, adapter: TransformerAdapter, encoder: TextEncoder, texts: Sequence[str], share: str, outputs: bool
    ):
        _check(adapter, texts, outputs)
        self.adapter, self.encoder = adapter, encoder
        self.texts, self.share, self.outputs = list(dict.fromkeys(texts)), share, outputs
        self.asking = False  # whether a call is of these texts
        self._pin = PinnedImage(adapter) if texts else None
        self._rows: list[int] = []  # of the batch, those of images to record; none where a call is not recorded
        # of this generation, known once it has begun: texts of one call, and its arguments that hold them
        self._batches: list[tuple[list[Text], dict]] = []
        self._heard: list[tuple[Text, int]] = []  # in a call of these texts, the text and the image of each row
        self._real: dict[str, list[torch.Tensor]] = {}  # by layer: the pixels' outputs (pixel, channel) of each image
        # of the latest step, by the text's and the image's number and the layer: maps, and outputs and products
        self._taken: dict[tuple[str, int], dict[str, tuple[torch.Tensor, ...]]] = {}

    def listen(self) -> list:
        """Listen to the denoiser, its blocks and attentions; return the handles to remove that by."""
        adapter, module = self.adapter, self.adapter.module
        return [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after, with_kwargs=True, always_call=True),  # also after an error
            *([] if self._pin is None else self._pin.listen()),
            *(handle for name, m in adapter.attentions.items() for handle in adapter.tap(m, self._receiver(name))),
        ]

    def begin(self, active: bool, rows: list[int]) -> None:
        """Begin a step: whether it is recorded, and which rows of the batch."""
        self._rows, self._real, self._taken = rows if active else [], {}, {}
        if self._pin is not None:
            self._pin.forget()

    def put(self, trace: Trace, i: int) -> None:
        """Add what was found in a whole step to the trace of image i."""
        for name in trace.sizes if self.outputs else ():
            add_to(trace.outputs, name, self._real[name][i].float())
        for text in [text for texts, _ in self._batches for text in texts]:
            beside = trace.beside.setdefault(text.text, TextBeside(text.words, text.ends))
            sums = trace.streamed.setdefault(text.text, {}), beside.outputs, beside.products
            taken = self._taken[text.text, i]
            if lost := trace.sizes.keys() - taken:
                raise RuntimeError(f"{len(lost)} attentions did not meet {text.text!r}; {self.adapter.how_seen}")
            for name in trace.sizes:
                for total, found in zip(sums, taken[name], strict=False):  # outputs only where they are asked for
                    add_to(total, name, found)

    def forget(self) -> None:
        """Drop what belongs to one generation alone."""
        self.begin(False, [])
        self._batches = []

    @torch.compiler.disable
    def _before(self, module, args):
        if self._rows and self._pin is not None:
            rows, self._rows = self._rows, []  # the calls of reading are stopped, which hooks take for an error
            self._batches = self._batches or self._read(len(rows))
            self._rows, self._pin.phase = rows, "keep"

    @torch.compiler.disable
    @torch.no_grad()
    def _after(self, module, args, kwargs, output):
        rows, count = [] if output is None else self._rows, len(self._rows)  # None after an error
        try:
            self.asking = bool(rows)
            for texts, given in self._batches if rows else ():
                self._heard = [(text, i) for text in texts for i in range(count)]
                self._pin.phase, self._pin.rows = "give", rows * len(texts)
                called = with_text(self.adapter, args, kwargs, given, self._pin.rows)
                self.adapter.read((), called)  # tells where the text stands
                module.forward(**called)  # not the module itself, whose hooks are for the real call
        finally:
            self.asking, self._rows = False, []  # another call may be no step
            if self._pin is not None:
                self._pin.forget()

    def _read(self, images) -> list[tuple[list[Text], dict]]:
        """Read the texts as the prompt is read, and join those of one length, for so many images."""
        kept, alike, family = self.adapter.texts.calls, {}, self.adapter.family
        for text in self.texts:
            given, row, found = self.encoder.reader.beside(text)
            lengths = [int(given[mask][row].sum()) for mask in (family.length, family.before) if mask in given]
            shapes = [_shape(value, row) for value in given.values()]
            alike.setdefault(str((shapes, lengths)), []).append((given, row, found))
        self.adapter.texts.calls = kept  # by which the prompt is told, not by these
        parts = [found[i : i + _AT_ONCE] for found in alike.values() for i in range(0, len(found), _AT_ONCE)]
        return [([text for *_, text in part], joined_texts([read[:2] for read in part], images)) for part in parts]

    def _receiver(self, name) -> Callable[[JointCall], None]:
        @exact()
        def receive(call: JointCall) -> None:
            if self.asking:
                for row, (text, i) in enumerate(self._heard):
                    self._taken.setdefault((text.text, i), {})[name] = self._take(name, call, row, text, i)
            elif self.outputs and self._rows:
                self._real[name] = [call.outputs(row, call.pixels[row]) for row in self._rows]

        return receive

    def _take(self, name, call, row, text, i) -> tuple[torch.Tensor, ...]:
        """Return the maps (1, token, pixel) of a text beside image i; if asked for, its outputs, and products."""
        maps = call.shares(row, self.share, text.length)[None].contiguous()
        if not self.outputs:
            return (maps,)
        first = call.text[row].start
        found = call.outputs(row, slice(first, first + text.length)).float()
        return maps, found, found @ self._real[name][i].float().mT


def _check(adapter, texts, outputs):
    """Raise ValueError for what is no text, outputs that texts do not have, and where blocks are left out."""
    if wrong := [text for text in texts if not isinstance(text, str) or not text.strip()]:
        raise ValueError(f"texts={wrong!r}: each is a text of at least one word")
    if type(outputs) is not bool:
        raise ValueError(f"outputs={outputs!r}: True or False, of the layers that layers= chooses")
    if outputs and adapter.family.image not in ("first", "last"):
        raise ValueError(
            f"in {type(adapter.module).__name__} the text asks nothing of the image, so it has no outputs of "
            "attention: leave outputs= out"
        )
    if texts and getattr(adapter.module, "is_cache_enabled", False):
        raise ValueError("a cache leaves blocks of the denoiser out: pipe.transformer.disable_cache() first")


def _shape(value, row):
    """Return the shape of one row of an argument; the type of what has none."""
    value = value[row] if isinstance(value, list) else value
    return tuple(value.shape[-2:]) if torch.is_tensor(value) else type(value).__name__
