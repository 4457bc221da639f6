"""Training and measuring joint models of aerial scenes, every stage once, as short as can be."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from attnlab.joint import JointDiffusion
from attnlab.segmentation import model as segment
from attnlab.training import Schedule
from experiments.bundled import cards
from experiments.bundled import train_aerial as aerial
from experiments.studies import joint_pairs as aerial_study


def test_every_stage(tmp_path, monkeypatch):
    short = Schedule(steps=45, lr=1e-3, checkpoint=2)  # of 100 scenes: 4 of 4
    small = {"size": 32, "channels": (32, 32), "enlarging": (32, 32), "judged": 6, "steps": 2, "batch": 2, "short": 2}
    small |= {"enlarged": 2, "checked": 3}
    monkeypatch.setitem(aerial.PRESETS, "cpu", aerial.Preset(**small, schedule=short))
    monkeypatch.setattr(aerial, "BUNDLED", tmp_path / "bundled")
    for name in ("aerial", "aerial-x2", "aerial-judge"):
        (tmp_path / "bundled" / name).mkdir(parents=True)
        (tmp_path / "bundled" / name / "README.md").write_text("\n".join(["# A card", *cards.MARKS]))
    for stage, counts in (("measure", (3, 4, 2)), ("compare", (2,)), ("enlarge", (2,))):
        monkeypatch.setattr(getattr(aerial.Run, stage), "__defaults__", counts)
    aerial.main(["judge", "--work", str(tmp_path)])
    weights = (tmp_path / "judge/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    for stage in ("joint", "measure", "compare", "enlarge", "ship"):
        aerial.main([stage, "4", "--work", str(tmp_path)])
    found = json.loads((tmp_path / "measured.json").read_text())
    assert found.keys() == {"measure 4", "compare 4", "enlarge 4"}
    one = found["measure 4"]
    assert one["scenes"] == 4 and one["samples"] == 3 and [step for step, _ in one["held-out error"]] == [2, 4]
    assert sum(one["class shares"]["samples"]) == pytest.approx(1) and len(one["IoU of the judge"]["samples"]) == 7
    for off in found["compare 4"]["variants"].values():
        assert len(off["colors"]) == len(off["labels"]) == len(aerial.TIMES)
        assert all(0 <= share <= 1 for share in off["labels"])
    assert 0 < found["enlarge 4"]["pixels repeated"]["pixels of another class"] < 0.2
    assert (tmp_path / "judge/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == weights  # trained once
    assert json.loads((tmp_path / "bundled/aerial/measured.json").read_text()) == found
    text = {path.parent.name: path.read_text() for path in (tmp_path / "bundled").glob("*/README.md")}
    assert "samples, 4 scenes" in text["aerial"] and "| pixels repeated |" in text["aerial-x2"]
    assert f"{found['measure 4']['IoU of the judge']['held-out scenes'][0]:.3f}" in text["aerial-judge"]
    assert JointDiffusion.from_pretrained(tmp_path / "bundled/aerial").size == 32
    assert JointDiffusion.from_pretrained(tmp_path / "bundled/aerial-x2").size == 64
    images = aerial.Run(aerial.PRESETS["cpu"], tmp_path, torch.device("cpu")).scenes(0, 2)[0]
    judged = (segment.predict(model, images) for model in (aerial.load_judge(tmp_path / "judge"), aerial.load_judge()))
    assert np.mean(next(judged) == next(judged)) > 0.95  # in half precision it is the same judge


def test_joint_models_see_the_first_scenes_and_no_other():
    run = aerial.Run(aerial.Preset(), None, torch.device("cpu"))
    few, more = run.scenes(0, 3), run.scenes(0, 5)
    np.testing.assert_array_equal(few[0], more[0][:3])
    ranges = [range(500), range(aerial.JUDGED, aerial.JUDGED + 20_000)]
    ranges += [range(aerial_study.MORE, aerial_study.MORE + 500)]
    ranges += [range(first, first + 500) for first in (aerial.VALIDATION, aerial.TESTS)]
    assert len(set().union(*ranges)) == sum(map(len, ranges))  # nobody's scenes are another's


def test_a_small_study_chooses_on_validation_scenes_and_goes_on(tmp_path):
    images, labels = aerial.Run(aerial.Preset(), tmp_path, torch.device("cpu")).scenes(50, 6)  # as if drawn
    margins = np.ones(labels.shape, np.float32)
    (tmp_path / "study").mkdir()
    np.savez(tmp_path / "study/drawn 3.npz", images=images, labels=labels, margins=margins, judged=labels,
             segmented=labels)  # fmt: skip
    small = aerial_study.Study((3,), ratios=(1, 2), tried=3, trial=2, tries=1, seeds=1, steps=1, validation=3, tests=3)
    record = small.run(tmp_path, workers=1)
    mix, way = record["mix"], record["way"]
    on_validation = {one["mix"]: np.nanmean(one["validation"]) for one in record["arms"] if one["added"] == "drawn"
                     and one["ratio"] == 2 and one["way"] == aerial_study.FIRST}  # fmt: skip
    assert on_validation[mix] == max(on_validation.values()) and set(on_validation) == set(aerial_study.MIXES)
    arm = {"scenes": 3, "added": "drawn", "ratio": 1, "mix": mix, "way": way}
    assert aerial_study.ious(record, **arm).shape == (1, 7) and aerial_study.gain(record, **arm).shape == (1, 7)
    mixes = {row["added"]: row["mix"] for row in aerial_study.table(record)}
    drawn = ("drawn", "drawn, segmented", "drawn, judged")
    assert mixes == {"": "half", "rendered": "pool"} | dict.fromkeys(drawn, mix)
    assert {row["added"] for row in aerial_study.table(record)} == set(aerial_study.ADDED)
    assert len(aerial_study.trials(record)) == len(aerial_study.MIXES) + len(aerial_study.WAYS)
    assert [x.shape for x in aerial_study.by_ratio(record, 3)] == [(1, 7)] * 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "study/arms").iterdir()}
    assert small.run(tmp_path, workers=1) == record
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "study/arms").iterdir()} == before
    with pytest.raises(ValueError, match="holds a study with other settings"):
        replace(small, seeds=2).run(tmp_path)
    with pytest.raises(KeyError, match="of no arm or of several"):
        aerial_study.ious(record, added="drawn")


def test_the_ignore_band_leaves_out_what_is_undecided(tmp_path):
    (tmp_path / "study").mkdir()
    labels, margins = np.full((4, 2, 2), 3, np.uint8), np.full((4, 2, 2), 0.95, np.float32)
    margins[0, 0, 0] = 0.5
    np.savez(tmp_path / "study/drawn 2.npz", images=np.zeros((4, 2, 2, 3), np.uint8), labels=labels, margins=margins,
             judged=labels + 1)  # fmt: skip
    assert (aerial_study._extra(tmp_path, 2, "drawn", 3, None)[1] == 3).all()
    found = aerial_study._extra(tmp_path, 2, "drawn", 3, 0.9)[1]
    assert found.shape == (3, 2, 2) and found[0, 0, 0] == 255 and (found == 255).sum() == 1
    assert (aerial_study._extra(tmp_path, 2, "drawn, judged", 3, None)[1] == 4).all()
