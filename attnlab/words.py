"""From a prompt's token ids to its words, and from a word to its tokens. Words are found by their characters."""

from collections.abc import Sequence
from typing import NamedTuple

Query = str | int | tuple[str, int]  # "smoke", "red car"; the n-th word; ("car", 1): the second "car"


class Word(NamedTuple):
    """A word of a prompt and the positions of its tokens in the tokenized prompt (start token: 0)."""

    text: str
    tokens: tuple[int, ...]


def text_span(tokenizer, ids: Sequence[int]) -> range:
    """Positions of the tokens that stand for text: behind the start token, before the first end token."""
    start = 1 if len(ids) and ids[0] == tokenizer.bos_token_id else 0
    end = start
    while end < len(ids) and ids[end] != tokenizer.eos_token_id:
        end += 1
    return range(start, end)


def split(tokenizer, ids: Sequence[int]) -> list[Word]:
    """The words of tokenized text, in order, as the tokenizer writes them (CLIP's in lower case).

    A token belongs to the word to which it adds characters when the text is decoded token by token, so that pieces of
    one word stay together and equal words stay apart.
    """
    span = text_span(tokenizer, ids)
    groups: list[list[int]] = []
    done = ""
    for position in span:
        text = _decode(tokenizer, ids[span.start : position + 1])
        if not groups or text[len(done) :][:1].isspace():
            groups.append([])
        groups[-1].append(position)
        done = text
    return [Word(_decode(tokenizer, [ids[p] for p in group]).strip(), tuple(group)) for group in groups]


def _decode(tokenizer, ids):
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def find(words: Sequence[Word], query: Query) -> tuple[int, ...]:
    """Token positions of a word, of a phrase of neighboring words, or of the n-th word.

    Raises
    ------
    KeyError : no such word, or one that occurs more than once; the message names what can be asked for
    IndexError : no n-th word
    """
    if isinstance(query, int):
        if not -len(words) <= query < len(words):
            raise IndexError(f"there is no word {query}: the text has {len(words)} words, {_list(words)}")
        return words[query].tokens
    text, which = query if isinstance(query, tuple) else (query, None)
    matches = _matches(words, "".join(text.lower().split()))
    if not matches:
        raise KeyError(f"{text!r} is not in the text; its words are {_list(words)}")
    if which is None and len(matches) > 1:
        choices = " or ".join(f"({text!r}, {i})" for i in range(len(matches)))
        raise KeyError(f"{text!r} occurs {len(matches)} times; ask for {choices}")
    if which is not None and not 0 <= which < len(matches):
        raise KeyError(f"{text!r} occurs {len(matches)} times, counted from 0; there is no ({text!r}, {which})")
    return matches[which or 0]


def _matches(words, letters):
    """Token positions of every run of whole words whose letters, spaces left out, are `letters`."""
    found = []
    for first in range(len(words)):
        joined, tokens = "", ()
        for word in words[first:]:
            joined, tokens = joined + word.text.lower(), tokens + word.tokens
            if joined == letters:
                found.append(tokens)
            if not letters.startswith(joined):
                break
    return found


def _list(words):
    return ", ".join(repr(word.text) for word in words) or "none"
