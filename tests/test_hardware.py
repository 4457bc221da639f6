"""What `attnlab check` says of GPUs and memory: bytes as recordings have them; torch says that there is a GPU."""

import itertools
import warnings

import pytest
import torch
from test_families import KINDS, build

import attnlab as al
from attnlab.cli import hardware
from attnlab.cli.hardware import describe_hardware, recording_bytes
from attnlab.recording.stores import KEEP

CARD = {
    "is_available": lambda: True,
    "device_count": lambda: 2,
    "get_device_name": lambda i: f"Card {i}",
    "mem_get_info": lambda i: (70_000_000_000, 80_000_000_000 + i),
}


def lines(until="memory"):
    """{name: texts} of what comes before the lines about memory, which take a second to count."""
    found = {}
    for name, text in itertools.takewhile(lambda line: line[0] != until, describe_hardware()):
        found.setdefault(name, []).append(text)
    return found


@pytest.fixture
def build_of_torch(monkeypatch):
    """Set what torch was built for, and what it sees."""

    def built(available=lambda: False, **versions):
        for name, version in {"cuda": None, "hip": None, **versions}.items():
            monkeypatch.setattr(torch.version, name, version)
        monkeypatch.setattr(torch.cuda, "is_available", available)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return built


@pytest.mark.parametrize("keep", sorted({*KEEP} - {"calls"}))
@pytest.mark.parametrize("family", ["1.x", "XL"])
def test_bytes_are_those_of_a_recording(pipe, family, keep):
    """In U-Nets with attention at several heights, which halve odd sizes too."""
    pipe = KINDS[family][0](**build(family, pipe.tokenizer))
    pipe.set_progress_bar_config(disable=True)
    with al.record(pipe, keep=keep) as recording:
        size = {"height": 72, "width": 56}
        pipe("a burning house", **size, num_inference_steps=2, output_type="latent", generator=al.seed(0))
    trace = recording.trace
    latent = trace.generation.latent_size
    assert latent == (18, 14) and trace.length == 5
    found = recording_bytes(pipe.unet, latent, len(trace.text), trace.length, len(trace.steps))
    assert found[keep] == recording.nbytes


def test_memory_of_stable_diffusion():
    """Of 1.5, by hand: 2 layers at each of three heights on the way down, 3 on the way up."""
    rows = dict(text.split(": ", 1) for name, text in describe_hardware() if "Stable Diffusion" in text)
    assert list(rows) == ["Stable Diffusion 1.5, 512 x 512", "Stable Diffusion XL, 1024 x 1024"]
    channels = {64 * 64: 320, 32 * 32: 640, 16 * 16: 1280}
    queries = 50 * 5 * sum(pixels * width for pixels, width in channels.items())
    weights = 5 * sum(2 * 768 * width + width**2 for width in channels.values())
    by_hand = 2 * (queries + weights + 77 * 768) / 1e9
    assert f'"queries" {by_hand:.1f} GB, "sum" ' in rows["Stable Diffusion 1.5, 512 x 512"]
    assert [row.split("weights, ")[1] for row in rows.values()] == ["1.7 GB", "5.1 GB"]  # 860 million, 2.6 billion


@pytest.mark.parametrize(("native", "other"), [(True, "bfloat16"), (False, "float32")])
def test_each_gpu_is_named_with_its_memory(monkeypatch, native, other):
    for name, value in CARD.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    found = lines()
    assert found["gpu"] == [f"cuda:{i}, Card {i}: 80.0 GB of memory, 70.0 GB free" for i in range(2)]
    assert found["dtype"] == [f'float16 on cuda; where images come out black, load_pipeline(..., dtype="{other}")']


@pytest.mark.parametrize(
    ("system", "get", "native"), [("linux", "pip install torch", True), ("win32", "pytorch.org", False)]
)
def test_a_build_for_the_cpu_says_what_to_install(monkeypatch, build_of_torch, system, get, native):
    build_of_torch()
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr(hardware, "has_bfloat16", lambda device: native)
    [line], [dtype] = lines().values()
    assert line.startswith(f"none that torch sees: {torch.__version__} is built for the CPU alone") and get in line
    assert dtype.startswith("float32 on the CPU") and ("halves" in dtype, "slow" in dtype) == (native, not native)


def test_a_gpu_that_does_not_work_is_told_with_the_reason(build_of_torch):
    def old_driver():
        warnings.warn("The NVIDIA driver on your system is too old\nUpdate it", stacklevel=1)
        return False

    build_of_torch(cuda="13.0")
    assert "is built for GPUs" in lines()["gpu"][0] and "nvidia-smi" in lines()["gpu"][0]
    build_of_torch(old_driver, cuda="13.0")
    assert lines()["gpu"][0].endswith("is built for GPUs. The NVIDIA driver on your system is too old")
