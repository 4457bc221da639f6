"""The program that measures a GPU, on the CPU: what it reports is what recordings are."""

import json

import pytest
import torch

import attnlab as al
from experiments import gpu_check
from experiments.studies.random_weights import flux


def test_it_measures_what_recordings_are(levels, generate):
    found = gpu_check.check(levels, torch.device("cpu"), steps=2, rounds=1, size=64, height=8)
    rows = found["modes"]
    assert found["bit exact"] and found["stalls of plain"] == 0 and found["seconds a step"] > 0
    assert rows["plain"]["time ratio"] == [1, 1, 1] and rows["plain"]["kept bytes"] == 0
    with al.record(levels, keep="maps") as recording:
        generate(gpu_check.TEXT, pipe=levels, steps=2)
    assert rows["maps"]["kept bytes"] == recording.nbytes
    assert rows["queries"]["kept bytes"] == rows["queries on the device"]["kept bytes"] > rows["sum"]["kept bytes"] > 0
    assert set(found["maps"]) == {"daam", "ovam", "contributions", "linear_daam"} and not any(found["maps"].values())


def test_a_transformer_is_measured_in_its_own_ways():
    pipe = flux(narrow=24, double=1, single=1)
    found = gpu_check.check(pipe, torch.device("cpu"), steps=2, rounds=1, size=64, height=4)
    rows = found["modes"]
    assert found["bit exact"] and not found["maps"] and rows["maps"]["kept bytes"] > 0 == rows["plain"]["kept bytes"]
    with al.record(pipe) as recording:
        pipe(gpu_check.TEXT, height=64, width=64, num_inference_steps=2, generator=al.seed(0), output_type="latent")
    assert rows["maps and calls"]["kept bytes"] == recording.nbytes
    assert list(recording.trace.sizes.values()) == [(4, 4)] * 2 and recording.trace.layers.keys() == {
        "transformer_blocks.0.attn",
        "single_transformer_blocks.0.attn",
    }


def test_another_image_is_seen(levels, monkeypatch):
    """Latents that recording changes, and maps that differ between devices, are reported."""
    turn, count = gpu_check._turn, []

    def changed(pipe, device, kept, *more, **options):
        result = turn(pipe, device, kept, *more, **options)
        count.append(1)
        return result._replace(latents=result.latents + (kept is not None))

    monkeypatch.setattr(gpu_check, "_turn", changed)
    monkeypatch.setattr(
        gpu_check, "_modes", lambda pipe, device, height: {"plain": None, "queries": {"keep": "queries"}}
    )
    assert not gpu_check.check(levels, torch.device("cpu"), steps=1, rounds=1, size=64, height=8)["bit exact"]


def test_a_machine_without_a_gpu_is_told(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "best_device", lambda: "cpu")
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "--small" in capsys.readouterr().err
    small = {"check": lambda *given: {"size": given[-2]}, "_show": lambda *given: None}
    for name, stand_in in small.items():
        monkeypatch.setattr(gpu_check, name, stand_in)
    for name in ("stable_diffusion_2_base", "stable_diffusion_xl", "flux"):
        monkeypatch.setattr(gpu_check, name, named(name))
    gpu_check.main(["--small", "--out", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["card"] == "CPU" and found["models"]["stable_diffusion_xl"] == {"size": 128}


def named(name):
    def make(narrow):
        return torch.nn.Identity()

    make.__name__ = name
    return make
