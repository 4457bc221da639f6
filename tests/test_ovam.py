"""Open-vocabulary maps: against plain float64 loops over the recorded queries, and their identities with DAAM."""

import numpy as np
import pytest
import torch
from conftest import PROMPT

import attnlab as al


def reference(recording, embedding, mode="bilinear"):
    """OVAM written out: loops over layers, steps and heads in float64; (token, row, column)."""
    trace, total, count = recording.trace, 0, 0
    for name, recorded in trace.queries.items():
        layer, (height, width) = trace.layers[name], trace.sizes[name]
        keys = (embedding.double() @ layer.weight.double().T).unflatten(-1, (layer.heads, -1))  # (token, head, width)
        for queries in recorded:
            queries = queries.double().unflatten(-1, (layer.heads, -1))  # (pixel, head, width)
            for head in range(layer.heads):
                probabilities = (queries[:, head] @ keys[:, head].T * layer.scale).softmax(-1)
                maps = probabilities.T.reshape(1, -1, height, width)
                total = total + torch.nn.functional.interpolate(maps, (16, 16), mode=mode, align_corners=False)[0]
                count += 1
    return (total / count).numpy()


@pytest.fixture(scope="module")
def recording(levels, generate):
    """A generation of PROMPT, whose maps are of two sizes."""
    with al.record(levels) as recording:
        generate(pipe=levels)
    return recording


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("text", ["smoke", "fire and a tree", "two cars, a river"])
def test_equals_the_plain_computation(recording, text, padded):
    encoded = recording.encode(text)
    expected = reference(recording, encoded.embedding if padded else encoded.embedding[: encoded.length])
    maps = al.ovam(recording, text, padded=padded)
    assert len(maps.values) == encoded.length
    np.testing.assert_allclose(maps.values, expected[: encoded.length], atol=1e-5 * expected.max())


def test_the_padded_prompt_is_daam(recording):
    maps = al.ovam(recording, PROMPT, padded=True, mode="bicubic")
    np.testing.assert_array_equal(maps.values, al.daam(recording).values)


def test_probabilities_add_up_to_one(recording):
    for choice in ({}, {"special": False}, {"layers": 8}, {"steps": 1, "heads": [0, 2]}):
        np.testing.assert_allclose(al.ovam(recording, "fire and a tree", **choice).values.sum(0), 1, atol=1e-5)


def test_without_start_and_end(recording):
    """A word alone has probability 1; of two words the one with the higher scores has more."""
    np.testing.assert_allclose(al.ovam(recording, "smoke", special=False)["smoke"], 1)
    maps = al.ovam(recording, "smoke house", special=False)
    encoded = recording.encode("smoke house")
    np.testing.assert_allclose(maps.values, reference(recording, encoded.embedding[1:3]), atol=1e-5)
    np.testing.assert_allclose(maps["house"], maps.values[1])
    with pytest.raises(ValueError, match="without start and end"):
        maps.start  # noqa: B018


def test_context(recording):
    """The maps of a phrase's own words, the same as in the whole text."""
    whole = al.ovam(recording, "a car and a red house in an urban environment")
    maps = al.ovam(recording, "red house", context="a car and a {} in an urban environment")
    assert list(maps) == ["red", "house"]
    np.testing.assert_array_equal(maps["house"], whole["house"])
    np.testing.assert_array_equal(maps["red house"], whole["red house"])
    assert not np.allclose(maps["house"], al.ovam(recording, "house")["house"], atol=1e-3)


def test_embeddings(recording):
    encoded = recording.encode("fire")
    maps = al.ovam(recording, encoded.embedding[:3])
    np.testing.assert_array_equal(maps.values, al.ovam(recording, "fire").values)
    np.testing.assert_array_equal(maps[1], maps.values[1])


def test_parts_make_up_the_whole(recording):
    whole = al.ovam(recording, "fire").values
    for per in ("step", "layer", "head"):
        parts = al.ovam(recording, "fire", per=per)
        np.testing.assert_allclose(np.mean([m.values for m in parts.values()], axis=0), whole, atol=1e-6)


def test_half_precision_agrees(levels, generate, recording):
    with al.record(levels, dtype=torch.float16) as half:
        generate(pipe=levels)
    expected = al.ovam(recording, "fire and a tree").values
    assert abs(al.ovam(half, "fire and a tree").values - expected).max() <= 2e-3 * expected.max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"text": ""}, "text is empty"),
        ({"text": "a house", "context": "no hole"}, "write {} once"),
        ({"text": "a house", "context": "{} and {}"}, "write {} once"),
        ({"text": "a house", "padded": True, "special": False}, "needs special=True"),
        ({"text": "a " * 99}, "would fall outside"),
        ({"text": torch.zeros(2, 64)}, r"embeddings are \(token, 128\) for this model, not \(2, 64\)"),
        ({"text": torch.full((2, 128), torch.nan)}, "NaN"),
        ({"text": "a house", "layers": "middle"}, "no layer fits 'middle'"),
        ({"text": "a house", "steps": 77}, r"recorded: \[0, 1, 2, 3\]"),
        ({"text": "a house", "mode": "nearest"}, r"mode one of \('bicubic', 'bilinear'\)"),
    ],
)
def test_wrong_input(recording, call, message):
    with pytest.raises(ValueError, match=message):
        al.ovam(recording, **call)
