"""Texts: embedded as the pipeline itself would, words by position, and refused where they do not fit."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from test_families import build

import attnlab as al
from attnlab.recording.texts import TextEncoder


@pytest.fixture(scope="module")
def encoder(pipe):
    return TextEncoder.of(pipe)


@pytest.fixture(scope="module")
def room(pipe):
    """Tokens that a text may have, between those of its begin and end."""
    return pipe.tokenizer.model_max_length - 2


def test_as_the_pipeline_embeds_it(pipe, encoder):
    text = encoder("a burning house, with smoke")
    expected, _ = pipe.encode_prompt("a burning house, with smoke", "cpu", 1, False)
    assert torch.equal(text.embedding, expected[0])
    assert [w.text for w in text.words] == ["a", "burning", "house", ",", "with", "smoke"]
    assert text.length == 8 and text.ids[text.length - 1] == pipe.tokenizer.eos_token_id


def test_textual_inversion_with_several_vectors():
    pipe = al.load_pipeline("tiny", device="cpu")  # one of its own: its vocabulary grows
    pipe.load_textual_inversion({"<town>": torch.randn(2, 128, generator=al.seed(0))}, token="<town>")
    text = TextEncoder.of(pipe)("a <town> at night")
    expected, _ = pipe.encode_prompt("a <town> at night", "cpu", 1, False)
    assert torch.equal(text.embedding, expected[0])
    assert text.words[1] == ("<town>", (2, 3))


@pytest.mark.parametrize("text", ["", "   ", None, ["a house"]])
def test_no_text(encoder, text):
    with pytest.raises(ValueError, match="give at least one word"):
        encoder(text)


def test_beyond_the_window(encoder, room):
    said = rf"the text has {room + 4} tokens, the window {room + 2}: 'tree', 'house' would fall outside"
    with pytest.raises(ValueError, match=said):
        encoder("a " * room + "tree house")
    with pytest.raises(ValueError, match=r"'tree', 'a', 'a', 'a', 'a', 15 more words would fall outside"):
        encoder("a " * room + "tree" + " a" * 19)
    assert encoder("a " * (room - 1) + "tree").length == room + 2  # fills it to the last token


def test_words_that_would_be_lost(encoder, room):
    assert encoder.lost("a " * (room - 1) + "tree") == []
    assert encoder.lost("a " * (room - 1) + "tree house") == ["house"]
    assert encoder.lost("a " * (room - 2) + "umbrella") == ["umbrella"]  # which the window would cut


@pytest.mark.parametrize(("end", "left", "last"), [("tree smoke", 1, "tree"), ("umbrella", 2, "um…")])
def test_a_recording_says_that_its_prompt_may_be_cut(pipe, generate, room, end, left, last):
    said = f"window of {room + 2} tokens: it was read up to '{last}'; any .* is lost"
    with pytest.warns(UserWarning, match=said) as caught, al.record(pipe) as recording:
        generate("a " * (room - left) + end, steps=2)
    assert len(caught) == 1 and [word.text for word in recording.words][-1] == last
    assert len(al.daam(recording).values) == room + 2  # the cut piece has a place of its own, before the end token
    with warnings.catch_warnings(), al.record(pipe):
        warnings.simplefilter("error")
        generate("a " * (room - 1), steps=1)


def test_two_texts_at_the_same_places(pipe):
    """SDXL's `prompt_2`: the second encoder's words lie where those of the prompt do."""
    xl = StableDiffusionXLPipeline(**build("XL", pipe.tokenizer))
    xl.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 1, "guidance_scale": 4.0, "output_type": "latent"}
    with pytest.warns(UserWarning, match="prompt_2 puts other words .* 'a tree in fog': .* leave prompt_2 out"):
        with al.record(xl) as recording:
            xl("a house with smoke", prompt_2="a tree in fog", **call)
    assert recording.prompt == "a house with smoke" and al.daam(recording)["smoke"].shape == (8, 8)
    with warnings.catch_warnings(), al.record(xl, branch="both"):
        warnings.simplefilter("error", UserWarning)
        xl("a house with smoke", prompt_2="A house, with smoke".replace(",", ""), negative_prompt="fog", **call)
        xl("a house", prompt_2="a house", negative_prompt="fog", negative_prompt_2="fog", **call)


def test_learned_words_with_capitals():
    """One word everywhere; of several vectors diffusers adds the others to names in small letters alone."""
    pipe = al.load_pipeline("tiny", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    vectors = torch.randn(3, 128, generator=al.seed(0))
    pipe.load_textual_inversion({"<Fire-Toy>": vectors[:1]}, token="<Fire-Toy>")
    with al.record(pipe) as recording:
        pipe("a <Fire-Toy> car", num_inference_steps=2, output_type="latent", generator=al.seed(0))
    assert [word.text for word in recording.words] == ["a", "<Fire-Toy>", "car"]
    text, linear = TextEncoder.of(pipe)("a <Fire-Toy> car"), al.linear_daam(recording)
    assert torch.equal(text.embedding, pipe.encode_prompt("a <Fire-Toy> car", "cpu", 1, False)[0][0])
    np.testing.assert_array_equal(linear["<Fire-Toy>"], linear["<fire-toy>"])
    maps = al.ovam(recording, "<Fire-Toy>", context="a <Fire-Toy> and a {} in a tree")
    np.testing.assert_array_equal(maps["<fire-toy>"], maps["<Fire-Toy>"])
    assert [word.text for word in maps.words] == ["<Fire-Toy>"] and maps.words[0].tokens == (5,)
    assert al.daam(recording)["<Fire-Toy>"].shape == (16, 16)
    pipe.load_textual_inversion({"Toy": vectors[1:]}, token="Toy")
    for use in (TextEncoder.of(pipe), lambda text: al.record_image(pipe, np.zeros((64, 64, 3), "f"), text)):
        with pytest.warns(UserWarning, match="some of the vectors of 'Toy' only: .*token='toy'"):
            use("a Toy car")
        use("a Toy Toy_1 car")


def test_an_encoder_is_pickled_by_its_models_name(pipe, encoder):
    assert copy.deepcopy(encoder) is encoder and copy.copy(encoder) is encoder
    again = pickle.loads(pickle.dumps(encoder))
    assert again.model == "tiny" and torch.equal(again("a car").embedding, encoder("a car").embedding)
    with pytest.raises(ValueError, match=r"which is not known: set encoder\.model"):
        pickle.dumps(TextEncoder(lambda: {}))


def test_a_pipeline_without_text_encoder(pipe, generate):
    embedding, _ = pipe.encode_prompt("a house", "cpu", 1, False)
    bare = type(pipe)(**{**pipe.components, "text_encoder": None, "tokenizer": None}, requires_safety_checker=False)
    bare.set_progress_bar_config(disable=True)
    with al.record(bare) as recording:
        bare(prompt_embeds=embedding, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    with pytest.raises(ValueError, match="no text encoder"):
        recording.encode("a house")
    assert al.ovam(recording, embedding[0])[3].shape == (16, 16)  # embeddings are answered without one
