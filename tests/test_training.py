"""The training loop: resumed and killed runs draw the same batches; early stop keeps the best; NaN stops."""

import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from attnlab import training
from experiments.bundled.shipping import thin_curve

SCHEDULE = training.Schedule(steps=30, lr=0.05, warmup=5, checkpoint=10)


def fit_line(folder, stop_at=None, nan_at=None, schedule=SCHEDULE, **options):
    """Train y = 2x - 1 from noisy batches; with `stop_at`, killed in the middle of that step."""
    model, calls = nn.Linear(1, 1), []
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)

    def loss(model, generator):
        calls.append(1)
        if stop_at is not None and len(calls) > stop_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 1, generator=generator)
        factor = math.nan if len(calls) - 1 == nan_at else 1.0
        return {"loss": factor * ((model(x) - 2 * x + 1) ** 2).mean()}

    return training.run_training(model, loss, schedule, folder, **options)


def test_schedule_restarts():
    """Two cosines of 100 steps, each from the highest rate to a fiftieth; a linear rise of 10 steps before each."""
    schedule = training.Schedule(steps=200, lr=1.0, cycles=2, warmup=10)
    rates = [schedule.factor(step) for step in range(200)]
    assert rates[:100] == rates[100:]
    assert rates[0] == pytest.approx(0.1, abs=1e-3) and rates[50] == pytest.approx(0.51) and rates[99] < 0.021


def test_a_training_by_hand(tmp_path):
    """AdamW (Loshchilov and Hutter, ICLR 2019) on clipped gradients, each batch of its own step, and the average."""
    schedule = training.Schedule(6, 0.1, cycles=2, warmup=2, ema=0.8, weight_decay=0.3, clip=2.0, checkpoint=4, seed=3)

    def draw(step):
        return torch.randn(2, generator=torch.Generator().manual_seed(3 * 1_000_003 + step))

    def loss(model, generator):
        return {"loss": ((model.weight[0] - torch.randn(2, generator=generator)) ** 2).sum()}

    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 0.3)
    found = training.run_training(model, loss, schedule, tmp_path).weight[0].detach()
    w, m, v, average = torch.full((2,), 0.3), 0, 0, 0
    for step in range(6):
        gradient, rate = 2 * (w - draw(step)), 0.1 * schedule.factor(step)
        gradient = gradient * min(1.0, 2.0 / float(gradient.norm()))
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        w = w * (1 - rate * 0.3) - rate * m / (1 - 0.9 ** (step + 1)) / (v / (1 - 0.99 ** (step + 1))).sqrt()
        average = 0.8 * average + 0.2 * w if step else w
    torch.testing.assert_close(found, average, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.weight[0].detach(), w, rtol=1e-4, atol=1e-5)


def test_resumed_training_is_the_same_training(tmp_path):
    whole = fit_line(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path / "stopped", stop_at=17)  # after the checkpoint of step 10
    resumed = fit_line(tmp_path / "stopped")
    assert (tmp_path / "whole/curve.csv").read_text() == (tmp_path / "stopped/curve.csv").read_text()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    losses = np.loadtxt(tmp_path / "whole/curve.csv", delimiter=",", skiprows=1)[:, 1]
    assert len(losses) == 30 and losses[-1] < 0.5 * losses[0]


def test_a_longer_training_is_not_taken_for_a_shorter_one(tmp_path):
    long = fit_line(tmp_path)
    with pytest.raises(ValueError, match="has a training of 30 steps, longer than steps=29: name another"):
        fit_line(tmp_path, schedule=replace(SCHEDULE, steps=29))
    assert torch.equal(fit_line(tmp_path).weight, long.weight)


def test_a_rate_that_was_lowered_counts_from_the_next_step_on(tmp_path):
    first = fit_line(tmp_path, schedule=replace(SCHEDULE, steps=10, ema=0)).weight.item()
    slowly = fit_line(tmp_path, schedule=replace(SCHEDULE, steps=12, ema=0, lr=1e-6)).weight.item()
    assert 0 < abs(slowly - first) < 4e-6  # a step of Adam is about as long as its rate


