"""Loading: by name, from a folder, from a hub that cannot be reached."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_pipelines import SMALL

import attnlab as al
from attnlab import pipelines


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
    known = r"bundled \(tiny, tiny-mmdit, tiny-plain\), nor a folder or file, nor a hub id"
    with pytest.raises(FileNotFoundError, match=known):
        al.load_pipeline("tinny")
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is missing"):
        al.load_pipeline(tmp_path)
    for name in (tmp_path / "nowhere", "tiny/"):
        with pytest.raises(FileNotFoundError, match="no model"):
            al.load_pipeline(name)


@pytest.fixture
def saved(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "my model")
    return tmp_path / "my model"


def test_a_folder_with_pickles(pipe, saved):
    """It is not opened; the command that the message gives converts it."""
    for part in (pipe.unet, pipe.vae):
        folder = saved / ("unet" if part is pipe.unet else "vae")
        (folder / "diffusion_pytorch_model.safetensors").unlink()
        torch.save(part.state_dict(), folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="unet holds weights as a pickle, which can run any code") as refused:
        al.load_pipeline(saved, device="cpu")
    exec(re.search(r'python -c "(.*)"', str(refused.value))[1], {})
    loaded = al.load_pipeline(saved.with_name("my model-safetensors"), device="cpu")
    assert torch.equal(loaded.unet.conv_in.weight, pipe.unet.conv_in.weight)


def test_a_folder_that_is_not_whole(saved):
    (saved / "tokenizer").rename(saved / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"my model is not whole: its model_index\.json names tokenizer"):
        al.load_pipeline(saved, device="cpu")
    bare = al.load_pipeline(saved, device="cpu", tokenizer=None, text_encoder=None)  # one that is not asked for
    assert bare.tokenizer is None
    index = (saved / "model_index.json").read_text()
    for damaged in ("[]", "{}", index.replace("StableDiffusionPipeline", "SomePipeline")):
        (saved / "model_index.json").write_text(damaged)
        with pytest.raises(ValueError, match="my model is no pipeline that this diffusers knows"):
            al.load_pipeline(saved, device="cpu", tokenizer=None)
    (saved / "model_index.json").write_text(index)
    weights = saved / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(OSError, match=r"Unable to load weights from checkpoint file for .*my model/unet"):
        al.load_pipeline(saved, device="cpu", tokenizer=None, text_encoder=None)
    weights = saved / "text_encoder/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="my model has weights that are no whole safetensors file"):
        al.load_pipeline(saved, device="cpu", tokenizer=None, unet=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_safetensors": False}, "use_safetensors=False: weights are read from safetensors alone"),
        ({"dtype": "float8"}, "dtype='float8': choose one of float32, float16, bfloat16"),
        ({"dtype": torch.int8}, "dtype=torch.int8: choose one of"),
        ({"torch_dtype": 16}, "dtype=16: choose one of"),
        ({"torch_dtype": torch.float32, "dtype": torch.float16}, "give one of them"),
        ({"device": "gpu"}, "device='gpu' does not work here, '.*' does"),
        ({"device": "cuda:77"}, "device='cuda:77' does not work here"),
        ({"device": 1.5}, "device=1.5 does not work here"),
        ({"config": "tiny"}, "config=tiny is for one .safetensors file; tiny has its own"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(options, message, monkeypatch):
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", None)
    with pytest.raises(ValueError, match=message):
        al.load_pipeline("tiny", **{"device": "cpu"} | options)


def test_the_old_name_of_dtype():
    for dtype in (torch.bfloat16, "bfloat16"):
        loaded = al.load_pipeline("tiny", device="cpu", torch_dtype=dtype, use_safetensors=True)
        assert loaded.unet.dtype == torch.bfloat16


def test_files_that_are_no_pipeline(tmp_path):
    for name in ("model.ckpt", "model.pt", "model.bin", "model.pth"):
        (tmp_path / name).write_bytes(b"any")
        with pytest.raises(ValueError, match=f"{name} holds weights as a pickle"):
            al.load_pipeline(tmp_path / name)
    (tmp_path / "model.onnx").write_bytes(b"any")
    (tmp_path / "cut.safetensors").write_bytes(b"any")
    save_file({"lora_unet_down.weight": torch.ones(2)}, tmp_path / "lora.safetensors")
    for name, message in (
        ("model.onnx", r"is no \.safetensors file of Stable Diffusion"),
        ("cut.safetensors", "weights that are no whole safetensors file"),
        ("lora.safetensors", r"no checkpoint of Stable Diffusion .* pipe\.load_lora_weights"),
    ):
        with pytest.raises(ValueError, match=message):
            al.load_pipeline(str(tmp_path / name), device="cpu")


def test_hub_out_of_reach(tmp_path, monkeypatch):
    """An empty cache and no network: the error says what was wanted and what works offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    with pytest.raises(ConnectionError, match=rf'could not get {name!r} .*load_pipeline\("tiny"\).* folder'):
        al.load_pipeline(name, device="cpu", cache_dir=tmp_path)


def test_loading_is_quiet():
    code = "import attnlab as al; al.load_pipeline('tiny')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
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


@pytest.mark.parametrize(
    ("family", "able", "usual"),
    [("tiny", True, torch.float16), ("flux", True, torch.bfloat16), ("flux", False, torch.float16)],
)
def test_on_a_gpu_transformers_compute_in_bfloat16(tmp_path, monkeypatch, family, able, usual):
    """Their numbers grow too large for float16; U-Nets are used in it."""
    monkeypatch.setattr(pipelines, "has_bfloat16", lambda device: able)
    folder = pipelines.bundled().get(family, tmp_path)
    if family == "flux":
        SMALL["flux"]()[0].save_pretrained(folder)
    assert pipelines._usual_dtype(folder, torch.device("cuda")) == usual
    assert pipelines._usual_dtype(folder, torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("able", [True, False])
def test_models_compute_in_bfloat16_only_where_it_is_not_imitated(monkeypatch, able):
    """A processor without its instructions takes twenty times as long: float32 there, or what the caller has set."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: able)
    layer, expected = torch.nn.Linear(2, 2), torch.bfloat16 if able else torch.float32
    with al.pipelines.mixed_precision("cpu"):
        assert layer(torch.ones(1, 2)).dtype == expected
    with torch.autocast("cpu", torch.float16), al.pipelines.mixed_precision("cpu"):
        assert layer(torch.ones(1, 2)).dtype == (torch.bfloat16 if able else torch.float16)
