"""The words of a denoiser's text are found by content: its rows are those that the pipeline's text encoders gave."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from small_pipelines import encoders
from small_pipelines.encoders import OTHER, PROMPT
from torch import nn
from transformers import BertTokenizer, CLIPTextModelWithProjection

from attnlab.recording.encoded import EncodedTexts
from attnlab.recording.words import Word, find

CAR = "a car in the night and a car"
NOISE = torch.Generator().manual_seed(0)


@contextmanager
def listening(**parts):
    """The texts that the encoders among some parts of a pipeline read inside the block."""
    texts = EncodedTexts(SimpleNamespace(components=parts))
    handles = texts.listen()
    try:
        yield texts
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def encode(encoder, tokenizer, text, **how):
    """All that an encoder gives for a text, or for several, padded to the longest one."""
    how = {"padding": True, "truncation": True} | how
    tokens = tokenizer(text, return_tensors="pt", **how)
    return encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True)


def shown(read):
    return {" ".join(map(str, word.tokens)): word.text for word in read.words}


@pytest.fixture(scope="module")
def t5():
    tokenizer = encoders.t5_tokenizer()
    return {"text_encoder": encoders.t5(tokenizer, 32), "tokenizer": tokenizer}


@pytest.fixture(scope="module")
def qwen():
    tokenizer = encoders.qwen_tokenizer()
    return {"text_encoder": encoders.qwen_vision(tokenizer, 32), "tokenizer": tokenizer}


@pytest.fixture(scope="module")
def gemma():
    tokenizer = encoders.gemma_tokenizer()
    return {"text_encoder": encoders.gemma2(tokenizer, 16), "tokenizer": tokenizer}


def clip(width, seed):
    return encoders.clip(width, CLIPTextModelWithProjection, seed)


def test_a_repeated_word(t5):
    with listening(**t5) as texts:
        text = encode(*t5.values(), CAR, padding="max_length", max_length=20).last_hidden_state[0]
    read = texts.read([text], [CAR])
    assert read == ([Word(word, (i,)) for i, word in enumerate(CAR.split())], 0, True)


def test_embeddings_of_another_origin_have_no_words(t5):
    with listening(**t5) as texts:
        text = encode(*t5.values(), CAR).last_hidden_state[0]
    assert texts.read([torch.randn(text.shape, generator=NOISE)], [CAR]) is None
    assert texts.read([torch.zeros_like(text)], [CAR]) is None
    assert texts.read([text[:, :16]], [CAR]) is None  # narrower than all that the encoder gave
    assert texts.token_ids(text) is not None
    texts.forget()
    assert texts.read([text], [CAR]) is None and texts.token_ids(text) is None
    encode(*t5.values(), CAR)  # the hooks are gone
    assert texts.read([text], [CAR]) is None


def test_an_embedding_may_be_rounded(t5):
    with listening(**t5) as texts:
        text = encode(*t5.values(), CAR).last_hidden_state[0]
    assert len(texts.read([text.bfloat16()], [CAR]).words) == 8
    assert len(texts.read([text * 1.004], [CAR]).words) == 8
    assert texts.read([text * 1.006], [CAR]) is None


def test_a_text_of_some_rows_from_elsewhere(t5):
    """Register tokens ahead of the text, and rows that were set to zero behind it."""
    with listening(**t5) as texts:
        text = encode(*t5.values(), "a red car").last_hidden_state[0]
    registers, zeros = torch.randn(8, 32, generator=NOISE), torch.zeros(5, 32)
    read = texts.read([torch.cat([registers, text, zeros])], ["a red car"])
    assert read.words == [Word("a", (8,)), Word("red", (9,)), Word("car", (10,))] and read.ends


def test_two_texts_of_one_call(t5):
    with listening(**t5) as texts:
        made = encode(*t5.values(), [CAR, OTHER]).last_hidden_state
        later = encode(*t5.values(), "a house").last_hidden_state
    first, second, third = (texts.read([text], [CAR, OTHER]) for text in (*made, later[0]))
    assert [word.text for word in first.words] == CAR.split() and [word.text for word in second.words] == OTHER.split()
    assert [word.tokens for word in second.words] == [(0,), (1,), (2,)]
    assert first.order == second.order == 0 and third.order == 1


def test_the_latest_call_of_the_same_text(t5):
    with listening(**t5) as texts:
        for text in (CAR, OTHER, CAR):
            made = encode(*t5.values(), text).last_hidden_state[0]
    assert texts.read([made], [CAR]).order == 2


def test_old_calls_are_forgotten_and_still_count(t5):
    with listening(**t5) as texts:
        first = encode(*t5.values(), CAR).last_hidden_state[0]
        for _ in range(31):
            other = encode(*t5.values(), OTHER).last_hidden_state[0]
        assert texts.read([first], [CAR]).order == 0
        assert texts.read([other], [OTHER]).order == 31
        encode(*t5.values(), OTHER)
        assert texts.read([first], [CAR]) is None
        texts.forget()
        encode(*t5.values(), OTHER)
    assert texts.read([other], [OTHER]).order == 33


# Several text encoders


@pytest.fixture(scope="module")
def stable_diffusion_3():
    """The parts that read its text, and a way to put it together: CLIP's side by side, and below it T5's."""
    tokenizer = encoders.t5_tokenizer()
    parts = {"text_encoder": clip(16, 0), "text_encoder_2": clip(12, 1), "text_encoder_3": encoders.t5(tokenizer, 32)}
    parts |= {
        "tokenizer": encoders.clip_tokenizer(),
        "tokenizer_2": encoders.clip_tokenizer(),
        "tokenizer_3": tokenizer,
    }

    def text(prompt, second=None, third=None):
        rows = [
            encode(parts[f"text_encoder{n}"], parts[f"tokenizer{n}"], other or prompt, padding="max_length")
            for n, other in (("", None), ("_2", second), ("_3", third))
        ]
        side = torch.cat([rows[0].hidden_states[-2], rows[1].hidden_states[-2]], -1)
        return torch.cat([nn.functional.pad(side, (0, 4)), rows[2].last_hidden_state], 1)[0]

    return parts, text


def test_a_word_that_two_encoders_read(stable_diffusion_3):
    parts, text = stable_diffusion_3
    with listening(**parts) as texts:
        conditional, negative = text(PROMPT), text(OTHER)
    read = texts.read([conditional], [PROMPT, OTHER])
    window = 48  # of CLIP
    assert read.words[:3] == [
        Word("a", (1, window)),
        Word("burning", (2, window + 1, window + 2)),
        Word("house", (3, window + 3)),
    ]
    assert [word.text for word in read.words] == PROMPT.split()
    assert read.words[-1].tokens == (10, window + 10) and read.ends and read.order == 0
    read = texts.read([negative], [PROMPT, OTHER])
    assert read.words == [Word(word, (1 + i, window + i)) for i, word in enumerate(OTHER.split())]
    assert read.order == 3


def test_words_behind_one_encoders_window(stable_diffusion_3):
    parts, text = stable_diffusion_3
    prompt = "tree " * 45 + "house car and tree"
    with listening(**parts) as texts:
        read = texts.read([text(prompt)], [prompt])
    assert [word.text for word in read.words] == prompt.split()
    assert read.words[44:] == [
        Word("tree", (45, 92)),
        Word("house", (46, 93)),
        Word("car", (94,)),
        Word("and", (95,)),
        Word("tree", (96,)),
    ]


def test_another_text_for_one_of_the_encoders(stable_diffusion_3):
    parts, text = stable_diffusion_3
    with listening(**parts) as texts:
        read = texts.read([text("a red car", third="a blue car")], ["a red car", "a blue car"])
    assert shown(read) == {
        **{"1": "a", "2": "red", "3": "car"},
        **{"48": "a", "49": "blue", "50": "car"},
    }


def test_a_text_beside_the_prompt_adds_no_words(t5):
    """HunyuanImage has another encoder read what is quoted in the prompt, in a template of its own."""
    other = encoders.t5_tokenizer()
    with listening(**t5, text_encoder_2=encoders.t5(other, 24), tokenizer_2=other) as texts:
        encoder = texts._encoders[1][0]
        rows = [encode(*t5.values(), "a car of fire"), encode(encoder, other, "the system of fire")]
    read = texts.read([made.last_hidden_state[0] for made in rows], ["a car of fire"])
    assert shown(read) == {"0": "a", "1": "car", "2": "of", "3": "fire"}


def test_rows_count_on_through_several_tensors(t5):
    """HiDream is given the rows of T5 and those of every layer of Llama."""
    tokenizer = encoders.qwen_tokenizer()
    model = encoders.qwen3(tokenizer, 24)
    with listening(**t5, text_encoder_4=model, tokenizer_4=tokenizer) as texts:
        rows = encode(*t5.values(), "a burning car", padding="max_length", max_length=10).last_hidden_state[0]
        layers = torch.stack(encode(model, tokenizer, "a burning car").hidden_states[1:])[:, 0]
    read = texts.read([rows, layers], ["a burning car"])
    assert shown(read) == {"0 10": "a", "1 2 11 12 13": "burning", "3 14": "car"}
    assert not read.ends  # the last row is the last word's


# Templates

TEMPLATE = "<|im_start|>system\nthe color of the image by size<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
TEMPLATE += "<|im_start|>assistant\n"


@pytest.mark.parametrize("prompt", ["a car by the house", "the image of a car"])
@pytest.mark.parametrize("dropped", [False, True])
def test_words_of_a_template_are_no_words(qwen, prompt, dropped):
    tokenizer = qwen["tokenizer"]
    start = len(tokenizer(TEMPLATE.split("{}")[0]).input_ids)
    with listening(**qwen) as texts:
        text = encode(*qwen.values(), TEMPLATE.format(prompt)).hidden_states[-1][0]
    read = texts.read([text[start:] if dropped else text], ["a tree", prompt])
    first = 0 if dropped else start
    assert read.words == [Word(word, (first + i,)) for i, word in enumerate(prompt.split())]
    assert read.ends  # the end of the user's part


def test_a_prompt_cut_off_by_the_rows(qwen):
    prompt = "a car by the house"
    start = len(qwen["tokenizer"](TEMPLATE.split("{}")[0]).input_ids)
    with listening(**qwen) as texts:
        text = encode(*qwen.values(), TEMPLATE.format(prompt)).hidden_states[-1][0, start:][:3]
    read = texts.read([text], [prompt])
    assert shown(read) == {"0": "a", "1": "car", "2": "by"} and not read.ends


def test_a_prompt_cut_off_by_the_window(t5):
    with listening(**t5) as texts:
        text = encode(*t5.values(), "a burning car", max_length=3).last_hidden_state[0]
    read = texts.read([text], ["a burning car"])
    assert shown(read) == {"0": "a", "1": "burn…"} and read.ends


def test_a_template_around_nothing(qwen):
    with listening(**qwen) as texts:
        text = encode(*qwen.values(), TEMPLATE.format(" ")).hidden_states[-1][0]
    assert texts.read([text], ["a car", " "]).words == []
    every = texts.read([text], ["a car"]).words  # what else it may be is not known
    assert [word.text for word in every][:3] == ["system", "the", "color"] and every[-1].text == "assistant"


def test_a_prompt_that_the_pipeline_rewrote(t5):
    with listening(**t5) as texts:
        text = encode(*t5.values(), "a red car").last_hidden_state[0]
    assert shown(texts.read([text], ["a red, car"])) == {"0": "a", "1": "red", "2": "car"}


def test_first_and_last_rows(gemma):
    """Sana gives the start token and the end of a longer text."""
    prompt, instruction = "a car by the house", "the system of the image : by size and color "
    with listening(**gemma) as texts:
        how = {"padding": "max_length", "padding_side": "right"}
        long = encode(*gemma.values(), instruction + prompt, max_length=80, **how).last_hidden_state[0]
        short = encode(*gemma.values(), "a", max_length=24, **how).last_hidden_state[0]
    count = len(gemma["tokenizer"](instruction.strip()).input_ids)
    read = texts.read([long[[0, *range(count, 80)]]], [prompt, "a"])
    assert read.words == [Word(word, (1 + i,)) for i, word in enumerate(prompt.split())]
    assert read.order == 0 and not read.ends  # though the start token of the second call is the same
    read = texts.read([short], [prompt, "a"])
    assert read.words == [Word("a", (1,))] and read.order == 1 and not read.ends


# Kinds of text encoders


def test_padding_on_the_left():
    tokenizer = encoders.glm_tokenizer()
    model = encoders.glm(tokenizer, 16)
    with listening(text_encoder=model, tokenizer=tokenizer) as texts:
        made = encode(model, tokenizer, ["a burning car and a car", "a car"], padding_side="left")
    long, short = (texts.read([text], ["a burning car and a car", "a car"]) for text in made.hidden_states[-2])
    count = made.hidden_states[-2].shape[1]
    assert [word.text for word in long.words] == "a burning car and a car".split()
    assert [word.tokens for word in short.words] == [(count - 2,), (count - 1,)] and not short.ends


def test_characters_of_several_bytes(qwen):
    prompt = "a Straße 🔥 und 房子"
    with listening(**qwen) as texts:
        text = encode(*qwen.values(), TEMPLATE.format(prompt)).hidden_states[-1][0]
    words = texts.read([text], [prompt]).words
    assert [word.text for word in words] == ["a", "Straße", "🔥", "und", "房", "子"]
    assert [len(word.tokens) for word in words] == [1, 7, 4, 2, 3, 3]


def test_layers_side_by_side():
    """FLUX.2 puts three hidden states of every token side by side."""
    tokenizer = encoders.qwen_tokenizer()
    model = encoders.qwen3(tokenizer, 24)
    with listening(text_encoder=model, tokenizer=tokenizer) as texts:
        text = torch.cat(encode(model, tokenizer, CAR).hidden_states[1:], -1)[0]
    assert [word.tokens for word in texts.read([text], [CAR]).words] == [(i,) for i in range(8)]


def test_learned_tokens():
    tokenizer = encoders.clip_tokenizer.__wrapped__()
    tokenizer.add_tokens(["<Toy>", "<Toy>_1"])
    model = clip(16, 0)
    model.resize_token_embeddings(len(tokenizer))
    with listening(text_encoder=model, tokenizer=tokenizer) as texts:
        text = encode(model, tokenizer, "a <Toy> <Toy>_1 car", padding="max_length").hidden_states[-2][0]
    assert find(texts.read([text], ["a <Toy> car"]).words, "<Toy>") == (2, 3)
    assert shown(texts.read([text], [])) == {"1": "a", "2 3": "<Toy>", "4": "car"}


def test_hidden_states_behind_probabilities(qwen):
    """As a tuple of all that a language model gives, where the first part is no embedding."""
    ids = qwen["tokenizer"](CAR, return_tensors="pt").input_ids
    with listening(**qwen) as texts, torch.no_grad():
        made = qwen["text_encoder"](ids, output_hidden_states=True, return_dict=False, use_cache=False)
    assert made[0].shape[-1] != made[-1][-1].shape[-1]
    assert [word.tokens for word in texts.read([made[-1][-1][0]], [CAR]).words] == [(i,) for i in range(8)]


@pytest.mark.parametrize("keyword", [False, True])
def test_outputs_as_tuples(t5, keyword):
    ids = t5["tokenizer"](CAR, return_tensors="pt").input_ids
    with listening(**t5) as texts, torch.no_grad():
        encoder = t5["text_encoder"]
        made = encoder(input_ids=ids, return_dict=False) if keyword else encoder(ids, return_dict=False)
    assert len(texts.read([made[0][0]], [CAR]).words) == 8


@pytest.mark.parametrize("tuples", [False, True])
def test_hidden_states_with_and_without_the_last_norm(tuples):
    """`clip_skip=` of Stable Diffusion takes them with it, SDXL without."""
    tokenizer, model = encoders.clip_tokenizer(), clip(16, 0)
    ids = tokenizer(CAR, return_tensors="pt").input_ids
    with listening(text_encoder=model, tokenizer=tokenizer) as texts, torch.no_grad():
        output = model(ids, output_hidden_states=True, return_dict=not tuples)
    hidden = output[2] if tuples else output.hidden_states
    norm = model.text_model.final_layer_norm
    for text in (*hidden, norm(hidden[-2]), norm(hidden[-1])):
        assert texts.token_ids(text[0]) == ids[0].tolist()
        assert [word.tokens for word in texts.read([text[0]], [CAR]).words] == [(i,) for i in range(1, 9)]


def test_token_ids_of_texts_that_differ_in_one_token():
    tokenizer, model = encoders.clip_tokenizer(), clip(16, 0)
    ids = tokenizer([CAR, CAR.rpartition(" ")[0] + " tree"], return_tensors="pt").input_ids
    assert (ids[0] != ids[1]).sum() == 1
    with listening(text_encoder=model, tokenizer=tokenizer) as texts, torch.no_grad():
        made = model(ids).last_hidden_state
    assert [texts.token_ids(text) for text in made] == ids.tolist()
    rounded = made + 1e-6 * torch.randn(made.shape, generator=NOISE)  # as by another order of sums
    assert [texts.token_ids(text) for text in rounded] == ids.tolist()


def test_token_ids_of_two_encoders_side_by_side(stable_diffusion_3):
    parts, _ = stable_diffusion_3
    parts = {name: part for name, part in parts.items() if not name.endswith("_3")}
    with listening(**parts) as texts:
        rows = [
            encode(parts[f"text_encoder{n}"], parts[f"tokenizer{n}"], prompt, padding="max_length").hidden_states[-2][0]
            for n, prompt in (("", PROMPT), ("_2", OTHER))
        ]
    text = torch.cat(rows, -1)
    for n, (prompt, second) in enumerate([(PROMPT, False), (OTHER, True)]):
        ids = parts["tokenizer"](prompt, padding="max_length").input_ids
        assert texts.token_ids(text, second=second) == ids
        assert texts.token_ids(rows[n], second=not second) is None
    with listening(text_encoder=parts["text_encoder_2"], text_encoder_2=None, tokenizer=parts["tokenizer"]) as texts:
        text = encode(parts["text_encoder_2"], parts["tokenizer"], PROMPT).hidden_states[-2][0]
    assert texts.token_ids(text) is not None and texts.token_ids(text, second=True) is None


class Lookup(nn.Module):
    """A text encoder of one layer, which gives equal tokens equal rows; tokens before texts, as ChatGLM does."""

    def __init__(self, size, width):
        super().__init__()
        self.table = nn.Embedding(size, width)

    def forward(self, input_ids):
        return (self.table(input_ids).transpose(0, 1),)


def test_equal_rows_are_told_by_their_neighbors():
    tokenizer = encoders.t5_tokenizer()
    model = Lookup(len(tokenizer), 600)
    with listening(text_encoder=model, tokenizer=tokenizer) as texts, torch.no_grad():
        ids = tokenizer(CAR, padding="max_length", max_length=30, return_tensors="pt").input_ids
        text = model(ids)[0][:, 0]
    read = texts.read([text], [CAR])
    assert [word.tokens for word in read.words] == [(i,) for i in range(8)] and read.ends
    assert texts.calls[0].made.shape == (1, 1, 30, 200)  # some of the columns are enough


def test_texts_end_with_a_separator():
    """BERT's do, which has no end token."""
    pieces = "[PAD] [UNK] [CLS] [SEP] [MASK] a house burn ##ing".split()
    tokenizer = BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)})
    model = Lookup(len(pieces), 16)
    with listening(text_encoder=model, tokenizer=tokenizer) as texts, torch.no_grad():
        ids = tokenizer("A burning house", padding="max_length", max_length=9, return_tensors="pt").input_ids
        text = model(ids)[0][:, 0]
    read = texts.read([text], ["a burning house"])
    assert shown(read) == {"1": "a", "2 3": "burning", "4": "house"} and read.ends


