"""Joint models of labeled and unlabeled scenes: what they may know, and that they go on."""

import numpy as np
import pytest
import torch

from attnlab.joint import JointDiffusion, class_proportions
from attnlab.joint.diffusion import _loss
from attnlab.training import Schedule
from experiments.studies import pair_generators as generators, scarce_sets

SHORT = Schedule(steps=2, lr=1e-3, checkpoint=1, ema=0.5)


@pytest.fixture
def model():
    return generators.new_generator(scarce_sets.unlabeled_scenes(4), (32,))


def gradient(model, pairs):
    """Gradients of the last layer by channel of a pair, (channel,): three colors, then the label channels."""
    model.unet.zero_grad()
    _loss(model, model.unet, *model._encoded(*pairs), torch.Generator().manual_seed(0), True).backward()
    found = model.unet.conv_out.weight.grad.abs().sum((1, 2, 3))
    return found.reshape(-1, model.metadata["shuffle"] ** 2).sum(1)


def test_unlabeled_scenes_teach_colors_alone(model):
    labeled, unlabeled = scarce_sets.labeled_set(0, 2), scarce_sets.unlabeled_scenes(4)
    found = gradient(model, unlabeled)
    assert (found[:3] > 0).all() and (found[3:] == 0).all() and len(found) == 6
    assert (gradient(model, labeled) > 0).all()
    # and they are asked for without class proportions, as if drawn unconditionally
    assert np.isnan(class_proportions(unlabeled[1], 7)).all() and model.metadata["proportions"] == []


def test_labels_of_unlabeled_scenes_cannot_leak():
    images, labels = scarce_sets.unlabeled_scenes(3)
    assert (labels == 255).all() and labels.shape == images.shape[:3]
    with pytest.raises(ValueError, match="unlabeled scenes have labels"):
        generators.half_labeled(scarce_sets.labeled_set(0, 2), scarce_sets.labeled_set(1, 3))


def test_half_of_what_batches_draw_is_labeled():
    labeled, unlabeled = scarce_sets.labeled_set(0, 3), scarce_sets.unlabeled_scenes(7)
    images, labels = generators.half_labeled(labeled, unlabeled)
    assert len(images) == len(labels) == 14 and ((labels == 255).all((1, 2))).sum() == 7
    for k in range(7):
        np.testing.assert_array_equal(images[k], labeled[0][k % 3])
        np.testing.assert_array_equal(labels[k], labeled[1][k % 3])
        np.testing.assert_array_equal(images[7 + k], unlabeled[0][k])


def test_codes_are_those_of_the_prior_whatever_the_scenes(model):
    first, second = (generators.new_generator(scarce_sets.labeled_set(k, 2), (32,), k) for k in range(2))
    codes = np.array(model.metadata["codes"])
    for other in (first, second):
        np.testing.assert_array_equal(other.metadata["codes"], codes)
        np.testing.assert_array_equal(other.codec.codes, codes)
    assert first.metadata["mean"] != second.metadata["mean"]  # colors are of their own scenes
    names = first.classes
    apart = (codes[:, None] != codes).sum(2)
    expected = [(names.index(a), names.index(b)) for a, others in generators.PRIOR_NEIGHBORS.items() for b in others]
    neighbors = np.mean([apart[pair] for pair in expected])
    assert neighbors < np.mean([apart[i, j] for i in range(7) for j in range(i) if (i, j) not in expected])
    weights = [next(m.unet.parameters()).detach() for m in (first, second)]
    assert not torch.equal(*weights)  # drawn by the number


def test_a_model_is_fitted_once_adapted_and_drawn_from(model, tmp_path):
    unlabeled, labeled = scarce_sets.unlabeled_scenes(4), scarce_sets.labeled_set(0, 2)
    check = scarce_sets.scarce_validation(2)
    options = {"schedule": SHORT, "check": check, "batch": 2}
    found = generators.fit_and_keep(model, unlabeled, tmp_path / "first", **options)
    assert [step for step, _ in found] == [1, 2]
    assert {path.name for path in (tmp_path / "first").iterdir()} >= {"model", "checks.csv", "curve.csv"}
    assert not list((tmp_path / "first").glob("*.safetensors"))  # checkpoints are gone
    written = (tmp_path / "first/model/joint.json").stat().st_mtime_ns
    assert generators.fit_and_keep(model, unlabeled, tmp_path / "first", **options) == found
    assert (tmp_path / "first/model/joint.json").stat().st_mtime_ns == written
    adapted = generators.adapt_generator(tmp_path / "first/model", labeled)
    kept = JointDiffusion.from_pretrained(tmp_path / "first/model")
    for a, b in zip(adapted.unet.parameters(), kept.unet.parameters(), strict=True):
        assert torch.equal(a, b)
    np.testing.assert_allclose(adapted.metadata["proportions"], class_proportions(labeled[1], 7), atol=1e-4)
    assert adapted.metadata["codes"] == model.metadata["codes"] and adapted.metadata["mean"] == model.metadata["mean"]
    generators.fit_and_keep(adapted, generators.half_labeled(labeled, unlabeled), tmp_path / "own", **options)
    draws = {}
    for name, number, rare in (("a", 1, False), ("again", 1, False), ("other", 2, False), ("rare", 1, True)):
        generators.draw_pairs(tmp_path / "own", tmp_path / f"{name}.npz", 3, number, rare, steps=1)
        with np.load(tmp_path / f"{name}.npz") as file:
            draws[name] = file["images"]
    assert draws["a"].shape == (3, 64, 64, 3)
    np.testing.assert_array_equal(draws["a"], draws["again"])
    assert (draws["a"] != draws["other"]).any() and (draws["a"] != draws["rare"]).any()
