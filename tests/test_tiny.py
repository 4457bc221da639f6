"""The bundled models and their training: grounding's loss by hand, words that localize."""

import importlib
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import attnlab as al
from attnlab import training
from attnlab.pipelines import BUNDLED
from attnlab.scenes import street
from experiments import gpu_train
from experiments.bundled import (
    cards,
    data,
    denoiser_training,
    localize,
    shipping,
    soup,
    steer,
    street_segmenter,
    train_street,
    vae,
)
from experiments.bundled.denoiser_training import DenoiserTraining, Examples, TextToImageSettings, tokenize
from experiments.bundled.shipping import forget_origin
from experiments.bundled.text_encoder import deepen, new_text_encoder, train_tokenizer
from experiments.bundled.text_to_image import TextToLatent, attention_scores, grounding_loss, new_scheduler, off_start


def shortened(preset, **schedules):
    steps = dict.fromkeys(("vae", "denoiser", "segmenter"), training.Schedule(steps=2, lr=1e-3)) | schedules
    return replace(train_street.STREET_PRESETS[preset], scenes=20, settings=TextToImageSettings(batch=4), **steps)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every stage of a preset, two steps each; the denoisers after a first call that has no time for them."""
    folder = tmp_path_factory.mktemp("street")
    call = ["--work", str(folder / "work"), "--out", str(folder / "models"), "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_street.STREET_PRESETS, "gpu", shortened("gpu"))
        gpu_train.main([*call, "--minutes", "0"])
        assert not (folder / "models" / "tiny").exists() and (folder / "models" / "street-segmenter").exists()
        gpu_train.main(call)
    return folder


def test_every_stage_of_a_preset(exported):
    """From scenes to a folder that loads as a pipeline and draws an image of the scenes' size."""
    for name in train_street.DENOISERS.values():
        pipe = al.load_pipeline(exported / "models" / name, device="cpu")
        pipe.set_progress_bar_config(disable=True)
        image = pipe("a house", num_inference_steps=2).images[0]
        assert image.size == (train_street.SIZE, train_street.SIZE)
        size = sum(file.stat().st_size for file in (exported / "models" / name).rglob("*.safetensors"))
        assert size < 20e6, "more than the budget of the bundled weights"
    paths = [exported / "work" / stage / "curve.csv" for stage in train_street.DENOISERS]
    curves = [np.genfromtxt(path, delimiter=",", names=True) for path in paths]
    assert curves[0]["diffusion"] == curves[1]["diffusion"]  # of the first step: the same start and the same batch
    assert curves[0]["loss"] == pytest.approx(curves[0]["diffusion"] + 0.15 * curves[0]["grounding"], abs=2e-5)
    assert curves[1]["loss"] == curves[1]["diffusion"] and curves[1]["grounding"] == curves[0]["grounding"]
    assert (exported / "models/street-segmenter/diffusion_pytorch_model.safetensors").exists()


def test_curves_of_two_sittings_are_one(tmp_path):
    for name, steps in (("a", range(0, 40, 10)), ("b", range(0, 20, 10))):
        (tmp_path / name).write_text("step,loss\n" + "".join(f"{step},{step / 10}\n" for step in steps))
    shipping.thin_curve([tmp_path / "a", tmp_path / "b"], tmp_path / "all", rows=3)
    assert (tmp_path / "all").read_text().split() == ["step,loss", "5.0,0.5", "25.0,2.5", "45.0,0.5"]
    (tmp_path / "b").write_text("step,loss,price\n0,1,3\n10,2,5\n")  # which the sitting before did not log
    shipping.thin_curve([tmp_path / "a", tmp_path / "b"], tmp_path / "all", rows=2)
    assert (tmp_path / "all").read_text().split() == ["step,loss,price", "10.0,1.0,", "40.0,2.0,4.0"]
    for name, every in (("a", 100), ("b", 10)):  # the first was thinned before: no reason to thin it more
        rows = "".join(f"{step},{step / 10}\n" for step in range(0, 400, every))
        (tmp_path / name).write_text("step,loss\n" + rows)
    shipping.thin_curve([tmp_path / "a", tmp_path / "b"], tmp_path / "all", rows=8)
    rows = (tmp_path / "all").read_text().split()[1:]
    assert rows[:4] == ["0.0,0.0", "100.0,10.0", "200.0,20.0", "300.0,30.0"] and len(rows) == 8


