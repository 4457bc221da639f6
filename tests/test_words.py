"""Words are found by their characters: pieces of one stay together, equal ones stay apart."""

import copy
import pickle

import pytest

from attnlab.recording.words import Word, find, split, text_span


@pytest.fixture(scope="module")
def tokenizer(pipe):
    return pipe.tokenizer


def words_of(tokenizer, text):
    return split(tokenizer, tokenizer(text, padding="max_length").input_ids)


def test_every_domain_word_is_one_token(tokenizer):
    words = words_of(tokenizer, "a burning house, with smoke")
    assert words == [Word(w, (i + 1,)) for i, w in enumerate(("a", "burning", "house", ",", "with", "smoke"))]


@pytest.mark.parametrize("text", ["umbrella", "Été", "don't", "traffic-light 42", "ω", "🔥 fire"])
def test_unknown_text_falls_to_pieces_and_comes_back_whole(tokenizer, text):
    words = words_of(tokenizer, f"a {text} car")
    tokens = find(words, text)
    assert tokens == tuple(range(2, 2 + len(tokens)))
    assert words[-1] == Word("car", (2 + len(tokens),))


def test_learned_tokens_are_words(pipe):
    """Textual inversion: one token, and one with three vectors."""
    tokenizer = copy.deepcopy(pipe.tokenizer)
    tokenizer.add_tokens(["sks", "<blob>", "<blob>_1", "<blob>_2"])
    words = words_of(tokenizer, "a sks cat, <blob> <blob>_1 <blob>_2 car")
    assert [w.text for w in words] == ["a", "sks", "cat", ",", "<blob>", "car"]
    assert len(find(words, "<blob>")) == 3 and find(words, "sks") == (2,)
    tokenizer.add_tokens(["style", "style_1"])  # two words of their own, not the vectors of one, unless in a row
    assert [w.text for w in words_of(tokenizer, "style_1 house")] == ["style_1", "house"]
    assert [w.text for w in words_of(tokenizer, "a house style_1")] == ["a", "house", "style_1"]
    assert [w.text for w in words_of(tokenizer, "a style style_1 house")] == ["a", "style", "house"]


def test_learned_tokens_keep_their_capitals(pipe):
    """The tokenizer finds them in any case, and gives their small letters as pieces."""
    tokenizer = copy.deepcopy(pipe.tokenizer)
    tokenizer.add_tokens(["<Fire-Toy>", "<Fire-Toy>_1", "Sks", "<Cafe\u0301>"])  # the last one not in normal form C
    for text in ("a <Fire-Toy> <Fire-Toy>_1 car, Sks tree", "A <FIRE-TOY> <fire-toy>_1 car, sks tree"):
        words = words_of(tokenizer, text)
        assert [word.text for word in words] == ["a", "<Fire-Toy>", "car", ",", "Sks", "tree"]
        for query in ("<Fire-Toy>", "<fire-toy>", "< FIRE-toy >"):
            assert find(words, query) == (2, 3)
        assert find(words, "<Fire-Toy> car") == (2, 3, 4) and find(words, "sks") == find(words, "Sks") == (6,)
    for form in ("<Cafe\u0301>", "<caf\u00e9>"):
        words = words_of(tokenizer, f"a {form} car")
        assert [word.text for word in words] == ["a", "<Cafe\u0301>", "car"] and find(words, form) == (2,)


def test_of_names_that_differ_in_case_the_exact_one_is_meant():
    words = [Word(t, (i,)) for i, t in enumerate(("Car", "car", "tree"))]
    assert find(words, "Car") == (0,) and find(words, "car") == (1,)
    with pytest.raises(KeyError, match=r"'CAR' occurs 2 times"):
        find(words, "CAR")


def test_a_word_cut_by_the_window_is_marked(tokenizer):
    room = tokenizer.model_max_length - 2  # between the tokens of begin and end
    fits = room - len(tokenizer.tokenize("umbrella"))
    whole = words_of(tokenizer, "a " * fits + "umbrella")
    assert [word.text for word in whole] == ["a"] * fits + ["umbrella"]
    ids = tokenizer("a " * (room - 2) + "umbrella", padding="max_length", truncation=True).input_ids
    cut = split(tokenizer, ids)
    assert cut[-1].tokens == (room - 1, room) and cut[-1].text.endswith("…") and len(cut[-1].text) > 1
    assert "umbrella".startswith(cut[-1].text.rstrip("…"))
    with pytest.raises(KeyError, match="…'"):
        find(cut, cut[-1].text.rstrip("…"))
    ids = tokenizer("a " * (room - 1) + "Ünder", padding="max_length", truncation=True).input_ids
    assert split(tokenizer, ids)[-1] == Word("…", (room,))  # of two bytes the first


def test_a_whole_word_goes_before_words_that_spell_it():
    words = [Word(t, (i + 1,)) for i, t in enumerate("a car pet on a carpet".split())]
    assert find(words, "carpet") == (6,) and find(words, "car pet") == (6,) and find(words, "pet on") == (3, 4)


def test_a_copied_tokenizer_splits_alike(tokenizer):
    """transformers loses its way of writing words when a tokenizer is copied to another process."""
    text = "a burning house, with smoke"
    assert words_of(copy.deepcopy(tokenizer), text) == words_of(tokenizer, text)
    assert words_of(pickle.loads(pickle.dumps(tokenizer)), text) == words_of(tokenizer, text)
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["<Toy>"])
    assert [word.text for word in words_of(copy.deepcopy(changed), "a <Toy> car")] == ["a", "<Toy>", "car"]


def test_padding_is_not_text(tokenizer):
    ids = tokenizer("a car", padding="max_length").input_ids
    assert list(text_span(tokenizer, ids)) == [1, 2]
    assert split(tokenizer, tokenizer("", padding="max_length").input_ids) == []
    assert list(text_span(tokenizer, ids[1:3])) == [0, 1]


def test_find():
    words = [Word(t, (i + 1,)) for i, t in enumerate("a red car and a blue car".split())]
    assert find(words, "blue car") == (6, 7) and find(words, "Blue  Car") == (6, 7)
    assert find(words, ("car", 0)) == (3,) and find(words, ("car", 1)) == (7,)
    assert find(words, 1) == (2,) and find(words, -1) == (7,)


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        ("car", KeyError, r"occurs 2 times; ask for \('car', 0\) or \('car', 1\)"),
        ("ca", KeyError, "is not in the text; its words are 'a', 'red', 'car'"),
        ("", KeyError, "is not in the text"),
        ("red and", KeyError, "is not in the text"),
        (("car", 2), KeyError, r"there is no \('car', 2\): it occurs 2 times"),
        (None, TypeError, "not by None"),
        (("car", "0"), TypeError, r"not by \('car', '0'\)"),
        (("car",), TypeError, r"not by \('car',\)"),
        (("car", 0, 1), TypeError, r"not by \('car', 0, 1\)"),
        (slice(1, 2), TypeError, "not by slice"),
        (7, IndexError, "has 7 words"),
    ],
)
def test_what_is_not_there_is_named(query, error, message):
    words = [Word(t, (i + 1,)) for i, t in enumerate("a red car and a blue car".split())]
    with pytest.raises(error, match=message):
        find(words, query)