def fit_blur(folder, stop_at=None, check=None):
    """Train convolutions whose weights do not lie in memory as usual, in bfloat16, with a part without gradients."""
    with training.seeded(0):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3))
    model = model.to(memory_format=torch.channels_last)
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    left = iter(range(100 if stop_at is None else stop_at))

    def loss(model, generator):
        if next(left, None) is None:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, 9, 9, generator=generator)
        return {"loss": ((model[0:4](x) - x[..., 2:-2, 2:-2]) ** 2).mean()}

    return training.run_training(
        model, loss, training.Schedule(8, 0.01, cycles=2, warmup=2, checkpoint=3), folder, check
    )


def test_a_checkpoint_holds_all_that_the_next_step_needs(tmp_path):
    """Averages of gradients above all: a fused optimizer reads them in the order in which weights lie in memory."""
    whole = fit_blur(tmp_path / "whole")
    for stop_at in (4, 7):
        with pytest.raises(KeyboardInterrupt):
            fit_blur(tmp_path / f"stopped {stop_at}", stop_at)
        resumed = fit_blur(tmp_path / f"stopped {stop_at}")
        same = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in same)
        assert resumed[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"checkpoint.safetensors", "curve.csv"}


def test_checkpoints_that_cannot_be_gone_on_from(tmp_path):
    """Of another model, damaged, or a pickle, as earlier versions wrote them; what is there stays there."""
    fit_line(tmp_path / "line")
    before = (tmp_path / "line/checkpoint.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint.safetensors is of another model: name another folder"):
        training.run_training(nn.Linear(2, 2), None, SCHEDULE, tmp_path / "line")
    assert (tmp_path / "line/checkpoint.safetensors").read_bytes() == before
    (tmp_path / "line/checkpoint.safetensors").write_bytes(before[:200])
    with pytest.raises(ValueError, match=r"checkpoint.safetensors is no whole safetensors file"):
        fit_line(tmp_path / "line")
    (tmp_path / "line/checkpoint.safetensors").rename(tmp_path / "line/checkpoint.pt")
    curve = (tmp_path / "line/curve.csv").read_bytes()
    with pytest.raises(ValueError, match=r"has a checkpoint.pt, which earlier versions wrote: name another folder"):
        fit_line(tmp_path / "line")
    assert (tmp_path / "line/curve.csv").read_bytes() == curve


def test_weights_that_share_memory_are_kept(tmp_path):
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    training.save_checkpoint(tmp_path / "tied", {"model": tied})
    again = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert training.load_checkpoint(tmp_path / "tied", {"model": again}) == {"groups": []}
    assert torch.equal(again[1].weight, tied[0].weight)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps=0: give a whole number, 1 or more"),
        ({"steps": 1e4}, "steps=10000.0: give a whole number"),
        ({"cycles": 0}, "cycles=0"),
        ({"warmup": 0}, "warmup=0"),
        ({"checkpoint": -1}, "checkpoint=-1"),
        ({"seed": -1}, "seed=-1: give a whole number, 0 or more"),
        ({"seed": 2**62}, "seed=4611686018427387904"),
        ({"lr": 0}, "lr=0: give a number above 0, below inf"),
        ({"lr": "fast"}, "lr='fast': give a number above 0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": math.inf}, "lr=inf"),
        ({"clip": 0}, "clip=0: give a number above 0"),
        ({"ema": 1.0}, "ema=1.0: give a number from 0, below 1"),
        ({"ema": -0.1}, "ema=-0.1"),
        ({"weight_decay": -1}, "weight_decay=-1"),
    ],
)
def test_schedules_that_train_nothing(options, says):
    with pytest.raises(ValueError, match=says):
        training.Schedule(**{"steps": 10, "lr": 0.1} | options)


