"""Training and measuring joint models of aerial scenes, every stage once, as short as can be."""

import json

import numpy as np
import pytest
import torch

from attnlab.tiny import aerial
from attnlab.training import Schedule


def test_every_stage(tmp_path, monkeypatch):
    short = Schedule(steps=2, rate=1e-3, checkpoint=1)
    preset = aerial.Preset(size=32, channels=(32, 32), judged=6, steps=2, batch=2, schedule=short)
    monkeypatch.setitem(aerial.PRESETS, "cpu", preset)
    monkeypatch.setattr(aerial.Run.measure, "__defaults__", (3, 4))
    aerial.main(["judge", "--work", str(tmp_path)])
    weights = (tmp_path / "judge/model.safetensors").stat().st_mtime_ns
    aerial.main(["joint", "4", "--work", str(tmp_path)])
    aerial.main(["measure", "4", "--work", str(tmp_path)])
    found = json.loads((tmp_path / "measured4.json").read_text())
    assert found["scenes"] == 4 and found["samples"] == 3
    assert sum(found["class shares"]["samples"]) == pytest.approx(1) and len(found["IoU of the judge"]["samples"]) == 7
    assert (tmp_path / "judge/model.safetensors").stat().st_mtime_ns == weights  # trained once


def test_joint_models_see_the_first_scenes_and_no_other():
    run = aerial.Run(aerial.Preset(), None, torch.device("cpu"))
    few, more = run.scenes(0, 3), run.scenes(0, 5)
    np.testing.assert_array_equal(few[0], more[0][:3])
    ranges = [range(500), range(aerial.JUDGED, aerial.JUDGED + 1500)]
    ranges += [range(first, first + 500) for first in (aerial.VALIDATION, aerial.TESTS)]
    assert len(set().union(*ranges)) == sum(map(len, ranges))  # nobody's scenes are another's
