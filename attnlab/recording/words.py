"""Map words to token positions by position and spelling, so that repeated words stay apart."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import cache, reduce
from itertools import accumulate
from numbers import Integral
from typing import NamedTuple

__all__ = ["Query", "Word", "find", "matches", "merge", "of_prompt", "special_ids", "split", "text_span", "vocabulary"]

Query = str | int | tuple[str, int]
"""What asks for a word: "smoke", or a phrase, "red car"; a number, for the n-th word; ("car", 1), the second "car"."""
_END_OF_WORD = "</w>"  # how CLIP's tokenizer marks the last piece of a word
_CUT = "…"  # how a word is marked of which the window cut off the end
_UNKNOWN = "\ufffd"  # stands for what a tokenizer has no piece for
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # sentencepiece's piece for a byte of a character that it has no piece for
_NO_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")  # scripts that put none between words


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
    words stay apart. Special tokens are no words. A learned token (textual inversion) is a word, with all its vectors
    and the capitals of its name. Punctuation is a word; a token that holds parts of two words, as "-light", belongs to
    both. In scripts without spaces (Chinese) each token is a word. What CLIP's window cut off is written with an
    ellipsis, "umbr…".

    Parameters
    ----------
    tokenizer : PreTrainedTokenizer
        CLIP's, or one of sentencepiece (T5, Gemma), of byte pairs (Qwen, Llama 3) or of word pieces (BERT).
    ids : sequence of int
        Numbers of the tokens. Special tokens and padding may be anywhere; what follows CLIP's end token is not read.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    if any(piece.endswith(_END_OF_WORD) for piece in pieces) or tokenizer.tokenize("a")[-1].endswith(_END_OF_WORD):
        return _split_at_ends(tokenizer, ids)  # a text of learned tokens alone has no mark, but a letter has
    return _split_by_characters(tokenizer, ids, pieces)


def _split_at_ends(tokenizer, ids):
    """Group CLIP's pieces, of which the last one of a word is marked."""
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


def _split_by_characters(tokenizer, ids, pieces):
    """Group the pieces of other tokenizers by the characters that they spell, special tokens left out."""
    special, read = special_ids(tokenizer), _reader(tokenizer)
    pieced = {*special, tokenizer.unk_token_id}
    learned = {number: name for name, number in tokenizer.get_added_vocab().items() if number not in pieced}
    found: list[Word] = []
    spelled: list[tuple[int, bytes]] = []  # the tokens of the text since the last special or learned one
    previous = ""  # the learned token just before
    for position, (number, piece) in enumerate(zip(ids, pieces, strict=True)):
        if number in special or number in learned:
            found += _words_in(spelled)
            spelled = []
        else:
            spelled.append((position, _UNKNOWN.encode() if number == tokenizer.unk_token_id else read(piece)))
        name = learned.get(number, "")
        if name and previous and _follows(previous, name):
            found[-1] = Word(found[-1].text, (*found[-1].tokens, position))
        elif name:
            found.append(Word(name, (position,)))
        previous = name
    return found + _words_in(spelled)


def _reader(tokenizer) -> Callable[[str], bytes]:
    """Choose how to read the UTF-8 bytes of a tokenizer's pieces, by the sign that it writes for a space."""
    sample = "".join(tokenizer.tokenize("a a"))
    if "Ġ" in sample:  # byte pairs
        return lambda piece: bytes(_byte_signs()[sign] for sign in piece)
    if "▁" in sample:  # sentencepiece
        return lambda piece: bytes.fromhex(m[1]) if (m := _BYTE.fullmatch(piece)) else piece.replace("▁", " ").encode()
    if " " in sample:  # a token for every byte
        return lambda piece: piece.encode("latin-1")
    return lambda piece: piece.removeprefix("##").encode() if piece.startswith("##") else f" {piece}".encode()


