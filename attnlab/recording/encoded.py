"""The texts that a pipeline's text encoders read lately: which words the rows of an embedding stand for."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import ProcessorMixin

from .words import Word, merge, of_prompt, special_ids, split

__all__ = ["EncodedTexts", "ReadText"]

_REMEMBERED = 32  # latest calls of text encoders, to tell which words an embedding stands for
_ALIKE = 5e-3  # relative distance up to which an embedding is one that a text encoder gave: half precision rounds
_RUNS = 1000  # longest ones to choose from: rows that are all alike make many more short ones
_COLUMNS = 256  # of an embedding that are kept, at most: enough to tell it, in a tenth of the memory


class ReadText(NamedTuple):
    """What is known of a text that a denoiser read."""

    words: list[Word]  # token positions are rows of the denoiser's text, counted on through all its tensors
    order: int  # number of the text encoder's call that made its first row: what is encoded first is the conditional
    ends: bool  # whether an end token follows the last word


class _Call(NamedTuple):
    """A call of a text encoder."""

    number: int  # counted from 0
    encoder: int  # which of the pipeline's text encoders
    ids: torch.Tensor  # (text, token)
    width: int  # of the embeddings
    made: torch.Tensor  # (layer, text, token, column), some columns of what the encoder gave


class _Encoded(NamedTuple):
    """One text of a call."""

    call: int
    encoder: int
    row: int
    ids: tuple[int, ...]


class _Run(NamedTuple):
    """Neighboring rows of the denoiser's text that are neighboring tokens of an encoded one."""

    source: _Encoded
    row: int  # the first one
    token: int
    length: int


class EncodedTexts:
    """The latest calls of a pipeline's text encoders: which token ids became which embeddings."""

    def __init__(self, pipe):
        self.calls: list[_Call] = []
        self._count = 0
        self._encoders = [
            (part, _tokenizer(pipe.components, name))
            for name, part in pipe.components.items()
            if name.startswith("text_encoder") and isinstance(part, torch.nn.Module)
        ]

    @property
    def tokenizers(self) -> list:
        """Those of the text encoders, in their order."""
        return [tokenizer for _, tokenizer in self._encoders if tokenizer is not None]

    def listen(self) -> list:
        """Register a forward hook at every text encoder; returns the handles, to remove them."""
        encoders = [encoder for encoder, _ in self._encoders]
        return [e.register_forward_hook(self._listener(i), with_kwargs=True) for i, e in enumerate(encoders)]

    def forget(self) -> None:
        """Drop all that is remembered."""
        self.calls = []

    def token_ids(self, text: torch.Tensor, second: bool = False) -> list[int] | None:
        """Find the token ids that became `text` (token, text width), told by the result itself.

        Where there are two text encoders, the rows of `text` begin with what the first one made, and end with what the
        second one did.
        """
        for call in reversed(self.calls):
            if call.encoder != int(second):
                continue
            asked = _some(text[..., -call.width :] if second else text[..., : call.width])
            if asked.shape != call.made.shape[2:]:
                continue
            near = (call.made.to(asked) - asked).flatten(2).norm(dim=-1) <= _ALIKE * asked.norm()  # (layer, text)
            if near.any():
                return call.ids[int(near.any(0).nonzero()[0])].tolist()
        return None

    def read(self, texts: Sequence[torch.Tensor], prompts: Sequence[str]) -> ReadText | None:
        """Find the words of a text that a denoiser read, told by the rows themselves.

        Parameters
        ----------
        texts : sequence of torch.Tensor
            The text of one image as the denoiser was given it, mostly one tensor (token, text width); or several, whose
            rows count on. Of a tensor (layer, token, text width) the last layer is looked up.
        prompts : sequence of str
            What the pipeline was asked for, in any order: of a template around it no word is taken.

        Returns
        -------
        ReadText or None
            None where no text encoder made the rows: the prompt came as embeddings.
        """
        runs, start = [], 0
        for text in texts:
            text = text[-1] if text.ndim == 3 else text
            runs += [run._replace(row=run.row + start) for run in self._runs(text)]
            start += len(text)
        if not runs:
            return None
        runs.sort(key=lambda run: run.row)
        lists = [self._words(source, runs, prompts) for source in dict.fromkeys(run.source for run in runs)]
        fitting = [found for found, fits in lists if fits]
        words = merge([found for found, _ in lists])
        if fitting:  # what was read beside the prompt is no word of it
            known = {position for found in fitting for word in found for position in word.tokens}
            words = [word for word in words if not known.isdisjoint(word.tokens)]
        return ReadText(words, runs[0].source.call, self._ends(words, runs))

    def _listener(self, which):
        @torch.compiler.disable
        def remember(encoder, args, kwargs, output):
            ids = args[0] if args else kwargs.get("input_ids")
            made = [] if ids is None else list(_embeddings(output, tuple(ids.shape)))
            if not made:
                return
            norm = getattr(getattr(encoder, "text_model", encoder), "final_layer_norm", None)
            if norm is not None:
                made += [norm(h) for h in made[1:]]  # of hidden states clip_skip= takes these, and SDXL the others
            width = made[-1].shape[-1]
            made = torch.stack([_some(h.detach()) for h in made if h.shape[-1] == width])
            self.calls = [*self.calls[1 - _REMEMBERED :], _Call(self._count, which, ids.cpu(), width, made)]
            self._count += 1

        return remember

    def _runs(self, text) -> list[_Run]:
        """Find where the rows of a text (token, text width) come from: long runs first, and the latest calls."""
        candidates, taken = [], []
        for call in reversed(self.calls):
            new = _near(text, call)
            candidates += [run for source, near in new for run in _diagonals(source, near)]
            if new:
                taken = _choose(candidates, len(text))
                if sum(run.length for run in taken) == len(text) and len({run.source for run in taken}) == len(taken):
                    break  # older calls can tell no better
        return taken

    def _words(self, source, runs, prompts):
        """Return the words of an encoded text that have rows, and whether they are those of a prompt."""
        tokenizer = self._encoders[source.encoder][1]
        if tokenizer is None:
            return [], False
        rows = {run.token + i: run.row + i for run in runs if run.source == source for i in range(run.length)}
        found = split(tokenizer, source.ids)
        kept = of_prompt(found, prompts)
        fits = kept is not None
        if not fits:
            empty = not all(prompt.strip() for prompt in prompts) and _is_chat(tokenizer, source.ids, found)
            kept = [] if empty else found
        kept = [Word(word.text, tuple(rows[p] for p in word.tokens if p in rows)) for word in kept]
        return [word for word in kept if word.tokens], fits

    def _ends(self, words, runs) -> bool:
        """Tell whether an end token is the row behind the last one of a word."""
        row = max((position for word in words for position in word.tokens), default=0) + 1
        run = next((run for run in runs if run.row <= row < run.row + run.length), None)
        tokenizer = None if run is None else self._encoders[run.source.encoder][1]
        if tokenizer is None:
            return False
        return run.source.ids[run.token + row - run.row] in (tokenizer.eos_token_id, tokenizer.sep_token_id)


