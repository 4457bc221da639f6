"""Tokens learned from a few scenes: what the bundled models must be able to do, and sets that repeat."""

import numpy as np
import pytest
import torch

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
    """A broken fit, whitening or map would not pass."""
    study.words(2, draws=2)
    study.fits(2, draws=2)
    gain, low, _ = study.gain("fit_token, 2", "Linear DAAM, 2")
    assert low > 0 and gain == pytest.approx(np.mean(study.by_class("fit_token, 2") - study.by_class("Linear DAAM, 2")))
    assert len(study.seconds["fit_token, 2"]) == 2 * len(NAMES)


@pytest.mark.parametrize("learner", ["nearest prototype", "linear probe"])
def test_classifiers_of_queries_find_the_class(study, learner):
    study.fits(2, draws=2, learner=learner)
    assert (study.by_class(f"{learner}, 2") > 0.3).all() and (study.by_class(f"{learner} above 0, 2") > 0.2).all()


def test_published_descents_take_part(study):
    study.descents(1, "thesis")
    assert np.isfinite(study.by_class("thesis, 1")).all()


def test_rows_hold_the_iou_of_test_scenes_alone(study):
    study.fits(1)
    for column, name in enumerate(NAMES):
        tested = np.isfinite(study.rows["fit_token, 1"][0, :, column])
        assert np.flatnonzero(tested).tolist() == study.test_numbers[name] and tested.sum() == 8
    token = study.learn("fire", 1)
    maps, masks = study.test_examples("fire")
    expected = al.transfer_matrix([token], maps, masks)[0]
    np.testing.assert_array_equal(study.rows["fit_token above 0, 1"][0, study.test_numbers["fire"], 1], expected)


