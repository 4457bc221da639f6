"""Files of recordings and linear maps: whole, lazy, and clear about what they cannot be."""

import json
import pickle
import resource
import subprocess
import sys
from copy import copy, deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import PROMPT
from safetensors.torch import load_file, save_file

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
    weights = [name for name in file.names if name.startswith("keys.") and name.endswith("weight")]
    assert len(weights) == len(again.traces[0].layers)
    np.testing.assert_array_equal(al.daam(again[1]).values, al.daam(recording[1]).values)


def test_only_what_is_asked_for_is_read(recording, path, monkeypatch):
    """Key weights and text at once, a layer's queries when its maps are made."""
    read = []
    get = storage.Stored.__getitem__
    monkeypatch.setattr(storage.Stored, "__getitem__", lambda self, i: (read.append(self.name), get(self, i))[1])
    again = al.Recording.load(path)
    assert again.nbytes < recording.nbytes and not read
    al.daam(again, layers="up_blocks", steps=[0, 2])
    assert len(read) == 4 and all("up_blocks" in name for name in read)
    with pytest.raises(IndexError, match="entry 4 of 4"):
        next(iter(again.trace.queries.values()))[4]


def test_a_fresh_process_answers_for_a_new_word(recording, path):
    """With the text encoder alone: the denoiser is not loaded."""
    code = (
        "import sys, numpy as np, attnlab as al; from diffusers import UNet2DConditionModel\n"
        "UNet2DConditionModel.__init__ = None\n"
        "out, recording, linear = sys.argv[1:]; softmax = al.ovam(al.Recording.load(recording), 'a river')['river']\n"
        "np.savez(out, softmax=softmax, linear=al.LinearMap.load(linear)['river'])"
    )
    out, linear = path.parent / "river.npz", al.linear_daam(recording).save(path.parent / "linear")
    subprocess.run([sys.executable, "-c", code, str(out), str(path), str(linear)], check=True)
    found, expected = np.load(out), al.linear_daam(recording)["river"]
    np.testing.assert_array_equal(found["softmax"], al.ovam(recording, "a river")["river"])
    assert abs(found["linear"] - expected).max() <= 2e-3 * abs(expected).max()  # kept in half precision


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


def answers(path):
    """All that a file of any kind says, as numbers and JSON; ValueError where it cannot be read."""
    kind = storage.kind(path)
    if kind == "LinearMap":
        linear = al.LinearMap.load(path)
        return [linear.matrix.tolist(), linear.bias.tolist(), linear.size, linear.metadata]
    if kind == "Recording":
        found = al.Recording.load(path)
        said = [[one.metadata, one.trace.words, one.trace.timesteps] for one in found]
        return [said, [[al.daam(one).values.tolist(), one.self_attention()[0].tolist()] for one in found]]
    tokens = al.TokenLibrary.load(path).values()
    tokens = [*tokens, *(token.background for token in tokens if token.background)]
    return [[token.name, token.value.tolist(), token.bias, token.metadata] for token in tokens]


@pytest.fixture(scope="module")
def written(pipe, tmp_path_factory):
    """{kind: file} of small ones, in a folder that saving has to make."""
    folder = tmp_path_factory.mktemp("files")
    call = {"layers": "up_blocks.2", "timesteps": (500, 100), "generator": al.seed(0)}
    one = al.record_image(pipe, np.full((32, 32, 3), 0.5, "f"), "a car", self_attention=8, dtype=torch.half, **call)
    token = al.Token("car", one.encoder.embed("car"), 0.5, al.Token("rest", one.encoder.embed("a")), {"model": "tiny"})
    return {
        "Recording": one.save(folder / "a/recording"),
        "LinearMap": al.linear_daam(one).save(folder / "b/linear"),
        "TokenLibrary": al.TokenLibrary([token]).save(folder / "c/d/tokens"),
    }


