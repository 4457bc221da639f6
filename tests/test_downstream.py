"""The study of what synthetic pairs are worth: exact scenes, and every segmenter trained on what its run says."""

import json
from dataclasses import asdict

import numpy as np
import pytest

import attnlab as al
from attnlab.metrics import class_ious, confusion
from attnlab.segmentation import train_segmenter
from experiments.studies import generated_pairs
from experiments.studies.jobs import mean_and_interval


def test_scenes_have_exact_labels_of_the_classes():
    images, labels = generated_pairs.real_pairs(5, generated_pairs.FIRST_REAL_TEST_SEED)
    assert images.shape == (5, 64, 64, 3) and labels.dtype == np.uint8
    number, checked = generated_pairs.FIRST_REAL_TEST_SEED, 0
    while checked < 5:
        scene = al.scenes.street.render(number)
        if max(scene.mask(name).mean() for name in generated_pairs.DISASTERS) >= generated_pairs.MIN_CLASS_AREA:
            np.testing.assert_array_equal(images[checked], scene.image)
            for i, name in enumerate(generated_pairs.DISASTERS, 1):
                np.testing.assert_array_equal(labels[checked] == i, scene.mask(name))
            checked += 1
        number += 1


def test_the_reference_segmenter_labels_the_same_images():
    images, labels = generated_pairs.real_pairs(8, generated_pairs.FIRST_REAL_SEED)
    again, found = generated_pairs.with_reference_labels((images, labels), al.load_segmenter("street", "cpu"))
    assert again is images
    assert class_ious(confusion(labels, found, 4)).min() > 0.6


def hand_made(values):
    """A record of two seeds and one size, IoU of the three classes as given for each run and seed."""
    arms = [
        {"real": real, "added": added, "seed": s, "iou": [0.9, *iou]}
        for (real, added), rows in values.items()
        for s, iou in enumerate(rows)
    ]
    return {"arms": arms}


def test_gains_compare_the_same_seed():
    record = hand_made({(10, ""): [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], (10, "tiny"): [[0.3, 0.4, 0.5], [0.6, 0.7, 0.8]]})
    alone, added = generated_pairs.gains_table(record)
    assert alone["gain"] == "" and added["gain"] == "+0.200 (+0.200 to +0.200)"  # though the means overlap
    assert [added[name] for name in generated_pairs.DISASTERS] == [0.45, 0.55, 0.65]
    # two values 0.2 and 0.5: standard error 0.15, t of one degree of freedom 12.706
    assert alone["mean (95% interval)"] == "0.350 (-1.556 to 2.256)"
    with pytest.raises(KeyError, match="no run of 30 real pairs and 'tiny' added"):
        generated_pairs.run_ious(record, 30, "tiny")


def test_tokens_are_learned_from_the_given_pairs_alone():
    pipe = al.load_pipeline("tiny-plain", device="cpu")
    images, labels = generated_pairs.real_pairs(12, generated_pairs.FIRST_REAL_SEED)
    labels = np.where(labels == 3, 0, labels)  # nobody marked water
    tokens = generated_pairs.learn_tokens(pipe, (images, labels))
    assert list(tokens) == ["fire", "smoke"]
    other = np.roll(labels, 20, axis=2)
    assert not np.allclose(generated_pairs.learn_tokens(pipe, (images, other))["fire"].value, tokens["fire"].value)


