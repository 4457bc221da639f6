"""Files of an earlier version load, and answer as they did: `tests/data/commit_879ad02` was written by that commit."""

import json
from pathlib import Path

import numpy as np
import pytest

import attnlab as al
from attnlab.dataset import Dataset, verify_dataset
from attnlab.joint import JointDiffusion

OLD = Path(__file__).parent / "data/commit_879ad02"
ANSWERS = np.load(OLD / "answers.npz")


def near(values, name):
    expected = ANSWERS[name]
    np.testing.assert_allclose(values, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.fixture(scope="module")
def queries():
    return al.Recording.load(OLD / "queries.safetensors")


@pytest.fixture(scope="module")
def sums():
    return al.Recording.load(OLD / "sums.safetensors")


def test_a_recording_of_queries(queries):
    shown = queries.branch("conditional")
    near(al.daam(shown).values, "daam")
    near(al.daam(shown, per="step", heads=0)[1]["smoke"], "daam_step")
    near(al.daam(queries.branch("negative")).values, "daam_negative")
    near(al.ovam(shown, "a house, fire and water").values, "ovam")
    near(al.linear_daam(shown)["tree"], "linear")
    near(al.propagate(al.daam(shown), *shown.self_attention())["smoke"], "propagated")


def test_recordings_of_sums_and_maps(sums):
    near(al.ovam(sums[1], "fire water").values, "ovam_streamed")
    near(al.linear_daam(sums[0])["tree"], "linear_sum")
    near(al.daam(al.Recording.load(OLD / "maps.safetensors")).values, "daam_streamed")


def test_what_is_known_of_them(queries):
    known = json.loads((OLD / "about.json").read_text())
    shown = queries.branch("conditional")
    assert json.loads(json.dumps(shown.metadata)) == known["recording"] | {"changed": None}  # noted since then
    assert [word.text for word in shown.words] == known["words"]
    found = al.LinearMap.load(OLD / "linear.safetensors").metadata
    assert {name: found[name] for name in known["linear"]} == known["linear"]


def test_a_linear_map_and_tokens(queries):
    linear, library = al.LinearMap.load(OLD / "linear.safetensors"), al.TokenLibrary.load(OLD / "tokens.safetensors")
    near(linear["smoke"], "linear_file")
    shown = queries.branch("conditional")
    near(al.linear_daam(shown)[library["smoke"]], "token")
    near(al.ovam(shown, library["car"])["car"], "token_softmax")
    assert library["smoke"].metadata["method"] == "fit_token" and library["car"].background is not None


@pytest.mark.parametrize("kind", ["labels", "masks"])
def test_a_data_set(kind):
    folder = OLD / f"dataset_{kind}"
    assert verify_dataset(folder) == []
    for i, pair in enumerate(Dataset(folder)):
        if kind == "labels":
            np.testing.assert_array_equal(pair.labels, ANSWERS[f"dataset_labels/{i}"])
        else:
            for name, mask in pair.labels.items():
                np.testing.assert_array_equal(mask, ANSWERS[f"dataset_masks/{i}/{name}"])


def test_a_joint_model():
    model = JointDiffusion.from_pretrained(OLD / "joint")
    images, labels, margins = model.sample(2, al.seed(0), steps=3)
    # bfloat16, whose last bits depend on the processor
    assert np.abs(images.astype(int) - ANSWERS["joint_images"]).mean() < 1
    assert (labels == ANSWERS["joint_labels"]).mean() > 0.98
    np.testing.assert_allclose(margins, ANSWERS["joint_margins"], atol=0.1)
