"""Files of an earlier version load, and answer as they did: `tests/data/commit_879ad02` was written by that commit.

`text` is the text encoder that the bundled models had then; they were trained anew since.
"""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

import attnlab as al
from attnlab.dataset import Dataset, verify_dataset
from attnlab.joint import JointDiffusion
from attnlab.recording.clip import ClipReader
from attnlab.recording.texts import TextEncoder

OLD = Path(__file__).parent / "data/commit_879ad02"
ANSWERS = np.load(OLD / "answers.npz")


def near(values, name):
    expected = ANSWERS[name]
    np.testing.assert_allclose(values, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.fixture(scope="module")
def encoder():
    tokenizer = CLIPTokenizer.from_pretrained(OLD / "text/tokenizer")
    model = CLIPTextModel.from_pretrained(OLD / "text/text_encoder", dtype=torch.float32)
    return TextEncoder(lambda: ClipReader({"tokenizer": tokenizer, "text_encoder": model}), "tiny")


@pytest.fixture(scope="module")
def queries(encoder):
    return al.Recording.load(OLD / "queries.safetensors", encoder)


@pytest.fixture(scope="module")
def sums(encoder):
    return al.Recording.load(OLD / "sums.safetensors", encoder)


def test_texts_of_a_model_that_was_trained_anew_are_refused():
    """What the file holds is shown; another text would be read by weights that its queries never met."""
    again = al.Recording.load(OLD / "queries.safetensors").branch("conditional")
    near(al.daam(again).values, "daam")
    for ask in (
        lambda: al.ovam(again, "water"),
        lambda: al.linear_daam(again)["tree"],
        lambda: pickle.loads(pickle.dumps(again)).encode("tree"),
        lambda: al.LinearMap.load(OLD / "linear.safetensors")["smoke"],
    ):
        with pytest.raises(ValueError, match="tiny reads texts otherwise than when this was recorded"):
            ask()


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
    since = {"changed": None, "denoiser": None, "share": "text", "options": {}}  # noted since then
    assert json.loads(json.dumps(shown.metadata)) == known["recording"] | since
    assert [word.text for word in shown.words] == known["words"]
    found = al.LinearMap.load(OLD / "linear.safetensors").metadata
    assert {name: found[name] for name in known["linear"]} == known["linear"]


def test_a_linear_map_and_tokens(queries):
    linear = al.LinearMap.load(OLD / "linear.safetensors", queries.encoder)
    library = al.TokenLibrary.load(OLD / "tokens.safetensors")
    near(linear["smoke"], "linear_file")
    shown = queries.branch("conditional")
    near(al.linear_daam(shown)[library["smoke"]], "token")
    near(al.ovam(shown, library["car"])["car"], "token_softmax")
    assert library["smoke"].metadata["method"] == "fit_token" and library["car"].background is not None


@pytest.mark.parametrize("kind", ["labels", "masks"])
def test_a_data_set(kind):
    folder = OLD / f"dataset_{kind}"
    assert [said.partition(":")[0] for said in verify_dataset(folder)] == [
        "SHA256SUMS is missing, as in data sets of early versions"
    ]
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
