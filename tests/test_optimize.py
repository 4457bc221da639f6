"""Published token optimization: each step equal to plain float64 gradient descent, and the best epoch kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

import attnlab as al
from attnlab.learning.optimize import PRESETS, OptimizerSettings, optimize_token

EPOCHS = 6
MASK = np.zeros((64, 64), bool)
MASK[20:44, 10:40] = True
SHORT = {name: replace(preset, epochs=EPOCHS, lr_step=2) for name, preset in PRESETS.items()}


def plain_maps(recording, x, softmax):
    """(token, row, column) as the definition has it, one step, head and layer at a time, in float64."""
    trace, total, count = recording.trace, 0, 0
    for name, layer in trace.layers.items():
        keys = (x @ layer.weight.double().T).unflatten(-1, (layer.heads, -1))
        for queries in trace.queries[name]:
            queries = queries.double().unflatten(-1, (layer.heads, -1))
            for head in range(layer.heads):
                scores = keys[:, head] @ queries[:, head].T * layer.scale
                scores = scores.softmax(0) if softmax else scores
                grid = scores.reshape(1, -1, *trace.sizes[name])
                total = total + interpolate(grid, (16, 16), mode="bilinear", align_corners=False)[0]
                count += 1
    return total / count


def plain_descent(recording, x, settings):
    """Losses before each step, and the embeddings after the last."""
    x, losses = x.double().clone().requires_grad_(), []
    inside = torch.from_numpy(MASK).double()
    for epoch in range(settings.epochs):
        maps = plain_maps(recording, x, settings.softmax)
        maps = interpolate(maps[None], MASK.shape, mode="bilinear", align_corners=False)[0]
        maps = (maps - maps.min()) / (maps.max() - maps.min())
        target = torch.stack([1 - inside, inside]) if settings.background else inside[None]
        if settings.loss == "logits":
            loss = -(target * (maps - maps.logsumexp(0))).sum(0).mean()
        else:
            maps = maps.clamp(1e-4, 1 - 1e-4)
            loss = -(target * maps.log() + (1 - target) * (1 - maps).log()).mean()
        losses.append(float(loss.detach()))
        [slope] = torch.autograd.grad(loss, x)
        lr = settings.lr * settings.lr_gamma ** (epoch // settings.lr_step)
        x = (x - lr * slope).detach().requires_grad_()
    return losses


@pytest.mark.parametrize("collapse", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_equals_plain_gradient_descent(recording, preset, collapse):
    settings, word = SHORT[preset], recording.encode("smoke").embedding
    token = optimize_token(recording, [MASK], "smoke", settings, collapse=collapse)
    losses = plain_descent(recording, word[:2] if settings.background else word[1:2], settings)
    np.testing.assert_allclose(token.metadata["losses"], losses, rtol=2e-4)
    assert (token.background is not None) == settings.background


def test_the_best_epoch_is_kept(recording):
    """A learning rate that is far too high: some later epochs are worse than an earlier one."""
    wild = replace(PRESETS["thesis"], epochs=10, lr=300)
    token = optimize_token(recording, [MASK], "smoke", wild)
    losses = token.metadata["losses"]
    assert losses[-1] > min(losses) and len(losses) == 10
    again = optimize_token(recording, [MASK], token.value, replace(wild, epochs=1))
    assert again.metadata["losses"][0] == pytest.approx(min(losses), rel=1e-5)


def test_the_same_input_gives_the_same_token(recording):
    one, other = (optimize_token(recording, [MASK], "smoke", SHORT["ovam"]).value for _ in range(2))
    assert torch.equal(one, other)


def test_read_as_logits_a_perfect_mask_has_a_large_loss():
    """The published loss of a perfect pair of masks is log(1 + 1/e), that of probabilities nearly 0."""
    matrix = torch.from_numpy(np.where(MASK[::4, ::4], 1.0, -1.0)).float().reshape(-1, 1)
    linear = al.LinearMap(matrix, torch.zeros(256), (16, 16), None, {"model": "made"})
    both = torch.tensor([[-1.0], [1.0]])
    settings = OptimizerSettings(softmax=False, background=True, loss="logits", lr=1e-9, epochs=1)
    for loss, expected in (("logits", np.log(1 + np.exp(-1))), ("binary", 1e-4)):
        small = MASK[::4, ::4]
        token = optimize_token(linear, [small], both, replace(settings, loss=loss))
        assert token.metadata["losses"][0] == pytest.approx(expected, rel=1e-3)


def test_ignored_pixels_do_not_count(recording):
    masked = MASK.astype(np.uint8)
    masked[:, 32:] = 255
    one = optimize_token(recording, [masked], "smoke", SHORT["thesis"]).metadata["losses"][0]
    linear = al.linear_daam(recording).upscaled("smoke", 64)
    heat = np.clip((linear - linear.min()) / np.ptp(linear), 1e-4, 1 - 1e-4)[:, :32]
    expected = -np.where(MASK[:, :32], np.log(heat), np.log(1 - heat)).mean()
    assert one == pytest.approx(float(expected), rel=1e-4)


def test_a_loss_that_runs_away_keeps_the_best(recording):
    linear = al.linear_daam(recording)
    wild = replace(PRESETS["ovam"], softmax=False, minmax=False, lr=1e38, epochs=9)
    with pytest.warns(UserWarning, match=r"the loss became (nan|inf) after \d epochs: lower lr"):
        token = optimize_token(linear, [MASK], "smoke", wild)
    assert torch.equal(token.value, recording.encoder.embed("smoke")) and len(token.metadata["losses"]) < 9


def test_it_may_start_from_a_token(recording):
    word = al.Token("mine", recording.encoder.embed("smoke"), metadata={"model": "tiny"})
    token = optimize_token(recording, [MASK], word, SHORT["ovam"])
    same = optimize_token(recording, [MASK], "smoke", SHORT["ovam"])
    assert token.name == token.metadata["init"] == "mine" and token.metadata["losses"] == same.metadata["losses"]
    on = optimize_token(recording, [MASK], token, SHORT["ovam"]).metadata["losses"][0]
    assert on == pytest.approx(min(token.metadata["losses"]), rel=1e-5)


def test_an_interrupt_returns_the_best_so_far(recording, monkeypatch):
    class Stops:
        def __init__(self, epochs, **_):
            self.epochs = epochs

        def __iter__(self):
            yield from list(self.epochs)[:3]
            raise KeyboardInterrupt

        def set_postfix(self, **_):
            pass

    monkeypatch.setattr("attnlab.learning.optimize.tqdm", Stops)
    token = optimize_token(recording, [MASK], "smoke", SHORT["thesis"])
    full = PRESETS["thesis"]
    assert len(token.metadata["losses"]) == 3 < full.epochs


def test_it_learns(recording):
    """The training image's map fits better than the word's."""
    token = optimize_token(recording, [MASK], "smoke")
    before, after = token.metadata["losses"][0], min(token.metadata["losses"])
    word = al.best_words(recording, [MASK], ["smoke"])[0].iou
    assert after < 0.8 * before and token.metadata["iou"] > word + 0.1
    linear = al.linear_daam(recording)
    assert al.transfer_matrix([token], recording, [MASK], token.metadata["threshold"])[0, 0] == pytest.approx(
        token.metadata["iou"]
    )
    assert linear[token].shape == (16, 16)


def spoiled(recording):
    queries = {name: [q * torch.nan for q in steps] for name, steps in recording.trace.queries.items()}
    return al.Recording(recording.encoder, [replace(recording.trace, queries=queries)])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r: optimize_token([], [], "smoke"), "no recordings"),
        (lambda r: optimize_token(r, [MASK], "smoke", "fast"), "choose 'thesis', 'thesis-softmax', 'ovam'"),
        (lambda r: optimize_token(al.linear_daam(r), [MASK], "smoke", "ovam"), "softmax maps need recordings"),
        (lambda r: optimize_token(r, [~MASK & MASK], "smoke"), "is empty"),
        (lambda r: optimize_token(r, [MASK], None), "init is missing"),
        (lambda r: optimize_token(r, [MASK], torch.zeros(128)), "flat where the descent starts"),
        (lambda r: optimize_token(spoiled(r), [MASK], "smoke", "ovam"), "maps of image 0 hold NaN"),
        (lambda r: optimize_token(r, [MASK], al.Token("x", torch.ones(64))), "does not fit tiny"),
        (lambda r: optimize_token(r, [MASK, MASK], "smoke"), "2 masks for 1 images"),
        (lambda r: optimize_token(r, [MASK], torch.ones(64)), r"finite embedding \(128,\), not \(64,\)"),
        (lambda r: optimize_token(al.Recording(None, r.traces), [MASK], torch.ones(128), "ovam"), "no text encoder"),
        (lambda r: OptimizerSettings(softmax=True, background=False, loss="binary", lr=1, epochs=1), "background=True"),
        (
            lambda r: OptimizerSettings(softmax=True, background=True, loss="hinge", lr=1, epochs=1),
            "'binary' or 'logits'",
        ),
        (lambda r: replace(PRESETS["ovam"], epochs=0), "epochs and lr_step are 1 or more"),
    ],
)
def test_bad_input(recording, call, says):
    with pytest.raises(ValueError, match=says):
        call(recording)


def test_recordings_of_two_models_are_refused(recording):
    other = al.Recording(recording.encoder, [replace(recording.trace)])
    other.traces[0].generation = replace(recording.trace.generation, model="elsewhere")
    for preset in ("thesis", "ovam"):
        with pytest.raises(ValueError, match="elsewhere"):
            optimize_token([recording, other], [MASK, MASK], "smoke", preset)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_callers_modes_change_nothing(recording, preset):
    """Of recordings and linear maps that were made in inference mode too, and with embeddings from there."""
    expected = optimize_token(recording, [MASK], "smoke", SHORT[preset]).value
    with torch.inference_mode():
        linear, start = al.linear_daam(recording), recording.encoder.embed("smoke")
        assert torch.equal(optimize_token(recording, [MASK], "smoke", SHORT[preset]).value, expected)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(optimize_token(recording, [MASK], "smoke", SHORT[preset]).value, expected)
    if preset == "thesis":
        for images, init in ((linear, "smoke"), (recording, start)):
            assert torch.equal(optimize_token(images, [MASK], init, SHORT[preset]).value, expected)
