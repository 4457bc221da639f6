"""`tiny-mmdit` and its training: what is trained is what the pipeline calls, it goes on bit by bit, and it ships."""

import copy
import math
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

import attnlab as al
from attnlab import training
from attnlab.scenes import street
from experiments import gpu_train
from experiments.bundled import joint_denoiser, localize, train_mmdit
from experiments.bundled.denoiser_training import Examples, TextToImageSettings, train_together
from experiments.bundled.flow_training import FlowTraining, flow_times
from experiments.bundled.joint_denoiser import JointDenoiser, joint_pipeline
from experiments.bundled.muon import MuonAndAdamW
from experiments.studies import joint_maps

CAPTIONS = ["a red car left of a house, trees", "smoke"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base():
    """The pipeline whose autoencoder and tokenizer are taken."""
    return al.load_pipeline("tiny-plain", device="cpu")


NEW = JointDenoiser.new


def small(tokenizer, patch=1, heads=1, words=None):
    return NEW(tokenizer, blocks=2, heads=1, patch=patch, words=words)


def new_model(tokenizer, **sizes):
    """A model all of whose weights do something: as it begins, every block is the identity."""
    with training.seeded(0):
        model = JointDenoiser.new(tokenizer, **{"blocks": 2, "heads": 1} | sizes)
        for weight in model.transformer.parameters():
            weight.data += 0.1 * torch.randn(weight.shape)
    return model


def begin(model, tokenizer, path, latents=None, **given):
    if latents is None:
        latents = torch.randn(8, 4, 16, 16, generator=al.seed(0))
    captions = [(CAPTIONS[k % 2], {}) for k in range(len(latents))]
    settings = TextToImageSettings(batch=4, grounding=0.0, **given)
    schedule = training.Schedule(steps=4, lr=1e-3, warmup=1, ema=0.5)
    return FlowTraining(model, Examples.of(latents, captions, tokenizer), settings, schedule, path, CPU)


def calls_of(module, act):
    """What a module was called with while `act()` ran: a dict of arguments by name a call."""
    names, kept = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"), []
    hook = module.register_forward_pre_hook(
        lambda _, args, given: kept.append(dict(zip(names, args, strict=False)) | given), with_kwargs=True
    )
    act()
    hook.remove()
    return kept


def test_the_pipeline_calls_the_denoiser_as_it_was_trained(base, tmp_path):
    """Both texts with their padding and summaries, the empty one of guidance, and the zeros in the place of T5."""
    model = new_model(base.tokenizer)
    run = begin(model, base.tokenizer, tmp_path / "checkpoint", contextless=0.0, empty=0.5)
    drawn = run.draw()
    assert (drawn["ids"] == model.empty).all(1).any() and "contextless" not in drawn
    trained = calls_of(model.transformer, lambda: run._losses(drawn))[0]
    texts = [base.tokenizer.decode(ids, skip_special_tokens=True).strip().replace(" ,", ",") for ids in drawn["ids"]]
    assert set(texts) >= {""}
    pipe = joint_pipeline(model, base.tokenizer, base.vae)
    pipe.set_progress_bar_config(disable=True)
    guided = calls_of(model.transformer, lambda: pipe(texts, guidance_scale=4.0, num_inference_steps=1))[0]
    both, told = guided["encoder_hidden_states"], trained["encoder_hidden_states"].detach()
    empty, close = model._read(model.empty), torch.testing.assert_close  # summaries of several texts are rounded
    for k in range(4):
        assert torch.equal(both[4 + k, :48], told[k, :48]) and torch.equal(both[k, :48], empty[0][0])
        close(guided["pooled_projections"][4 + k], trained["pooled_projections"][k])
        close(guided["pooled_projections"][k], empty[1][0])
    assert both.shape[1] == 48 + joint_denoiser.ZEROS and told.shape[1] == 48 + 1
    assert not both[:, 48:].any() and not told[:, 48:].any()
    assert guided["timestep"].tolist() == [1000] * 8  # pure noise, in the units of `flow_times`


@pytest.mark.parametrize("patch", [1, 2])
def test_one_zero_counts_as_all_of_them(base, patch):
    """In float64 the model of one token, which counts 256 times, is that of 256 tokens."""
    model = new_model(base.tokenizer, patch=patch).double().eval()
    noisy, timestep = torch.randn(2, 4, 16, 16, dtype=torch.double), torch.tensor([300.0, 700.0])
    ids = base.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    text, pooled = model._read(ids)
    text = torch.cat([text, text.new_zeros(2, joint_denoiser.ZEROS, text.shape[-1])], 1)
    expected = model.transformer(noisy, text, pooled, timestep).sample
    torch.testing.assert_close(model(noisy, timestep, ids), expected, rtol=0, atol=1e-10)
    fewer = model.transformer(noisy, text[:, :-9], pooled, timestep).sample
    assert (fewer - expected).abs().max() > 1e-6


def test_half_of_the_texts_come_without_their_summary(base, tmp_path):
    model = new_model(base.tokenizer)
    run = begin(model, base.tokenizer, tmp_path / "checkpoint")
    drawn = run.draw() | {"contextless": torch.tensor([True, False, True, False])}
    told = calls_of(model.transformer, lambda: run._losses(drawn))[0]["pooled_projections"]
    own, none = model._read(drawn["ids"])[1], model._read(model.empty)[1][0]
    for k in range(4):
        torch.testing.assert_close(told[k], none if k % 2 == 0 else own[k])
    assert not torch.allclose(own, none.expand_as(own), atol=1e-3)


def test_words_are_read_without_context(base):
    """What the denoiser reads of a word is of its token and place; what the summary says is of the words before it."""
    model = JointDenoiser.new(base.tokenizer)
    ids = base.tokenizer(["a red house", "a blue house"], padding="max_length", return_tensors="pt").input_ids
    states, pooled = model._read(ids)
    assert (states[0] != states[1]).any(-1).nonzero().flatten().tolist() == [2]
    assert not torch.allclose(*pooled, atol=1e-3)


class Known(torch.nn.Module):
    """The velocity of a world of one image, x0: from x = (1 - s) x0 + s noise it is noise - x0 = (x - x0) / s."""

    matrices = ()

    def __init__(self, image):
        super().__init__()
        self.image = torch.nn.Parameter(image)

    def forward(self, noisy, timestep, *text):
        return (noisy - self.image) / (timestep / 1000)[:, None, None, None]


def test_the_velocity_leads_from_noise_to_the_image(base, tmp_path):
    """The same function has no error in training and draws the image: so signs, units and direction agree."""
    image = torch.randn(4, 16, 16, generator=al.seed(1))
    run = begin(Known(image), base.tokenizer, tmp_path / "checkpoint", image.expand(8, -1, -1, -1))
    with torch.no_grad():
        assert float(run._losses(run.draw())["loss"]) < 1e-6
    scheduler, x = joint_denoiser.new_flow_scheduler(), torch.randn(1, 4, 16, 16, generator=al.seed(2))
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(run.model(x, t[None]), t, x).prev_sample
    torch.testing.assert_close(x[0], image, rtol=0, atol=1e-4)


def test_times_are_logit_normal():
    """Quantiles of the normal distribution, by the logistic function, in thousandths; the ends are finite."""
    chance = torch.tensor([0.0, 0.15865525, 0.5, 0.84134475, 1.0])
    expected = 1000 / (1 + np.exp([1.0, 0.0, -1.0]))
    np.testing.assert_allclose(flow_times(chance)[1:4], expected, rtol=1e-5)
    assert 0 < flow_times(chance)[0] < 10 and 990 < flow_times(chance)[-1] < 1000


def test_a_training_goes_on_bit_by_bit(base, tmp_path):
    """A step moves all weights that it should; a run that was killed after a checkpoint ends as one that was not."""
    before = new_model(base.tokenizer).state_dict()
    whole = begin(new_model(base.tokenizer), base.tokenizer, tmp_path / "whole")
    whole.advance()
    for name, weight in whole.model.state_dict().items():
        still = "pos_embed.pos_embed", "empty"
        assert torch.equal(weight, before[name]) == name.endswith(still), name
    train_together([whole])
    killed = begin(new_model(base.tokenizer), base.tokenizer, tmp_path / "killed")
    killed.advance()
    killed.advance()
    killed.save(1.0)
    killed.advance()  # lost
    resumed = begin(new_model(base.tokenizer), base.tokenizer, tmp_path / "killed")
    assert resumed.done == 2
    train_together([resumed])
    for a, b in zip(whole.average.state_dict().values(), resumed.average.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_matrices_are_stepped_by_muon_and_the_rest_by_adamw(base):
    """A matrix moves along U V^T of its gradient's singular vectors, and as far as AdamW would; others as by AdamW."""
    model = new_model(base.tokenizer).requires_grad_(True)
    names = {name for name, one in model.named_parameters() if any(one is matrix for matrix in model.matrices)}
    assert {name.split(".", 3)[3] for name in names} >= {
        "attn.to_q.weight",
        "attn.add_k_proj.weight",
        "ff.net.2.weight",
    }
    assert all(name.startswith("transformer.transformer_blocks.") for name in names) and len(names) == 21
    for one in model.parameters():
        one.grad = torch.randn(one.shape, generator=al.seed(one.numel()))
    before, other = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    for one, same in zip(other.parameters(), model.parameters(), strict=True):
        one.grad = same.grad.clone()
    MuonAndAdamW(model, model.matrices, lr=1e-2, weight_decay=0.0).step()
    torch.optim.AdamW(other.parameters(), 1e-2, (0.9, 0.99), weight_decay=0.0).step()
    for name, weight in model.named_parameters():
        if name not in names:
            torch.testing.assert_close(weight, other.get_parameter(name), msg=name)
            continue
        u, values, v = torch.linalg.svd(weight.grad.double(), full_matrices=False)
        moved = (before[name] - weight.detach()).double() / (1e-2 * 0.2 * math.sqrt(max(weight.shape)))
        along = (u.T @ moved @ v.T).diagonal()[values > values.max() / 10]
        assert 0.6 < along.min() and along.max() < 1.3, name  # five steps of Newton and Schulz's iteration end there
        assert ((u.T @ moved @ v.T).fill_diagonal_(0).abs() < 0.05).all(), name


def test_the_first_encoder_begins_with_the_words_of_the_plain_model(base, tmp_path):
    """As large as the image's states; the second one begins at random."""
    run = train_mmdit.MMDITTraining(train_mmdit.MMDIT_PRESETS["cpu"], tmp_path, tmp_path, CPU)
    model, words = run._model(), base.text_encoder.embeddings.token_embedding.weight.detach()
    found = model.text_encoder.text_model.embeddings.token_embedding.weight.detach()
    torch.testing.assert_close(found, words / words.std())
    assert model.transformer.config.num_attention_heads == 2 and model.transformer.config.patch_size == 2


def test_masks_are_refused(base, tmp_path):
    """Grounding, whose weight is above 0 unless told otherwise, needs them."""
    examples = begin(new_model(base.tokenizer), base.tokenizer, tmp_path / "checkpoint").examples
    given = TextToImageSettings(), training.Schedule(1, 1e-3), tmp_path / "other", CPU
    with pytest.raises(ValueError, match="no grounding"):
        FlowTraining(new_model(base.tokenizer), examples, *given)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """What two steps train, after a first call that had no time for them; in the folder of models."""
    folder = tmp_path_factory.mktemp("mmdit")
    call = ["--work", str(folder / "work"), "--out", str(folder / "models"), "--device", "cpu"]
    call += ["--scenes", "12", "--batch", "2", "--steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_mmdit.JointDenoiser, "new", small)
        gpu_train.main(["mmdit", *call, "--minutes", "0"])
        assert not (folder / "models").exists()
        gpu_train.main(["mmdit", *call])
    return folder / "models" / "tiny-mmdit"


def test_what_is_shipped_loads_and_draws(shipped, base):
    """By attnlab, by diffusers, and by name once it lies among the bundled models; with the autoencoder as it was."""
    pipe = al.load_pipeline(shipped, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a house", num_inference_steps=2, generator=al.seed(0)).images[0]
    assert isinstance(pipe, diffusers.StableDiffusion3Pipeline) and image.size == (64, 64)
    none = {"text_encoder_3": None, "tokenizer_3": None, "dtype": torch.float32}
    other = diffusers.StableDiffusion3Pipeline.from_pretrained(shipped, **none)
    other.set_progress_bar_config(disable=True)
    again = other("a house", num_inference_steps=2, generator=al.seed(0)).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(again))
    for a, b in zip(pipe.vae.state_dict().values(), base.vae.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert pipe.vae.config.scaling_factor == base.vae.config.scaling_factor and pipe.vae.config.shift_factor == 0
    assert pipe.tokenizer.get_vocab() == pipe.tokenizer_2.get_vocab() == base.tokenizer.get_vocab()
    for part in ("tokenizer", "tokenizer_2"):
        assert (shipped / part / "merges.txt").exists()
    assert (shipped / "README.md").read_text().count("<!-- measured -->") == 1
    assert (shipped / "curve.csv").read_text().startswith("step,loss")


def test_what_is_bundled_is_within_the_budget():
    """At most 9 million parameters and 18 MB; words find things and not others, though no mask took part."""
    pipe = al.load_pipeline("tiny-mmdit", device="cpu")
    parts = pipe.transformer, pipe.text_encoder, pipe.text_encoder_2
    assert sum(weight.numel() for part in parts for weight in part.parameters()) < 9e6
    assert sum(path.stat().st_size for path in (al.pipelines.BUNDLED / "tiny-mmdit").rglob("*")) < 18e6
    found = localize.localization(pipe, scenes=16, tuning=12)
    assert found["word iou"] > 0.3 > 0.2 > found["shuffled word iou"]


def test_a_finished_model_goes_on(shipped, tmp_path):
    """From its weights; and a folder of another training is refused before anything is rendered."""
    preset = replace(train_mmdit.MMDIT_PRESETS["finish"], scenes=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_mmdit.JointDenoiser, "new", small)
        run = train_mmdit.MMDITTraining(preset, tmp_path, tmp_path / "models", CPU, start=shipped)
        begun = run.begin(Examples(torch.zeros(1, 4, 16, 16), torch.zeros(2, 48, dtype=torch.long), 0))
    pipe = al.load_pipeline(shipped, device="cpu")
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        weights = zip(getattr(begun.model, name).parameters(), getattr(pipe, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in weights)
    run.claim()
    with pytest.raises(ValueError, match="other settings"):
        replace(run, preset=replace(preset, batch=7)).claim()
    large = new_model(pipe.tokenizer, patch=2)
    run.write_pipeline(large, tmp_path / "large")
    goes_on = replace(run, start=tmp_path / "large", preset=replace(preset, heads=1))._model().transformer
    bias = joint_denoiser.with_patch(large.transformer, 1).proj_out.bias
    torch.testing.assert_close(goes_on.proj_out.bias, bias, rtol=1e-3, atol=1e-3)
    assert goes_on.config.patch_size == 1


def test_the_bundled_model_is_found_once_it_is_there(shipped, tmp_path, monkeypatch):
    (tmp_path / "tiny-mmdit").mkdir()
    monkeypatch.setattr(al.pipelines, "BUNDLED", tmp_path)
    assert "tiny-mmdit" not in al.pipelines.bundled()  # a folder without a pipeline is none
    (tmp_path / "tiny-mmdit").rmdir()
    (tmp_path / "tiny-mmdit").symlink_to(shipped, target_is_directory=True)
    assert al.load_pipeline("tiny-mmdit", device="cpu").name_or_path == "tiny-mmdit"


@pytest.fixture(scope="module")
def study(shipped, tmp_path_factory):
    pipe, work = al.load_pipeline(shipped, device="cpu"), tmp_path_factory.mktemp("maps")
    return joint_maps.JointMapsStudy(pipe, work, tuning=2, tests=3, timesteps=(200, 800))


def test_the_study_reads_every_layer_timestep_and_share(study):
    """A reading of one layer is DAAM of it, recorded by hand; readings of several are means; kept maps are read."""
    found = study.run()
    assert len(study.readings(2)) == 4 * 3 * 3 + 3
    assert set(found["chosen"]) == {"text", "joint", "propagated", "output", "agreement"}
    with_classes = [{k: r[k] for k in joint_maps.Reading._fields} for r in found["readings"] if "classes" in r]
    assert sorted(with_classes, key=str) == sorted(found["chosen"].values(), key=str)
    assert {r["timestep"] for r in found["readings"]} == {200, 800, None}
    table = joint_maps.readings_table(found)
    assert " *" in table and "0 to 1" in table
    maps = study.find(joint_maps.FIRST_REPORTED, 3)
    number = maps.rows[0][0]
    scene = street.render(number, size=64)
    word = next(iter(scene.words))
    recording = al.record_image(
        study.pipe, scene.image, scene.caption, timesteps=800, share="joint", layers="all", generator=al.seed(number)
    )
    layers = al.daam(recording, per="layer")
    by_hand = np.stack([heat[word, 0] for heat in layers.values()])
    np.testing.assert_allclose(maps.maps[1, 1, 0].numpy(), by_hand, atol=1e-6)
    assert not np.allclose(maps.maps[0, 1, 0].numpy(), by_hand, atol=1e-3)
    also = al.record_again(study.pipe, recording, self_attention=16, share="joint")
    looks, first = also.self_attention()[0].numpy(), by_hand[0]
    np.testing.assert_allclose(maps.maps[2, 1, 0, 0].flatten(), looks @ first.flatten(), atol=1e-6)
    texts = list(dict.fromkeys([*scene.words, "sky", "grass"]))
    recording = al.record_again(study.pipe, recording, texts=texts, outputs=True, share="text")
    of_last = al.concept_maps(recording, texts, layers=[list(layers)[1]])
    np.testing.assert_allclose(maps.maps[3, 1, 0, 1].numpy(), of_last[word], atol=1e-6)
    whole = al.goca(al.record_again(study.pipe, recording, agreement=16), words=list(scene.words))
    np.testing.assert_allclose(maps.maps[4, 1, 0].numpy(), np.stack([whole[word]] * 2), atol=1e-4)
    one, mean = (study.cases(maps, joint_maps.Reading("joint", *run, 800))[0] for run in ((0, 1), (1, 1)))
    assert one.heat.shape == (64, 64) and np.array_equal(one.truth, scene.mask(word))
    assert not np.allclose(one.heat, mean.heat)


def test_the_study_chooses_on_other_scenes_than_it_reports(study, monkeypatch):
    """Maps that are right in the tuning scenes alone are chosen, and reported as wrong."""
    masks = torch.zeros(4, 16, 16, dtype=torch.bool)
    masks[:, :8] = True
    right, wrong = masks.float(), (~masks).float()

    def maps(of_text):  # (kind, timestep, map, layer, row, column)
        return torch.stack([of_text, wrong, wrong, wrong, wrong])[:, None, :, None].expand(5, 1, 4, 2, 16, 16)

    rows = [(n, name) for n in (0, 1) for name in ("car", "sky")]
    tuning, tests = (joint_maps._Found(maps(of), masks, rows) for of in (right, wrong))
    finds = {joint_maps.FIRST_CHOSEN_ON: tuning, joint_maps.FIRST_REPORTED: tests}
    monkeypatch.setattr(joint_maps.JointMapsStudy, "find", lambda self, first, count: finds[first])
    found = replace(study, work=study.work / "other", timesteps=(200,)).run()
    assert found["chosen of all"]["kind"] == "text"
    row = next(r for r in found["readings"] if r["kind"] == "text")
    assert row["IoU on tuning scenes"] == 1 and row["word iou"] == 0 and row["scenes"] == 2


def test_smaller_tokens_go_on_from_larger_ones(base):
    """Where all latents of a token are alike, a token of one of them reads the same and says the mean."""
    model = new_model(base.tokenizer, patch=2).transformer
    finer = joint_denoiser.with_patch(model, 1)
    assert finer.config.patch_size == 1 and finer.config.pos_embed_max_size == 2 * model.config.pos_embed_max_size
    for name, weight in model.transformer_blocks.state_dict().items():
        assert torch.equal(finer.transformer_blocks.state_dict()[name], weight)
    coarse = torch.randn(1, 4, 4, 4, generator=al.seed(0))
    large, small = model.pos_embed.proj, finer.pos_embed.proj
    twice = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(small(twice)[:, :, ::2, ::2], large(twice))
    states = torch.randn(3, model.inner_dim, generator=al.seed(1))
    said = model.proj_out(states).unflatten(-1, (2, 2, 4)).mean((1, 2))
    torch.testing.assert_close(finer.proj_out(states), said)
    places, old = (one.pos_embed.cropped_pos_embed(16, 16)[0] for one in (finer, model))
    places, old = places.unflatten(0, (16, 16)), old.unflatten(0, (8, 8))
    torch.testing.assert_close(places[1, 1], (9 * old[0, 0] + 3 * old[0, 1] + 3 * old[1, 0] + old[1, 1]) / 16)
    assert torch.equal(joint_denoiser.with_patch(model, 2).proj_out.weight, model.proj_out.weight)
    with pytest.raises(ValueError, match="tokens of 2 latents a side do not divide into tokens of 3"):
        joint_denoiser.with_patch(model, 3)