def test_a_tokens_map_is_a_weighted_sum_of_queries(study):
    """So a probe on queries can say whatever a token can: here the weights that make it say the same."""
    recording, queries = study.test.recordings[0], study.test.queries[0]
    token = study.learn("fire", 1)
    layers, steps = recording.trace.layers.values(), len(recording.trace.steps)
    weights = [layer.scale * (layer.weight.float() @ token.value) for layer in layers]
    count = steps * sum(layer.heads for layer in layers)
    found = queries @ (torch.cat(weights) / count) + token.bias
    expected = study.test.maps[0][token]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def scaled_cells(study, name):
    """Features and coverage of two train examples, written out: each direction over variance ** 0.25."""
    pool = np.concatenate([one.matrix.numpy() for one in study.train.queries]).astype(float)
    variance, axes = np.linalg.eigh(np.cov(pool.T))
    scale = axes / np.maximum(variance, 1e-8 * variance[-1]) ** 0.25
    numbers = study.train.examples(name, 2)
    cells = np.concatenate([study.train.queries[i].matrix.numpy() for i in numbers]).astype(float)
    masks = np.stack(study.train.masks(name, numbers)).astype(float)
    side = study.train.queries[0].size[0]
    inside = masks.reshape(2, side, 64 // side, side, 64 // side).mean((2, 4)).ravel()
    return (cells - pool.mean(0)) @ scale, inside, numbers, scale


def test_the_prototype_says_which_mean_is_nearer(study):
    cells, inside, numbers, _ = scaled_cells(study, "building")
    means = [np.average(cells, axis=0, weights=share) for share in (inside, 1 - inside)]
    near, far = (((cells - mean) ** 2).sum(1) for mean in means)
    token = study.prototype("building", 2)
    found = np.concatenate([study.train.queries[i][token].ravel() for i in numbers])
    np.testing.assert_allclose(found, (far - near) / 2, atol=1e-3 * np.abs(far - near).max())


def test_the_probe_is_at_the_optimum_of_its_loss(study):
    """The gradient of weighted cross-entropy and ridge is zero there, and is not for other scores."""
    cells, inside, numbers, scale = scaled_cells(study, "building")
    token = study.probe("building", 2)
    scores = np.concatenate([study.train.queries[i][token].ravel() for i in numbers]).astype(float)
    positive, negative = inside * np.sqrt((1 - inside).sum() / inside.sum()), 1 - inside
    weights = np.linalg.solve(scale, token.value.numpy().astype(float))

    def gradient(factor):
        share = 1 / (1 + np.exp(-factor * scores))
        slope = (share * (positive + negative) - positive) / (positive + negative).sum()
        return np.append(few_shot._PROBE_C * slope @ cells + factor * weights, slope.sum())

    assert np.abs(gradient(1)).max() < 0.05 * np.abs(gradient(0.5)).max()


@pytest.mark.parametrize("draws", [2, 4])
def test_intervals_cover_training_sets_and_test_scenes(draws):
    """Simulated tables whose mean is known: what each training set and each scene adds, and noise on top."""
    rng = np.random.default_rng(0)
    scenes, classes, sets, scene, noise = 60, 16, 0.08, 0.15, 0.05
    truth, covered, short, widths = 0.5, [], [], []
    for _ in range(300):
        values = truth + rng.normal(0, sets, (draws, 1, classes)) + rng.normal(0, scene, (1, scenes, classes))
        values += rng.normal(0, noise, (draws, scenes, classes))
        _, low, high = few_shot.interval_over_draws(values, resamples=400)
        covered.append(low < truth < high)
        widths.append(high - low)
        _, low, high = metrics.mean_over_classes(values.mean(0), resamples=400)
        short.append(low < truth < high)
    assert 0.9 < np.mean(covered) < 0.99 and np.mean(short) < 0.85
    variance = (sets**2 / draws + scene**2 / scenes + noise**2 / scenes / draws) / classes
    assert np.mean(widths) == pytest.approx(2 * 1.96 * variance**0.5, rel=0.1)


def test_intervals_of_differences_and_of_single_sets():
    rng = np.random.default_rng(1)
    scenes = rng.normal(0.5, 0.2, (1, 50, 4))
    scenes[:, ::2, 1] = np.nan
    better = scenes + 0.1 + rng.normal(0, 0.02, (3, 1, 4))
    mean, low, high = few_shot.interval_over_draws(better, scenes)
    expected = np.nanmean(better, axis=(0, 1)).mean() - np.nanmean(scenes, axis=(0, 1)).mean()
    assert mean == pytest.approx(expected) and 0.07 < low < mean < high < 0.13  # scenes are paired
    alike = few_shot.interval_over_draws(better, better - 0.1)  # training sets are paired as well
    np.testing.assert_allclose(alike, 0.1)
    one, over_scenes = few_shot.interval_over_draws(scenes), metrics.mean_over_classes(scenes[0])
    np.testing.assert_allclose(one, over_scenes, atol=0.005)


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

    def method(pool, numbers):
        heats = [np.where(mask, 1.0, low[id(pool)]) for mask in pool.masks("sky", numbers)]
        for heat in heats:
            heat[-1, -1] = 0.0
        return np.stack(heats)

    tested = study.test_numbers["sky"]
    study._put("by hand", "sky", [study._at_threshold(method, "sky", 2, 0)])
    everything = [mask.sum() / (mask.size - 1) for mask in study.test.masks("sky", tested)]
    np.testing.assert_allclose(study.rows["by hand"][0, tested, 0], everything)


def test_training_sets_repeat_and_share_no_scene(study):
    sets = [study.train.examples("sky", 3, draw) for draw in (0, 1, 2, 1)]
    assert sets[1] == sets[3] and len({number for some in sets for number in some}) == 9
    with pytest.raises(ValueError, match=r"'fire' is in \d+ of 40 scenes: 99 are wanted"):
        study.train.examples("fire", 99)
    with pytest.raises(ValueError, match=r"'fire' is in \d+ of 40 scenes: 9 sets of 5 are wanted, make more"):
        study.train.examples("fire", 5, 8)
