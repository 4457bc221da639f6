"""Loading: by name, from a folder, from a hub that cannot be reached."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import attnlab as al


def test_bundled_model(pipe):
    assert type(pipe).__name__ == "StableDiffusionPipeline" and pipe.name_or_path == "tiny"
    assert pipe.unet.dtype == torch.float32 and pipe.device.type == "cpu"
    image = pipe("a house", generator=al.seed(0), num_inference_steps=2).images[0]
    again = pipe("a house", generator=al.seed(0), num_inference_steps=2).images[0]
    assert image.size == (64, 64) and (np.asarray(image) == np.asarray(again)).all()


def test_folder_dtype_and_options(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "mine")
    loaded = al.load_pipeline(tmp_path / "mine", device="cpu", dtype=torch.bfloat16, requires_safety_checker=True)
    assert loaded.unet.dtype == torch.bfloat16 and loaded.config.requires_safety_checker is True
    for mine, theirs in zip(pipe.unet.parameters(), loaded.unet.parameters(), strict=True):
        assert torch.equal(mine.bfloat16(), theirs)


def test_wrong_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"bundled \(tiny, tiny-plain\), nor a folder, nor a hub id"):
        al.load_pipeline("tinny")
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is missing"):
        al.load_pipeline(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model"):
        al.load_pipeline(tmp_path / "nowhere")


def run(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )


def test_hub_out_of_reach(tmp_path):
    """An empty cache and no network: the error says what was wanted and what works offline."""
    code = "import attnlab as al; al.load_pipeline('stable-diffusion-v1-5/stable-diffusion-v1-5')"
    done = run(code, HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ConnectionError: could not get 'stable-diffusion-v1-5")
    assert 'load_pipeline("tiny")' in last and "folder" in last


def test_loading_is_quiet():
    done = run("import attnlab as al; al.load_pipeline('tiny')")
    assert done.returncode == 0 and done.stdout == ""
    assert "torchvision" not in done.stderr and "Warning" not in done.stderr, done.stderr


def test_seed_repeats():
    assert torch.equal(torch.randn(3, generator=al.seed(5)), torch.randn(3, generator=al.seed(5)))
    assert al.seed(5).initial_seed() == 5


def test_dtype_by_name():
    assert al.load_pipeline("tiny", device="cpu", dtype="bfloat16").unet.dtype == torch.bfloat16
    assert al.load_pipeline("tiny", device="cpu", dtype="").unet.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype='float61': choose one of float32, float16, bfloat16"):
        al.load_pipeline("tiny", device="cpu", dtype="float61")