@cache
def _byte_signs() -> dict[str, int]:
    """Map the signs of byte pair encoding to bytes: a byte that prints is itself, the others follow from "Ā" on."""
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _words_in(spelled):
    """Group tokens, as (position, bytes), into words: letters, digits, emoji or other signs in a row."""
    owners = [position for position, data in spelled for _ in data]  # the token of each byte
    text = b"".join(data for _, data in spelled).decode(errors="surrogateescape")  # a stray byte is a character, too
    found: list[Word] = []
    kind, last, byte = "space", -1, 0  # of the character before: its kind and last token; and where the next one starts
    for character in text:
        size = len(character.encode(errors="surrogateescape"))
        tokens = tuple(dict.fromkeys(owners[byte : byte + size]))
        byte += size
        before, kind = kind, _kind(character, kind)
        if not found or kind != before or (kind == "no spaces" and tokens[0] > last):
            found.append(Word("", ()))
        found[-1] = Word(found[-1].text + character, tuple(dict.fromkeys((*found[-1].tokens, *tokens))))
        last = tokens[-1]
    return [word._replace(text=_whole(word.text)) for word in found if word.text.strip()]


def _whole(text) -> str:
    """Write an ellipsis for a letter of which the window cut off some bytes."""
    whole = text.encode(errors="surrogateescape").decode(errors="ignore")
    return whole if whole == text else whole + _CUT


def _kind(character, before) -> str:
    """Tell what kind of word a character belongs to, which may be that of the character before."""
    category = unicodedata.category(character)
    if character.isspace():
        return "space"
    if category[0] == "M" or category in ("Cf", "Cs"):  # accents, what joins the parts of an emoji, half a letter
        return before if before != "space" else "letters"
    if category[0] == "L" or character == _UNKNOWN:
        return "no spaces" if unicodedata.name(character, "").startswith(_NO_SPACES) else "letters"
    if category in ("So", "Sk"):  # emoji, and the colors of their skin
        return "symbols"
    return "digits" if category[0] == "N" else "signs"


def special_ids(tokenizer) -> set[int]:
    """Collect the numbers of tokens that stand for no text: start, end, padding, the marks of a chat."""
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return {*tokenizer.all_special_ids, *marked} - ({tokenizer.unk_token_id} - ends)  # an unknown piece stands for text


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
                found.append(tuple(dict.fromkeys(tokens)))  # a token may belong to two words
            if not letters.startswith(joined):
                break
    return found


def of_prompt(words: Sequence[Word], prompts: Sequence[str]) -> list[Word] | None:
    """Keep those words of a text that are one of the prompts, not of a template around it; None where no prompt fits.

    The longest prompt that fits is taken, at its last place: templates put it last. A prompt may also be cut off by
    the end of the text. Where the tokenizer did not know some letters, all words are kept, with the prompt's letters.
    """
    if any(_UNKNOWN in word.text for word in words):
        return _named(words, prompts)  # tokenizers that do not know every letter are of encoders without a template
    spelled = _spelled(words)
    ends = list(accumulate(map(len, spelled), initial=0))  # of words, in letters; the first one starts at 0
    joined, fits = "".join(spelled), (0, 0, 0, "")  # how many letters fit, the words from and up to, and the prompt
    for prompt in prompts:
        if not (letters := _compared(prompt)):
            continue
        whole = [i for i, end in enumerate(ends[:-1]) if joined.startswith(letters, end) and end + len(letters) in ends]
        # one word at the end of another text may be the first one of the prompt by chance, several are not
        cut = [i for i, end in enumerate(ends[:-2]) if letters.startswith(joined[end:])]
        if whole:
            fits = max(fits, (len(letters), whole[-1], ends.index(ends[whole[-1]] + len(letters)), prompt))
        elif cut:
            fits = max(fits, (len(joined) - ends[cut[0]], cut[0], len(words), prompt))
    count, first, stop, prompt = fits
    return _marked(words[first:stop], count, prompt) if count else None