def test_a_small_study_runs_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(generated_pairs, "_LISTS", {"thing": ("house", "tree"), "when": ("at night", "at dusk")})
    small = generated_pairs.GeneratedPairsStudy(sizes=(3,), seeds=1, images=1, denoising=2, steps=1, tests=4)
    record = small.run(tmp_path, workers=1)
    assert len(record["arms"]) == len(small.jobs()) == 7 + 5
    agreement = np.array(record["sets"]["tiny, oracle"]["iou with the oracle"])  # nan: drawn by none
    assert (agreement[~np.isnan(agreement)] == 1).all() and not np.isnan(agreement).all()
    for n, kind in {(n, kind) for n, kind, _ in small.jobs()}:
        assert generated_pairs.run_ious(record, n, kind).shape == (1, 3)
    further = generated_pairs._load_pairs(tmp_path / "rendered.npz")[0]
    first = generated_pairs._FIRST_FURTHER_REAL_SEED
    np.testing.assert_array_equal(further, generated_pairs.real_pairs(len(further), first)[0])
    seeds = [generated_pairs.FIRST_REAL_SEED, first, generated_pairs.FIRST_REAL_TEST_SEED]
    assert min(np.diff(seeds)) >= 20_000  # nobody's scenes are another's
    for path in (tmp_path / "arms").glob("*tokens*"):
        path.unlink()
    others = {path: path.stat().st_mtime_ns for path in (tmp_path / "arms").iterdir()}
    assert json.dumps(small.run(tmp_path, workers=1)) == json.dumps(record)  # where nan is nan
    assert all(path.stat().st_mtime_ns == before for path, before in others.items())
    with pytest.raises(ValueError, match="holds a run with other settings"):
        generated_pairs.GeneratedPairsStudy(sizes=(4,)).run(tmp_path)


def test_every_run_is_trained_on_what_it_says(tmp_path, monkeypatch):
    """The same few real pairs, what is added to them, a seed of its own; and tested on the test scenes."""
    study, seen = generated_pairs.GeneratedPairsStudy(sizes=(4,), steps=1, tests=3), []

    def spy(*pairs, extra=None, **options):
        seen.append((pairs[0], extra and extra[0], options["seed"], options["steps"]))
        return train_segmenter(*pairs, extra=extra, **options)

    monkeypatch.setattr(generated_pairs, "train_segmenter", spy)
    made = {name: generated_pairs.real_pairs(2, 7 + i) for i, name in enumerate(("tiny", "tiny-plain, tokens 4 3"))}
    for name, pairs in made.items():
        generated_pairs._save_pairs(tmp_path / f"{name}.npz", pairs)
    few, (added, learned) = study.few(4, 3)[0], (pairs[0] for pairs in made.values())
    for n, kind, extra in ((4, "", None), (4, "tiny", added), (4, "tiny-plain, tokens", learned), (0, "tiny", None)):
        counts = np.array(study.train(tmp_path, n, kind, 3))
        images, found, *options = seen.pop()
        np.testing.assert_array_equal(images, few if n else added)
        assert options == [3, 1] and (found is None if extra is None else np.array_equal(found, extra))
        truth = generated_pairs.real_pairs(3, generated_pairs.FIRST_REAL_TEST_SEED)[1]
        assert counts.sum(1).tolist() == np.bincount(truth.ravel(), minlength=4).tolist()


def test_the_same_real_pairs_for_every_kind_and_others_for_every_seed():
    study = generated_pairs.GeneratedPairsStudy(sizes=(4, 8), seeds=2)
    first, again, other = study.few(4, 0), study.few(4, 0), study.few(4, 1)
    np.testing.assert_array_equal(first[0], again[0])
    assert len(first[0]) == 4 and not np.array_equal(first[0], other[0])


def test_the_committed_record_is_of_the_whole_study():
    record = json.loads(generated_pairs.GENERATED_PAIRS_RESULTS.read_text())
    assert record["study"] == json.loads(json.dumps(asdict(generated_pairs.GeneratedPairsStudy())))
    assert len(record["arms"]) == len(generated_pairs.GeneratedPairsStudy().jobs())


def test_mean_and_interval_is_students_t():
    """0.95 quantile of t with 4 degrees of freedom, from a printed table: 2.776."""
    values = np.array([0.1, 0.2, 0.4, 0.3, 0.25])
    mean, low, high = mean_and_interval(values)
    half = 2.776 * values.std(ddof=1) / np.sqrt(5)
    np.testing.assert_allclose((mean, low, high), (0.25, 0.25 - half, 0.25 + half), rtol=1e-3)
    mean, *ends = mean_and_interval([0.5])
    assert mean == 0.5 and np.isnan(ends).all()
