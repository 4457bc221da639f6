"""Words and the positions of their tokens, and how one asks for a word so that repeated ones stay apart."""

import unicodedata
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

__all__ = ["Query", "Word", "find", "matches", "vocabulary"]

Query = str | int | tuple[str, int]
"""What asks for a word: "smoke", or a phrase, "red car"; a number, for the n-th word; ("car", 1), the second "car"."""


class Word(NamedTuple):
    """A word of a prompt and the positions of its tokens in the tokenized prompt (start token: 0)."""

    text: str
    tokens: tuple[int, ...]


def vocabulary(tokenizer) -> list[str]:
    """List the tokenizer's whole words of three letters and more, in alphabetical order."""
    pieces = (piece.removesuffix("</w>") for piece in tokenizer.get_vocab() if piece.endswith("</w>"))
    return sorted(word for word in pieces if len(word) > 2 and word.isalpha() and word.isascii())


def find(words: Sequence[Word], query: Query) -> tuple[int, ...]:
    """Find the token positions of a word, of a phrase of neighboring words, or of the n-th word.

    KeyError where there is no such word, or more than one, with what can be asked for; IndexError where there is no
    n-th word; TypeError for a query of another kind.
    """
    found = matches(words, query)
    if isinstance(query, Integral):
        if not found:
            raise IndexError(f"there is no word {query}: the text has {len(words)} words, {_list(words)}")
        return found[0]
    text, which = query if isinstance(query, tuple) and len(query) == 2 else (query, None)
    every = matches(words, text)
    if not every:
        raise KeyError(f"{text!r} is not in the text; its words are {_list(words)}")
    if not found:
        raise KeyError(f"there is no ({text!r}, {which}): it occurs {len(every)} times, counted from 0")
    if len(found) > 1:
        choices = " or ".join(f"({text!r}, {i})" for i in range(len(found)))
        raise KeyError(f"{text!r} occurs {len(found)} times; ask for {choices}")
    return found[0]


def matches(words: Sequence[Word], query: Query) -> list[tuple[int, ...]]:
    """Find the token positions of everything in the text that a query could mean, none to several."""
    if isinstance(query, Integral):
        return [words[query].tokens] if -len(words) <= query < len(words) else []
    if isinstance(query, tuple) and len(query) == 2 and isinstance(query[1], Integral):
        text, which = query
        return matches(words, text)[which : which + 1] if which >= 0 else []
    if not isinstance(query, str):
        raise TypeError(f'ask by word ("smoke"), by number (3) or for one of several (("car", 1)), not by {query!r}')
    letters, spelled = _letters(query), [_letters(word.text) for word in words]
    found = [word.tokens for word, own in zip(words, spelled, strict=True) if own == letters]
    found = [word.tokens for word in words if word.text == query] or found  # of learned "Car" and "car", the one named
    for first in range(len(words) if not found else 0):  # a phrase, where no single word is meant
        joined, tokens = "", ()
        for word, own in zip(words[first:], spelled[first:], strict=True):
            joined, tokens = joined + own, tokens + word.tokens
            if joined == letters:
                found.append(tuple(dict.fromkeys(tokens)))  # a token may belong to two words
            if not letters.startswith(joined):
                break
    return found


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).lower().split())  # as the tokenizer, which normalizes too


def _list(words):
    return ", ".join(repr(word.text) for word in words) or "none"
