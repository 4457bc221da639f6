"""The live page: its data are of the bundled model as it is now, and it asks nobody for anything."""

import base64
import io
import re
from pathlib import Path

import live
import numpy as np
import pytest
import torch
from PIL import Image

import attnlab as al
from attnlab.scenes import street

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/live"


@pytest.fixture(scope="module")
def data():
    return live.read()


def maps(image, vectors):
    """Maps (word, row, column) of a stored image, computed as the page does."""
    matrix = live.unpack(image["matrix"])
    return (vectors @ matrix[:, :-1].T + matrix[:, -1]).reshape(-1, *image["size"])


def test_data_are_of_the_bundled_model(data):
    """`python docs/live.py` where this fails: the model was trained anew, or an image or a word was changed."""
    words = [word for group in live.WORDS.values() for word in group]
    assert {title: tuple(group) for title, group in data["words"].items()} == live.WORDS
    assert [(image["prompt"], image["seed"]) for image in data["images"]] == list(live.PROMPTS)
    stored = data["images"][0]
    pipe = al.load_pipeline(data["model"])
    image, linear = live.draw(pipe, stored["prompt"], stored["seed"])
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(stored["png"]))))
    assert np.abs(shown.astype(int) - np.asarray(image)).max() <= 2  # other processors round otherwise
    expected = linear @ torch.stack([linear.embed(word) for word in words])
    found = maps(stored, live.unpack(data["vectors"]))
    highest = np.abs(expected).max((1, 2))
    worst = (np.abs(found - expected).max((1, 2)) / highest).max()
    assert worst < 1e-2


def test_the_scale_holds_every_word_of_every_image(data):
    vectors = live.unpack(data["vectors"])
    highest = max(maps(image, vectors).max() for image in data["images"])
    assert data["highest"] == pytest.approx(highest, rel=1e-2)


def test_words_are_those_of_the_captions():
    words = [word for group in live.WORDS.values() for word in group]
    assert len(set(words)) == len(words)
    tokens = al.load_pipeline(live.MODEL).tokenizer.get_vocab()
    assert [word for word in words if f"{word}</w>" not in tokens] == []
    captions = (street.render(seed).caption for seed in range(street.HELD_OUT, street.HELD_OUT + 40))
    assert {word.strip(",") for caption in captions for word in caption.split()} <= set(words)


def test_half_precision_keeps_small_numbers():
    small = torch.linspace(-3e-6, 3e-6, 12).reshape(3, 4)
    assert live.unpack(live._pack(small)) == pytest.approx(small.numpy(), abs=3e-9)


def test_the_page_is_small_and_asks_nobody():
    files = {path.name: path.read_text("utf-8") for path in PAGE.iterdir()}
    assert sorted(files) == ["data.js", "index.html", "live.js", "style.css"]
    assert sum(len(text.encode()) for text in files.values()) < 1e6
    assert len(files["live.js"].splitlines()) <= 200
    assert files["data.js"].count("\n") == 1
    for name, text in files.items():
        outside = re.findall(r"https?:|//\w+\.|\bfetch\b|XMLHttpRequest|WebSocket|@import|\bimport\b", text)
        assert outside == [] or name == "data.js", name
    links = re.findall(r'(?:src|href)="([^"#][^"]*)"', files["index.html"])
    assert [link for link in links if link != "data:," and not (PAGE / link).exists()] == []
