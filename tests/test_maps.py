"""Maps: DAAM against a plain float64 computation from the model's own attention probabilities, and its identities."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROMPT
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention

import attnlab as al
from attnlab.maps.heatmaps import HeatMaps, minmax, resize, upscale
from attnlab.recording.layers import Layer
from attnlab.recording.words import Word


def reference_daam(stores, sizes, largest, row=-1):
    """DAAM written out with plain loops in float64: (token, row, column), from the probabilities of every step.

    `row` is the image's place in the batch; the conditional half comes last.
    """
    total, count = 0, 0
    for name, steps in stores.items():
        if name not in sizes:
            continue
        heads = sum(p[row] for p in steps) / len(steps)  # (head, pixel, token)
        for head in heads:
            maps = head.T.reshape(1, -1, *sizes[name])
            total = total + torch.nn.functional.interpolate(maps, largest, mode="bicubic").clamp(min=0)[0]
            count += 1
    return (total / count).numpy()


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_daam_equals_the_models_own_attention(levels, generate, plain_attention, size):
    with al.record(levels) as recording:
        generate(height=size[0], width=size[1], pipe=levels)
    sizes = recording.trace.sizes
    expected = reference_daam(plain_attention, sizes, (size[0] // 4, size[1] // 4))
    maps = al.daam(recording)
    assert abs(maps.values - expected[: len(maps.values)]).max() <= 1e-5 * expected.max()
    np.testing.assert_array_equal(maps["smoke"], maps.values[5])  # start, a, burning, house, with, smoke
    assert maps.values.shape[0] == 7  # ..., end


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_every_image_of_a_batch_has_its_own_attention(pipe, generate, plain_attention, guidance):
    prompts = [PROMPT, "a red car", "two trees near water", "smoke"]
    with al.record(pipe) as recording:
        generate(prompts, guidance=guidance, steps=2)
    for i in range(4):
        expected = reference_daam(plain_attention, recording[i].trace.sizes, (16, 16), row=i - 4)
        maps = al.daam(recording[i])
        assert abs(maps.values - expected[: len(maps.values)]).max() <= 1e-5 * expected.max()


def test_layers_of_stable_diffusion(pipe):
    """Its topology with random weights: 15 layers by default, five each at three sizes, none skipped."""
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32,) * 4, cross_attention_dim=128, attention_head_dim=4
    )
    other = StableDiffusionPipeline(**{**pipe.components, "unet": unet.eval()}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with al.record(other) as recording:
        other(PROMPT, num_inference_steps=1, output_type="latent", generator=al.seed(0))
    sizes = list(recording.trace.sizes.values())
    assert {size: sizes.count(size) for size in sizes} == {(16, 16): 5, (8, 8): 5, (4, 4): 5}
    assert al.daam(recording)["smoke"].shape == (16, 16)


def test_large_recordings_are_taken_in_groups(recording, monkeypatch):
    whole = al.daam(recording).values
    monkeypatch.setattr("attnlab.maps.softmax._SCORES_AT_ONCE", 1)
    np.testing.assert_allclose(al.daam(recording).values, whole, rtol=1e-6)


def test_normalized_queries_and_biased_keys():
    """Where a model normalizes queries and keys, or its keys have a bias, the scores are still its own."""
    torch.manual_seed(0)
    attention = Attention(16, cross_attention_dim=8, heads=2, dim_head=4, qk_norm="rms_norm", bias=True)
    for norm in (attention.norm_q, attention.norm_k):
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    x, text = torch.randn(9, 16), torch.randn(5, 8)
    layer = Layer.of("layer", attention)
    with torch.no_grad():
        found = layer.queries(attention.to_q(x)) @ layer.keys(text).mT
        q, k = (f(y).unflatten(-1, (2, 4)) for f, y in ((attention.to_q, x), (attention.to_k, text)))
        expected = torch.einsum("phd,thd->hpt", attention.norm_q(q), attention.norm_k(k))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_hidden_tokens_take_no_attention(pipe, plain_attention):
    """A model that masks padding: the mask is part of the softmax."""
    with al.record(pipe, parts=["conditional"]) as recording:
        text, _ = pipe.encode_prompt(PROMPT, pipe.device, 1, False)
        attention_mask = torch.arange(text.shape[1])[None] < 6
        with torch.no_grad():
            pipe.unet(torch.randn(1, 4, 16, 16, generator=al.seed(0)), 500, text, encoder_attention_mask=attention_mask)
    expected = reference_daam(plain_attention, recording.trace.sizes, (16, 16))
    maps = al.daam(recording)
    assert abs(maps.values - expected[:7]).max() <= 1e-5 * expected.max()
    assert maps.end.max() == 0


def test_probabilities_add_up_to_one(levels, generate):
    """Rows of a softmax map add up to 1: exactly after bilinear resizing, at least 1 after bicubic and clamping."""
    window = levels.tokenizer.model_max_length
    full = " ".join(["tree"] * (window - 1))  # fills the window: every token is a row of the maps
    with pytest.warns(UserWarning, match="fills the model's window"), al.record(levels) as recording:
        generate(full, pipe=levels)
    bilinear = al.daam(recording, mode="bilinear").values
    assert bilinear.shape[0] == window
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


def test_selections(levels, generate):
    with al.record(levels) as recording:
        generate(pipe=levels)
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
        ({"steps": [7, 0]}, r"steps=\[7\] cannot be chosen; recorded: \[0, 1, 2, 3\]"),
        ({"steps": []}, r"steps=\[\] cannot be chosen"),
        ({"heads": 4}, r"heads=\[4\] cannot be chosen: down_blocks.* has 4, numbered from 0"),
        ({"heads": []}, r"heads=\[\] cannot be chosen"),
        ({"layers": []}, "chooses nothing; layers: down_blocks"),
        ({"layers": "middle"}, "no layer fits 'middle'"),
        ({"per": "token"}, "'step', 'layer' or 'head'"),
        ({"mode": "nearest"}, r"one of \('bicubic', 'bilinear'\)"),
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
    assert "car" in maps and ("car", 1) in maps and ("car", 2) not in maps and 99 not in maps
    assert "boat" not in maps and None not in maps and all(maps[word].shape == (16, 16) for word in maps)
    np.testing.assert_array_equal(maps[np.int64(2)], maps["car", 0])
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


QUERIES = Path(__file__).parent / "data/commit_879ad02/queries.safetensors"
UNPLOTTED = """
import sys, attnlab as al
maps = al.daam(al.Recording.load(sys.argv[1]).branch("conditional"))
assert "smoke" in maps and "matplotlib.pyplot" not in sys.modules and "attnlab.plots" not in sys.modules
"""


def test_making_maps_loads_no_matplotlib():
    subprocess.run([sys.executable, "-c", UNPLOTTED, str(QUERIES)], check=True)


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


def test_standard_deviation(recording):
    parts = list(al.daam(recording, per="step").values())
    np.testing.assert_allclose(al.std(parts)["smoke"], np.std([m["smoke"] for m in parts], axis=0), atol=1e-7)
    for wrong in ([], parts[:1], [parts[0], al.ovam(recording, "fire")]):
        with pytest.raises(ValueError, match="two or more maps of one text"):
            al.std(wrong)


def test_minmax_rescales_maps_one_by_one():
    maps = np.float32([[[-2, 2], [0, 1]], [[3, 3], [3, 3]]])
    np.testing.assert_allclose(minmax(maps, 2), [[[0, 1], [0.5, 0.75]], [[0, 0], [0, 0]]])
    np.testing.assert_allclose(minmax(maps[0], (4, 6)), minmax(maps, (4, 6))[0])
    large = upscale(maps[0], (4, 4))
    expected = resize(torch.from_numpy(maps[:1])[None], (4, 4), "bilinear")[0, 0]
    np.testing.assert_array_equal(large, expected)