KINDS = ["Recording", "LinearMap", "TokenLibrary"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_is_seen(kind, written, tmp_path):
    """Anywhere in the header, and anywhere in the file: the file is refused, or says what it said."""
    whole, path = written[kind].read_bytes(), tmp_path / "file"
    path.write_bytes(whole)
    expected, generator, refused = answers(path), np.random.default_rng(3), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    for end in [header] * 60 + [len(whole)] * 40:
        damaged = bytearray(whole)
        damaged[generator.integers(end)] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        try:
            assert answers(path) == expected
        except ValueError as error:
            assert str(path) in str(error), error
            refused += 1
    assert refused > 90


def rewritten(path, change, tensors=None):
    """Write a file anew with its metadata changed, and without checksums, as attnlab did before."""
    kind, file = storage.kind(path), load_file(path)
    metadata = json.loads(storage._open(path)[1]["about"])
    change = change(metadata) or metadata
    header = {"attnlab": kind, "format": "1", "about": change if isinstance(change, str) else json.dumps(change)}
    damaged = path.with_name(path.name + "-damaged")
    save_file(file | (tensors or {}), damaged, header)
    return damaged


def paths_in(data, path=()):
    """The paths of all values in nested JSON types."""
    yield path
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield from paths_in(data[key], (*path, key))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_metadata_ends_in_words(kind, written, tmp_path):
    """Each value in turn is replaced by some others, or left out: refused, or it was one that nothing depends on."""
    assert answers(rewritten(written[kind], lambda metadata: None)) == answers(written[kind])
    every = list(paths_in(json.loads(storage._open(written[kind])[1]["about"])))[1:]
    for i, path in enumerate(every):
        for value in (None, -1, 2.5, "x", [], {}, [[1, 2]], "left out")[i % 3 :: 3]:

            def change(metadata, path=path, value=value):
                for key in path[:-1]:
                    metadata = metadata[key]
                if value == "left out":
                    del metadata[path[-1]]
                else:
                    metadata[path[-1]] = value

            damaged = rewritten(written[kind], change)
            try:
                answers(damaged)
            except ValueError as error:
                said = ("is damaged: ", "do not fit", "no self-attention was", "no step of", "are unknown", "prompt ch")
                assert any(words in str(error) for words in said), (path, value, error)


@pytest.mark.parametrize("kind", KINDS)
def test_headers_that_are_none_of_ours(kind, written, tmp_path):
    for about in ("no JSON", "[" * 100_000, "[]", "3", ""):
        with pytest.raises(ValueError, match="is damaged"):
            getattr(al, kind).load(rewritten(written[kind], lambda metadata, about=about: about or " "))
    header = storage._open(written[kind])[1]
    for change in ({"format": "x"}, {"format": "0"}, {"crc32": "x"}, {"crc32": "[1, {}]"}, {"cr632": "[1, {}]"}):
        save_file(load_file(written[kind]), tmp_path / "file", header | change)
        with pytest.raises(ValueError, match="file is damaged"):
            getattr(al, kind).load(tmp_path / "file")
    save_file(load_file(written[kind]), tmp_path / "file", {"about": header["about"]})
    with pytest.raises(ValueError, match=r"does not say what it holds|something else"):
        getattr(al, kind).load(tmp_path / "file")


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None])
def test_scales_are_finite(scale, written):
    def of_layer(metadata):
        next(iter(metadata["traces"][0]["layers"].values()))["scale"] = scale

    with pytest.raises(ValueError, match="is damaged: its layers do not fit the rest"):
        al.Recording.load(rewritten(written["Recording"], of_layer))
    with pytest.raises(ValueError, match="is damaged: its scale is"):
        al.LinearMap.load(rewritten(written["LinearMap"], lambda metadata: metadata.update(scale=scale)))


def test_other_types_and_shapes_of_the_same_bytes_are_seen(written, tmp_path):
    tensors, header = load_file(written["LinearMap"]), storage._open(written["LinearMap"])[1]
    half, turned = tensors["matrix"].view(torch.bfloat16), tensors["matrix"].reshape(tensors["matrix"].T.shape)
    for other in (half, turned):
        save_file(tensors | {"matrix": other.contiguous()}, tmp_path / "file", header)
        with pytest.raises(ValueError, match="the values of matrix are not those that were written"):
            al.LinearMap.load(tmp_path / "file")


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_do_not_fit_or_hold_nan(kind, written):
    for name, tensor in load_file(written[kind]).items():
        if tensor.is_floating_point():
            for bad in (torch.nan, -torch.inf):
                values = tensor.clone()
                values.view(-1)[-1] = bad
                with pytest.raises(ValueError, match=f"{name} of .* holds NaN or infinity"):
                    answers(rewritten(written[kind], lambda metadata: None, {name: values}))
        less = tensor[:, 1:] if name == "0.text" else tensor[1:]
        for other in (less.clone(), tensor[None].clone(), torch.zeros(())):
            with pytest.raises(ValueError, match=r"damaged|of the same text width"):
                answers(rewritten(written[kind], lambda metadata: None, {name: other}))


def test_recordings_are_pickled_and_copied(recording, path):
    """Whole, in memory; the text encoder by its model's name."""
    for one in (recording, al.Recording.load(path)):
        for again in (pickle.loads(pickle.dumps(one)), deepcopy(one)):
            np.testing.assert_array_equal(al.daam(again).values, al.daam(recording).values)
            np.testing.assert_array_equal(al.ovam(again, "a tree").values, al.ovam(recording, "a tree").values)
            assert again.metadata == recording.metadata and again.nbytes == recording.nbytes
    linear = al.linear_daam(recording)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(linear))["car"], linear["car"])
    assert deepcopy(recording).encoder is recording.encoder


def test_an_interrupted_write_leaves_the_old_file(recording, path, monkeypatch):
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        recording.save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(recording, path):
    """As where a file may not grow beyond a thousand bytes."""
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"house\.safetensors could not be written: .*File too large"):
            recording.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
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
