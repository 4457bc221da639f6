"""Files of recordings and linear maps: whole, lazy, and clear about what they cannot be."""

import json
import subprocess
import sys
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import PROMPT
from safetensors.torch import save_file

import attnlab as al
from attnlab import storage
from attnlab.recording.texts import TextEncoder


@pytest.fixture
def path(recording, tmp_path):
    return recording.save(tmp_path / "house.safetensors")


def test_a_recording_comes_back(recording, path):
    again = al.Recording.load(path)
    assert again.metadata == recording.metadata and again.prompt == recording.prompt
    assert again.trace.timesteps == recording.trace.timesteps
    np.testing.assert_array_equal(al.daam(again).values, al.daam(recording).values)
    np.testing.assert_array_equal(al.ovam(again, "red car").values, al.ovam(recording, "red car").values)
    np.testing.assert_array_equal(al.linear_daam(again)["car"], al.linear_daam(recording)["car"])
    assert list(path.parent.iterdir()) == [path]


def test_masked_tokens_are_in_the_file(pipe, tmp_path):
    """Of a model that masks padding: the softmax of a loaded recording leaves out the same tokens."""
    with al.record(pipe, parts=["conditional"]) as recording, torch.no_grad():
        text, _ = pipe.encode_prompt("a red car", pipe.device, 1, False)
        shown = torch.arange(text.shape[1])[None] < 5
        pipe.unet(torch.randn(1, 4, 16, 16, generator=al.seed(0)), 500, text, encoder_attention_mask=shown)
    again = al.Recording.load(recording.save(tmp_path / "masked.safetensors"))
    assert torch.equal(again.trace.attention_mask, shown[0])
    np.testing.assert_array_equal(al.daam(again).values, al.daam(recording).values)


def test_how_it_came_about_is_in_the_file(pipe, generate, tmp_path):
    with al.record(pipe, generator=al.seed(7)) as recording:
        generate(steps=2)
    metadata = al.Recording.load(recording.save(tmp_path / "file")).metadata
    assert metadata == recording.metadata
    known = {
        "model": "tiny",
        "revision": None,
        "prompt": PROMPT,
        "seed": 7,
        "guidance_scale": 4.0,
        "branch": "conditional",
    }
    assert known.items() <= metadata.items() and metadata["planned"] == metadata["ran"] == 2
    assert set(storage.File(tmp_path / "file", "Recording").metadata["versions"]) == {
        "attnlab", "torch", "diffusers", "transformers"
    }  # fmt: skip


def test_an_interrupted_generation_says_so(pipe, tmp_path):
    def stop(p, step, timestep, kwargs):
        p._interrupt = step == 1
        return kwargs

    with al.record(pipe) as recording:
        pipe(PROMPT, num_inference_steps=5, callback_on_step_end=stop, output_type="latent", generator=al.seed(0))
    again = al.Recording.load(recording.save(tmp_path / "file"))
    assert not again.complete and "interrupted after 2 of 5 steps" in repr(again)


def test_the_text_encoder_of_another_model_is_refused(path):
    with pytest.raises(ValueError, match="was recorded from tiny: tiny-plain's texts do not fit"):
        al.Recording.load(path, TextEncoder.named("tiny-plain"))
    linear = al.linear_daam(al.Recording.load(path)).save(path.parent / "linear")
    with pytest.raises(ValueError, match="was recorded from tiny: tiny-plain's texts do not fit"):
        al.LinearMap.load(linear, TextEncoder.named("tiny-plain"))


def test_a_replaced_file_goes_on_to_give_what_it_held(pipe, generate, tmp_path):
    with al.record(pipe) as recording:
        generate(["a house", "a tree"], steps=2)
    again = al.Recording.load(recording.save(tmp_path / "file"))
    again[1].save(tmp_path / "file")
    np.testing.assert_array_equal(al.daam(again[0]).values, al.daam(recording[0]).values)


def test_without_a_text_encoder_it_knows_its_prompt(recording, path):
    """Of a model without a name: maps of the prompt need the file alone."""
    trace = copy(recording.trace)
    trace.generation = replace(trace.generation, model=None)
    again = al.Recording.load(al.Recording(None, [trace]).save(path))
    assert again.encoder is None and again.prompt == PROMPT and PROMPT in repr(again)
    np.testing.assert_array_equal(al.daam(again).values, al.daam(recording).values)
    with pytest.raises(ValueError, match=r"load it with Recording.load"):
        al.ovam(again, "a tree")


