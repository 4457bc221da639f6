"""The thesis's experiments: data sets that repeat, curves and tables by hand, matrices with known margins."""

import numpy as np
import pytest
from PIL import Image

import attnlab as al
from attnlab import metrics, thesis

CALL = {"num_inference_steps": 4, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def cars(pipe):
    return thesis.generate(pipe, al.load_oracle("cpu"), "car", range(4), batch=3, **CALL)


@pytest.fixture(scope="module")
def scenes(pipe):
    return thesis.render(pipe, "car", 3)


def test_the_main_object_is_the_largest_region():
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]], bool)
    np.testing.assert_array_equal(thesis.main_object(mask), [[0, 0, 0, 0]] * 3 + [[0, 1, 1, 1]])
    assert not thesis.main_object(np.zeros((3, 3), bool)).any()


def test_images_are_those_of_their_seeds(pipe, cars):
    """Whatever the batch: one noise a seed, shared by all classes."""
    alone = pipe(thesis.PROMPT.format("car"), generator=al.seed(2), **CALL).images[0]
    assert [e.number for e in cars] == [0, 1, 2, 3]
    assert np.abs(np.asarray(cars[2].image, int) - np.asarray(alone, int)).max() <= 2
    assert cars[0].recording.prompt == thesis.PROMPT.format("car")


def test_rendered_scenes_have_exact_masks(scenes):
    for e in scenes:
        truth = thesis.main_object(al.scenes.street.render(e.number).mask("car"))
        np.testing.assert_array_equal(e.truth, truth)
        assert e.shown and e.truth.mean() >= thesis.SHOWN


def test_images_without_the_object_are_dropped(scenes):
    empty = scenes[0]._replace(truth=np.zeros((64, 64), bool))
    assert not empty.shown
    np.testing.assert_array_equal(
        thesis.curves(thesis.daam_of(), [empty, *scenes]), thesis.curves(thesis.daam_of(), scenes)
    )
    with pytest.raises(ValueError, match="no example shows its class"):
        thesis.curves(thesis.daam_of(), [empty])
    with pytest.raises(ValueError, match="1 images show the class: learning from 1 leaves none"):
        thesis.split([empty, scenes[0]], 1)


def test_summary_by_hand():
    ious = np.zeros((101, 2))
    ious[20], ious[30] = (0.5, 0.7), (0.9, 0.1)
    found = thesis.summary(ious)
    assert found == (pytest.approx(0.6), pytest.approx(0.2), pytest.approx((0.6 + 0.5) / 100), 2)
    both = thesis.over_classes({"a": ious, "b": np.zeros((101, 7))})
    assert thesis.summary(both).maximum == pytest.approx(0.3)  # classes weigh the same, not images


def test_maps_are_those_of_the_class_at_the_images_size(scenes):
    e = scenes[0]
    heat = thesis.daam_of()(e)
    expected = al.daam(e.recording).upscale(64)["car"]
    np.testing.assert_allclose(heat, expected / expected.max())
    linear = al.linear_daam(e.recording)["tree"]
    np.testing.assert_allclose(thesis.linear_of("tree")(e), al.heatmaps.stretch(linear, 64))


@pytest.mark.parametrize("preset", ["fit_token", "thesis"])
def test_learned_tokens_carry_over(scenes, preset):
    known, rest = thesis.split(scenes, 2)
    token = thesis.learn(known, preset)
    assert token.name == "car" and len(rest) == 1
    assert thesis.curves(thesis.linear_of(token), rest).max() > 0.3


def test_margins_of_layers_by_steps(scenes):
    found = thesis.layers_by_steps(scenes)
    layers, steps = 6, 3
    assert found.shape == (layers + 1, steps + 1)
    everything = thesis.curves(thesis.daam_of(), scenes)[np.searchsorted(metrics.THRESHOLDS, 0.5)].mean()
    assert found[-1, -1] == pytest.approx(everything)


@pytest.mark.parametrize(("per", "count"), [("layer", 6), ("step", 3)])
def test_correlations(scenes, per, count):
    found = thesis.correlations(scenes, per)
    assert found.shape == (count, count)
    np.testing.assert_allclose(np.diag(found), 1)
    np.testing.assert_allclose(found, found.T)
    maps = [list(al.daam(e.recording, per=per).values()) for e in scenes]
    first, last = (np.concatenate([m[k]["car"].ravel() for m in maps]) for k in (0, -1))
    assert found[0, -1] == pytest.approx(np.corrcoef(first, last)[0, 1], abs=1e-6)


def test_a_picture_is_a_picture(cars):
    assert all(isinstance(e.image, Image.Image) and e.image.size == (64, 64) for e in cars)
