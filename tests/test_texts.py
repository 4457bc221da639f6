"""Texts: embedded as the pipeline itself would, words by position, and refused where they do not fit."""

import pytest
import torch

import attnlab as al
from attnlab.recording.texts import TextEncoder


@pytest.fixture(scope="module")
def encoder(pipe):
    return TextEncoder.of(pipe)


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


def test_beyond_the_window(encoder):
    with pytest.raises(ValueError, match=r"the text has 34 tokens, the window 32: 'tree', 'house' would fall outside"):
        encoder("a " * 30 + "tree house")
    with pytest.raises(ValueError, match=r"'tree', 'a', 'a', 'a', 'a', 15 more words would fall outside"):
        encoder("a " * 30 + "tree" + " a" * 19)
    assert encoder("a " * 29 + "tree").length == 32  # fills it to the last token


def test_a_pipeline_without_text_encoder(pipe, generate):
    embedding, _ = pipe.encode_prompt("a house", "cpu", 1, False)
    bare = type(pipe)(**{**pipe.components, "text_encoder": None, "tokenizer": None}, requires_safety_checker=False)
    bare.set_progress_bar_config(disable=True)
    with al.record(bare) as recording:
        bare(prompt_embeds=embedding, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    with pytest.raises(ValueError, match="no text encoder"):
        recording.encode("a house")
    assert al.ovam(recording, embedding[0])[3].shape == (16, 16)  # embeddings are answered without one