def test_several_images_share_their_key_weights(pipe, generate, tmp_path):
    with al.record(pipe) as recording:
        generate(["a house", "a tree"], steps=2)
    again = al.Recording.load(recording.save(tmp_path / "two.safetensors"))
    assert len(again) == 2 and again[1].prompt == "a tree"
    assert again.traces[0].layers is not again.traces[1].layers
    file = storage.File(tmp_path / "two.safetensors", "Recording")
    weights = [name for name in file.names if name.startswith("keys.")]
    assert len(weights) == len(again.traces[0].layers)
    np.testing.assert_array_equal(al.daam(again[1]).values, al.daam(recording[1]).values)


def test_only_what_is_asked_for_is_read(recording, path, monkeypatch):
    """Key weights and text at once, a layer's queries when its maps are made."""
    read = []
    get = storage.Stored.__getitem__
    monkeypatch.setattr(storage.Stored, "__getitem__", lambda self, i: (read.append(self.name), get(self, i))[1])
    again = al.Recording.load(path)
    assert again.nbytes < recording.nbytes and not read
    al.daam(again, layers="up_blocks.1", steps=[0, 2])
    assert len(read) == 4 and all("up_blocks.1" in name for name in read)
    with pytest.raises(IndexError, match="entry 4 of 4"):
        next(iter(again.trace.queries.values()))[4]


def test_a_fresh_process_answers_for_a_new_word(recording, path):
    """With the text encoder alone: the denoiser is not loaded."""
    code = (
        "import sys, numpy as np, attnlab as al; from diffusers import UNet2DConditionModel\n"
        "UNet2DConditionModel.__init__ = None\n"
        "np.save(sys.argv[1], al.ovam(al.Recording.load(sys.argv[2]), 'a river')['river'])"
    )
    out = path.parent / "river.npy"
    subprocess.run([sys.executable, "-c", code, str(out), str(path)], check=True)
    np.testing.assert_array_equal(np.load(out), al.ovam(recording, "a river")["river"])


@pytest.mark.parametrize("kind", ["Recording", "LinearMap"])
def test_files_that_cannot_be_read(kind, recording, tmp_path):
    good = (recording if kind == "Recording" else al.linear_daam(recording)).save(tmp_path / "good")
    (tmp_path / "cut").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "text").write_text("no tensors at all")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    storage.write(tmp_path / "other", "Token", {"x": torch.zeros(1)}, {})
    save_file({"x": torch.zeros(1)}, tmp_path / "newer", {"attnlab": kind, "format": "99", "about": "{}"})
    load = getattr(al, kind).load
    for name, message in (
        ("cut", "no whole safetensors"),
        ("text", "no whole safetensors"),
        ("foreign", f"something else, not a {kind}"),
        ("other", f"holds Token, not a {kind}"),
        ("newer", "format 99, this attnlab reads up to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no file"):
        load(tmp_path / "missing")


def test_an_interrupted_write_leaves_the_old_file(recording, path, monkeypatch):
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        recording.save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_what_a_block_writes_replaces_the_file_when_it_ends_well(tmp_path):
    path = tmp_path / "numbers.npz"
    for end in (1, 2):
        with storage.replacing(path) as part:
            np.savez(part, x=np.arange(end))
            assert part.name == path.name and path.exists() == (end == 2)
        assert list(tmp_path.iterdir()) == [path]
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), storage.replacing(path) as part:
        part.write_text("half of")
        raise KeyboardInterrupt
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_belongs_to_the_settings_it_was_claimed_with(tmp_path):
    folder, settings = tmp_path / "runs/one", {"sizes": (1, 2), "name": "é"}
    for _ in range(2):
        assert storage.claim_folder(folder, settings, "run.json") == {"sizes": [1, 2], "name": "é"}
    assert json.loads((folder / "run.json").read_text()) == {"sizes": [1, 2], "name": "é"}
    with pytest.raises(ValueError, match=r"holds a run with other settings \(see .*run.json\): name another folder"):
        storage.claim_folder(folder, {"sizes": (1, 3)}, "run.json")
    (folder / "run.json").write_text("")  # as after a loss of power
    with pytest.raises(ValueError, match=r"run.json is damaged: delete it if .* is of this run"):
        storage.claim_folder(folder, settings, "run.json")


def test_a_folder_is_claimed_though_a_claim_was_killed(tmp_path):
    half = tmp_path / ".run.json.part-x/run.json"
    half.parent.mkdir()
    half.write_text('{"si')
    assert storage.claim_folder(tmp_path, {"size": 1}, "run.json") == {"size": 1}


def test_missing_folders_are_made_and_a_folder_is_not_replaced(tmp_path):
    assert storage.write_text(tmp_path / "a/b/text", "é").read_text("utf-8") == "é"
    with pytest.raises(IsADirectoryError, match="b is a folder: name a file in it"):
        storage.write_text(tmp_path / "a/b", "text")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
