"""Group the tokens of a text into words by the characters that they spell, whichever tokenizer made them."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from transformers.convert_slow_tokenizer import bytes_to_unicode

from .words import Word

__all__ = ["CUT", "UNKNOWN", "split", "words_in"]

CUT = "…"  # how a word is marked of which the window cut off the end
UNKNOWN = "\ufffd"  # stands for what a tokenizer has no piece for
_END_OF_WORD = "</w>"  # how CLIP's tokenizer marks the last piece of a word
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # sentencepiece's piece for a byte of a character that it has no piece for
_BYTES = {sign: byte for byte, sign in bytes_to_unicode().items()}  # what byte pair encoding writes for each byte
_NO_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")  # scripts that put none between words


def split(tokenizer, ids: Sequence[int]) -> list[Word]:
    """Group the tokens of a text into words, in order, as the tokenizer writes them (CLIP's in lower case).

    Words are letters, digits, emoji or other signs in a row; in scripts without spaces (Chinese) each character is one.
    Their tokens are those that spell them: a token that holds parts of two words, as "-light", belongs to both. Special
    tokens are no words. A learned token (textual inversion) is a word, with all its vectors and the capitals of its
    name. What CLIP's window cut off is written with an ellipsis, "umbr…"; what follows its end token is not read.

    The tokenizer is CLIP's, or one of sentencepiece (T5, Gemma), byte pairs (Qwen, Llama 3) or word pieces (BERT).
    """
    ids, read = list(ids), _reader(tokenizer)
    first, end, unknown = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} - {unknown}
    special |= {first, end, tokenizer.pad_token_id}  # an unknown piece stands for text unless it is one of these
    if marked := _END_OF_WORD in tokenizer.tokenize("a")[-1]:  # what CLIP pads with may be a sign of the text as well
        ids, special = ids[: [*ids, end].index(end)], {first}
    names = {number: name for name, number in tokenizer.get_added_vocab().items() if number not in {*special, unknown}}
    found: list[Word] = []
    spelled: list[tuple[int, bytes]] = []  # the tokens of the text since the last special or learned one
    for position, (number, piece) in enumerate(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)):
        if number not in special and number not in names:
            spelled.append((position, UNKNOWN.encode() if number == unknown else read(piece)))
            continue
        found += _words_of(spelled)
        spelled = []
        if number in names:
            _add_learned(found, names[number], position)
    found += _words_of(spelled)
    if marked and spelled and not spelled[-1][1].endswith(b" "):
        found[-1] = found[-1]._replace(text=found[-1].text.removesuffix(CUT) + CUT)
    return found


def words_in(text: str) -> list[Word]:
    """Split a text into words as a tokenizer's tokens are; positions are those of its characters."""
    return _group((character, [i]) for i, character in enumerate(text))


def _add_learned(found, name, position):
    """Add a learned token; the vectors of one word are "<cat>", "<cat>_1", "<cat>_2", in a row."""
    stem, _, number = name.rpartition("_")
    text, tokens = found[-1] if found else ("", ())
    if text == stem and number == str(len(tokens)) and tokens[-1] == position - 1:
        found[-1] = Word(text, (*tokens, position))
    else:
        found.append(Word(name, (position,)))


def _reader(tokenizer) -> Callable[[str], bytes]:
    """Choose how to read the UTF-8 bytes of a tokenizer's pieces, by the signs that it writes for spaces."""
    sample = "".join(tokenizer.tokenize("a a"))
    if _END_OF_WORD in sample:  # CLIP's byte pairs
        return lambda piece: bytes(_BYTES.get(sign, ord(" ")) for sign in piece.replace(_END_OF_WORD, " "))
    if "Ġ" in sample:  # other byte pairs
        return lambda piece: bytes(_BYTES[sign] for sign in piece)
    if "▁" in sample:  # sentencepiece
        return lambda piece: bytes.fromhex(m[1]) if (m := _BYTE.fullmatch(piece)) else piece.replace("▁", " ").encode()
    if " " in sample:  # a token for every byte
        return lambda piece: piece.encode("latin-1")
    return lambda piece: piece.removeprefix("##").encode() if piece.startswith("##") else f" {piece}".encode()


def _words_of(spelled) -> list[Word]:
    """Group tokens, as (position, bytes), into words."""
    owners = [position for position, data in spelled for _ in data]  # the token of each byte
    text = b"".join(data for _, data in spelled).decode(errors="surrogateescape")  # a stray byte is a character, too
    characters, byte = [], 0
    for character in text:
        size = len(character.encode(errors="surrogateescape"))
        characters.append((character, owners[byte : byte + size]))
        byte += size
    return [word._replace(text=_whole(word.text)) for word in _group(characters)]


def _group(characters: Iterable[tuple[str, Sequence[int]]]) -> list[Word]:
    """Group characters, each with its tokens, into words."""
    found: list[Word] = []
    kind = "space"  # of the character before
    for character, tokens in characters:
        if kind == "space" or not _is_mark(character):
            before, kind = kind, _kind(character)
            if kind == "space":
                continue
            if kind != before or kind == "no spaces":
                found.append(Word("", ()))
        text, known = found[-1]
        found[-1] = Word(text + character, tuple(dict.fromkeys((*known, *tokens))))
    return found


def _is_mark(character) -> bool:
    """Tell whether a character is an accent, what joins the parts of an emoji, or half a letter."""
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf", "Cs")


def _kind(character) -> str:
    """Tell what kind of word a character belongs to."""
    category = unicodedata.category(character)
    if character.isspace():
        return "space"
    if category[0] == "L" or character == UNKNOWN or _is_mark(character):
        return "no spaces" if unicodedata.name(character, "").startswith(_NO_SPACES) else "letters"
    if category in ("So", "Sk"):  # emoji, and the colors of their skin
        return "symbols"
    return "digits" if category[0] == "N" else "signs"


def _whole(text) -> str:
    """Write an ellipsis for a letter of which the window cut off some bytes."""
    whole = text.encode(errors="surrogateescape").decode(errors="ignore")
    return whole if whole == text else whole + CUT
