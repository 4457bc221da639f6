"""Map words to token positions by position and spelling, so that repeated words stay apart."""

import unicodedata
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

__all__ = ["Query", "Word", "find", "matches", "split", "text_span", "vocabulary"]

Query = str | int | tuple[str, int]
"""What asks for a word: "smoke", or a phrase, "red car"; a number, for the n-th word; ("car", 1), the second "car"."""
_END_OF_WORD = "</w>"  # how CLIP's tokenizer marks the last piece of a word
_CUT = "…"  # how a word is marked of which the window cut off the end


class Word(NamedTuple):
    """A word of a prompt and the positions of its tokens in the tokenized prompt (start token: 0)."""

    text: str
    tokens: tuple[int, ...]


def text_span(tokenizer, ids: Sequence[int]) -> range:
    """Find the positions of the tokens that stand for text: behind the start token, before the first end token."""
    start = 1 if len(ids) and ids[0] == tokenizer.bos_token_id else 0
    end = start
    while end < len(ids) and ids[end] != tokenizer.eos_token_id:
        end += 1
    return range(start, end)


def split(tokenizer, ids: Sequence[int]) -> list[Word]:
    """Group the tokens of a text into words, in order, as the tokenizer writes them (CLIP's in lower case).

    Tokens are grouped in the order of the text by the word they are pieces of: pieces of a word stay together, equal
    words stay apart. A learned token (textual inversion) is a word, with all its vectors and the capitals of its name.
    A word of which the window cut off the end is written with an ellipsis, "umbr…".
    """
    span = text_span(tokenizer, ids)
    learned = {number: name for name, number in tokenizer.get_added_vocab().items()}
    groups: list[list[int]] = []
    ended, previous = True, ""  # whether the last piece ended its word, and what it was
    for position, piece in zip(span, tokenizer.convert_ids_to_tokens([ids[p] for p in span]), strict=True):
        name = learned.get(ids[position])  # of which the tokenizer gives the small letters as the piece
        if (ended or name) and not (name and _follows(previous, name)):
            groups.append([])
        groups[-1].append(position)
        ended, previous = bool(name) or piece.endswith(_END_OF_WORD), name or piece
    found = [Word(_spell(tokenizer, [ids[p] for p in group], learned), tuple(group)) for group in groups]
    if not ended:
        found[-1] = found[-1]._replace(text=found[-1].text.rstrip("\ufffd") + _CUT)  # half a letter is no letter
    return found


def _follows(previous: str, piece: str) -> bool:
    """Whether a learned piece is the next vector of the one before: "<cat>", "<cat>_1", "<cat>_2"."""
    stem, _, number = piece.rpartition("_")
    return number.isdigit() and previous == (stem if number == "1" else f"{stem}_{int(number) - 1}")


def vocabulary(tokenizer) -> list[str]:
    """List the tokenizer's whole words of three letters and more, in alphabetical order."""
    pieces = (piece.removesuffix(_END_OF_WORD) for piece in tokenizer.get_vocab() if piece.endswith(_END_OF_WORD))
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
                found.append(tokens)
            if not letters.startswith(joined):
                break
    return found


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).lower().split())  # as the tokenizer, which normalizes too


def _spell(tokenizer, ids, learned) -> str:
    if ids[0] in learned:
        return learned[ids[0]]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text.replace(_END_OF_WORD, "").strip()  # a copied tokenizer leaves the marks in


def _list(words):
    return ", ".join(repr(word.text) for word in words) or "none"