def test_what_gives_no_embeddings_is_not_remembered(qwen):
    ids = qwen["tokenizer"](CAR, return_tensors="pt").input_ids
    with listening(**qwen) as texts, torch.no_grad():
        qwen["text_encoder"](input_ids=ids)  # the next word's probabilities, as where it writes a prompt
        embeddings = qwen["text_encoder"].get_input_embeddings()(ids)
        qwen["text_encoder"](inputs_embeds=embeddings, output_hidden_states=True)
    assert texts.calls == []


@pytest.mark.parametrize("name", ["tokenizer", "processor"])
def test_the_tokenizer_of_a_processor(qwen, name):
    processor = encoders.qwen_processor(qwen["tokenizer"])
    with listening(text_encoder=qwen["text_encoder"], **{name: processor}) as texts:
        text = encode(*qwen.values(), CAR).hidden_states[-1][0]
    assert [word.tokens for word in texts.read([text], [CAR]).words] == [(i,) for i in range(8)]


def test_an_encoder_without_a_tokenizer(t5):
    with listening(text_encoder=t5["text_encoder"], tokenizer=None) as texts:
        text = encode(*t5.values(), CAR).last_hidden_state[0]
    read = texts.read([text], [CAR])
    assert read.words == [] and not read.ends and texts.token_ids(text) is not None
