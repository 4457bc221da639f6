"""The study of what makes words localize: its captions, its texts, its loop of training, its maps, the whole of it."""

import copy
import json
from dataclasses import replace
from itertools import count, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attnlab as al
from attnlab import training
from attnlab.scenes import street
from experiments.bundled import denoiser_training
from experiments.bundled.denoiser_training import DenoiserTraining, Examples, tokenize
from experiments.bundled.localize import TIMESTEPS
from experiments.bundled.text_to_image import TextToLatent
from experiments.studies import word_localization
from experiments.studies.word_localization import WordLocalizationStudy, token_maps, variants_table
from experiments.studies.word_training import VARIANTS, Variant, new_model, start_training

CPU = torch.device("cpu")
TEXTS = ["a red car with a house and smoke", "a house", "", "smoke, a blue house, a red car and a tree"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return WordLocalizationStudy(tmp_path_factory.mktemp("study"), CPU, steps=4, batch=4, scenes=40, tuning=8, tests=12)


def test_dense_captions():
    """Of the same scene, true, and longer: three of four name every visible object, most of them with a color."""
    named, colored, cars = [], 0, 0
    for s in range(street.HELD_OUT, street.HELD_OUT + 150):
        usual, dense = street.render_both(s)
        for scene, again in ((usual, street.render(s, dense=False)), (dense, street.render(s))):
            assert (scene.image == again.image).all() and (scene.labels == again.labels).all()
            assert (scene.caption, scene.words) == (again.caption, again.words)
        assert all(dense.mask(word).mean() >= 0.006 for word in dense.words)
        objects = {"car", "building", "tree", "person"} & {street.CLASSES[k] for k in np.unique(dense.labels)}
        visible = {name for name in objects if dense.mask(name).mean() >= 0.02}
        named.append(visible <= set(dense.words.values()))
        words = dense.caption.replace(",", "").split()
        cars += words.count("car")
        colored += sum(b == "car" and a not in ("a", "burning") for a, b in pairwise(words))
    assert 0.7 < np.mean(named) < 0.97
    assert cars > 20 and colored / cars > 0.75


@pytest.mark.parametrize("layers", [0, 2])
def test_registers_stand_from_the_end_token_on(study, layers):
    """Words keep their embedding; what is behind them is the same in all texts, and is not trained."""
    plain, registers = (Variant("dense", layers, padding) for padding in ("visible", "registers"))
    tokenizer = study.tokenizer(plain)
    ids = tokenize(tokenizer, TEXTS).input_ids
    words = torch.arange(48) < torch.tensor([len(tokenizer(text).input_ids) - 1 for text in TEXTS])[:, None]
    one, other = (new_model(variant, tokenizer, 0).text_encoder for variant in (plain, registers))
    before, after = one(ids)[0], copy.deepcopy(other)(input_ids=ids)[0]
    assert torch.equal(before[words], after[words]) and not torch.isclose(before, after)[~words].all(-1).any()
    assert torch.equal(after[~words], other.registers.expand(4, -1, -1)[~words])
    assert "registers" not in dict(other.named_parameters())
    assert torch.isclose(other.registers.std(-1, correction=0), torch.ones(48), atol=1e-3).all()


@pytest.mark.parametrize(("padding", "fraction"), [("visible", 0), ("registers", 0), ("half", 0.5), ("hidden", 1)])
def test_what_is_hidden_in_training(study, padding, fraction):
    """Exactly the positions from the end token on, in that fraction of the samples; one of ten has no text."""
    run = start(study, Variant("sparse", 0, padding, keywords=0.15, window=32), batch=400)
    drawn = run.draw()
    ids, timestep = drawn["ids"], drawn["timestep"]
    attention_mask = drawn.get("attention_mask", torch.ones_like(ids, dtype=torch.bool))
    words = torch.arange(32) < (ids != run.examples.end).sum(1, keepdim=True)
    hidden = (~attention_mask).any(1)
    assert torch.equal(attention_mask[hidden], words[hidden]) and attention_mask[~hidden].all()
    assert abs(hidden.float().mean() - fraction) < 0.1
    assert 0.05 < (words.sum(1) == 1).float().mean() < 0.16
    assert timestep.float().histc(10, 0, 1000).tolist() == [40] * 10
    run.done = 1
    assert not torch.equal(run.draw()["ids"], ids)


def test_keywords(study):
    """Captions cut to keywords hold class words of their own scene alone, and only where they are asked for."""
    scenes = study.captioned(0, study.scenes)
    variant = Variant("sparse", 0, "visible", keywords=0.15, window=32)
    ids, without = (start(study, one).examples.ids for one in (variant, VARIANTS["dense-0-visible"]))
    assert (len(ids), len(without)) == (5 * 40 + 1, 41)
    tokenizer = study.tokenizer(variant)
    for k in range(40, 200):
        caption, words = scenes["sparse"][k % 40]
        told = tokenizer.decode(ids[k], skip_special_tokens=True).split()
        assert (0 < len(told) <= 3 and set(told) <= set(words)) if words else told == caption.split()
    assert (ids[-1, 1:] == tokenizer.eos_token_id).all()


def test_near_views_are_learned_from_too(study, tmp_path):
    """A third as many, behind the scenes; and the price goes to the loss."""
    study = replace(study, work=tmp_path)
    variant = Variant("dense", 1, "visible", near=True, price=0.5)
    run = study._start(study._examples, variant, 0)
    assert run.settings.price == 0.5 and (len(run.examples.latents), len(run.examples.ids)) == (53, 54)
    tokenizer = study.tokenizer(variant)
    for ids, s in ((run.examples.ids[12], 12), (run.examples.ids[45], 5)):
        caption = street.render(s, near=s == 5).caption
        assert ids.tolist() == tokenizer(caption, padding="max_length").input_ids
    assert variant.name == "dense-1-visible-near-price0.5"


def test_words_without_context(study):
    """A word's embedding depends on its place, not on its neighbors, unless the text encoder has layers."""
    for layers, alone in ((0, True), (1, False)):
        variant = Variant("dense", layers, "visible")
        tokenizer = study.tokenizer(variant)
        ids = tokenize(tokenizer, ["a red car", "two burning car"]).input_ids
        one, other = new_model(variant, tokenizer, 0).text_encoder(ids)[0][:, 3]
        assert torch.equal(one, other) == alone


def start(study, variant, batch=4, steps=4, path=None):
    tokenizer, scenes = study.tokenizer(variant), study.captioned(0, study.scenes)
    path = path or study.work / "none.checkpoint"
    schedule = training.Schedule(steps, lr=1e-3, ema=0.9, warmup=2, seed=3)
    examples = Examples.of(scenes["latents"], scenes[variant.captions], tokenizer, keywords=bool(variant.keywords))
    return start_training(variant, schedule, examples, tokenizer, path, CPU, batch)


def test_the_loop_is_that_of_training(study, tmp_path):
    """Four steps, with an interruption, give the weights of `training.run_training` to the last bit."""
    variant, path = VARIANTS["dense-1-visible"], tmp_path / "run.checkpoint"
    whole, half = start(study, variant), start(study, variant, path=path)
    for _ in range(4):
        whole.advance()
    half.advance()
    half.advance()
    half.save(1.5)
    half.advance()  # is lost
    rest = start(study, variant, path=path)
    assert (rest.done, rest.seconds) == (2, 1.5)
    rest.advance()
    rest.advance()

    def loss(model, generator):
        drawn.done = int(generator.initial_seed()) - 3 * 1_000_003
        latents, ids, timestep, noise = drawn.draw().values()
        noisy = drawn.scheduler.add_noise(latents, noise, timestep).contiguous(memory_format=torch.channels_last)
        goal = drawn.scheduler.get_velocity(latents, noise, timestep)
        return {"loss": F.mse_loss(model(noisy, timestep, ids).float(), goal)}

    drawn = start(study, variant)
    average = training.run_training(drawn.model, loss, drawn.schedule, tmp_path / "reference")
    for weights in zip(*(one.state_dict().values() for one in (average, whole.average, rest.average)), strict=True):
        assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    whole.terms = {"loss": torch.tensor(torch.nan)}
    with pytest.raises(FloatingPointError, match="at step 4"):
        whole.save(0)


def test_maps_are_those_of_daam(pipe):
    scenes = [street.render(s) for s in range(street.HELD_OUT, street.HELD_OUT + 3)]
    images, captions = [scene.image for scene in scenes], [scene.caption for scene in scenes]
    recording = al.record_image(pipe, images, captions, timesteps=TIMESTEPS, generator=al.seed(5))
    pixels = torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    ids = tokenize(pipe.tokenizer, captions).input_ids
    maps, loss = token_maps(TextToLatent(pipe.text_encoder, pipe.unet), latents, ids, al.seed(5))
    for one, values in zip(recording, maps, strict=True):
        expected = al.daam(one).values
        np.testing.assert_allclose(values[: len(expected)], expected, atol=2e-5)
    assert 0.1 < loss < 0.6


def test_a_killed_group_goes_on_to_the_same_results(study, monkeypatch):
    """Killed at its third step, after checkpoints of two; then time is up after one; then to the end."""
    jobs = [(VARIANTS[name], 0) for name in ("dense-0-registers", "sparse-2-half")]
    study, other = (replace(study, images=0, work=study.work / name) for name in ("killed", "whole"))
    for one in (study, other):
        one.work.mkdir()
    other.train_group(jobs)
    advance = DenoiserTraining.advance

    def killed(run):
        if run.done == 2:
            raise KeyboardInterrupt
        advance(run)

    with monkeypatch.context() as patch:
        patch.setattr(DenoiserTraining, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            study.train_group(jobs, interval=0)
    assert study.results(jobs) == [] and len(list(study.work.glob("*.checkpoint"))) == 2
    with (
        monkeypatch.context() as patch
    ):  # a clock on which whatever is timed takes 2 s: 14.8 s are kept for measurements
        clock = SimpleNamespace(time=count(0, 2).__next__)
        patch.setattr(word_localization, "time", clock)
        patch.setattr(denoiser_training, "time", clock)
        study.train_group(jobs, deadline=25)
    assert [found["steps"] for found in study.results(jobs)] == [3, 3] and study.results(jobs)[0]["of"] == 4
    study.train_group(jobs, deadline=word_localization.time.time() + 10)  # too late to begin
    assert [found["steps"] for found in study.results(jobs)] == [3, 3]
    study.train_group(jobs)
    assert not list(study.work.glob("*.checkpoint"))
    for found, expected in zip(study.results(jobs), other.results(jobs), strict=True):
        assert found | {"seconds": 0} == expected | {"seconds": 0} and found["steps"] == found["of"] == 4


def test_from_the_command_line(tmp_path, caplog):
    sizes = {"scenes": 20, "steps": 2, "batch": 2, "tuning": 6, "tests": 6, "images": 1, "known": 120}
    sizes |= {"seeds": 1, "workers": 1}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    options += ["--variants", "dense-0-hidden", "--device=cpu", f"--work={tmp_path}", f"--out={tmp_path / 'all.json'}"]
    with caplog.at_level("INFO"):
        word_localization.main(options)
    results = (tmp_path / "all.json").read_text()
    found = json.loads(results)
    (run,) = found["runs"]
    assert (run["variant"], run["seed"], run["steps"], run["device"]) == ("dense-0-hidden", 0, 2, "CPU")
    assert set(run["maps"]) == set(run["loss"]) == {"sparse", "dense"}
    assert all(0 <= row["asked"] <= 1 for row in run["steering"]["classes"].values())
    rates = [row["rate"] for row in run["colors"]["rows"]["one"].values()]
    assert (len(rates), run["colors"]["one"]) == (12, np.mean(rates)) and 0 <= run["colors"]["two"] <= 1
    assert run["distance"]["drawn"] > run["distance"]["rendered"] > 0  # untrained, it draws noise
    low, high = run["maps"]["dense"]["word iou interval"]
    assert low <= run["maps"]["dense"]["word iou"] <= high
    table = [record.message for record in caplog.records if " | " in record.message]
    assert table == variants_table([run]) and table[1].startswith("dense-0-hidden | 1 | 2 | 0.")
    twice = variants_table([run, run | {"seed": 1, "steps": 3}])[1]
    assert twice.startswith("dense-0-hidden | 2 | 2 3 | 0.") and twice.count(" ± 0.000") == 11
    with pytest.raises(ValueError, match="other settings"):
        word_localization.main([*options, "--steps=3"])
    assert (tmp_path / "all.json").read_text() == results
