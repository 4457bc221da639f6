"""The bundled models and their training: grounding's loss by hand, words that localize."""

import importlib
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import attnlab as al
from attnlab import training
from attnlab.pipelines import BUNDLED
from attnlab.scenes import street
from experiments.bundled import (
    cards,
    data,
    localize,
    steer,
    street_segmenter,
    text_to_image as denoiser,
    train_street,
    vae,
)
from experiments.bundled.text_encoder import train_tokenizer
from experiments.bundled.text_to_image import grounding_loss


@pytest.mark.parametrize("preset", train_street.STREET_PRESETS)
def test_every_stage_of_every_preset(preset, tmp_path):
    """Two steps each, from scenes to a folder that loads as a pipeline and draws an image of the preset's size."""
    steps = dict.fromkeys(("vae", "denoiser", "segmenter"), training.Schedule(steps=2, lr=1e-3))
    settings = denoiser.TextToImageSettings(batch=4)
    short = replace(train_street.STREET_PRESETS[preset], scenes=20, settings=settings, **steps)
    run = train_street.StreetTraining(short, tmp_path / "work", tmp_path / "models", torch.device("cpu"))
    run.vae()
    for stage in train_street.DENOISERS:
        run.train_denoiser(stage)
    run.segmenter()
    run.export()
    for name in train_street.DENOISERS.values():
        pipe = al.load_pipeline(tmp_path / "models" / name, device="cpu")
        pipe.set_progress_bar_config(disable=True)
        image = pipe("a house", num_inference_steps=2).images[0]
        assert image.size == (short.size, short.size)
        size = sum(file.stat().st_size for file in (tmp_path / "models" / name).rglob("*.safetensors"))
        assert size < 20e6, "more than the budget of the bundled weights"
    paths = [tmp_path / "work" / stage / "curve.csv" for stage in train_street.DENOISERS]
    curves = [np.genfromtxt(path, delimiter=",", names=True) for path in paths]
    assert curves[0]["diffusion"][0] == curves[1]["diffusion"][0]  # the same start and the same batch
    assert (curves[0]["loss"] > curves[0]["diffusion"]).all() and (curves[1]["loss"] == curves[1]["diffusion"]).all()
    assert (tmp_path / "models/street-segmenter/diffusion_pytorch_model.safetensors").exists()


TABLE = (Path(cards.__file__).parents[1] / "README.md").read_text()
COMMANDS = set(re.findall(r"python -m (experiments(?:\.\w+)+)([^`\n]*)`", TABLE))


