"""Joint diffusion of images and labels: a world small enough to be learned in seconds, and the arithmetic by hand."""

import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from attnlab.joint import JointDiffusion, diffusion
from attnlab.joint.channels import NUM_TIMES, augment_channels, noise_schedule
from attnlab.joint.denoiser import PREDICTIONS, Conditioning
from attnlab.pipelines import mixed_precision
from attnlab.segmentation import shrink
from attnlab.training import Schedule

CLASSES = ("ground", "house", "water")
SMALL = {"channels": (32, 32), "shuffle": 1}


def world(count, size=8, seed=0):
    """Left of a random column red ground, right of it blue water, and nothing else (training may flip that)."""
    rng = np.random.default_rng(seed)
    columns = rng.integers(2, size - 1, count)
    labels = np.where(np.arange(size)[None, None] < columns[:, None, None], 0, 2) * np.ones((1, size, 1), int)
    images = np.array([(200, 40, 40), (0, 0, 0), (40, 40, 200)])[labels] + rng.integers(-15, 16, (count, size, size, 3))
    return images.astype(np.uint8), labels.astype(np.uint8)


def new(**options):
    return JointDiffusion.new(*world(40), CLASSES, **SMALL | options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    schedule = Schedule(steps=400, lr=3e-3, warmup=20, ema=0.97, checkpoint=200)
    return new().fit(*world(40), tmp_path_factory.mktemp("joint"), schedule, rotate90=False)


def test_it_learns_images_and_labels_together(trained):
    """Samples have both classes, in the right colors, with the border as straight as in the world."""
    images, labels, margins = trained.sample(30, torch.Generator().manual_seed(0), steps=25)
    assert images.shape == (30, 8, 8, 3) and images.dtype == np.uint8 and margins.dtype == np.float32
    assert (labels == 1).mean() < 0.02 and 0.2 < (labels == 2).mean() < 0.8
    red = images[..., 0].astype(int) > images[..., 2]
    assert (red == (labels == 0)).mean() > 0.9
    upright = (labels == labels[:, :1]).mean()  # every row is like the first one: the border stands
    steps = (labels[:, :, 1:] != labels[:, :, :-1]).sum(-1)
    assert upright > 0.85 and (steps == 1).mean() > 0.75


def test_self_conditioning():
    """The U-Net sees its own x0 prediction of the step before."""
    model = new(self_conditioning=True)
    seen = []
    keep = model.unet.register_forward_pre_hook(lambda unet, given: seen.append(given[0]))
    model.sample(2, torch.Generator().manual_seed(0), steps=2)
    keep.remove()
    first, second = (x[:, 5:] for x in seen)  # behind the 5 channels themselves
    assert not first.any() and second.abs().max() > 0.1


def calls(model):
    """Inputs and outputs (of the U-Net) of each of its passes, from now on."""
    seen = []
    model.unet.register_forward_hook(lambda unet, given, output: seen.append((given[0], given[1], output.sample)))
    return seen


@torch.no_grad()
def loss_of(model, images, labels, twice):
    """The loss of pairs as training computes it."""
    generator = torch.Generator().manual_seed(0)
    return float(diffusion._loss(model, model.unet, *model._encoded(images, labels), generator, twice))


def test_training_shows_the_unet_its_own_prediction():
    """Never the true channels: it would learn to repeat them, and has none to repeat when it draws."""
    model = new()
    seen, (images, labels) = calls(model), world(8)
    loss_of(model, images, labels, twice=False)
    loss_of(model, images, labels, twice=True)
    (once, _, _), (first, _, output), (second, _, _) = seen
    assert not once[:, 5:].any() and not first[:, 5:].any()
    assert torch.equal(second[:, :5], first[:, :5])
    torch.testing.assert_close(second[:, 5:], model.codec.clamp(output))
    assert (second[:, 5:] - model.codec.encode(images, labels)[0]).abs().mean() > 0.3


def test_errors_of_x0_weigh_up_to_five():
    """1 / (1 - kept signal), which is large where there is little noise, at most 5: a U-Net of zeros, by hand."""
    model, (images, labels) = new(), world(40)
    for parameter in model.unet.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    seen = calls(model)
    loss = loss_of(model, images, labels, twice=False)
    weight = (1 / (1 - model.schedule.alphas_cumprod[seen[0][1]])).clip(max=5)
    assert weight.max() == 5 and weight.min() < 1.01  # both sides of the limit are met
    errors = (model.codec.encode(images, labels)[0] ** 2).mean((1, 2, 3))
    assert loss == pytest.approx(float((weight * errors).sum() / weight.sum()), rel=1e-5)


def test_ignored_pixels_have_no_loss():
    model, (images, labels) = new(), world(8)
    for parameter in model.unet.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    labels[:, :5], seen = 255, calls(model)
    loss = loss_of(model, images, labels, twice=False)
    x0, valid = model.codec.encode(images, labels)
    weight = (1 / (1 - model.schedule.alphas_cumprod[seen[0][1]])).clip(max=5)[:, None, None, None] * valid
    assert loss == pytest.approx(float((weight * x0**2).sum() / weight.sum()), rel=1e-5)


def test_every_step_sees_early_and_late_times():
    """One time in every sixteenth, of no pair always the same; the small pair is as noisy as samples are."""
    model, large = larger(), world(16, 8)
    seen = calls(model)
    loss_of(model, *large, twice=False)
    channels, times, _ = seen[0]
    assert torch.equal((times * 16 // NUM_TIMES).sort().values, torch.arange(16)) and (times.diff() < 0).any()
    noise = channels[:, -5:] - model._encoded(*large)[2].low_res
    assert float(noise.std()) == pytest.approx(0.1, rel=0.05) and abs(float(noise.mean())) < 0.01


def test_what_is_learned_from(monkeypatch, tmp_path):
    """In 80 steps: channels, what is valid and the small pair turned alike; proportions left out at times."""
    images, labels = (x.repeat(2, 1).repeat(2, 2) for x in world(20, 4))
    labels[::2, :2] = 255
    seen = []

    def loss(model, unet, x0, valid, conditioning, generator, twice):
        seen.append((x0, valid, *conditioning, twice))
        return sum(parameter.sum() for parameter in unet.parameters())

    monkeypatch.setattr(diffusion, "_loss", loss)
    small = JointDiffusion.new(images, labels, CLASSES, upscale=2, self_conditioning=False, **SMALL)
    for model, steps in ((new(), 80), (small, 8)):
        model.fit(images, labels, tmp_path / str(steps), Schedule(steps, 1e-9), batch=8)
    alone, enlarged = seen[:80], seen[80:]
    for x0, valid, low_res, _, _ in seen:
        assert torch.equal(valid[:, 3:] > 0, x0[:, 3:] != 0) and valid[:, :3].all()
        assert low_res is None or torch.equal(low_res[:, 3:][valid[:, 3:] > 0], x0[:, 3:][valid[:, 3:] > 0])
    assert len({x0.numpy().tobytes() for x0, *_ in alone}) == 80
    proportions = torch.cat([one[3] for one in alone])
    assert 0.06 < proportions.isnan().all(1).float().mean() < 0.15
    assert 25 < sum(one[4] for one in alone) < 55 and not any(one[4] for one in enlarged)
    assert all(one[3] is None for one in enlarged) and all(one[2] is None for one in alone)


def test_the_error_is_the_mean_of_several_draws():
    """Of self-conditioned predictions, each draw with noise of its own."""
    model, pairs = new(), world(6)
    seen = calls(model)
    error = model.error(*pairs, draws=3)
    assert len(seen) == 6 and all(one[0][:, 5:].any() for one in seen[1::2])
    assert len({one[0][:, :5].numpy().tobytes() for one in seen[::2]}) == 3
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), mixed_precision("cpu"):
        losses = [float(diffusion._loss(model, model.unet, *model._encoded(*pairs), generator, True)) for _ in range(3)]
    assert error == pytest.approx(np.mean(losses))
    assert new(self_conditioning=False).error(*pairs) > 0


def test_proportions_reach_the_prediction():
    """Through every normalization: one of a single channel takes away whatever is added before it."""
    model = new()
    noisy, times = torch.randn(1, 5, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.no_grad():
        found = [
            model.predict(model.unet, noisy, None, Conditioning(proportions=torch.tensor([[p, 0, 1 - p]])), times)
            for p in (0.1, 0.9)
        ]
    assert (found[0] - found[1]).abs().mean() > 0.01


def test_models_of_scenes_without_colors_or_labels():
    """A color that is the same in all of them is not divided by zero; a scene without a label has no proportions."""
    images, labels = np.zeros((3, 8, 8, 3), np.uint8), np.zeros((3, 8, 8), np.uint8)
    labels[0] = 255
    model = JointDiffusion.new(images, labels, CLASSES, **SMALL)
    assert model.codec.encode(images, labels)[0].isfinite().all()
    assert model.metadata["proportions"] == [[1, 0, 0]] * 2


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions_stay_in_the_range_of_pairs(prediction):
    """Colors from 0 to 255, codes from -1 to 1: what is beyond would be fed back, and grow."""
    model = new(prediction=prediction)
    for sign in (-1, 1):
        x0 = model.as_x0(torch.full((1, 5, 8, 8), 100.0 * sign), torch.zeros(1, 5, 8, 8), torch.tensor([500]), None)
        assert set(x0[:, 3:].abs().unique().tolist()) == {1.0}
        assert set(model.codec.decode(x0)[0].ravel()) <= {0, 255}
        colors = (x0[:, :3] - model.codec._shift) / model.codec._scale
        assert colors.min() >= -1e-6 and colors.max() <= 1 + 1e-6


def test_pairs_are_turned_alike():
    """In all eight ways, or left-right alone."""
    x = torch.arange(200 * 9.0).reshape(200, 1, 3, 3)
    turns = [torch.rot90(y, k, (2, 3)) for y in (x, x.flip(3)) for k in range(4)]
    for rotate90, ways in ((True, range(8)), (False, (0, 4))):
        one, none, other = augment_channels((x, None, -x), rotate90, torch.Generator().manual_seed(0))
        which = [[torch.equal(a, turn[i]) for turn in turns].index(True) for i, a in enumerate(one)]
        assert none is None and torch.equal(other, -one) and set(which) == set(ways)
        assert min(which.count(way) for way in ways) > 200 / len(ways) / 2


def test_the_last_time_is_the_last_of_the_schedule(monkeypatch):
    """A random number just below 1 may round up to it, once in a million: it is not past the schedule."""
    model = new()
    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None: torch.full(shape, 1 - 2.0**-24))
    seen = calls(model)
    loss_of(model, *world(16), twice=False)
    assert seen[0][1].max() == NUM_TIMES - 1 and len(seen[0][1].unique()) == 16


def test_noise_has_eight_times_the_power_of_the_cosine_schedule():
    """Signal-to-noise ratios against those of diffusers' own cosine schedule."""
    ours, cosine = (
        DDPMScheduler(**options).alphas_cumprod[50:999]
        for options in (noise_schedule(), {"num_train_timesteps": NUM_TIMES, "beta_schedule": "squaredcos_cap_v2"})
    )
    np.testing.assert_allclose(8 * ours / (1 - ours), cosine / (1 - cosine), rtol=0.03)


def test_samples_repeat_whatever_the_batch(trained):
    first, again = (trained.sample(5, torch.Generator().manual_seed(1), steps=4, batch=n) for n in (5, 2))
    assert np.abs(first[0].astype(int) - again[0]).max() <= 4  # products of another batch are rounded otherwise
    assert (first[1] == again[1]).mean() > 0.98
    other = trained.sample(5, torch.Generator().manual_seed(2), steps=4)
    assert (other[0] != first[0]).any()


def test_it_draws_the_proportions_that_it_is_asked_for(trained):
    """Water in 2 of 8 columns or in 6, as asked; unconditionally both, as in the world."""
    water = {}
    for name, part in (("little", 0.25), ("much", 0.75), ("any", np.nan)):
        asked = np.array([1 - part, 0 * part, part])
        labels = trained.sample(20, torch.Generator().manual_seed(0), proportions=asked, steps=20)[1]
        water[name] = (labels == 2).mean((1, 2))
    assert water["little"].mean() == pytest.approx(0.25, abs=0.06) and water["little"].std() < 0.1
    assert water["much"].mean() == pytest.approx(0.75, abs=0.06) and water["much"].std() < 0.1
    assert water["any"].min() < 0.4 and water["any"].max() > 0.6
    left = trained.sample(40, torch.Generator().manual_seed(0), steps=20)[1]  # each scene's proportions once
    assert (left == 2).mean() == pytest.approx((world(40)[1] == 2).mean(), abs=0.04)


def test_an_unconditional_model():
    model = new(proportions=False)
    assert "proportions" not in model.metadata
    assert model.sample(1, torch.Generator().manual_seed(0), steps=1)[0].shape == (1, 8, 8, 3)
    with pytest.raises(ValueError, match="make one with proportions=True"):
        model.sample(1, torch.Generator().manual_seed(0), proportions=np.array([0.5, 0, 0.5]))


def test_moments_on_the_way(trained):
    images, labels, _ = trained.sample(3, torch.Generator().manual_seed(1), steps=5, every=2)
    assert images.shape == (3, 3, 8, 8, 3) and labels.shape == (3, 3, 8, 8)  # after 2, 4 and 5 steps
    last = trained.sample(3, torch.Generator().manual_seed(1), steps=5)
    np.testing.assert_array_equal(images[-1], last[0])


def test_the_ancestral_sampler(trained):
    _, labels, _ = trained.sample(10, torch.Generator().manual_seed(0), steps=100, sampler="ancestral")
    assert (labels == 1).mean() < 0.03 and 0.2 < (labels == 2).mean() < 0.8


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("codes", ["bits", "one-hot"])
def test_a_model_that_knows_the_answer_samples_it(prediction, codes, monkeypatch):
    """One pair is the whole world: the exact prediction for it, by hand, leads every sample to that pair."""
    images, labels = world(1)
    model = JointDiffusion.new(images, labels, CLASSES, codes=codes, prediction=prediction, **SMALL)
    x0 = model.codec.encode(images, labels)[0]

    def answer(unet, x, previous, conditioning, times):
        a = model.schedule.alphas_cumprod[times][:, None, None, None]
        noise = (x - a.sqrt() * x0) / (1 - a).sqrt()
        return {"sample": x0, "epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0}[prediction]

    monkeypatch.setattr(model, "predict", answer)
    found = model.sample(2, torch.Generator().manual_seed(0), steps=20)
    assert np.abs(found[0].astype(int) - images).max() <= 1 and (found[1] == labels).all()
    assert model.error(images, labels) < 1e-3  # the loss agrees on what is to be predicted


def test_channels_and_back():
    model, (images, labels) = new(), world(40)
    labels[0, 0, :3] = 255
    channels, valid = model.codec.encode(images, labels)
    assert channels.shape == (40, 5, 8, 8) and valid[0, 3:, 0, :4].sum(0).tolist() == [0, 0, 0, 2] and valid[1:].all()
    assert channels[:, :3].std((0, 2, 3)) == pytest.approx([1.0] * 3, abs=1e-2)
    assert channels[:, :3].mean((0, 2, 3)).abs().max() < 1e-2
    again = model.codec.decode(channels)
    np.testing.assert_array_equal(again[0], images)
    np.testing.assert_array_equal(again[1][labels != 255], labels[labels != 255])


def test_saved_and_loaded(trained, tmp_path):
    trained.save_pretrained(tmp_path / "model", torch.float32)
    again = JointDiffusion.from_pretrained(tmp_path / "model")
    first, second = (m.sample(2, torch.Generator().manual_seed(0), steps=3) for m in (trained, again))
    np.testing.assert_array_equal(first[0], second[0])
    assert again.classes == CLASSES and again.size == 8
    metadata = json.loads((tmp_path / "model/joint.json").read_text())
    (tmp_path / "model/joint.json").write_text(json.dumps(metadata | {"codes": np.eye(3).tolist()}))
    with pytest.raises(ValueError, match="or of another model than the weights beside it"):
        JointDiffusion.from_pretrained(tmp_path / "model")
    for damaged in (metadata | {"self_conditioning": False}, metadata | {"classes": ["a", "b"]}):
        (tmp_path / "model/joint.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="or of another model than the weights beside it"):
            JointDiffusion.from_pretrained(tmp_path / "model")
    for damaged in ("", "[]", "{}", json.dumps(metadata | {"mean": "red"})):
        (tmp_path / "model/joint.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"joint.json is damaged"):
            JointDiffusion.from_pretrained(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="holds no joint model"):
        JointDiffusion.from_pretrained(tmp_path)


def test_weights_are_read_from_whole_safetensors_alone(tmp_path):
    """A pickle is not opened, what is missing or damaged is not drawn at random."""
    weights = Path(new().save_pretrained(tmp_path), "diffusion_pytorch_model.safetensors")
    whole = load_file(weights)
    save_file({name: x for name, x in whole.items() if name != "conv_in.bias"}, weights)
    with pytest.raises(ValueError, match=r"weights are missing or of another model, conv_in.bias among them"):
        JointDiffusion.from_pretrained(tmp_path)
    save_file(whole | {"conv_in.bias": torch.zeros(7)}, weights)
    with pytest.raises(ValueError, match="damaged or do not fit"):
        JointDiffusion.from_pretrained(tmp_path)
    save_file(whole, weights)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or do not fit"):
        JointDiffusion.from_pretrained(tmp_path)
    weights.unlink()
    torch.save(whole, weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"no weights as .safetensors. A .bin or .pt is a pickle"):
        JointDiffusion.from_pretrained(tmp_path)


def test_killed_or_full_while_its_settings_are_written(tmp_path, monkeypatch):
    """A full disk, then SIGKILL between writing model.json and giving it its name: the same call begins anew."""
    model, pairs, schedule = new(), world(40), Schedule(steps=1, lr=1e-3)

    def full(*names):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            model.fit(*pairs, tmp_path, schedule)
    assert not list(tmp_path.iterdir())
    if not (child := os.fork()):
        try:
            Path.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
            model.fit(*pairs, tmp_path, schedule)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "model.json").exists() and list(tmp_path.iterdir())  # what it had begun to write
    model.fit(*pairs, tmp_path, schedule, batch=2)
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_stopped_and_gone_on(tmp_path, monkeypatch):
    schedule = Schedule(steps=6, lr=1e-3, checkpoint=2)
    whole = new().fit(*world(40), tmp_path / "whole", schedule, batch=4)
    with monkeypatch.context() as patch:
        calls, loss = iter(range(9)), diffusion._loss

        def cut(*args):
            if next(calls) == 3:
                raise KeyboardInterrupt
            return loss(*args)

        patch.setattr(diffusion, "_loss", cut)
        with pytest.raises(KeyboardInterrupt):
            new().fit(*world(40), tmp_path / "part", schedule, batch=4)
    metadata = json.loads((tmp_path / "part/model.json").read_text())["unet"]
    assert not [name for name in metadata if name.startswith("_")]  # sets, which another process lists in another order
    again = new().fit(*world(40), tmp_path / "part", schedule, batch=4)
    same = zip(whole.unet.parameters(), again.unet.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        new(prediction="epsilon").fit(*world(40), tmp_path / "whole", schedule)


def test_held_out_pairs_end_training(tmp_path):
    model = new()
    before = model.error(*world(20, seed=1))
    schedule = Schedule(steps=60, lr=3e-3, warmup=5, ema=0.9, checkpoint=20)
    model.fit(*world(40), tmp_path, schedule, check=world(20, seed=1))
    assert model.error(*world(20, seed=1)) < 0.7 * before
    assert model.error(*world(20, seed=1)) == model.error(*world(20, seed=1))


def test_enlarging(tmp_path):
    """Trained on pairs of 16 pixels, it makes them from halves."""
    large = world(40, 16)
    model = JointDiffusion.new(*large, CLASSES, upscale=2, **SMALL)
    model.fit(*large, tmp_path, Schedule(steps=100, lr=3e-3, warmup=20, ema=0.9, checkpoint=100), rotate90=False)
    asked = world(10, 16, seed=1)
    small = shrink(*asked, 2)
    images, labels, _ = model.sample(10, torch.Generator().manual_seed(0), small=small, steps=10)
    repeated = small[1].repeat(2, 1).repeat(2, 2)
    assert images.shape == (10, 16, 16, 3) and (labels == asked[1]).mean() > max(0.99, (repeated == asked[1]).mean())
    for parameter in model.unet.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    unchanged = model.sample(10, torch.Generator().manual_seed(0), small=small, steps=2)[:2]
    for found, given in zip(unchanged, small, strict=True):  # what the model predicts is added to the small pair
        np.testing.assert_array_equal(found, given.repeat(2, 1).repeat(2, 2))
    for one, options in ((model, {}), (new(), {"small": small})):
        with pytest.raises(ValueError, match="is for a model with upscale"):
            one.sample(10, torch.Generator().manual_seed(0), **options)


NAMES = tuple(map(str, range(200)))


def larger():
    return new(upscale=2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda i, x: JointDiffusion.new(i, x[:, :4], CLASSES), "a label map has its image's size"),
        (lambda i, x: JointDiffusion.new(i, x + 5, CLASSES), r"labels are 0 to 2 or 255, ignored; there is \[5, 7\]"),
        (lambda i, x: JointDiffusion.new(i / 255, x, CLASSES), "images are uint8"),
        (lambda i, x: JointDiffusion.new(i[:0], x[:0], CLASSES), "images are uint8"),
        (lambda i, x: JointDiffusion.new(i, 0 * x, CLASSES[:1]), "give two classes or more"),
        (lambda i, x: JointDiffusion.new(i, x, CLASSES, codes="gray"), "one of bits, one-hot"),
        (lambda i, x: JointDiffusion.new(i[:, :6, :6], x[:, :6, :6], CLASSES), "squares whose side 8 divides"),
        (lambda i, x: new().fit(i[:, ::2, ::2], x[:, ::2, ::2], "runs", Schedule(1, 1)), "cut patches"),
        (lambda i, x: new(shuffle=0), "shuffle=0: give a whole number, 1 or more"),
        (lambda i, x: new(upscale=0), "upscale=0"),
        (lambda i, x: new(upscale=0.5), "upscale=0.5"),
        (lambda i, x: new(channels=()), "levels=0"),
        (lambda i, x: new(channels=(32, 48)), r"channels=\(32, 48\): give multiples of 32"),
        (lambda i, x: new(channels=(0, 32)), "give multiples of 32"),
        (lambda i, x: JointDiffusion.new(i, x, ("a", "a", "b")), "classes are 1 to 255 different names"),
        (
            lambda i, x: JointDiffusion.new(i, x, NAMES[:65], channels=(64,)),
            "64 classes at most, not for 65: give codes='o",
        ),
        (lambda i, x: JointDiffusion.new(i, x, NAMES, **SMALL), "200 classes do not fit an embedding of 128"),
        (lambda i, x: new().fit(i, x, "runs", Schedule(1, 1), batch=0), "batch=0"),
        (lambda i, x: new().fit(i, x, "runs", Schedule(1, 1), patience=0), "patience=0"),
        (lambda i, x: new().sample(0, torch.Generator()), "count=0"),
        (lambda i, x: new().sample(1, torch.Generator(), batch=0), "batch=0"),
        (lambda i, x: new().sample(1, torch.Generator(), steps=0), "steps=0"),
        (lambda i, x: new().sample(1, torch.Generator(), every=-1), "every=-1: give a whole number, 0 or more"),
        (lambda i, x: new().sample(1, torch.Generator(), steps=1001), "1001 steps, .* give 1 to 1000"),
        (lambda i, x: new().sample(1, torch.Generator(), sampler="plms"), "'plms': give 1 to 1000, ddim or ancestral"),
        (lambda i, x: new().error(i, x, draws=0), "draws=0"),
        (lambda i, x: new().error(i[:0], x[:0]), "images=0"),
        (lambda i, x: larger().sample(2, torch.Generator(), small=(i, x)), "2 of each, is for a model with upscale"),
        (lambda i, x: larger().sample(4, torch.Generator(), small=(i, x)), r"images are \(8, 8\), the model's 4 x 4"),
        (lambda i, x: new().predict_x0(torch.zeros(1, 5, 8, 8), -1), "time=-1: give a whole number, 0 to 999"),
        (lambda i, x: new().add_noise(torch.zeros(1, 5, 8, 8), 1000, torch.Generator()), "time=1000"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call(*world(4))
