"""Words are found by their characters: pieces of one stay together, equal ones stay apart."""

import copy
import pickle
import unicodedata

import pytest
from small_pipelines import encoders
from transformers import BertTokenizer, ByT5Tokenizer

from attnlab.recording.pieces import split, words_in
from attnlab.recording.prompts import join, place
from attnlab.recording.words import Word, find, matches


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
    assert split(tokenizer, ids) == [Word("a", (1,)), Word("car", (2,))]
    assert split(tokenizer, tokenizer("", padding="max_length").input_ids) == []
    assert split(tokenizer, ids[1:3]) == [Word("a", (0,)), Word("car", (1,))]


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


# Other tokenizers


def numbered(text, start=0):
    """Words of one token each, from a position on."""
    return [Word(word, (start + i,)) for i, word in enumerate(text.split())]


HOUSE = "a burning house, fire 42 (red)"
SPLIT = ("a", "burning", "house", ",", "fire", "42", "(", "red", ")")


@pytest.mark.parametrize(
    ("make", "places"),
    [
        (encoders.t5_tokenizer, [(0,), (1, 2), (3,), (4,), (5,), (7, 8), (10,), (11, 12, 13), (14,)]),
        (encoders.gemma_tokenizer, [(1,), (2, 3, 4), (5,), (6,), (7,), (9, 10), (12,), (13,), (14,)]),
        (encoders.qwen_tokenizer, [(0,), (1, 2, 3), (4,), (5,), (6,), (8, 9), (11,), (12,), (13,)]),
        (encoders.glm_tokenizer, [(2,), (3, 4, 5), (6,), (7,), (8,), (10, 11), (13,), (14,), (15,)]),
    ],
)
def test_pieces_of_any_tokenizer_are_grouped_to_the_same_words(make, places):
    tokenizer = make()
    ids = tokenizer(HOUSE).input_ids
    expected = [Word(text, tokens) for text, tokens in zip(SPLIT, places, strict=True)]
    assert split(tokenizer, ids) == expected
    padding = [tokenizer.pad_token_id] * 3
    assert split(tokenizer, ids + padding) == expected
    moved = [Word(text, tuple(p + 3 for p in tokens)) for text, tokens in expected]
    assert split(tokenizer, padding + ids) == moved
    assert split(tokenizer, padding) == [] and split(tokenizer, []) == []


def test_pieces_of_words():
    """BERT's, where the end token is the separator and every Chinese character is a word."""
    pieces = "[PAD] [UNK] [CLS] [SEP] [MASK] a house burn ##ing , 房 子".split()
    tokenizer = BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)})
    ids = tokenizer("A burning house, 房子 car", padding="max_length", max_length=12).input_ids
    words = split(tokenizer, ids)
    assert [word.text for word in words] == ["a", "burning", "house", ",", "房", "子", "\ufffd"]
    assert [word.tokens for word in words] == [(1,), (2, 3), (4,), (5,), (6,), (7,), (8,)]
    assert find(words, "房子") == (6, 7)


def test_a_token_for_every_byte():
    tokenizer = ByT5Tokenizer()
    assert split(tokenizer, tokenizer("a glühbirne!").input_ids) == [
        Word("a", (0,)),
        Word("glühbirne", tuple(range(2, 12))),
        Word("!", (12,)),
    ]


@pytest.mark.parametrize("make", [encoders.qwen_tokenizer, encoders.gemma_tokenizer])
def test_characters_of_several_bytes(make):
    tokenizer = make()
    start = tokenizer("a").input_ids.index(tokenizer.convert_tokens_to_ids("a"))
    words = split(tokenizer, tokenizer("über 🔥, 👩‍🚒 cafe\u0301 房子").input_ids)
    texts = [unicodedata.normalize("NFC", word.text) for word in words]
    assert texts == ["über", "🔥", ",", "👩‍🚒", "café", "房", "子"]
    assert [word.tokens for word in words[:3]] == [
        tuple(range(start, start + 5)),  # of "ü" both bytes
        tuple(range(start + 6, start + 10)),  # behind the space
        (start + 10,),
    ]
    assert len(find(words, "房子")) == 6 and find(words, "café") == words[4].tokens


@pytest.fixture(scope="module")
def wide_pieces():
    """A tokenizer of which some tokens hold several characters of several kinds."""
    sentences = ["a traffic-light 一个房子 ，一个车。\n\nend.\n\n"] * 30
    return encoders.qwen_tokenizer().train_new_from_iterator(sentences, 420)


def test_a_token_of_two_words_belongs_to_both(wide_pieces):
    ids = wide_pieces("a traffic-light\n\nend.\n\n").input_ids
    assert "-light" in wide_pieces.convert_ids_to_tokens(ids)
    words = split(wide_pieces, ids)
    assert words == [
        Word("a", (0,)),
        Word("traffic", (1,)),
        Word("-", (2,)),
        Word("light", (2,)),
        Word("end", (4,)),
        Word(".", (5,)),  # one token with the empty line behind it
    ]
    assert find(words, "traffic-light") == (1, 2)


def test_without_spaces_characters_are_words(wide_pieces):
    words = split(wide_pieces, wide_pieces("房子和车").input_ids)
    assert words == [Word("房", (0,)), Word("子", (0,)), Word("和", (1, 2, 3)), Word("车", (4,))]
    assert find(words, "房子") == (0,) and find(words, "子和") == (0, 1, 2, 3)