def test_a_soup_is_the_mean_of_weights(exported, tmp_path):
    """Of every tensor in all parts, in half precision; a card beside the weights stays, other models are refused."""
    first, other, out = exported / "models", tmp_path / "other", tmp_path / "out"
    shutil.copytree(first / "tiny", other / "tiny")
    names = [path.relative_to(first) for path in (first / "tiny").rglob("*.safetensors")]
    for name in names:
        weights = {k: v + torch.randn(v.shape, generator=al.seed(0)).half() for k, v in load_file(first / name).items()}
        save_file(weights, other / name, {"format": "pt"})
    (out / "tiny").mkdir(parents=True)
    (out / "tiny" / "README.md").write_text("a card\n")
    soup.main([str(first), str(other), "--out", str(out)])
    for name in names:
        made, parts = load_file(out / name), [load_file(folder / name) for folder in (first, other)]
        assert made.keys() == parts[0].keys()
        for key, value in made.items():
            mean = (parts[0][key].double() + parts[1][key].double()) / 2
            assert value.dtype == torch.float16
            torch.testing.assert_close(value.double(), mean, rtol=2e-3, atol=1e-7)
    assert (out / "tiny" / "README.md").read_text() == "a card\n"
    assert [path.name for path in out.iterdir()] == ["tiny"]  # `tiny-plain` is in one folder alone
    assert al.load_pipeline(out / "tiny", device="cpu").unet.dtype == torch.float32

    with pytest.raises(ValueError, match="other names or sizes"):
        file = other / "tiny/unet/diffusion_pytorch_model.safetensors"
        save_file(dict(list(load_file(file).items())[1:]), file)
        soup.average_weights([first / "tiny", other / "tiny"], out / "tiny")
    (other / "tiny/vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="one has vae"):
        soup.average_weights([first / "tiny", other / "tiny"], out / "tiny")
    with pytest.raises(SystemExit):
        soup.main([str(first), "--out", str(out)])


def test_a_training_goes_on_from_exported_models(exported, tmp_path, monkeypatch):
    """From their weights, with their autoencoder and tokenizer, on latents of their scale."""
    models, begun = exported / "models", []
    monkeypatch.setattr(train_street, "train_together", lambda runs, deadline: begun.extend(runs))
    run = train_street.StreetTraining(shortened("finish"), tmp_path, tmp_path / "models", torch.device("cpu"), models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_street.DenoiserTraining, "write_curve", lambda *given: None)
        run.train_denoisers(["denoiser", "denoiser-plain"])
    for one, name in zip(begun, train_street.DENOISERS.values(), strict=True):
        pipe = al.load_pipeline(models / name, device="cpu")
        for module, other in ((one.model.unet, pipe.unet), (one.model.text_encoder, pipe.text_encoder)):
            for mine, its in zip(module.state_dict().values(), other.state_dict().values(), strict=True):
                assert torch.equal(mine, its)
        pixels = torch.from_numpy(run.scenes.images[:3]).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        torch.testing.assert_close(one.examples.latents[:3], latents, atol=1e-4, rtol=1e-4)
        ids = pipe.tokenizer(run.scenes.captions[:3], padding="max_length").input_ids
        assert one.examples.ids[:3].tolist() == ids
    assert begun[0].settings.grounding > begun[1].settings.grounding == 0


def test_a_training_begins_anew_with_a_kept_autoencoder(exported, tmp_path, monkeypatch):
    """On scenes and near views, at a price; of the exported models only what makes latents and tokens stays."""
    models, begun = exported / "models", []
    monkeypatch.setattr(train_street, "train_together", lambda runs, deadline: begun.extend(runs))
    monkeypatch.setattr(train_street.DenoiserTraining, "write_curve", lambda *given: None)
    monkeypatch.setitem(train_street.STREET_PRESETS, "finish", shortened("finish"))
    options = "--preset=finish --anew --scenes=18 --near=6 --price=0.25 --contextless=0.75 --device=cpu".split()
    train_street.main(["denoiser", "denoiser-plain", *options, f"--start={models}", f"--work={tmp_path}"])
    near = [street.render(s, near=True) for s in range(6)]
    pipe = al.load_pipeline(models / "tiny-plain", device="cpu")
    for one in begun:
        assert (one.settings.price, one.settings.contextless) == (0.25, 0.75) and len(one.examples.latents) == 24
        ids = pipe.tokenizer([scene.caption for scene in near], padding="max_length").input_ids
        assert one.examples.ids[18:24].tolist() == ids
        pixels = torch.from_numpy(np.stack([scene.image for scene in near])).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        torch.testing.assert_close(one.examples.latents[18:], latents, atol=1e-4, rtol=1e-4)
        assert not torch.equal(one.model.unet.conv_in.weight, pipe.unet.conv_in.weight)
    assert torch.equal(begun[0].model.unet.conv_in.weight, begun[1].model.unet.conv_in.weight)


TABLE = (Path(cards.__file__).parents[1] / "README.md").read_text()
COMMANDS = set(re.findall(r"python -m (experiments(?:\.\w+)+)([^`\n]*)`", TABLE))


@pytest.mark.parametrize(("module", "line"), sorted(COMMANDS), ids=lambda part: part.strip())
def test_the_commands_of_the_table_exist(module, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(module).main()
    text = capsys.readouterr().out
    known = r"[0-9.]+|runs/.*"  # numbers and folders, which no help has
    assert all(word in text for word in line.split() if not re.fullmatch(known, word))


def test_unfinished_models_are_not_exported(tmp_path):
    preset = shortened("cpu", vae=training.Schedule(1, 1e-3), denoiser=training.Schedule(1, 1e-3))
    run = train_street.StreetTraining(preset, tmp_path / "work", tmp_path / "models", torch.device("cpu"))
    run.vae()
    run.train_denoisers(["denoiser"])
    replace(run, preset=replace(preset, denoiser=training.Schedule(2, 1e-3))).export()
    assert not (tmp_path / "models").exists()


def test_grounding_loss_by_hand():
    """One word, its mask the upper half: attention spread evenly costs log 2, attention inside the mask nothing."""
    labels = torch.zeros(1, 64, 64, dtype=torch.uint8)
    labels[:, :32] = 1
    given = {"labels": labels, "attention_mask": None, "weight": torch.ones(1)}
    given |= {"positions": torch.tensor([[1]]), "classes": torch.tensor([[1]])}
    even = {"a": torch.zeros(1, 2, 256, 3), "b": torch.zeros(1, 2, 64, 3)}
    assert math.isclose(grounding_loss(even, **given), math.log(2), abs_tol=1e-3)
    inside = {name: torch.zeros_like(score) for name, score in even.items()}
    for score in inside.values():
        score[:, :, : score.shape[2] // 2, 1] = 20.0
        score[:, :, score.shape[2] // 2 :, 1] = -20.0
    assert grounding_loss(inside, **given) < 1e-3
    # another token takes much of the attention; hidden, it takes none
    drawn = {
        name: score + torch.tensor([5.0, 0, 0]) * torch.linspace(0, 1, score.shape[2])[:, None]
        for name, score in even.items()
    }
    shown, hidden = (torch.tensor([[one, True, True]]) for one in (True, False))
    assert grounding_loss(drawn, **given | {"attention_mask": shown}) < math.log(2) - 0.1
    assert math.isclose(grounding_loss(drawn, **given | {"attention_mask": hidden}), math.log(2), abs_tol=1e-3)
    half = grounding_loss(even, **given | {"weight": torch.full((1,), 0.5)})
    assert math.isclose(half, 0.5 * math.log(2), abs_tol=1e-3)
    for nothing in (
        {"classes": torch.tensor([[-1]])},  # no class
        {"attention_mask": torch.tensor([[True, False, True]])},  # the word is hidden
        {"labels": torch.zeros(1, 64, 64, dtype=torch.uint8)},  # the class is not in the scene
    ):
        assert grounding_loss(even, **given | nothing) == 0


@pytest.fixture(scope="module")
def scenes():
    return data.Scenes.of(street.render(s) for s in range(20))


@pytest.fixture(scope="module")
def tokenizer(scenes, tmp_path_factory):
    return train_tokenizer(scenes.captions, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def examples(scenes, tokenizer):
    """Twenty scenes, whose latents are their numbers."""
    latents = torch.arange(20.0)[:, None, None, None].expand(20, 4, 16, 16).contiguous()
    return Examples.of(latents, list(zip(scenes.captions, scenes.words, strict=True)), tokenizer, scenes.labels)


def begin(examples, tokenizer, path, batch=8, steps=2, **settings):
    with training.seeded(0):
        model = TextToLatent.new(tokenizer)
    settings, schedule = TextToImageSettings(batch, **settings), training.Schedule(steps, 1e-3, warmup=1)
    return DenoiserTraining(model, examples, settings, schedule, path / "checkpoint", torch.device("cpu"))


def test_batches_hold_what_settings_say(scenes, examples, tokenizer, tmp_path):
    """Captions, some empty; words for classes and where they are; the labels of the same scenes; nothing hidden."""
    drawn = begin(examples, tokenizer, tmp_path, batch=1000).draw()
    scene = drawn["latents"][:, 0, 0, 0].long()
    assert torch.equal(drawn["labels"], torch.from_numpy(scenes.labels)[scene]) and "attention_mask" not in drawn
    texts = tokenizer.batch_decode(drawn["ids"], skip_special_tokens=True)
    empty = np.array([text == "" for text in texts])
    assert np.mean(empty) == pytest.approx(0.1, abs=0.03)
    captions = [scenes.captions[i].replace(",", " ,") for i in scene]
    assert all(a or b == c for a, b, c in zip(empty, texts, captions, strict=True))
    for i, row, at, names in zip(scene, drawn["ids"], drawn["positions"], drawn["classes"], strict=True):
        told = [(tokenizer.decode(row[p]).strip(), street.CLASSES[c]) for p, c in zip(at, names, strict=True) if c >= 0]
        assert all(scenes.words[i][word] == name for word, name in told)
        said = tokenizer.decode(row, skip_special_tokens=True).split()
        assert len(told) == sum(word in scenes.words[i] for word in said)


def test_the_price_of_looking_off_the_start_token(examples, tokenizer, tmp_path):
    """The mean of what is not on the first token, in float64 by hand; added to the loss; it is what falls."""
    generator = al.seed(0)
    scores = {name: torch.randn(2, 3, pixels, 5, generator=generator) for name, pixels in (("a", 4), ("b", 9))}
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    for shown in (None, mask):
        expected = []
        for score in scores.values():
            score = score.double() if shown is None else score.double().masked_fill(~shown[:, None, None], -torch.inf)
            share = score.exp()[..., 0] / score.exp().sum(-1)
            expected.append(1 - share.mean())
        assert float(off_start(scores, shown)) == pytest.approx(float(sum(expected) / 2), abs=1e-6)
    shares = {}
    for price in (0.0, 20.0):
        run = begin(examples, tokenizer, tmp_path, steps=8, grounding=0.0, price=price)
        for _ in range(8):
            run.advance()
        if price:
            assert set(run.terms) == {"loss", "diffusion", "grounding", "off start"}
            total = run.terms["diffusion"] + price * run.terms["off start"]
            torch.testing.assert_close(run.terms["loss"], total)
        with torch.no_grad(), attention_scores(run.model.unet) as scores:
            run.model(torch.zeros(1, 4, 16, 16), torch.tensor([500]), examples.ids[:1])
        shares[price] = float(off_start(scores))
    assert shares[20.0] < shares[0.0] - 0.02


def test_half_of_the_texts_bypass_the_text_encoders_layers(examples, tokenizer, tmp_path):
    """Without context a word's state depends on itself and its place alone; with it, on the words before it, too."""
    run = begin(examples, tokenizer, tmp_path, batch=1000)
    assert run.draw()["contextless"].float().mean() == pytest.approx(0.5, abs=0.05)
    assert "contextless" not in begin(examples, tokenizer, tmp_path, contextless=0.0).draw()
    model, seen = run.model.eval(), []
    model.unet.forward = lambda noisy, timestep, text, **given: seen.append(text) or SimpleNamespace(sample=noisy)
    ids = tokenize(tokenizer, ["a red house", "a blue house"]).input_ids
    assert (ids[0] != ids[1]).nonzero().tolist() == [[2]]
    for bypassed in ([True, True], [False, False], [True, False]):
        with torch.no_grad():
            model(torch.zeros(2, 4, 16, 16), 0, ids, contextless=torch.tensor(bypassed))
    alone, read, mixed = seen
    assert torch.equal(alone[0, 3:], alone[1, 3:]) and not torch.allclose(alone[0, 2], alone[1, 2], atol=0.1)
    assert not torch.isclose(read[0, 3:], read[1, 3:]).all(-1).any()
    assert torch.equal(mixed[0], alone[0]) and torch.equal(mixed[1], read[1])


def test_further_text_layers_add_nothing_until_they_are_trained(tokenizer):
    ids = tokenize(tokenizer, ["a red house near a tree", ""]).input_ids
    for before, layers in ((0, 1), (1, 3), (2, 2)):
        encoder = new_text_encoder(tokenizer, before)
        deeper = deepen(encoder, layers)
        assert len(deeper.encoder.layers) == layers
        state = deeper(ids).last_hidden_state
        torch.testing.assert_close(state, encoder(ids).last_hidden_state)
    state.square().sum().backward()
    assert all(layer.mlp.fc2.weight.grad.any() for layer in deeper.encoder.layers)


def test_configurations_forget_where_they_came_from(tmp_path):
    (tmp_path / "unet").mkdir()
    for name in ("config.json", "unet/config.json"):
        (tmp_path / name).write_text(json.dumps({"_name_or_path": "/home/somebody/runs", "act_fn": "silu"}))
    forget_origin(tmp_path)
    assert [json.loads(path.read_text()) for path in tmp_path.rglob("*.json")] == [{"act_fn": "silu"}] * 2
    for path in BUNDLED.rglob("config.json"):
        assert "_name_or_path" not in path.read_text(), path


def test_every_step_of_the_denoiser_sees_early_and_late_timesteps(examples, tokenizer, monkeypatch, tmp_path):
    """One in every eighth, of no scene always the same, none past the last; grounding weighs by the signal left."""
    weights, grounding = [], denoiser_training.grounding_loss
    monkeypatch.setattr(denoiser_training, "grounding_loss", lambda *a: weights.append(a[-1]) or grounding(*a))
    run = begin(examples, tokenizer, tmp_path)
    alphas, scenes_at = new_scheduler().alphas_cumprod, []
    for _ in range(2):
        drawn = run.draw()
        run.advance()
        timestep = drawn["timestep"]
        assert torch.equal((timestep * 8 // 1000).sort().values, torch.arange(8))
        torch.testing.assert_close(weights[-1], alphas[timestep].sqrt())
        assert float(run.terms["loss"]) == pytest.approx(
            float(run.terms["diffusion"] + 0.15 * run.terms["grounding"]), abs=2e-5
        )
        scenes_at.append(drawn["latents"][:, 0, 0, 0])
    assert not torch.equal(*scenes_at)
    monkeypatch.setattr(torch, "rand", lambda *shape, **given: torch.full(shape, 1 - 2.0**-24))
    assert run.draw()["timestep"].max() == 999


def losses_of(module, monkeypatch, train, *given):
    """The loss that a training would minimize, without the training."""
    kept = []
    monkeypatch.setattr(module, "run_training", lambda model, loss, *rest: kept.append(loss) or model)
    train(*given)
    return kept[0]


def test_the_segmenters_loss_by_hand(monkeypatch):
    """Labels are flipped with their images; errors of rare classes weigh by 1 / sqrt(frequency)."""
    labels = np.arange(64).clip(max=15)[None, None] * np.ones((6, 64, 1), int)
    images = (labels[..., None] * np.array([16, 8, 4])).astype(np.uint8)
    scenes, device = data.Scenes(images, labels.astype(np.uint8), [""] * 6, [{}] * 6), torch.device("cpu")
    train, schedule = street_segmenter.train_street_segmenter, training.Schedule(1, 1e-3)
    loss = losses_of(street_segmenter, monkeypatch, train, scenes, images, schedule, Path(), device, 4)

    def right(x):  # reads the class from the color
        classes = ((x[:, 0].mean(1, keepdim=True) + 1) * 127.5 / 16).round().long().expand(4, 64, 64)
        return SimpleNamespace(logits=100 * torch.nn.functional.one_hot(classes, 16).permute(0, 3, 1, 2).float())

    assert max(float(loss(right, torch.Generator().manual_seed(s))["loss"]) for s in range(6)) < 0.1
    frequency = np.bincount(labels[0, 0], minlength=16) / 64
    weight, score = frequency / np.sqrt(frequency), torch.linspace(0, 3, 16)
    same = loss(lambda x: SimpleNamespace(logits=score[None, :, None, None].expand(4, 16, 64, 64)), torch.Generator())
    expected = -(weight * score.log_softmax(0).numpy()).sum() / weight.sum()
    assert float(same["loss"]) == pytest.approx(expected, rel=1e-5)


def test_the_autoencoders_loss_by_hand(monkeypatch):
    """Of a model that decodes to gray: pixels, edges, and a little of the latents' divergence; latents are drawn."""
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    scenes, drawn = data.Scenes(images, None, [""], [{}]), []

    class Gray:
        def encode(self, x):
            zero = torch.zeros(len(x), 4, 2, 2)
            latent = SimpleNamespace(mean=zero + 5, std=zero + 2, kl=lambda: torch.full((len(x),), 32.0))
            return SimpleNamespace(latent_dist=latent)

        def decode(self, latents):
            drawn.append(latents)
            return SimpleNamespace(sample=torch.zeros(len(latents), 3, 8, 8))

    monkeypatch.setattr(vae.training, "run_training", lambda model, loss, *rest: kept.append(loss) or model)
    monkeypatch.setattr(vae, "encode_images", lambda model, images: torch.randn(2, 4))
    kept = []
    vae.train_vae(scenes, training.Schedule(1, 1e-3), Path(), torch.device("cpu"), 200)
    terms = kept[0](Gray(), torch.Generator().manual_seed(0))
    x = torch.from_numpy(images[0]).double() / 127.5 - 1
    spread = torch.zeros(8, 8, dtype=torch.double)
    for i, j in np.ndindex(8, 8):  # the standard deviation of the 7 x 7 pixels around each, where there are so many
        window = x[max(i - 3, 0) : i + 4, max(j - 3, 0) : j + 4].flatten(0, 1)
        spread[i, j] = window.var(0, correction=0).sum().sqrt()
    weight = 0.5 + 0.5 * spread / spread.mean()
    pixels = ((x.abs() + x**2 / 2) * weight[..., None]).mean()
    edges = x.diff(dim=0).abs().mean() + x.diff(dim=1).abs().mean()
    assert float(terms["loss"]) == pytest.approx(float(pixels + edges / 2) + 3e-4 * 32 / 16, rel=1e-5)
    assert float(drawn[0].mean()) == pytest.approx(5, abs=0.2) and float(drawn[0].std()) == pytest.approx(2, rel=0.1)


def test_tokenizer_knows_the_words_it_was_trained_on(tmp_path):
    tokenizer = train_tokenizer(["a burning house", "two houses, smoke"], tmp_path)
    for word in ("a", "burning", "house", "houses", "two", "smoke", ","):
        assert len(tokenizer.tokenize(word)) == 1
    assert "".join(tokenizer.tokenize("boat")).replace("</w>", "") == "boat"
    assert {"vocab.json", "merges.txt"} <= {path.name for path in tmp_path.iterdir()}


def test_summary_by_hand():
    """Two words, each map right at 0.5 of its maximum; the threshold comes from the tuning scenes."""
    truth = np.zeros((8, 8), bool)
    truth[:4] = True
    good, bad = np.where(truth, 1.0, 0.3), np.where(truth, 0.3, 1.0)
    found = [localize.WordCase(0, "house", good, truth, bad), localize.WordCase(1, "car", good, truth, None)]
    result = localize.summarize_cases(found, found)
    assert 0.3 < result["threshold"] <= 1
    assert (result["word iou"], result["word pointing"]) == (1, 1)
    assert (result["shuffled word iou"], result["shuffled word pointing"]) == (0, 0)
    assert result["classes"]["car"] == {"maps": 1, "iou": 1.0, "pointing": 1.0}
    faint = [case._replace(heat=np.where(truth, 1.0, 0.7)) for case in found]
    result = localize.summarize_cases(found, faint)  # at 0.31, all of the image is marked
    assert result["threshold"] == 0.31 and result["word iou"] == 0.5


def test_words_of_the_bundled_model_localize(pipe):
    """Far below the card's figures, far above the baseline: broken weights or maps would not pass."""
    found = localize.localization(pipe, 30, tuning=20)
    assert found["word pointing"] > 0.75 > 0.4 > found["shuffled word pointing"]
    assert found["word iou"] > 0.4 > 0.25 > found["shuffled word iou"]


def test_bundled_models_share_their_vocabulary_and_autoencoder():
    """`tiny` and `tiny-plain` differ by grounding, nothing else."""
    one, other = (al.load_pipeline(name, device="cpu") for name in ("tiny", "tiny-plain"))
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    for a, b in zip(one.vae.state_dict().values(), other.vae.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert {**one.unet.config, "_name_or_path": ""} == {**other.unet.config, "_name_or_path": ""}
    assert one.scheduler.config == other.scheduler.config
    curves = [BUNDLED / name / "curve.csv" for name in ("tiny", "tiny-plain")]
    assert len({path.read_text().splitlines()[-1].split(",")[0] for path in curves}) == 1  # as many steps


def test_every_word_of_a_caption_is_one_token(pipe):
    for s in range(street.HELD_OUT, street.HELD_OUT + 100):
        for word in street.render(s).caption.replace(",", " ,").split():
            assert len(pipe.tokenizer.tokenize(word)) == 1, word


def test_steering(pipe):
    """Every class has its row, and two rough images of each already show most of what was asked."""
    result = steer.steering(pipe, al.load_segmenter("street", "cpu"), images=2, scenes=60, steps=6)
    assert tuple(result["classes"]) == street.CLASSES
    mean, least = steer.shown_when_asked(result["classes"], thin=False)
    assert 0.6 < mean <= 1 and least <= mean


def test_tables_and_card(tmp_path):
    """What stands between the marks is replaced, the rest stays."""
    maps = {
        "threshold": 0.4,
        "tuning scenes": 3,
        "scenes": 5,
        "maps": 9,
        "classes": {"sky": {"maps": 9, "iou": 0.5, "pointing": 0.25}},
    }
    for kind in ("word", "shuffled word"):
        maps |= {f"{kind} {what}": 0.75 for what in ("iou", "pointing")}
        maps |= {f"{kind} {what} interval": [0.5, 1.0] for what in ("iou", "pointing")}
    row = {"asked": 0.9, "interval": [0.8, 1.0], "unasked": 0.1, "oracle recall": 1.0}
    steering = {"images a class": 10, "steps": 20, "guidance": 4.0, "classes": dict.fromkeys(("sky", "pole"), row)}
    measured = {"maps": maps, "steering": steering, "PSNR": 30.0, "seconds an image": 0.5, "cores": 2}
    text = cards.pipeline_tables("tiny", {"tiny": measured})
    assert "| sky | 9 | 0.500 | 0.250 | 0.900 (0.800 to 1.000) | 0.100 | 1.000 |" in text
    assert "| thin class |" in text and "| pole | 0 |  |  | 0.900" in text and "30.0 dB" in text
    card = tmp_path / "README.md"
    card.write_text(f"before\n{cards.MARKS[0]}\nold\n{cards.MARKS[1]}\nafter\n")
    cards.write_card(tmp_path, text)
    cards.write_card(tmp_path, "new")
    assert card.read_text() == f"before\n{cards.MARKS[0]}\nnew\n{cards.MARKS[1]}\nafter\n"
    card.write_text("no marks")
    with pytest.raises(ValueError, match="needs the lines"):
        cards.write_card(tmp_path, "new")


@pytest.mark.parametrize("name", ["tiny", "tiny-plain", "tiny-mmdit", "street-segmenter"])
def test_cards_hold_what_was_measured(name):
    """The tables in a card are those of its measured.json: nothing was typed in by hand."""
    found = {p.parent.name: json.loads(p.read_text()) for p in BUNDLED.glob("*/measured.json")}
    tables = cards.segmenter_tables if name == "street-segmenter" else cards.pipeline_tables
    card = (BUNDLED / name / "README.md").read_text()
    assert tables(name, found) in card and "@" not in card