def _named(words, prompts):
    """Write words as the prompt has them whose words differ from them in unknown letters only."""
    for own in map(_words_of, prompts):
        known = [map(_compared, word.text.split(_UNKNOWN)) for word in words]
        patterns = [".+".join(map(re.escape, parts)) for parts in known]
        if len(words) <= len(own) and all(map(re.fullmatch, patterns, map(_compared, own))):
            return [word._replace(text=text) for word, text in zip(words, own, strict=False)]
    return list(words)


def _words_of(prompt) -> list[str]:
    return [word.text for word in _words_in([(i, letter.encode()) for i, letter in enumerate(prompt)])]


def _marked(words, count, prompt):
    """Write an ellipsis behind the last word where only its start was read: so many letters of the prompt were."""
    whole = count in accumulate(len(_compared(text)) for text in _words_of(prompt)) or words[-1].text.endswith(_CUT)
    return list(words) if whole else [*words[:-1], words[-1]._replace(text=words[-1].text + _CUT)]


def merge(lists: Sequence[Sequence[Word]]) -> list[Word]:
    """Join words that several text encoders read: the same word in the order of the text is one, with all its tokens.

    Words are told by their letters and their order, so that repeated ones stay apart. Where one tokenizer makes several
    words of another's one, they are that one.
    """
    return reduce(_merge, lists, [])


def _merge(first, second):
    spelled = [[_compared(word.text) for word in words] for words in (first, second)]
    merged = []
    for change, i, j, k, m in SequenceMatcher(None, *spelled, autojunk=False).get_opcodes():
        if change == "equal":
            merged += [_joined([one], [other]) for one, other in zip(first[i:j], second[k:m], strict=True)]
        else:
            merged += _merge_run(first[i:j], second[k:m])
    return merged


def _merge_run(first, second):
    """Join words up to every letter at which one ends in both lists, where these spell the same; then come the rest."""
    pair, spelled = (first, second), (_spelled(first), _spelled(second))
    letters = ["".join(words) for words in spelled]
    if not (letters[0].startswith(letters[1]) or letters[1].startswith(letters[0])):
        return [*first, *second]
    ends = [list(accumulate(map(len, words))) for words in spelled]
    for words, own, other in ((first, *ends), (second, *reversed(ends))):
        if words and words[-1].text.endswith(_CUT):  # goes to the word that it is the start of
            own[-1] = next((end for end in other if end >= own[-1]), own[-1])
    merged, starts = [], [0, 0]
    for end in sorted(set(ends[0]) & set(ends[1])):
        stops = [own.index(end) + 1 for own in ends]
        merged.append(_joined(*(words[start:stop] for words, start, stop in zip(pair, starts, stops, strict=True))))
        starts = stops
    return [*merged, *first[starts[0] :], *second[starts[1] :]]


def _joined(first, second) -> Word:
    """Make one word of words with the same letters, written as where it is the fewest, and not cut off."""
    written = min((first, second), key=lambda words: (len(words), words[-1].text.endswith(_CUT)))
    tokens = {position for word in (*first, *second) for position in word.tokens}
    return Word("".join(word.text for word in written), tuple(sorted(tokens)))


def _spelled(words) -> list[str]:
    """Spell words by the letters to compare; the last one may be cut off."""
    last = [word.text.removesuffix(_CUT) for word in words[-1:]]
    return [_compared(text) for text in [*(word.text for word in words[:-1]), *last]]


def _compared(text) -> str:
    return unicodedata.normalize("NFKC", _letters(text))  # sentencepiece writes "½" as "1⁄2"


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).lower().split())  # as the tokenizer, which normalizes too


def _spell(tokenizer, ids, learned) -> str:
    if ids[0] in learned:
        return learned[ids[0]]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text.replace(_END_OF_WORD, "").strip()  # a copied tokenizer leaves the marks in


def _list(words):
    return ", ".join(repr(word.text) for word in words) or "none"
