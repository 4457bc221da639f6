"""Maps: DAAM against a plain float64 computation from the model's own attention probabilities, and its identities."""

import numpy as np
import pytest
import torch
from conftest import PROMPT

import attnlab as al
from attnlab.maps import HeatMaps, resize
from attnlab.words import Word


def reference_daam(stores, sizes, largest):
    """DAAM written out with plain loops in float64: (token, row, column), from the probabilities of every step."""
    total, count = 0, 0
    for name, steps in stores.items():
        if name not in sizes:
            continue
        heads = sum(p[-1] for p in steps) / len(steps)  # conditional: the last of the batch; (head, pixel, token)
        for head in heads:
            maps = head.T.reshape(1, -1, *sizes[name])
            total = total + torch.nn.functional.interpolate(maps, largest, mode="bicubic").clamp(min=0)[0]
            count += 1
    return (total / count).numpy()


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_daam_equals_the_models_own_attention(pipe, generate, plain_attention, size):
    with al.record(pipe) as recording:
        generate(height=size[0], width=size[1])
    sizes = recording.trace.sizes
    expected = reference_daam(plain_attention, sizes, (size[0] // 4, size[1] // 4))
    maps = al.daam(recording)
    assert abs(maps.values - expected[: len(maps.values)]).max() <= 1e-5 * expected.max()
    np.testing.assert_array_equal(maps["smoke"], maps.values[5])  # start, a, burning, house, with, smoke
    assert maps.values.shape[0] == 7  # ..., end


def test_hidden_tokens_take_no_attention(pipe, plain_attention):
    """A model that masks padding: the mask is part of the softmax."""
    with al.record(pipe) as recording:
        text, _ = pipe.encode_prompt(PROMPT, pipe.device, 1, False)
        pipe._guidance_scale = 1.0
        visible = torch.arange(text.shape[1])[None] < 6
        with torch.no_grad():
            pipe.unet(torch.randn(1, 4, 16, 16, generator=al.seed(0)), 500, text, encoder_attention_mask=visible)
    expected = reference_daam(plain_attention, recording.trace.sizes, (16, 16))
    maps = al.daam(recording)
    assert abs(maps.values - expected[:7]).max() <= 1e-5 * expected.max()
    assert maps.end.max() == 0


def test_shares_add_up_to_one(pipe, generate):
    """Rows of a softmax map add up to 1: exactly after bilinear resizing, at least 1 after bicubic and clamping."""
    full = " ".join(["tree"] * 31)  # fills the window: every token is a row of the maps
    with al.record(pipe) as recording:
        generate(full)
    bilinear = al.daam(recording, mode="bilinear").values
    assert bilinear.shape[0] == pipe.tokenizer.model_max_length
    np.testing.assert_allclose(bilinear.sum(0), 1, atol=1e-5)
    assert al.daam(recording).values.sum(0).min() >= 1 - 1e-5
    assert 0 <= bilinear.min() and bilinear.max() <= 1


def test_parts_make_up_the_whole(recording):
    whole = al.daam(recording, mode="bilinear").values  # bilinear: no clamping, so means commute
    for per in ("step", "layer", "head"):
        parts = al.daam(recording, per=per, mode="bilinear")
        np.testing.assert_allclose(np.mean([m.values for m in parts.values()], axis=0), whole, atol=1e-6)
    assert list(al.daam(recording, per="step")) == [0, 1, 2, 3]
    assert list(al.daam(recording, per="layer")) == list(recording.trace.queries)
    name = next(iter(recording.trace.queries))
    assert [key for key in al.daam(recording, per="head") if key[0] == name] == [(name, h) for h in range(4)]


def test_selections(recording):
    per_layer = al.daam(recording, per="layer", mode="bilinear")
    small = [n for n, size in recording.trace.sizes.items() if size == (8, 8)]
    assert al.daam(recording, layers=8)["smoke"].shape == (8, 8)
    chosen = al.daam(recording, layers=[16, 8], steps=[2], heads=[1, 3])
    assert chosen.values.shape == al.daam(recording).values.shape
    one = al.daam(recording, layers=small[0], heads=[2])
    np.testing.assert_allclose(one.values, al.daam(recording, layers=small[0], per="head")[small[0], 2].values)
    assert set(per_layer) == set(recording.trace.sizes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": [7]}, r"steps \[7\] were not recorded; recorded: \[0, 1, 2, 3\]"),
        ({"steps": []}, "were not recorded"),
        ({"heads": [4]}, r"heads \[4\].*has 4, numbered from 0"),
        ({"layers": "middle"}, "no layer fits 'middle'"),
        ({"per": "token"}, "'step', 'layer' or 'head'"),
        ({"mode": "nearest"}, "'bicubic' or 'bilinear'"),
    ],
)
def test_wrong_choices_are_named(recording, wrong, message):
    with pytest.raises(ValueError, match=message):
        al.daam(recording, **wrong)


def test_repeated_and_multi_token_words(pipe, generate):
    with al.record(pipe) as recording:
        generate("a red car, an umbrella and a blue car")
    maps = al.daam(recording)
    umbrella = next(w for w in recording.words if w.text == "umbrella")
    assert len(umbrella.tokens) > 1
    np.testing.assert_allclose(maps["umbrella"], maps.values[list(umbrella.tokens)].mean(0))
    with pytest.raises(KeyError, match="occurs 2 times"):
        maps["car"]
    np.testing.assert_array_equal(maps["car", 1], maps[-1])
    np.testing.assert_allclose(maps["blue car"], (maps[-2] + maps[-1]) / 2, rtol=1e-6)
    assert abs(maps["car", 0] - maps["car", 1]).max() > 0
    assert ("car", 1) in list(maps) and "umbrella" in list(maps)
    with pytest.raises(KeyError, match="'smoke' is not in the text; its words are 'a', 'red', 'car'"):
        maps["smoke"]


def test_heat_maps_on_an_image(recording):
    maps = al.daam(recording)
    assert len(maps) == 5 and list(maps) == ["a", "burning", "house", "with", "smoke"]
    large = maps.upscale((64, 64))
    assert large["smoke"].shape == (64, 64) and large.values.min() >= 0
    overlay = maps.overlay(np.zeros((64, 64, 3), np.uint8), "smoke")
    assert overlay.shape == (64, 64, 3) and overlay.dtype == np.uint8 and overlay.max() > 0
    assert "16 x 16" in repr(maps)


def test_resize_keeps_centers():
    """One lit cell stays in the middle of its block."""
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 1, 2] = 1
    large = resize(maps, (16, 16), "bilinear")[0, 0]
    rows, columns = torch.nonzero(large == large.max(), as_tuple=True)
    assert rows.float().mean() == 1 * 4 + 1.5 and columns.float().mean() == 2 * 4 + 1.5


def test_overlapping_words_are_told_apart_by_position():
    values = np.arange(4, dtype=np.float32)[:, None, None] * np.ones((1, 2, 2), np.float32)
    maps = HeatMaps(values, [Word("fire", (1,)), Word("fire", (2,))])
    assert maps["fire", 0].max() == 1 and maps["fire", 1].max() == 2 and maps["fire fire"].max() == 1.5
    assert maps.start.max() == 0 and maps.end.max() == 3
