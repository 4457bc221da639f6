"""Codes of classes: by hand, by trying all of them, and there and back."""

import itertools

import numpy as np
import pytest
import torch

from attnlab.joint.channels import ChannelCodec, bit_codes, touching


def cost(touching, codes):
    differ = (codes[:, None] != codes[None]).sum(-1)
    return (touching * differ).sum() / 2


def one_hot(count):
    return (2 * np.eye(count) - 1).astype(np.float32)


def encode(labels, codes):
    """Label channels of labels: those behind the colors."""
    images = np.zeros((*labels.shape, 3), np.uint8)
    return ChannelCodec(codes, (0, 0, 0), (1, 1, 1)).encode(images, labels)[0][:, 3:]


def decode(channels, codes):
    """Labels and margins of label channels."""
    colors = torch.zeros(len(channels), 3, *channels.shape[2:])
    return ChannelCodec(codes, (0, 0, 0), (1, 1, 1)).decode(torch.cat([colors, channels], 1))[1:]


def test_touching_by_hand():
    labels = np.array([[[0, 0, 1], [0, 2, 255]]])
    # side by side: 0-1 once, 0-2 once; one above the other: 0-2 once; 255 touches nothing
    np.testing.assert_array_equal(touching(labels, 3), [[0, 1, 2], [1, 0, 0], [2, 0, 0]])


def test_a_ring_of_four_classes_needs_one_bit_a_border():
    ring = np.zeros((4, 4))
    for i in range(4):
        ring[i, (i + 1) % 4] = ring[(i + 1) % 4, i] = 1
    assert cost(ring, bit_codes(ring)) == 4


@pytest.mark.parametrize("seed", [0, 1, 7])  # of the last one a single start would not find it
def test_no_assignment_is_better(seed):
    """All 6,720 ways to give five classes codes of three bits."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 9, (5, 5)).astype(float)
    weight = np.triu(weight, 1) + np.triu(weight, 1).T
    every = 2.0 * (np.arange(8)[:, None] >> np.arange(3) & 1) - 1
    least = min(cost(weight, every[list(some)]) for some in itertools.permutations(range(8), 5))
    found = bit_codes(weight)
    assert cost(weight, found) == least
    assert found.shape == (5, 3) and found.dtype == np.float32 and len({tuple(code) for code in found}) == 5


@pytest.mark.parametrize(("count", "bits"), [(1, 1), (2, 1), (3, 2), (7, 3), (8, 3), (16, 4)])
def test_as_many_bits_as_needed(count, bits):
    assert bit_codes(np.ones((count, count)) - np.eye(count)).shape == (count, bits)


@pytest.mark.parametrize("codes", [bit_codes(np.ones((6, 6))), one_hot(6)], ids=["bits", "one-hot"])
def test_there_and_back(codes):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, (3, 8, 9)).astype(np.uint8)
    channels = encode(labels, codes)
    assert channels.shape == (3, codes.shape[1], 8, 9) and set(channels.unique().tolist()) == {-1.0, 1.0}
    found, margin = decode(0.6 * channels, codes)
    np.testing.assert_array_equal(found, labels)
    assert found.dtype == np.uint8 and (margin > 0.59).all()


def test_all_codes_in_use_are_thresholds():
    codes, channels = bit_codes(np.ones((8, 8))), torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    found, margin = decode(channels, codes)
    signs = np.sign(channels.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(codes[found], signs)
    np.testing.assert_allclose(margin, channels.abs().amin(1).numpy(), atol=1e-6)


def test_a_code_of_nobody_goes_to_the_class_of_least_change():
    """Of two bits, 00, 01 and 10 are classes. 11 with a weak second bit becomes 10, with a weak first one 01."""
    codes = np.array([[-1, -1], [-1, 1], [1, -1]], np.float32)
    channels = torch.tensor([[0.9, 0.2], [0.1, 0.7]]).reshape(2, 2, 1, 1)
    found, margin = decode(channels, codes)
    assert found.ravel().tolist() == [2, 1]
    assert margin.ravel() == pytest.approx([0.7, 0.6])  # products 0.7 and -0.7; 0.6 and -0.6


def test_ignored_pixels_have_no_bits():
    channels = encode(np.array([[[255, 1]]], np.uint8), bit_codes(np.ones((2, 2))))
    assert channels[0, :, 0, 0].tolist() == [0] and channels[0, 0, 0, 1].abs() == 1


@pytest.mark.parametrize(
    "wrong", [1, [], [[]], [1, 2], [[1, 2]], np.zeros((2, 2, 2)), [[0, -1], [-1, 0]], [[0, np.nan], [np.nan, 0]]]
)
def test_what_does_not_count_touching_classes(wrong):
    with pytest.raises(ValueError, match=r"how often classes touch is \(class, class\)"):
        bit_codes(wrong)


def test_too_many_classes_are_refused_before_the_search():
    with pytest.raises(ValueError, match="for 64 classes at most, not for 200: give codes='one-hot'"):
        bit_codes(np.ones((200, 200)))


def test_bad_input():
    with pytest.raises(ValueError, match=r"labels are 0 to 2 or 255, ignored; there is \[3, 9\]"):
        encode(np.array([[[0, 3, 9]]]), one_hot(3))
