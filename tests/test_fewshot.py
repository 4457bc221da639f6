"""Tokens learned from a few scenes: what the bundled models must be able to do, and sets that repeat."""

import numpy as np
import pytest

import attnlab as al
from attnlab import metrics
from attnlab.scenes import street
from experiments.studies import few_shot

NAMES = ("sky", "fire", "building")


@pytest.fixture(scope="module")
def study():
    """Of the model that never saw a mask, small."""
    pipe = al.load_pipeline("tiny-plain", device="cpu")
    pools = few_shot.record_pool(pipe, few_shot.FIRST_TRAIN_SEED, 40), few_shot.record_pool(pipe, street.HELD_OUT, 40)
    return few_shot.FewShotStudy(*pools, names=NAMES, tests=8)


def test_a_token_of_two_scenes_beats_the_word(study):
    """Far below the README's gain: a broken fit, whitening or map would not pass."""
    study.words(2)
    study.fits(2, draws=2)
    gain, low, _ = study.gain("fit_token, 2", "Linear DAAM, 2")
    assert low > 0.08 and gain == pytest.approx(
        np.mean(study.by_class("fit_token, 2") - study.by_class("Linear DAAM, 2"))
    )
    assert len(study.seconds["fit_token, 2"]) == 2 * len(NAMES)


def test_published_descents_take_part(study):
    study.descents(1, "thesis")
    assert np.isfinite(study.by_class("thesis, 1")).all()


def test_rows_hold_the_iou_of_test_scenes_alone(study):
    study.fits(1)
    for column, name in enumerate(NAMES):
        tested = np.isfinite(study.rows["fit_token, 1"][:, column])
        assert np.flatnonzero(tested).tolist() == study.test_numbers[name] and tested.sum() == 8
    token = study.learn("fire", 1)
    maps, masks = study.test_examples("fire")
    expected = al.transfer_matrix([token], maps, masks)[0]
    np.testing.assert_array_equal(study.rows["fit_token above 0, 1"][study.test_numbers["fire"], 1], expected)
    assert metrics.mean_over_classes(study.rows["fit_token, 1"])[0] == pytest.approx(
        study.by_class("fit_token, 1").mean()
    )


def test_pools_have_noise_of_their_own(study):
    """Drawn from the first seed of a batch: train scenes do not share it with test scenes."""
    pipe = al.load_pipeline("tiny-plain", device="cpu")
    for pool, first in ((study.train, few_shot.FIRST_TRAIN_SEED), (study.test, street.HELD_OUT)):
        scene, options = pool.scenes[0], {"timesteps": few_shot.TIMESTEPS, "generator": al.seed(first)}
        np.testing.assert_array_equal(scene.image, street.render(first).image)
        expected = al.linear_daam(al.record_image(pipe, scene.image, scene.caption, **options))["sky"]
        np.testing.assert_allclose(pool.maps[0]["sky"], expected, atol=0.01 * np.ptp(expected))


def test_thresholds_are_chosen_on_train_examples(study):
    """A map that a low threshold cuts rightly in the train scenes, and only a high one in the test scenes."""
    low = {id(study.train): 0.25, id(study.test): 0.75}

    def method(pool, i):
        heat = np.where(pool.scenes[i].mask("sky"), 1.0, low[id(pool)])
        heat[-1, -1] = 0.0
        return heat

    train, tested = study.train.examples("sky", 2), study.test_numbers["sky"]
    study._put("by hand", "sky", [study._at_threshold(method, "sky", train)])
    everything = [mask.sum() / (mask.size - 1) for mask in study.test.masks("sky", tested)]
    np.testing.assert_allclose(study.rows["by hand"][tested, 0], everything)


def test_training_sets_repeat_and_differ(study):
    sets = [study.train.examples("sky", 3, draw) for draw in (0, 1, 2, 1)]
    assert sets[1] == sets[3] and len({tuple(s) for s in sets}) == 3
    with pytest.raises(ValueError, match=r"'fire' is in \d+ of 40 scenes: 99 are wanted"):
        study.train.examples("fire", 99)