def _tokenizer(parts, name):
    """Return the tokenizer of a text encoder; that of a processor, where images are read as well."""
    found = parts.get(name.replace("text_encoder", "tokenizer")) or parts.get("processor")
    return found.tokenizer if isinstance(found, ProcessorMixin) else found


def _embeddings(output, shape) -> Iterator[torch.Tensor]:
    """Give the embeddings (text, token, width) among all that a text encoder returned, the logits left out."""
    for name, part in output.items() if hasattr(output, "items") else enumerate(output):
        if isinstance(part, tuple | list):
            yield from _embeddings(part, shape)
        elif isinstance(part, torch.Tensor) and part.ndim == 3 and name != "logits":
            if part.shape[:2] == shape:
                yield part
            elif part.shape[1::-1] == shape:  # ChatGLM puts tokens before texts
                yield part.transpose(0, 1)


def _some(embedding):
    """Keep some of the columns of (..., width), evenly spaced."""
    return embedding[..., :: -(-embedding.shape[-1] // _COLUMNS)]


def _near(text, call) -> list[tuple[_Encoded, np.ndarray]]:
    """Compare rows of a text with those of a call: of each text with any, which (row, token) are alike."""
    if call.width > text.shape[-1]:
        return []
    asked, made = _some(text[:, : call.width]).float(), call.made.float().to(text.device)
    layers, texts, tokens, columns = made.shape
    distances = torch.cdist(asked, made.reshape(-1, columns)).reshape(-1, layers, texts, tokens)
    distances = distances / asked.norm(dim=-1).clamp(min=1e-12)[:, None, None, None]
    # of the layers that one which has most of the rows, and has them best
    layer = (_ALIKE - distances.amin(-1)).clamp(min=0).sum(0).argmax(0)
    chosen = distances[:, layer, torch.arange(texts, device=layer.device)]  # (row, text, token)
    near = (chosen <= _ALIKE).transpose(0, 1).cpu().numpy()
    sources = [_Encoded(call.number, call.encoder, i, tuple(ids)) for i, ids in enumerate(call.ids.tolist())]
    return [(source, each) for source, each in zip(sources, near, strict=True) if each.any()]


def _diagonals(source, near) -> Iterator[_Run]:
    """Give the longest runs of neighboring rows that are alike to neighboring tokens, from (row, token)."""
    padded = np.pad(near, 1)
    starts = np.argwhere(near & ~padded[:-2, :-2])
    lasts = np.argwhere(near & ~padded[2:, 2:])
    # sorted by their diagonals, and along these, the n-th end is that of the n-th start
    starts, lasts = (sorted((token - row, row) for row, token in ends.tolist()) for ends in (starts, lasts))
    for (diagonal, row), (_, last) in zip(starts, lasts, strict=True):
        yield _Run(source, row, row + diagonal, last - row + 1)


def _choose(runs, rows) -> list[_Run]:
    """Choose runs that cover as many rows as possible, each once: the longest first, of one text if possible.

    Of equal ones the first, so runs are given from the latest call to the oldest.
    """
    taken, free = [], np.ones(rows, bool)
    runs = sorted(runs, key=lambda run: -run.length)[:_RUNS]
    while runs:
        known = {run.source for run in taken}
        best = max(runs, key=lambda run: (run.length, run.source in known))
        taken.append(best)
        free[best.row : best.row + best.length] = False
        runs = [part for run in runs for part in _free_parts(run, free)]
    return taken


def _free_parts(run, free) -> Iterator[_Run]:
    """Give the parts of a run whose rows are free."""
    inside = np.pad(free[run.row : run.row + run.length], 1).astype(int)
    for start, stop in zip(np.flatnonzero(np.diff(inside) == 1), np.flatnonzero(np.diff(inside) == -1), strict=True):
        yield _Run(run.source, run.row + int(start), run.token + int(start), int(stop - start))


def _is_chat(tokenizer, ids, words) -> bool:
    """Tell whether special tokens stand between words, as those of a chat do between its parts."""
    inside = ids[words[0].tokens[0] : words[-1].tokens[-1]] if words else ()
    return not special_ids(tokenizer).isdisjoint(inside)
