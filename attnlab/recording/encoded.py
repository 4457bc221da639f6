"""The texts that a pipeline's text encoders read lately: which words the rows of an embedding stand for."""

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from transformers import ProcessorMixin

from .pieces import split, words_in
from .prompts import join, place
from .words import Word

__all__ = ["EncodedTexts", "ReadText"]

_REMEMBERED = 32  # latest calls of text encoders, to tell which words an embedding stands for
_ALIKE = 5e-3  # relative distance up to which an embedding is one that a text encoder gave: half precision rounds
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


class _Source(NamedTuple):
    """An encoded text from which rows of a denoiser's text come."""

    call: _Call
    ids: list[int]
    rows: dict[int, int]  # of its tokens, by their positions


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
            if call.encoder == int(second):
                own = text[:, -call.width :] if second else text
                if (ids := _equal_text(own, call)) is not None:  # mostly, and much quicker to find
                    return ids
                for ids, places in _placed_rows(own, call):
                    if len(places) == len(text) == len(ids):
                        return ids
        return None

    def read(self, texts: Sequence[torch.Tensor], prompts: Sequence[str]) -> ReadText | None:
        """Find the words of a text that a denoiser read, told by the rows themselves.

        It is that of one image, mostly one tensor (token, text width); or several, whose rows count on. Of a tensor
        (layer, token, text width) the last layer is looked up. `prompts` is what the pipeline was asked for, in any
        order: of a template around it no word is taken. None where no text encoder made the rows: the prompt came as
        embeddings.
        """
        sources, start = [], 0
        for text in texts:
            text = text[-1] if text.ndim == 3 else text
            sources += self._sources(text, start)
            start += len(text)
        if not sources:
            return None
        sources.sort(key=lambda source: min(source.rows.values()))
        words = self._words(sources, prompts)
        return ReadText(words, sources[0].call.number, self._ends(words, sources))

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

    def _sources(self, text, start) -> list[_Source]:
        """Find where the rows of a text (token, text width) come from, which count from `start` on."""
        found, sources = [], []
        for call in reversed(self.calls):
            found += [(call, ids, places) for ids, places in _placed_rows(text, call) if places]
            if any(len(places) == len(text) for *_, places in found):
                break  # older calls can tell no better
        free = set(range(len(text)))
        while found:  # the text that has most of the rows, the latest one of equal ones; then those of what is left
            call, ids, places = max(found, key=lambda source: len(source[2]))
            sources.append(_Source(call, ids, {token: row + start for row, token in places.items()}))
            free -= set(places)
            found = [(*of, {row: token for row, token in places.items() if row in free}) for *of, places in found]
            found = [source for source in found if source[2]]
        return sources

    def _words(self, sources, prompts) -> list[Word]:
        """Find the words of the prompts in all sources; where none has one, those of the longest source."""
        lists = []
        for source in sources:
            tokenizer = self._encoders[source.call.encoder][1]
            found = [] if tokenizer is None else split(tokenizer, source.ids)
            rows = ([source.rows[p] for p in word.tokens if p in source.rows] for word in found)
            lists.append([word._replace(tokens=tuple(own)) for word, own in zip(found, rows, strict=True) if own])
        asked = [words_in(prompt) for prompt in prompts]
        words = _placed(asked, lists)
        if not words and all(asked):  # a prompt that the pipeline rewrote; a template around nothing has no words
            words = _placed([max(lists, key=len)], lists)
        return words

    def _ends(self, words, sources) -> bool:
        """Tell whether an end token is the row behind the last one of a word."""
        row = max((position for word in words for position in word.tokens), default=0) + 1
        for source in sources:
            tokenizer = self._encoders[source.call.encoder][1]
            behind = {source.ids[token] for token, own in source.rows.items() if own == row}
            if tokenizer is not None and behind & {tokenizer.eos_token_id, tokenizer.sep_token_id}:
                return True
        return False


def _placed(asked, lists) -> list[Word]:
    """Give the words of texts that were asked for the rows of all lists of words that spell them."""
    placed: dict[int, list[list[Word]]] = {}  # by the number of the text
    for words in lists:
        each = {i: found for i, own in enumerate(asked) if (found := place(own, words))}
        if each:
            longest = max(each, key=lambda i: sum(bool(word.tokens) for word in each[i]))
            placed.setdefault(longest, []).append(each[longest])
    return [word for found in placed.values() for word in reduce(join, found) if word.tokens]


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


def _equal_text(text, call) -> list[int] | None:
    """Return the token ids of the text of a call that rows are equal to, one by one; None where there is none."""
    if call.width > text.shape[-1] or len(text) != call.ids.shape[1]:
        return None
    asked = _some(text[:, : call.width])
    equal = (call.made.to(asked.device) == asked).flatten(2).all(-1).any(0)  # (text,)
    return call.ids[equal.tolist().index(True)].tolist() if equal.any() else None


def _placed_rows(text, call) -> Iterator[tuple[list[int], dict[int, int]]]:
    """Give the token ids of each text of a call, and which tokens rows of a text are alike to: {row: token}."""
    if call.width > text.shape[-1]:
        return
    asked, made = _some(text[:, : call.width]).float(), call.made.float().to(text.device)
    layers, texts, tokens, columns = made.shape
    distances = torch.cdist(asked, made.reshape(-1, columns)).reshape(-1, layers, texts, tokens)
    distances = distances / asked.norm(dim=-1).clamp(min=1e-12)[:, None, None, None]
    # of the layers that one which has most of the rows, and has them best
    layer = (_ALIKE - distances.amin(-1)).clamp(min=0).sum(0).argmax(0)
    for i, ids in enumerate(call.ids.tolist()):
        near = distances[:, layer[i], i].cpu()  # (row, token)
        places = {}
        for row in (near.amin(-1) <= _ALIKE).nonzero().flatten().tolist():
            behind = places.get(row - 1, tokens) + 1  # of equal tokens, as of a repeated word, it is that one
            follows = behind < tokens and near[row, behind] <= _ALIKE
            places[row] = behind if follows else int(near[row].argmin())
        yield ids, places
