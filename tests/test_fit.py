"""Convex token fitting: the optimum is scikit-learn's, a hand-made problem's, one where an independent slope is 0."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from sklearn.linear_model import LogisticRegression

import attnlab as al
from attnlab.learning.fit import RIDGE, RIDGES, Whitening, fit_token, fit_tokens
from attnlab.learning.logistic import WORD_PENALTY, weighted_loss

SIDE = 32  # maps of this size are not refined: cells are the matrix's rows


def make_maps(images=2, width=6, start=0, side=SIDE):
    """LinearMaps of random features with a trend, of which a direction is what masks show."""
    maps = []
    for i in range(images):
        matrix = torch.randn(side * side, width, generator=al.seed(start + i)) * torch.linspace(0.3, 2, width) + 1
        metadata = {"model": "made", "layers": ["a"], "heads": None, "scaled": True}
        maps.append(al.LinearMap(matrix, torch.zeros(side * side), (side, side), None, metadata))
    return maps


def make_masks(maps, seed=5, level=1.0, direction=(1, -1, 0.5, 0, 0, 0.2)):
    noise = [torch.randn(m.matrix.shape[0], generator=al.seed(seed + i)) for i, m in enumerate(maps)]
    v = torch.tensor(direction).float()[: maps[0].matrix.shape[1]]
    return [(m.matrix @ v + e > level).reshape(m.size).numpy() for m, e in zip(maps, noise, strict=True)]


@pytest.mark.parametrize("prior", [False, True])
def test_equals_scikit_learn(prior):
    maps = make_maps()
    masks = make_masks(maps)
    word = torch.tensor([1.0, 0, 0, 0.5, 0, 0]) if prior else None
    token = fit_token(maps, masks, word, ridge=0.02)
    white = Whitening.of(maps)
    features = (torch.cat([m.matrix for m in maps]).double() - white.mean) @ white.scale
    scaling = torch.eye(6).double()
    if prior:  # the penalty along a scaled direction is weaker
        d = torch.nn.functional.normalize(white.inverse @ word.double(), dim=0)
        scaling += (WORD_PENALTY**-0.5 - 1) * torch.outer(d, d)
    inside = np.concatenate([m.ravel() for m in masks])
    weight = np.where(inside, np.sqrt((~inside).sum() / inside.sum()), 1)
    model = LogisticRegression(C=1 / 0.02, solver="newton-cholesky", tol=1e-10)
    model.fit((features @ scaling).numpy(), inside, weight / weight.sum())
    value = white.scale @ scaling @ torch.from_numpy(model.coef_[0])
    np.testing.assert_allclose(token.value, value, rtol=1e-4, atol=1e-5)
    assert token.bias == pytest.approx(float(model.intercept_[0] - white.mean @ value), rel=1e-4)
    assert token.metadata["gradient"] < 1e-6


def test_a_problem_with_a_known_optimum():
    """One feature, 1 inside and -1 outside: the slope of log(1 + exp(-v)) + ridge v² / 2 is 0."""
    mask = np.zeros((SIDE, SIDE), bool)
    mask[: SIDE // 2] = True
    matrix = torch.from_numpy(np.where(mask, 1.0, -1.0)).float().reshape(-1, 1)
    linear = al.LinearMap(matrix, torch.zeros(SIDE * SIDE), (SIDE, SIDE), None, {"model": "made"})
    token = fit_token([linear], [mask], ridge=0.1, name="half")
    known = brentq(lambda v: 0.1 * v - 1 / (1 + np.exp(v)), 0, 10)
    assert float(token.value[0]) == pytest.approx(known, rel=1e-6) and abs(token.bias) < 1e-6
    assert token.name == "half" and token.metadata["iou"] == 1 and ((linear[token] > 0) == mask).all()


def test_the_gradient_is_that_of_the_weighted_loss():
    generator = al.seed(0)
    scores, weights = (torch.randn(7, n, generator=generator, dtype=torch.float64) for n in (3, 4))
    weights, step = weights.abs(), 1e-6
    _, slope = weighted_loss(scores, weights)
    for i, c in np.ndindex(7, 3):
        there, back = scores.clone(), scores.clone()
        there[i, c] += step
        back[i, c] -= step
        numeric = (weighted_loss(there, weights)[0] - weighted_loss(back, weights)[0]) / (2 * step)
        assert float(slope[i, c]) == pytest.approx(float(numeric), rel=1e-6, abs=1e-9)


def test_several_classes_reach_their_optimum():
    """At the optimum the slope of an independently written loss is 0; the loss is convex, so there is no other."""
    maps = make_maps(3)
    first = make_masks(maps)
    second = [m & ~f for m, f in zip(make_masks(maps, 50, direction=(-1, 1, 0, 1, 0, 0)), first, strict=True)]
    library = fit_tokens(maps, {"a": first, "b": second}, {"a": None, "b": None}, ridge=0.05)
    white = Whitening.of(maps)
    features = (torch.cat([m.matrix for m in maps]).double() - white.mean) @ white.scale
    u = torch.stack([white.inverse @ token.value.double() for token in library.values()]).requires_grad_()
    bias = torch.tensor([t.bias + float(white.mean @ t.value.double()) for t in library.values()]).requires_grad_()
    label = np.concatenate([(f + 2 * s).ravel() for f, s in zip(first, second, strict=True)])
    count = np.bincount(label)
    weight = torch.from_numpy(np.sqrt(count[0] / count))[label]
    scores = torch.cat([torch.zeros(len(label), 1), features @ u.T + bias], 1)
    loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(label), reduction="none")
    ((weight * loss).sum() / weight.sum() + 0.05 / 2 * u.square().sum()).backward()
    assert u.grad.abs().max() < 1e-6 and bias.grad.abs().max() < 1e-6
    found = al.LinearMap.stack(maps).labels(library, SIDE).ravel()
    assert (found == label).mean() > count.max() / count.sum() + 0.1


def test_a_class_may_be_absent_from_an_image():
    maps = make_maps(2)
    masks = make_masks(maps)
    library = fit_tokens(maps, {"thing": [masks[0], np.zeros((SIDE, SIDE), bool)]}, {"thing": None})
    assert list(library) == ["thing"]


def test_a_class_of_one_image_has_no_iou_where_it_was_left_out():
    maps, empty = make_maps(6), np.zeros((SIDE, SIDE), bool)
    masks = [make_masks(maps)[0], *[empty] * 5]
    [token] = fit_tokens(maps, {"thing": masks}, {"thing": None}).values()
    assert all(np.isfinite(row["loss"]) and row["iou"] is None for row in token.metadata["left out"])


def test_a_class_may_fill_an_image():
    """Left out, such an image has no background; it still says which ridge is good."""
    maps = make_maps(5)
    masks = [np.ones((SIDE, SIDE), bool), *make_masks(maps)[1:]]
    [token] = fit_tokens(maps, {"thing": masks}, {"thing": None}).values()
    assert all(np.isfinite(row["loss"]) for row in token.metadata["left out"])


def test_one_image_a_class_is_enough():
    """No image can be left out, so the ridge is the default one; asked to choose, it says so."""
    maps, empty = make_maps(5), np.zeros((SIDE, SIDE), bool)
    masks = {f"c{i}": [m if k == i else empty for k, m in enumerate(make_masks(maps))] for i in range(5)}
    library = fit_tokens(maps, masks, dict.fromkeys(masks))
    assert library["c0"].metadata["ridge"] == RIDGE and "left out" not in library["c0"].metadata
    with pytest.raises(ValueError, match="none can be left out: give one ridge"):
        fit_tokens(maps, masks, dict.fromkeys(masks), ridge=(0.1, 1))


def test_the_same_input_gives_the_same_token():
    maps = make_maps(5)
    one, other = (fit_token(maps, make_masks(maps), torch.ones(6)) for _ in range(2))
    assert one.name == "token" and torch.equal(one.value, other.value) and one.bias == other.bias


def test_the_ridge_with_the_least_loss_on_left_out_images():
    maps = make_maps(5)
    tried = fit_token(maps, make_masks(maps)).metadata
    losses = {row["ridge"]: row["loss"] for row in tried["left out"]}
    assert set(losses) == set(RIDGES) and tried["ridge"] == min(losses, key=losses.get)
    assert "left out" not in fit_token(maps[:2], make_masks(maps[:2])).metadata


def test_a_ridge_keeps_to_the_word():
    """With few cells and a ridge the token stays near a word that points the right way, and leaves without one."""
    maps = make_maps(1, side=4)
    word = torch.tensor([1.0, -1, 0.5, 0, 0, 0.2])  # what masks show, but for their noise
    masks, cosine = make_masks(maps), torch.nn.functional.cosine_similarity
    tokens = [fit_token(maps, masks, init, ridge=r).value for init, r in ((word, 0.3), (word, 1e-4), (None, 0.3))]
    near, far, without = (float(cosine(value, word, 0)) for value in tokens)
    assert near > far and near > without


def test_ignored_pixels_and_cells_do_not_count():
    maps = make_maps(1)
    [mask] = make_masks(maps)
    spoiled = mask.astype(np.uint8)
    spoiled[:8], maps[0].matrix[: 8 * SIDE] = 255, 0  # what lies there must not matter
    half = al.LinearMap(maps[0].matrix[8 * SIDE :], torch.zeros(24 * SIDE), (24, SIDE), None, maps[0].metadata)
    white = Whitening.of(maps)
    with_hole = fit_token(maps, [spoiled], unlabeled=white)
    # 24 rows are few enough to upsample, but no whole factor refines them: the same cells
    without = fit_token([half], [mask[8:]], unlabeled=white)
    np.testing.assert_allclose(with_hole.value, without.value, rtol=1e-5, atol=1e-6)


def test_a_band_leaves_out_cells_that_are_in_part_inside():
    maps = make_maps(1)
    [mask] = make_masks(maps)
    fine = np.kron(mask, np.ones((2, 2), bool))
    fine[::2, ::2] ^= True  # every cell has three quarters or one quarter
    with pytest.raises(ValueError, match="no valid pixel is outside"):
        fit_token(maps, [fine], band=(0.2, 0.8))
    exact = fit_token(maps, [mask]).value
    assert torch.equal(fit_token(maps, [np.kron(mask, np.ones((2, 2), bool))], band=(0.2, 0.8)).value, exact)


def test_keys_with_a_bias():
    """What a map adds by itself is there before the token: shifted maps need the opposite zero level."""
    maps = make_maps()
    shifted = [al.LinearMap(m.matrix, m.bias + 3, m.size, None, m.metadata) for m in maps]
    one, other = (fit_token(m, make_masks(maps)) for m in (maps, shifted))
    np.testing.assert_allclose(one.value, other.value, rtol=1e-4, atol=1e-5)
    assert other.bias == pytest.approx(one.bias - 3, rel=1e-4)


def test_a_fitted_token_finds_what_its_word_misses(pipe):
    """Windows, which no caption names: learned from two scenes, found in others."""
    from attnlab.scenes import street

    scenes = [s for s in map(street.render, range(160)) if s.mask("roof").mean() > 0.03][:4]
    recording = al.record_image(pipe, [s.image for s in scenes], [s.caption for s in scenes], generator=al.seed(0))
    masks = [s.mask("roof") for s in scenes]
    token = al.fit_token(recording[:2], masks[:2], "house", name="roof")
    learned = al.transfer_matrix([token], recording[2:], masks[2:]).mean()
    word = al.transfer_matrix(
        ["house"], recording[2:], masks[2:], al.best_words(recording[:2], masks[:2], ["house"])[0][2]
    )
    assert learned > word.mean()


good = make_maps(2)
masks = make_masks(good)
empty, full = np.zeros((SIDE, SIDE), bool), np.ones((SIDE, SIDE), bool)
spoiled = al.LinearMap(good[0].matrix * np.nan, good[0].bias, good[0].size, None, good[0].metadata)
foreign = al.LinearMap(good[0].matrix, good[0].bias, good[0].size, None, {**good[0].metadata, "model": "other"})


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fit_token([], []), "no recordings"),
        (lambda: fit_token(good, masks[:1]), "1 masks for 2 images"),
        (lambda: fit_token(good, [masks[0], empty]), r"masks\[1\] is empty"),
        (lambda: fit_token(good, [full, masks[1]]), r"masks\[0\] is full"),
        (lambda: fit_token(good, [masks[0], masks[1][:9]]), "its proportions must be"),
        (lambda: fit_token([good[0], foreign], masks), "one size, text width, model"),
        (lambda: fit_token([spoiled, good[1]], masks), "NaN or infinity"),
        (lambda: fit_token(good, masks, "car"), "no text encoder"),
        (lambda: fit_token(good, masks, torch.ones(7)), r"finite embedding \(6,\), not \(7,\)"),
        (
            lambda: fit_token(good, masks, al.Token("x", torch.ones(6), metadata={"model": "other"})),
            "does not fit made",
        ),
        (lambda: fit_token(good, masks, ridge=0), "positive number"),
        (lambda: fit_token(good[:1], masks[:1], ridge=(0.1, 1)), "2 folds of 2 images"),
        (lambda: fit_token(good, masks, band=(0.8, 0.2)), "band is"),
        (lambda: fit_token(good, masks, unlabeled=[]), "unlabeled is empty"),
        (lambda: fit_token(good, masks, unlabeled=make_maps(1, 5)), "unlabeled is of made, text width 5"),
        (lambda: fit_token(good, masks, unlabeled=[foreign]), "unlabeled is of other, text width 6; .* of made"),
        (lambda: fit_token(good, masks, unlabeled=[good[0], foreign]), r"of several models: \['made', 'other'\]"),
        (lambda: fit_tokens(good, {"a": [m * np.uint8(255) for m in masks]}, {"a": None}), "take mask > 0"),
        (lambda: fit_tokens(good, {}), "no class"),
        (lambda: fit_tokens(good, {"a": [empty, empty]}, {"a": None}), "'a' is in no training image"),
        (lambda: fit_tokens(good, {"a": masks, "b": masks}, {"a": None, "b": None}), "masks of image 0 overlap"),
        (lambda: fit_tokens(good, {"a": masks, "b": [~m for m in masks]}, {"a": None, "b": None}), "leave a class out"),
        (lambda: fit_tokens(good, {"a": masks}, {"b": None}), "init names 'b'"),
        (lambda: fit_tokens(good, {"a": masks[:1]}, {"a": None}), "1 masks for 2 images"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_the_callers_modes_change_nothing(recording):
    mask = np.zeros((16, 16), bool)
    mask[4:12, 2:9] = True
    expected = fit_token(recording, [mask], "smoke")
    near = al.nearest_words(expected, recording.encoder, ["smoke", "car", "tree"], recording)
    with torch.inference_mode():
        inside = fit_token(recording, [mask], "smoke")
        whitening, start = Whitening.of([recording]), recording.encoder.embed("smoke")
    with torch.autocast("cpu", torch.bfloat16):
        cast = fit_token(recording, [mask], "smoke", unlabeled=whitening)
        assert al.nearest_words(expected, recording.encoder, ["smoke", "car", "tree"], recording) == near
    for token in (inside, cast, fit_token(recording, [mask], start)):
        assert torch.equal(token.value, expected.value) and token.bias == expected.bias
