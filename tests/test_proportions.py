"""Class proportions, which a joint model is conditioned on: counted, blurred, embedded."""

import numpy as np
import pytest
import torch

from attnlab.joint.proportions import ROOT_STD, blurred, class_proportions, embed, wanted_proportions


def test_proportions_are_of_valid_pixels():
    labels = np.array([[[0, 0, 1, 255], [255, 2, 2, 2]], np.full((2, 4), 255), np.full((2, 4), 3)], np.uint8)
    found = class_proportions(labels, 4)
    assert found.dtype == np.float32 and found[0] == pytest.approx([2 / 6, 1 / 6, 3 / 6, 0])
    assert np.isnan(found[1]).all() and found[2].tolist() == [0, 0, 0, 1]
    with pytest.raises(ValueError, match=r"labels are 0 to 2 or 255, ignored; there is \[3\]"):
        class_proportions(labels, 3)


def test_blurred_proportions_are_near_the_exact_ones():
    exact = torch.tensor([[0.5, 0.49, 0.01, 0.0]]).repeat(20_000, 1)
    found = blurred(exact, torch.Generator().manual_seed(0))
    assert (found >= 0).all() and torch.allclose(found.sum(1), torch.ones(20_000), atol=1e-5)
    assert found.mean(0).numpy() == pytest.approx(exact[0].numpy(), abs=0.005)
    apart = found[:, 0].sqrt() - found[:, 1].sqrt()  # of two large ones, each with noise of ROOT_STD
    assert float(apart.std()) == pytest.approx(2**0.5 * ROOT_STD, rel=0.02)
    dropped = blurred(exact, torch.Generator().manual_seed(0), 0.25).isnan()
    assert (dropped.all(1) == dropped.any(1)).all() and dropped.any(1).float().mean() == pytest.approx(0.25, abs=0.02)


def test_the_embedding_by_hand():
    found = embed(torch.tensor([[0.25, 0.75], [np.nan, np.nan]]), 20)
    assert found.shape == (2, 20) and not found[1].any() and not found[0, 16:].any()
    angles = np.array([np.sqrt(0.25), np.sqrt(0.75)])[:, None] * np.pi / 2 * np.array([1, 2, 4, 8])
    by_hand = np.concatenate([np.sin(angles), np.cos(angles)], 1).ravel()
    assert found[0, :16].numpy() == pytest.approx(by_hand, abs=1e-6)
    assert embed(torch.rand(1, 8), 20)[0, 16:].abs().max() == 0  # one octave each
    with pytest.raises(ValueError, match="11 classes do not fit an embedding of 20"):
        embed(torch.rand(1, 11), 20)


def test_one_row_is_for_all_images():
    known, generator = np.zeros((0, 2), np.float32), torch.Generator()
    found = wanted_proportions([0.25, 0.75], known, 3, generator)
    assert found.shape == (3, 2) and (found == torch.tensor([0.25, 0.75])).all()
    assert wanted_proportions(np.full(2, np.nan), known, 3, generator).isnan().all()
    assert wanted_proportions(None, known, 3, generator) is None


def test_known_ones_come_equally_often():
    known = np.eye(3, dtype=np.float32)
    found = wanted_proportions(None, known, 7, torch.Generator().manual_seed(0))
    counts = np.bincount(found.argmax(1), minlength=3)
    assert sorted(counts) == [2, 2, 3] and 0 < float((1 - found.max(1).values).max()) < 0.1


@pytest.mark.parametrize(
    ("proportions", "says"),
    [
        ([1.0], r"proportions are \(2,\), or \(3, 2\)"),
        (np.full((2, 2), 0.5), r"not \(2, 2\)"),
        (0.5, r"not \(\)"),
        ([25, 75], "sum to 1: divide them by their sum"),
        ([1.5, -0.5], "0 or more"),
        ([np.nan, 1], "all NaN is unconditional"),
    ],
)
def test_bad_proportions(proportions, says):
    with pytest.raises(ValueError, match=says):
        wanted_proportions(proportions, np.zeros((0, 2), np.float32), 3, torch.Generator())