def test_patience_is_a_count(tmp_path):
    with pytest.raises(ValueError, match="patience=0"):
        fit_line(tmp_path / "line", patience=0)
    assert not list(tmp_path.iterdir())


def test_an_error_that_is_no_number_is_no_best_one(tmp_path):
    """NaN is below nothing: the average of the first check would be kept for ever."""
    with pytest.raises(FloatingPointError, match="the error on held-out data is nan at step 10: try a lower lr"):
        fit_line(tmp_path / "line", check=lambda model: math.nan)


def test_a_line_of_the_curve_that_is_cut_short_is_made_again(tmp_path):
    """As a full disk leaves it: step 1 of "17" would be an earlier step."""
    fit_line(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path / "stopped", stop_at=17)
    curve = tmp_path / "stopped/curve.csv"
    curve.write_text(curve.read_text() + "1")
    fit_line(tmp_path / "stopped")
    assert curve.read_text() == (tmp_path / "whole/curve.csv").read_text()


def test_training_killed_and_resumed(tmp_path):
    """SIGKILL in the middle of a step; the curve of the run that goes on is that of a run never stopped."""
    fit_line(tmp_path / "whole")
    code = (
        "import sys, time; sys.path.insert(0, {folder!r}); import test_training; from pathlib import Path\n"
        "draw = test_training.torch.randn\n"
        "test_training.torch.randn = lambda *a, **k: (time.sleep(0.05), draw(*a, **k))[1]\n"
        "test_training.fit_line(Path({out!r}))"
    ).format(folder=str(Path(__file__).parent), out=str(tmp_path / "killed"))
    curve = tmp_path / "killed/curve.csv"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and (not curve.exists() or len(curve.read_text().splitlines()) < 16):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    fit_line(tmp_path / "killed")
    assert curve.read_text() == (tmp_path / "whole/curve.csv").read_text()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 17; .* keeps step 10: try a lower lr"):
        fit_line(tmp_path / "line", nan_at=17)
    whole, resumed = fit_line(tmp_path / "whole"), fit_line(tmp_path / "line")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(FloatingPointError, match="keeps no step"):
        fit_line(tmp_path / "other", nan_at=3)


def test_early_stop_returns_the_best(tmp_path):
    """Errors as given: the second of six checks is the best, and two worse ones end it, though the last one falls."""
    errors, seen = iter([3.0, 1.0, 4.0, 2.0, 0.0, 0.0]), []

    def check(model):
        assert not model.training
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(errors)

    schedule = training.Schedule(steps=60, lr=0.05, warmup=5, checkpoint=10)
    best = fit_line(tmp_path / "line", schedule=schedule, check=check, patience=2)
    assert training.checks(tmp_path / "line") == [(10, 3.0), (20, 1.0), (30, 4.0), (40, 2.0)]
    assert all(torch.equal(best.state_dict()[name], seen[1][name]) for name in seen[1])
    again = fit_line(tmp_path / "line", schedule=schedule, check=check, patience=2)  # it is over: nothing is trained
    assert len(seen) == 4 and all(torch.equal(again.state_dict()[name], seen[1][name]) for name in seen[1])


def test_checks_go_on_after_an_interruption(tmp_path):
    def check(model):
        return float((model.weight.detach() - 2).abs())

    whole = fit_line(tmp_path / "whole", check=check)
    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path / "stopped", stop_at=25, check=check)
    resumed = fit_line(tmp_path / "stopped", check=check)
    assert training.checks(tmp_path / "stopped") == training.checks(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_curve_is_thinned_to_means(tmp_path):
    (tmp_path / "long.csv").write_text("step,loss\n" + "".join(f"{i},{i % 2}\n" for i in range(1000)))
    thin_curve([tmp_path / "long.csv"], tmp_path / "short.csv", rows=100)
    curve = np.genfromtxt(tmp_path / "short.csv", delimiter=",", names=True)
    assert len(curve) == 100 and (curve["loss"] == 0.5).all() and curve["step"][0] == 4.5
