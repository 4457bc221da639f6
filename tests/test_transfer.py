"""Tokens on other images, and words near them: answers that are known by construction."""

import numpy as np
import pytest
import torch

import attnlab as al
from attnlab import metrics
from attnlab.recording import words


def four_pixels(image):
    """A map of 2 x 2 pixels in which direction i of the embedding lights pixel (i + image) mod 4."""
    matrix = torch.eye(4).roll(image, 0)
    return al.LinearMap(matrix, torch.zeros(4), (2, 2), None, {"model": "made"})


LEFT = np.array([[1, 0], [1, 0]], bool)
TOKEN = al.Token("left", torch.tensor([2.0, -1, 2, -1]), -0.5, metadata={"model": "made"})


def test_matrix_by_hand():
    maps = [four_pixels(0), four_pixels(1)]
    other = al.Token("corner", torch.tensor([1.0, 0, 0, 0]), -0.5)
    found = al.transfer_matrix([TOKEN, other], maps, [LEFT, LEFT])
    np.testing.assert_allclose(found, [[1, 0], [0.5, 0]])
    # as a fraction of the range -1 is 0: the threshold 1/2 takes what is above 0.5
    np.testing.assert_allclose(al.transfer_matrix({"a": TOKEN}, maps, [LEFT, LEFT], 0.5), [[1, 0]])
    np.testing.assert_allclose(al.transfer_matrix({"a": TOKEN}, maps, [LEFT, LEFT], {"a": 0}), [[0.5, 0.5]])


def test_ignored_pixels_do_not_count():
    mask = np.array([[1, 0], [1, 255]], np.uint8)
    corner = al.Token("corner", torch.tensor([1.0, 0, 0, 1]), -0.5)
    np.testing.assert_allclose(al.transfer_matrix([corner], [four_pixels(0)], [mask]), [[0.5]])


def test_every_row_is_kept_and_one_may_be_alone():
    same = [TOKEN, al.Token("left", TOKEN.value, 5.0)]
    assert al.transfer_matrix(same, [four_pixels(0)], [LEFT]).shape == (2, 1)
    assert al.transfer_matrix(TOKEN, [four_pixels(0)], [LEFT]).tolist() == [[1]]


def test_the_best_threshold_is_that_of_valid_pixels():
    """The only wrong pixel is ignored, so a threshold at the map's lowest value inside the mask is perfect."""
    mask = np.array([[1, 255], [1, 0]], np.uint8)
    token = al.Token("x", torch.tensor([0.6, 1, 0.6, 0]), 0.1)
    [match] = al.best_words([four_pixels(0)], [mask], [token])
    assert match.iou == 1 and match.threshold <= 0.6
    assert al.transfer_matrix([token], [four_pixels(0)], [mask], match.threshold)[0, 0] == 1


def test_a_token_with_a_background_has_softmax_maps(recording):
    mask = np.zeros((16, 16), bool)
    mask[:8] = True
    words = [recording.encoder.embed(word) for word in ("smoke", "house")]
    token = al.Token("x", words[0], background=al.Token("rest", words[1]))
    heat = al.ovam(recording, token)[token]
    found = (heat - heat.min()) / np.ptp(heat) >= 0.5
    assert al.transfer_matrix([token], recording, [mask], 0.5)[0, 0] == pytest.approx(metrics.iou(found, mask))
    with pytest.raises(ValueError, match="learned for softmax maps, with a background: give recordings"):
        al.transfer_matrix([token], al.linear_daam(recording), [mask], 0.5)


def test_the_word_for_a_region(pipe):
    from attnlab.scenes import street

    scene = next(s for s in street.render_with("building", 30) if s.mask("building").mean() > 0.1)
    recording = al.record_image(pipe, scene.image, scene.caption, generator=al.seed(0))
    found = al.best_words(recording, [scene.mask("building")], ["sky", "house", "road"])
    assert found[0].word == "house" and found[0].iou > found[1].iou
    again = al.transfer_matrix(["house"], recording, [scene.mask("building")], found[0].threshold)
    assert again[0, 0] == pytest.approx(found[0].iou)


def test_the_nearest_word_of_a_word_is_itself(recording):
    token = al.Token("x", 3 * recording.encoder.embed("smoke"), metadata={"model": "tiny"})
    for images in (None, recording):
        near = al.nearest_words(token, recording.encoder, recordings=images, count=3)
        assert near[0] == ("smoke", pytest.approx(1, abs=1e-4)) and near[1][1] < near[0][1]
    assert [w for w, _ in al.nearest_words(token, recording.encoder, ["tree", "sky"])] != []


def test_the_vocabulary_has_the_words_of_captions(recording):
    known = words.vocabulary(recording.encoder.tokenizer)
    assert {"smoke", "burning", "house", "tree"} <= set(known) and known == sorted(known)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: al.transfer_matrix([], [four_pixels(0)], [LEFT]), "no tokens"),
        (lambda: al.transfer_matrix([TOKEN, "car"], [four_pixels(0)], [LEFT]), "'car': no fitted zero level"),
        (lambda: al.transfer_matrix([TOKEN], [four_pixels(0)], [LEFT, LEFT]), "2 masks for 1 images"),
        (lambda: al.best_words([four_pixels(0)], [LEFT & ~LEFT], ["car"]), "is empty"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_a_token_of_another_model_is_refused(recording):
    with pytest.raises(ValueError, match="does not fit tiny"):
        al.nearest_words(TOKEN, recording.encoder)
