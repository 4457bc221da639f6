"""The study of what synthetic pairs are worth: exact scenes, and every arm trained on what it says."""

import json
from dataclasses import asdict

import numpy as np
import pytest

import attnlab as al
from attnlab.metrics import class_ious, confusion
from experiments.studies import generated_pairs as downstream


def test_scenes_have_exact_labels_of_the_classes():
    images, labels = downstream.scenes(5, downstream.TESTS)
    assert images.shape == (5, 64, 64, 3) and labels.dtype == np.uint8
    number, checked = downstream.TESTS, 0
    while checked < 5:
        scene = al.scenes.street.render(number)
        if max(scene.mask(name).mean() for name in downstream.CLASSES) >= downstream.SEEN:
            np.testing.assert_array_equal(images[checked], scene.image)
            for i, name in enumerate(downstream.CLASSES, 1):
                np.testing.assert_array_equal(labels[checked] == i, scene.mask(name))
            checked += 1
        number += 1


def test_the_reference_segmenter_labels_the_same_images():
    images, labels = downstream.scenes(8, downstream.TRAINING)
    again, found = downstream.with_truth((images, labels), al.load_segmenter("street", "cpu"))
    assert again is images
    assert class_ious(confusion(labels, found, 4)).min() > 0.6


def hand_made(values):
    """A record of two seeds and one size, IoU of the three classes as given for each arm and seed."""
    arms = [
        {"real": real, "added": added, "seed": s, "iou": [0.9, *iou]}
        for (real, added), rows in values.items()
        for s, iou in enumerate(rows)
    ]
    return {"arms": arms}


def test_gains_compare_the_same_seed():
    record = hand_made({(10, ""): [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], (10, "tiny"): [[0.3, 0.4, 0.5], [0.6, 0.7, 0.8]]})
    alone, added = downstream.table(record)
    assert alone["gain"] == "" and added["gain"] == "+0.200 (+0.200 to +0.200)"  # though the means overlap
    assert [added[name] for name in downstream.CLASSES] == [0.45, 0.55, 0.65]
    # two values 0.2 and 0.5: standard error 0.15, t of one degree of freedom 12.706
    assert alone["mean (95% interval)"] == "0.350 (-1.556 to 2.256)"
    with pytest.raises(KeyError, match="no arm of 30 real pairs and 'tiny' added"):
        downstream.ious(record, 30, "tiny")


def test_tokens_are_learned_from_the_given_pairs_alone():
    pipe = al.load_pipeline("tiny-plain", device="cpu")
    images, labels = downstream.scenes(12, downstream.TRAINING)
    labels = np.where(labels == 3, 0, labels)  # nobody marked water
    tokens = downstream.learned(pipe, (images, labels))
    assert list(tokens) == ["fire", "smoke"]
    other = np.roll(labels, 20, axis=2)
    assert not np.allclose(downstream.learned(pipe, (images, other))["fire"].value, tokens["fire"].value)


def test_a_small_study_runs_and_goes_on(tmp_path):
    small = downstream.Study(sizes=(3,), seeds=1, images=1, denoising=2, steps=1, tests=4)
    record = small.run(tmp_path, workers=1)
    assert len(record["arms"]) == len(small.arms()) == 7 + 5
    assert record["sets"]["tiny, oracle"]["iou with the oracle"] == [1, 1, 1]
    for n, kind in {(n, kind) for n, kind, _ in small.arms()}:
        assert downstream.ious(record, n, kind).shape == (1, 3)
    for path in (tmp_path / "arms").glob("*tokens*"):
        path.unlink()
    others = {path: path.stat().st_mtime_ns for path in (tmp_path / "arms").iterdir()}
    assert small.run(tmp_path, workers=1) == record
    assert all(path.stat().st_mtime_ns == before for path, before in others.items())
    with pytest.raises(ValueError, match="holds a study with other settings"):
        downstream.Study(sizes=(4,)).run(tmp_path)


def test_the_same_real_pairs_for_every_kind_and_others_for_every_seed():
    study = downstream.Study(sizes=(4, 8), seeds=2)
    first, again, other = study.few(4, 0), study.few(4, 0), study.few(4, 1)
    np.testing.assert_array_equal(first[0], again[0])
    assert len(first[0]) == 4 and not np.array_equal(first[0], other[0])


def test_the_committed_record_is_of_the_whole_study():
    record = json.loads(downstream.RECORD.read_text())
    assert record["study"] == json.loads(json.dumps(asdict(downstream.Study())))
    assert len(record["arms"]) == len(downstream.Study().arms())