@pytest.mark.parametrize(("module", "line"), sorted(COMMANDS), ids=lambda part: part.strip())
def test_the_commands_of_the_table_exist(module, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(module).main()
    text = capsys.readouterr().out
    assert all(word in text for word in line.split() if not re.fullmatch(r"[0-9.]+", word))


def test_unfinished_models_are_not_exported(tmp_path):
    preset = replace(train_street.STREET_PRESETS["cpu"], scenes=20, settings=denoiser.TextToImageSettings(batch=4))
    preset = replace(preset, vae=training.Schedule(1, 1e-3), denoiser=training.Schedule(1, 1e-3))
    run = train_street.StreetTraining(preset, tmp_path / "work", tmp_path / "models", torch.device("cpu"))
    run.vae()
    run.train_denoiser("denoiser")
    replace(run, preset=replace(preset, denoiser=training.Schedule(2, 1e-3))).export()
    assert not (tmp_path / "models").exists()


def test_grounding_loss_by_hand():
    """One word, its mask the upper half: attention spread evenly costs log 2, attention inside the mask nothing."""
    labels = torch.zeros(1, 64, 64, dtype=torch.uint8)
    labels[:, :32] = 1
    given = {"labels": labels, "attention_mask": torch.ones(1, 3, dtype=torch.bool), "weight": torch.ones(1)}
    given |= {"positions": torch.tensor([[1]]), "classes": torch.tensor([[1]])}
    even = {"a": torch.zeros(1, 2, 256, 3), "b": torch.zeros(1, 2, 64, 3)}
    assert math.isclose(grounding_loss(even, **given), math.log(2), abs_tol=1e-3)
    inside = {name: torch.zeros_like(score) for name, score in even.items()}
    for score in inside.values():
        score[:, :, : score.shape[2] // 2, 1] = 20.0
        score[:, :, score.shape[2] // 2 :, 1] = -20.0
    assert grounding_loss(inside, **given) < 1e-3
    half = grounding_loss(even, **given | {"weight": torch.full((1,), 0.5)})
    assert math.isclose(half, 0.5 * math.log(2), abs_tol=1e-3)
    for nothing in (
        {"classes": torch.tensor([[-1]])},  # no class
        {"attention_mask": torch.tensor([[True, False, True]])},  # the word is hidden
        {"labels": torch.zeros(1, 64, 64, dtype=torch.uint8)},  # the class is not in the scene
    ):
        assert grounding_loss(even, **given | nothing) == 0


@pytest.fixture(scope="module")
def batches():
    """Twenty scenes, whose latents are their numbers, and a tokenizer that knows all their words."""
    scenes = data.Scenes.of(street.render(s) for s in range(20))
    latents = torch.arange(20.0)[:, None, None, None].expand(20, 4, 16, 16).contiguous()
    tokenizer = al.load_pipeline("tiny", device="cpu").tokenizer
    return denoiser.Batches(latents, torch.from_numpy(scenes.labels), scenes.captions, scenes.words, tokenizer)


def test_batches_hold_what_settings_say(batches):
    """Captions, some empty or of class words alone; words for classes and where they are; what is hidden."""
    settings = denoiser.TextToImageSettings(batch=1000, bare=0.25)
    latents, labels, ids, mask, positions, classes = batches.draw(settings, torch.Generator().manual_seed(0))
    scene = latents[:, 0, 0, 0].long()
    assert torch.equal(labels, batches.labels[scene])
    texts = batches.tokenizer.batch_decode(ids, skip_special_tokens=True)
    captions = [batches.captions[i].replace(",", " ,") for i in scene]
    empty, whole = ([a == b for a, b in zip(texts, others, strict=True)] for others in ([""] * 1000, captions))
    words = [
        set(text.split()) <= set(batches.words[i]) and 0 < len(text.split()) <= 3
        for i, text in zip(scene, texts, strict=True)
    ]
    assert all(a or b or c for a, b, c in zip(empty, whole, words, strict=True))
    assert np.mean(empty) == pytest.approx(0.1, abs=0.03) and np.mean(whole) == pytest.approx(0.9 * 0.85, abs=0.06)
    named = torch.arange(ids.shape[1]) < (ids == batches.tokenizer.eos_token_id).int().argmax(1, keepdim=True)
    hidden = ~mask.all(1)
    assert torch.equal(mask[hidden], named[hidden]) and hidden.float().mean() == pytest.approx(0.25, abs=0.04)
    for i, row, at, names in zip(scene, ids, positions, classes, strict=True):
        told = [
            (batches.tokenizer.decode(row[p]).strip(), street.CLASSES[c])
            for p, c in zip(at, names, strict=True)
            if c >= 0
        ]
        assert all(batches.words[i][word] == name for word, name in told)
        said = batches.tokenizer.decode(row, skip_special_tokens=True).split()
        assert len(told) == sum(word in batches.words[i] for word in said)


def test_every_step_of_the_denoiser_sees_early_and_late_timesteps(batches, monkeypatch, tmp_path):
    """One in every eighth, of no scene always the same, none past the last; grounding weighs by the signal left."""
    seen, weights, forward, grounding = [], [], denoiser.TextToLatent.forward, denoiser.grounding_loss
    monkeypatch.setattr(denoiser.TextToLatent, "forward", lambda *a: seen.append(a[2]) or forward(*a))
    monkeypatch.setattr(denoiser, "grounding_loss", lambda *a: weights.append(a[-1]) or grounding(*a))
    settings, schedule = denoiser.TextToImageSettings(batch=8), training.Schedule(2, 1e-3)
    with training.seeded(0):
        model = denoiser.TextToLatent.new(batches.tokenizer, 16, (32, 32), text_layers=1)
    denoiser.train_denoiser(model, batches, settings, schedule, tmp_path / "a")
    curve = np.genfromtxt(tmp_path / "a/curve.csv", delimiter=",", names=True)
    np.testing.assert_allclose(curve["loss"], curve["diffusion"] + 0.15 * curve["grounding"], atol=2e-5)
    alphas = denoiser.new_scheduler().alphas_cumprod
    for timestep, weight in zip(seen, weights, strict=True):
        assert torch.equal((timestep * 8 // 1000).sort().values, torch.arange(8)) and (timestep.diff() < 0).any()
        torch.testing.assert_close(weight, alphas[timestep].sqrt())
    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None: torch.full(shape, 1 - 2.0**-24))
    denoiser.train_denoiser(model, batches, settings, replace(schedule, steps=1), tmp_path / "b")
    assert seen[-1].max() == 999


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
    labels = np.full((1, 8, 8), street.CLASSES.index("sky"), np.uint8)
    labels[:, :4] = street.CLASSES.index("fire")
    scenes, drawn = data.Scenes(images, labels, [""], [{}]), []

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
    pixels = ((x.abs() + x**2 / 2) * torch.where(torch.arange(8) < 4, 2.5, 1.0)[:, None, None]).mean()
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
    """`tiny` and `tiny-plain` differ by grounding and their random start, nothing else."""
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


@pytest.mark.parametrize("name", ["tiny", "tiny-plain", "street-segmenter"])
def test_cards_hold_what_was_measured(name):
    """The tables in a card are those of its measured.json: nothing was typed in by hand."""
    found = {p.parent.name: json.loads(p.read_text()) for p in BUNDLED.glob("*/measured.json")}
    tables = cards.segmenter_tables if name == "street-segmenter" else cards.pipeline_tables
    card = (BUNDLED / name / "README.md").read_text()
    assert tables(name, found) in card and "@" not in card
