"""Linear DAAM: equal to the sum over steps, layers and heads, one by one in float64; files that tell what is wrong."""

import json
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

import attnlab as al


def the_long_way(recording, x, layers=None, steps=None, heads=None, scaled=True):
    trace, total, count = recording.trace, 0, 0
    names = recording.choose_layers(layers)
    size = max(trace.sizes[name] for name in names)
    for name in names:
        layer = trace.layers[name]
        key = (layer.weight.double() @ x.double()).unflatten(0, (layer.heads, -1))
        if layer.bias is not None:
            key = key + layer.bias.double().unflatten(0, (layer.heads, -1))
        for step in recording.choose_steps(steps):
            queries = trace.queries[name][trace.steps.index(step)].double().unflatten(-1, (layer.heads, -1))
            for head in range(layer.heads) if heads is None else heads:
                scores = queries[:, head] @ key[head] * (layer.scale if scaled else 1)
                grid = scores.reshape(1, 1, *trace.sizes[name])
                total = total + interpolate(grid, size, mode="bilinear", align_corners=False)[0, 0]
                count += 1
    return (total / count).numpy()


@pytest.fixture(scope="module")
def recording(levels, generate):
    """A generation whose maps are of two sizes."""
    with al.record(levels) as recording:
        generate(pipe=levels)
    return recording


@pytest.mark.parametrize("choice", [{}, {"scaled": False}, {"layers": 8, "steps": [0, 3], "heads": [1, 2]}])
def test_equals_the_long_way(recording, choice):
    linear = al.linear_daam(recording, **choice)
    for word in ("smoke", "car", "burning house"):
        expected = the_long_way(recording, recording.encoder.embed(word), **choice)
        assert abs(linear[word] - expected).max() <= 1e-4 * abs(expected).max()


def test_biased_keys_make_it_affine(recording):
    trace = copy(recording.trace)
    trace.layers = {
        n: replace(layer, bias=torch.randn(len(layer.weight), generator=al.seed(1)))
        for n, layer in trace.layers.items()
    }
    biased = al.Recording(recording.encoder, [trace])
    linear, x = al.linear_daam(biased), recording.encoder.embed("smoke")
    expected = the_long_way(biased, x)
    assert abs((linear @ x) - expected).max() <= 1e-4 * abs(expected).max()


def test_normalized_keys_are_refused(recording):
    trace = copy(recording.trace)
    trace.layers = {n: replace(layer, norm_k=torch.nn.LayerNorm(4)) for n, layer in trace.layers.items()}
    with pytest.raises(ValueError, match="normalizes its keys, which is not linear"):
        al.linear_daam(al.Recording(recording.encoder, [trace]))


def test_product_with_embeddings(recording):
    linear = al.linear_daam(recording)
    a, b = (recording.encoder.embed(word) for word in ("smoke", "tree"))
    both = linear @ torch.stack([a, b])
    assert both.shape == (2, 16, 16) and both.dtype == np.float32
    np.testing.assert_allclose(both[0], linear["smoke"], atol=1e-6)
    np.testing.assert_allclose(linear @ (2 * a - b), 2 * both[0] - both[1], atol=1e-5)
    with pytest.raises(ValueError, match=r"\(128,\) or \(token, 128\) for this model, not \(64,\)"):
        linear @ torch.zeros(64)


def test_a_file_keeps_it(recording, tmp_path):
    linear = al.linear_daam(recording)
    path = linear.save(tmp_path / "house.safetensors")
    again = al.LinearMap.load(path, recording.encoder)
    assert abs(again["smoke"] - linear["smoke"]).max() <= 2e-3 * abs(linear["smoke"]).max()
    assert again.metadata == json.loads(json.dumps(linear.metadata)) and again.metadata["prompt"] == recording.prompt
    assert path.stat().st_size < 16 * 16 * 129 * 2 + 4096 and len(list(tmp_path.iterdir())) == 1
    bare = al.LinearMap(linear.matrix, linear.bias, linear.size)
    with pytest.raises(ValueError, match="no text encoder"):
        bare["smoke"]


def test_a_stack_is_its_parts(levels, generate):
    with al.record(levels, keep="sum") as two:
        generate(["a house", "a tree"], steps=2, pipe=levels)
    parts = [al.linear_daam(two[i]) for i in range(2)]
    stack = al.LinearMap.stack(parts)
    assert stack.size == (2, 16, 16)
    np.testing.assert_allclose(stack["car"], [m["car"] for m in parts], atol=1e-6)
    smaller = al.linear_daam(two[0], layers=8)
    for wrong in ([], [parts[0], smaller]):
        with pytest.raises(ValueError, match="one size, text width, model, layers"):
            al.LinearMap.stack(wrong)


def test_parts_of_a_linear_map_that_do_not_fit():
    four, zeros = torch.eye(4), torch.zeros(4)
    for size in ((2,), (2, 3), (0, 4), (-2, -2), (2.0, 2), (1, 1, 2, 2), ("2", 2)):
        with pytest.raises(ValueError, match="do not fit: a row of the matrix is a pixel"):
            al.LinearMap(four, zeros, size)
    for matrix, bias in ((four, torch.zeros(3)), (four, torch.zeros(4, 1)), (zeros, zeros), (four[0, 0], zeros)):
        with pytest.raises(ValueError, match="do not fit: a row of the matrix is a pixel"):
            al.LinearMap(matrix, bias, (2, 2))
