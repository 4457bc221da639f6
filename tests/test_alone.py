"""The package works by itself: no experiments/, no notebooks, no tests beside it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import attnlab

SCRIPT = """
import importlib, pkgutil, sys, warnings
import numpy as np
import attnlab as al
from attnlab.dataset import Filters, Recipe, generate_dataset
from attnlab.joint import JointDiffusion

assert al.__file__.startswith(sys.argv[1]), al.__file__
for module in pkgutil.walk_packages(al.__path__, "attnlab."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

pipe = al.load_pipeline("tiny", device="cpu")
with al.record(pipe) as recording:
    pipe("a burning house with smoke", generator=al.seed(7), num_inference_steps=4)
maps = [al.daam(recording)["smoke"], al.ovam(recording, "a tree")["tree"], al.linear_daam(recording)["fire"]]
assert all(np.isfinite(one).all() and np.ptp(one) > 0 for one in maps)
mask = al.dbscan_mask(maps[0])
assert 0 < mask.mean() < 0.5
token = al.fit_token([recording], [mask], init="smoke")
assert token.metadata["iou"] > 0.3
recipe = Recipe(prompts=["a house with smoke"], classes={"smoke": "smoke"}, images=2, steps=2, batch=2,
                filters=Filters(area=(0.0, 1.0)))
assert len(generate_dataset(recipe, "made")) == 2
images, labels, margins = JointDiffusion.from_pretrained("aerial").sample(2, al.seed(0), steps=3)
assert images.shape == (2, 64, 64, 3) and labels.max() < 7
assert "experiments" not in sys.modules
print("alone")
"""


def test_the_package_works_without_what_lies_beside_it(tmp_path):
    shutil.copytree(Path(attnlab.__file__).parent, tmp_path / "attnlab", ignore=shutil.ignore_patterns("__pycache__"))
    outside = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "alone", done.stdout + done.stderr
