"""Training and measuring joint models of aerial scenes, every stage once, as short as can be."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from attnlab.joint import JointDiffusion
from attnlab.segmentation import Segmenter
from attnlab.training import Schedule
from experiments.bundled import cards, train_aerial as aerial
from experiments.studies import joint_pairs


def test_every_stage(tmp_path, monkeypatch):
    short = Schedule(steps=45, lr=1e-3, checkpoint=2)  # of 100 scenes: 4 of 4
    small = {"size": 32, "channels": (32, 32), "enlarger_channels": (32, 32), "batch": 2, "segmenter_scenes": 6}
    small |= {"segmenter_steps": 2, "variant_steps": 2, "enlarger_steps": 2, "validation_scenes": 3}
    monkeypatch.setitem(aerial.AERIAL_PRESETS, "cpu", aerial.AerialPreset(**small, schedule=short))
    monkeypatch.setattr(aerial, "BUNDLED", tmp_path / "bundled")
    for name in ("aerial", "aerial-x2", "aerial-segmenter"):
        (tmp_path / "bundled" / name).mkdir(parents=True)
        (tmp_path / "bundled" / name / "README.md").write_text("\n".join(["# A card", *cards.MARKS]))
    for stage, counts in (("measure", (3, 4, 2)), ("compare", (2,)), ("enlarge", (2,))):
        monkeypatch.setattr(getattr(aerial.AerialTraining, stage), "__defaults__", counts)
    aerial.main(["segmenter", "--work", str(tmp_path)])
    weights = (tmp_path / "segmenter/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    for stage in ("joint", "measure", "compare", "enlarge", "ship"):
        aerial.main([stage, "4", "--work", str(tmp_path)])
    found = json.loads((tmp_path / "measured.json").read_text())
    assert found.keys() == {"measure 4", "compare 4", "enlarge 4"}
    one = found["measure 4"]
    assert one["scenes"] == 4 and one["samples"] == 3 and [step for step, _ in one["held-out error"]] == [2, 4]
    assert sum(one["class shares"]["samples"]) == pytest.approx(1) and len(one["IoU of the judge"]["samples"]) == 7
    for off in found["compare 4"]["variants"].values():
        assert len(off["colors"]) == len(off["labels"]) == len(aerial.COMPARED_TIMESTEPS)
        assert all(0 <= share <= 1 for share in off["labels"])
    assert 0 < found["enlarge 4"]["pixels repeated"]["pixels of another class"] < 0.2
    assert (tmp_path / "segmenter/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == weights  # trained once
    assert json.loads((tmp_path / "bundled/aerial/measured.json").read_text()) == found
    text = {path.parent.name: path.read_text() for path in (tmp_path / "bundled").glob("*/README.md")}
    assert "samples, 4 scenes" in text["aerial"] and "| pixels repeated |" in text["aerial-x2"]
    assert f"{found['measure 4']['IoU of the judge']['held-out scenes'][0]:.3f}" in text["aerial-segmenter"]
    assert JointDiffusion.from_pretrained(tmp_path / "bundled/aerial").size == 32
    assert JointDiffusion.from_pretrained(tmp_path / "bundled/aerial-x2").size == 64
    images = aerial.AerialTraining(aerial.AERIAL_PRESETS["cpu"], tmp_path, torch.device("cpu")).scenes(0, 2)[0]
    folders = tmp_path / "segmenter", tmp_path / "bundled/aerial-segmenter"
    seen = [Segmenter.from_pretrained(folder).segment(images) for folder in folders]
    assert np.mean(seen[0] == seen[1]) > 0.95  # in half precision it is the same segmenter


def test_joint_models_see_the_first_scenes_and_no_other():
    run = aerial.AerialTraining(aerial.AerialPreset(), None, torch.device("cpu"))
    few, more = run.scenes(0, 3), run.scenes(0, 5)
    np.testing.assert_array_equal(few[0], more[0][:3])
    ranges = [range(500), range(aerial.FIRST_SEGMENTER_SEED, aerial.FIRST_SEGMENTER_SEED + 20_000)]
    ranges += [range(joint_pairs.FIRST_FURTHER_SEED, joint_pairs.FIRST_FURTHER_SEED + 500)]
    ranges += [range(first, first + 500) for first in (aerial.FIRST_VALIDATION_SEED, aerial.FIRST_TEST_SEED)]
    assert len(set().union(*ranges)) == sum(map(len, ranges))  # nobody's scenes are another's


def test_a_small_study_chooses_on_validation_scenes_and_goes_on(tmp_path):
    models = aerial.AerialTraining(aerial.AerialPreset(), tmp_path, torch.device("cpu"))
    images, labels = models.scenes(50, 6)  # as if drawn
    margins = np.ones(labels.shape, np.float32)
    (tmp_path / "study").mkdir()
    np.savez(tmp_path / "study/drawn 3.npz", images=images, labels=labels, margins=margins, judged=labels,
             segmented=labels)  # fmt: skip
    size = {"tried": 3, "trial": 2, "tries": 1, "seeds": 1, "steps": 1, "validation": 3, "tests": 3}
    small = joint_pairs.JointPairsStudy((3,), ratios=(1, 2), **size)
    record = small.run(tmp_path, workers=1)
    mix, way = record["mix"], record["way"]
    on_validation = {one["mix"]: np.nanmean(one["validation"]) for one in record["arms"] if one["added"] == "drawn"
                     and one["ratio"] == 2 and one["way"] == joint_pairs.TRIAL_AUGMENTATION}  # fmt: skip
    assert on_validation[mix] == max(on_validation.values()) and set(on_validation) == set(joint_pairs.COMPARED_MIXES)
    arm = {"scenes": 3, "added": "drawn", "ratio": 1, "mix": mix, "way": way}
    assert joint_pairs.ious_by_seed(record, **arm).shape == (1, 7) and joint_pairs.gain(record, **arm).shape == (1, 7)
    mixes = {row["added"]: row["mix"] for row in joint_pairs.runs_table(record)}
    drawn = ("drawn", "drawn, segmented", "drawn, judged")
    assert mixes == {"": "half", "rendered": "pool"} | dict.fromkeys(drawn, mix)
    assert {row["added"] for row in joint_pairs.runs_table(record)} == set(joint_pairs.KINDS_OF_PAIRS)
    assert len(joint_pairs.trials(record)) == len(joint_pairs.COMPARED_MIXES) + len(joint_pairs.COMPARED_AUGMENTATIONS)
    assert [x.shape for x in joint_pairs.by_ratio(record, 3)] == [(1, 7)] * 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "study/arms").iterdir()}
    assert small.run(tmp_path, workers=1) == record
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "study/arms").iterdir()} == before
    with pytest.raises(ValueError, match="holds a run with other settings"):
        replace(small, seeds=2).run(tmp_path)
    with pytest.raises(KeyError, match="of no run or of several"):
        joint_pairs.ious_by_seed(record, added="drawn")


def test_every_run_of_the_study_is_trained_on_what_it_says(tmp_path, monkeypatch):
    """Scenes, as many added pairs as the ratio says, mixed and augmented as asked; tested on scenes of both kinds."""
    models = aerial.AerialTraining(aerial.AerialPreset(), tmp_path, torch.device("cpu"))
    images, labels = models.scenes(50, 6)
    (tmp_path / "study").mkdir()
    margins = np.ones(labels.shape, np.float32)
    np.savez(tmp_path / "study/drawn 3.npz", images=images, labels=labels, margins=margins)
    train, seen = joint_pairs.train_segmenter, []

    def spy(*pairs, **options):
        seen.append((pairs, options))
        return train(*pairs, **options)

    monkeypatch.setattr(joint_pairs, "train_segmenter", spy)
    small = joint_pairs.JointPairsStudy((3,), steps=1, validation=2, tests=4)
    found = small.train(tmp_path, 3, "drawn", 2, "half, ignore band", "CutMix", 5)
    pairs, options = seen[0]
    for one, expected in zip((*pairs[:2], *options["extra"]), (*models.scenes(0, 3), images, labels), strict=True):
        np.testing.assert_array_equal(one, expected)
    wanted = {"mix": "half", "augmentations": ("rotate90", "crop", "color", "cutmix"), "seed": 5, "steps": 1}
    assert {name: options[name] for name in wanted} == wanted
    for kind, first, count in (("validation", aerial.FIRST_VALIDATION_SEED, 2), ("test", aerial.FIRST_TEST_SEED, 4)):
        areas = np.bincount(models.scenes(first, count)[1].ravel(), minlength=7)
        assert np.array(found[kind]).sum(1).tolist() == areas.tolist()
    small.train(tmp_path, 3, "rendered", 1, "pool", "flips", 0)
    further = models.scenes(joint_pairs.FIRST_FURTHER_SEED, 3)[0]
    np.testing.assert_array_equal(seen[1][1]["extra"][0], further)


def test_mixes_and_augmentations_are_chosen_on_validation_scenes():
    """By the mean over seeds; on the test scenes others would be the best."""
    study = joint_pairs.JointPairsStudy((3,), tried=3, tries=2)
    right, wrong = [[5, 0], [0, 5]], [[1, 4], [4, 1]]
    found = {job: {"validation": wrong, "test": right} for job in study.trials()}
    for job in found:
        if job[3:5] == ("pool", joint_pairs.TRIAL_AUGMENTATION) or (job[1] == "" and job[4] == "CutMix"):
            found[job] = {"validation": right, "test": wrong}
    assert study.choose(found) == ("pool", "CutMix")


def test_the_ignore_band_leaves_out_what_is_undecided(tmp_path):
    (tmp_path / "study").mkdir()
    labels, margins = np.full((4, 2, 2), 3, np.uint8), np.full((4, 2, 2), 0.95, np.float32)
    margins[0, 0, 0] = 0.5
    np.savez(tmp_path / "study/drawn 2.npz", images=np.zeros((4, 2, 2, 3), np.uint8), labels=labels, margins=margins,
             judged=labels + 1)  # fmt: skip
    assert (joint_pairs._extra(tmp_path, 2, "drawn", 3, None)[1] == 3).all()
    found = joint_pairs._extra(tmp_path, 2, "drawn", 3, 0.9)[1]
    assert found.shape == (3, 2, 2) and found[0, 0, 0] == 255 and (found == 255).sum() == 1
    assert (joint_pairs._extra(tmp_path, 2, "drawn, judged", 3, None)[1] == 4).all()