def test_special_tokens_are_no_words_and_end_words():
    tokenizer = encoders.qwen_tokenizer()
    ids = tokenizer("<|im_start|>user\na car<|im_end|>\n<|im_start|>tree<|im_end|>").input_ids
    words = split(tokenizer, ids)
    assert [word.text for word in words] == ["user", "a", "car", "tree"]
    assert split(tokenizer, tokenizer("car<|im_end|>tree").input_ids)[1].text == "tree"
    tokenizer = encoders.t5_tokenizer()
    tokenizer.add_tokens(["<mark>"], special_tokens=True)  # not a named one
    assert [word.text for word in split(tokenizer, tokenizer("car <mark> ing").input_ids)] == ["car", "ing"]


def test_learned_tokens_of_another_tokenizer():
    tokenizer = encoders.t5_tokenizer()
    tokenizer.add_tokens(["<Toy>", "<Toy>_1"])
    words = split(tokenizer, tokenizer("a <Toy><Toy>_1 car").input_ids)
    assert [word.text for word in words] == ["a", "<Toy>", "car"] and len(words[1].tokens) == 2


def test_half_a_character_is_cut_off():
    tokenizer = encoders.qwen_tokenizer()
    ids = tokenizer("a ü").input_ids
    assert split(tokenizer, ids[:-1]) == [Word("a", (0,)), Word("…", (2,))]
    ids = tokenizer("a fireü").input_ids
    assert split(tokenizer, ids[:-1])[1].text == "fire…"


# Words of a prompt


@pytest.mark.parametrize(
    ("text", "prompt", "found"),
    [
        ("describe a red car : a red car .", "a red car", [(5,), (6,), (7,)]),  # the last place
        ("describe a red car : a red car .", "A  Redcar", [(5,), (6, 7)]),
        ("describe the car : a red car", "a red car on a road", [(4,), (5,), (6,), (), (), ()]),  # cut off
        ("a red a red", "a red a red car", [(0,), (1,), (2,), (3,), ()]),
        ("isn ' t 4 2 fire", "isn 't 42 fire", [(0,), (1,), (2,), (3, 4), (5,)]),
        ("describe the car : a red car", "a tree", None),
        ("describe the car : a red car", "", None),
        ("a red carpet", "a red car", None),  # by whole words
        ("scar", "car", None),
        ("of a", "a red car", None),  # by chance
        ("", "a", None),
        ("1⁄2 ﬁre", "½ fire", [(0,), (1,)]),
        ("u\u0308ber", "über", [(0,)]),
    ],
)
def test_words_of_the_prompt(text, prompt, found):
    own = words_in(prompt)
    expected = None if found is None else [Word(word.text, tokens) for word, tokens in zip(own, found, strict=True)]
    assert place(own, numbered(text)) == expected


def test_words_of_a_prompt_are_those_of_its_tokens():
    text = "A burning house, fire 42 (red) 👩‍🚒🔥 cafe\u0301 房子"
    tokenizer = encoders.qwen_tokenizer()
    own = [word.text for word in words_in(text)]
    assert [unicodedata.normalize("NFC", word) for word in own] == [
        *("A", "burning", "house", ",", "fire", "42", "(", "red", ")", "👩‍🚒🔥", "café", "房", "子")
    ]
    found = [word.text for word in split(tokenizer, tokenizer(text).input_ids)]
    assert found == [unicodedata.normalize("NFC", word) for word in own]
    assert words_in(" ") == []


def test_a_prompt_cut_within_a_word():
    own = words_in("a big umbrella, red")
    for text in ("image : a big umbr", "image : a big umbr…"):
        assert place(own, numbered(text))[:3] == [*numbered("a big", 2), Word("umbr…", (4,))]
        assert [word.tokens for word in place(own, numbered(text))][3:] == [(), ()]
    assert place(own, numbered("image : a big"))[:2] == numbered("a big", 2)


def test_unknown_letters_are_the_prompts():
    tokenizer = encoders.t5_tokenizer()
    prompt = "Zdzisław fire, 🔥 über"
    words = split(tokenizer, tokenizer(prompt).input_ids)
    assert [word.text for word in words] == ["Zdzis\ufffdaw", "fire", ",", "\ufffd", "\ufffdber"]
    placed = place(words_in(prompt), words)
    assert [word.text for word in placed] == ["Zdzisław", "fire", ",", "🔥", "über"]
    assert [word.tokens for word in placed] == [word.tokens for word in words]
    assert place(words_in("a car"), words) is None
    assert place(words, words) == words


def test_words_are_joined():
    own = words_in("a red umbrella on fire")
    one, other = place(own, numbered("a red umbr…")), place(own, numbered("a red umbrella on fire", 10))
    expected = [Word(word, (i, 10 + i)) for i, word in enumerate("a red umbrella".split())]
    assert join(one, other) == [*expected, Word("on", (13,)), Word("fire", (14,))]
    assert [word.text for word in join(other, one)] == [word.text for word in own]
    assert join(one, one)[2].text == "umbr…"


def test_a_token_of_two_words_counts_once_in_a_phrase():
    words = [Word("traffic", (1,)), Word("-", (2,)), Word("light", (2,))]
    assert matches(words, "traffic-light") == [(1, 2)]
