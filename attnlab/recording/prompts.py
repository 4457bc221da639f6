"""Find a prompt in what text encoders read: its words get the tokens of all that spells them."""

import unicodedata
from collections.abc import Sequence
from difflib import SequenceMatcher

from .pieces import CUT, UNKNOWN
from .words import Word

__all__ = ["join", "place"]


def place(own: Sequence[Word], words: Sequence[Word]) -> list[Word] | None:
    """Give a prompt's `own` words the tokens of those `words` of an encoded text that spell them; None where none do.

    Letters are compared, as tokenizers divide and write words in ways of their own. The prompt is found at its last
    place: templates put it last. It may be cut off by the end of the text: words behind that have no tokens, and one of
    which the start was read ends in an ellipsis.
    """
    asked = [_letters_of(word) for word in own]
    prompt = "".join(asked)
    spelled = [(letter, i) for i, word in enumerate(words) for letter in _letters_of(word)]
    if any(letter == UNKNOWN for letter, _ in spelled):
        spelled = _filled(spelled, prompt)
    text = "".join(letter for letter, _ in spelled)
    starts = [at for at, (_, i) in enumerate(spelled) if at == 0 or spelled[at - 1][1] != i]
    ends = {*starts, len(text)}
    whole = [at for at in starts if text.startswith(prompt, at) and at + len(prompt) in ends]
    # one word at the end of another text may be the first one of the prompt by chance, several are not
    cut = [at for at in starts[:-1] if prompt.startswith(text[at:])]
    if not prompt or not (whole or cut):
        return None
    at, found = whole[-1] if whole else cut[0], []
    for word, letters in zip(own, asked, strict=True):
        read = spelled[at : at + len(letters)]
        tokens = {position for _, i in read for position in words[i].tokens}
        cut_off = 0 < len(read) < len(letters)
        found.append(Word(word.text[: len(read)] + CUT if cut_off else word.text, tuple(sorted(tokens))))
        at += len(letters)
    return found


def join(first: Sequence[Word], second: Sequence[Word]) -> list[Word]:
    """Join the same words, as two text encoders read them: each with all its tokens, and not cut off if one read it."""
    joined = []
    for one, other in zip(first, second, strict=True):
        text = other.text if one.text.endswith(CUT) else one.text
        joined.append(Word(text, (*one.tokens, *other.tokens)))
    return joined


def _filled(spelled, prompt):
    """Put the prompt's letters where a tokenizer has no piece for what stands there."""
    text, filled = "".join(letter for letter, _ in spelled), []
    for change, i, j, k, m in SequenceMatcher(None, text, prompt, autojunk=False).get_opcodes():
        if change == "replace" and set(text[i:j]) == {UNKNOWN}:
            filled += [(letter, spelled[min(i + n, j - 1)][1]) for n, letter in enumerate(prompt[k:m])]
        else:
            filled += spelled[i:j]
    return filled


def _letters_of(word) -> str:
    """Spell a word by letters to compare: without what tokenizers change, and without the sign of a cut."""
    text = unicodedata.normalize("NFKD", word.text.removesuffix(CUT)).lower()  # sentencepiece writes "½" as "1⁄2"
    return "".join(text.split())
