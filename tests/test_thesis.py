"""The thesis's experiments: what is kept and made again, curves and tables by hand, matrices with known margins."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import attnlab as al
from attnlab import metrics, plots
from attnlab.learning.optimize import PRESETS
from experiments import thesis
from experiments.studies.random_weights import stable_diffusion_2_base
from experiments.thesis import cache, findings, pages, tables

CALL = {"num_inference_steps": 4, "guidance_scale": 4.0}
THESIS = "stabilityai/stable-diffusion-2-base"


@pytest.fixture(scope="module")
def gallery(pipe, tmp_path_factory):
    segmenter = al.load_segmenter("street", "cpu")
    return thesis.Gallery(pipe, tmp_path_factory.mktemp("gallery"), segmenter=segmenter, **CALL)


@pytest.fixture(scope="module")
def cars(gallery):
    return gallery.generated("car", range(4))


@pytest.fixture(scope="module")
def scenes(gallery):
    return gallery.rendered("car", 3)


@pytest.fixture(scope="module")
def experiment(gallery):
    return thesis.Experiment(gallery, images=5, training=(1, 2), epochs=10)


def test_the_main_object_is_the_largest_region():
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]], bool)
    np.testing.assert_array_equal(thesis.main_object(mask), [[0, 0, 0, 0]] * 3 + [[0, 1, 1, 1]])
    assert not thesis.main_object(np.zeros((3, 3), bool)).any()


def test_images_are_those_of_their_seeds(pipe, cars):
    """Whatever the batch: one noise per seed, shared by all classes."""
    alone = pipe(thesis.PROMPT.format("car"), generator=al.seed(2), **CALL).images[0]
    assert [e.number for e in cars] == [0, 1, 2, 3]
    assert np.abs(np.asarray(cars[2].image, int) - np.asarray(alone, int)).max() <= 2
    assert cars[0].prompt == thesis.PROMPT.format("car")


def test_rendered_scenes_have_exact_masks(scenes):
    for e in scenes:
        scene = al.scenes.street.render(e.number)
        np.testing.assert_array_equal(e.truth, thesis.main_object(scene.mask("car")))
        np.testing.assert_array_equal(e.mask("sky"), scene.mask("sky"))
        np.testing.assert_array_equal(e.image, scene.image)
        assert e.shown and e.truth.mean() >= thesis.MIN_OBJECT_AREA


def test_the_truth_of_generated_images_is_the_segmenters(gallery, cars):
    labels = gallery.segmenter.segment([e.image for e in cars])
    for e, label in zip(cars, labels, strict=True):
        np.testing.assert_array_equal(e.truth, thesis.main_object(label == gallery.segmenter.classes.index("car")))


@pytest.mark.parametrize("track", thesis.TRACKS)
def test_what_is_kept_is_what_recordings_answer(gallery, cars, scenes, track):
    e = {"generated": cars, "rendered": scenes}[track][1]
    recording = next(gallery.recordings([e]))
    maps = al.daam(recording)
    close = {"atol": 1e-4 * maps.values.max()}  # of another batch size
    np.testing.assert_allclose(e.maps.values, maps.values, **close)
    assert list(e.maps) == list(maps) and e.timesteps == recording.trace.timesteps
    linear, expected = e.linear["tree"], al.linear_daam(recording)["tree"]
    assert np.abs(linear - expected).max() < 2e-3 * np.ptp(expected)  # kept in half precision
    np.testing.assert_allclose(
        e.steps, [m["car"] for m in al.daam(recording, per="step").values()], atol=1e-4 * e.steps.max()
    )
    name, steps = list(e.layers.items())[1]
    np.testing.assert_allclose(steps[-1], al.daam(recording, layers=name, steps=len(steps) - 1)["car"], **close)


def test_what_is_in_the_folder_is_not_made_again(gallery, cars, tmp_path, monkeypatch):
    again = thesis.Gallery(gallery.pipe, tmp_path, segmenter=gallery.segmenter, **CALL)
    assert again.cache.folder.name == gallery.cache.folder.name
    shutil.copytree(gallery.cache.folder, again.cache.folder)
    lost = again.cache.folder / cars[1].path.relative_to(gallery.cache.folder)
    lost.unlink()
    made = again.generated("car", range(4))[1]
    np.testing.assert_array_equal(made.image, cars[1].image)
    np.testing.assert_array_equal(made.maps.values, cars[1].maps.values)
    np.testing.assert_array_equal(made.linear["car"], cars[1].linear["car"])
    monkeypatch.setattr(again, "_generate", None)
    monkeypatch.setattr(again, "_record_existing", None)
    assert [e.number for e in again.generated("car", range(4))] == [0, 1, 2, 3]


def test_another_call_or_other_weights_are_kept_elsewhere(gallery, pipe, tmp_path):
    longer = thesis.Gallery(pipe, tmp_path, **CALL | {"num_inference_steps": 5})
    names = {gallery.cache.folder.name, longer.cache.folder.name}
    bias = pipe.unet.conv_out.bias
    with torch.no_grad():
        bias[0] += 1
        names.add(thesis.Gallery(pipe, tmp_path, **CALL).cache.folder.name)
        bias[0] -= 1
    assert len(names) == 3


def test_the_code_in_all_folders_is_hashed(tmp_path):
    """A change where results come from makes a new cache, one in what only draws or asks does not."""
    package = Path(al.__file__).parent
    for path in package.rglob("*.py"):
        copy = tmp_path / path.relative_to(package)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    whole = cache.hash_code(tmp_path)
    assert whole == cache.hash_code()
    counts = {"maps/softmax.py", "recording/adapters/unet.py", "learning/fit.py", "scenes/street.py", "storage.py"}
    counts |= {"segmentation/model.py", "pipelines.py"}
    only_draws = {"plots/charts.py", "widgets/explore.py", "cli/runner.py", "dataset/recipe.py", "joint/denoiser.py"}
    for name in counts | only_draws:
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(before + b"# changed\n")
        assert (cache.hash_code(tmp_path) != whole) == (name in counts), name
        (tmp_path / name).write_bytes(before)
    (tmp_path / "maps/new").mkdir()
    (tmp_path / "maps/new/file.py").write_text("new = 1\n")
    assert cache.hash_code(tmp_path) != whole


def test_masks_from_a_folder(gallery, cars, tmp_path):
    masks = tmp_path / "masks"
    with pytest.raises(FileNotFoundError, match=r"is no folder; name one with car_0000\.png"):
        thesis.Gallery(gallery.pipe, tmp_path, masks=masks, **CALL)
    masks.mkdir()
    mask = np.zeros((128, 128), np.uint8)  # any size: masks are often drawn on larger copies
    mask[32:96, 64:] = 255
    Image.fromarray(mask).save(masks / "car_0002.png")
    own = thesis.Gallery(gallery.pipe, gallery.cache.folder.parent, masks=masks, **CALL)
    found = own.generated("car", range(4))
    assert [e.truth is not None for e in found] == [e.shown for e in found] == [False, False, True, False]
    np.testing.assert_array_equal(found[2].truth, mask[::2, ::2] > 0)
    Image.fromarray(mask // 255).save(masks / "car_0002.png")  # of 0 and 1
    np.testing.assert_array_equal(own.generated("car", [2])[0].truth, mask[::2, ::2] > 0)
    Image.fromarray(mask // 255 * 14).save(masks / "car_0002.png")
    with pytest.raises(ValueError, match=r"car_0002\.png goes up to 14: a mask is black and white, or 0 and 1"):
        own.generated("car", range(4))
    Image.fromarray(mask).save(masks / "car_0002.png")
    assert found[2].mask("bicycle") is None and own.rendered("car", 1)[0].mask("bicycle") is not None
    Image.fromarray(mask[:64]).save(masks / "car_0003.png")
    with pytest.raises(ValueError, match=r"car_0003\.png is 128 x 64: the images are 64 x 64"):
        own.generated("car", range(4))


def test_learned_tokens_are_kept(gallery, scenes, monkeypatch):
    short = replace(PRESETS["thesis"], epochs=5)
    first = [gallery.learn(scenes[:2], settings, scenes) for settings in (short, "fit_token")]
    monkeypatch.setattr(thesis.gallery, "optimize_token", None)
    monkeypatch.setattr(thesis.gallery, "fit_token", None)
    for token, settings in zip(first, (short, "fit_token"), strict=True):
        again = gallery.learn(scenes[:2], settings, scenes)
        assert torch.equal(again.value, token.value) and again.metadata == token.metadata
    with pytest.raises(TypeError):  # other images, another token
        gallery.learn(scenes[:1], short)


def test_an_interrupted_optimization_is_not_kept(gallery, scenes, monkeypatch):
    settings = replace(PRESETS["thesis"], epochs=7)
    whole = thesis.gallery.optimize_token
    cut = replace(settings, epochs=3)  # what the stop button makes of it
    monkeypatch.setattr(thesis.gallery, "optimize_token", lambda r, m, w, _, **named: whole(r, m, w, cut, **named))
    with pytest.raises(RuntimeError, match="ended after 3 of 7 epochs"):
        gallery.learn(scenes[:1], settings)
    monkeypatch.undo()
    assert len(gallery.learn(scenes[:1], settings).metadata["losses"]) == 7


def test_softmax_maps_of_tokens(gallery, scenes):
    token = gallery.learn(scenes[:1], replace(PRESETS["thesis-softmax"], epochs=3))
    found = gallery.softmax(token, scenes[1:])
    recordings = gallery.recordings(scenes[1:])
    np.testing.assert_allclose(found, [al.ovam(one, token)[token] for one in recordings], atol=1e-6)


def test_who_is_learned_from_and_who_is_tested(experiment, gallery):
    with pytest.raises(ValueError, match="of 2 images: learn from 1 or more, and leave some"):
        thesis.Experiment(gallery, images=2, training=[1, 2])
    for key, examples in experiment.sets.items():
        shown = [e for e in examples if e.shown]
        assert len(examples) == 5
        if len(shown) > 2:
            assert [*experiment.train[key], *experiment.tests[key]] == shown and len(experiment.train[key]) == 2
        else:
            assert key not in experiment.tests
    assert experiment.names("rendered") == list(thesis.PROMPT_WORDS)


def test_a_model_that_is_not_bundled_has_no_rendered_scenes(experiment, gallery, monkeypatch):
    assert gallery.bundled
    monkeypatch.setattr(gallery, "bundled", False)
    other = thesis.Experiment(gallery, 5, experiment.training, experiment.epochs)
    assert other.names("rendered") == [] and other.names("generated") == experiment.names("generated")
    assert other.curves("DAAM", "rendered") == {}


def test_maps_are_those_of_the_class_at_the_images_size(experiment):
    e = experiment.tests["rendered", "traffic light"][0]
    heat = experiment.heats("DAAM", "rendered", "traffic light")[0]
    expected = e.maps.upscale(64)["light"]
    np.testing.assert_allclose(heat, expected / expected.max())
    linear = experiment.heats("Linear DAAM", "rendered", "traffic light")[0]
    np.testing.assert_allclose(linear, al.maps.minmax(e.linear["light"], 64))
    token = experiment.token("fit_token", "rendered", "traffic light", 1)
    fitted = experiment.heats("fit_token", "rendered", "traffic light", count=1)[0]
    np.testing.assert_allclose(fitted, al.maps.minmax(e.linear[token], 64))
    assert token.metadata["images"] == 1


def test_summary_by_hand():
    ious = np.zeros((101, 2))
    ious[20], ious[30] = (0.5, 0.7), (0.9, 0.1)
    found = thesis.summarize_curve(ious)
    assert found == (pytest.approx(0.6), pytest.approx(0.2), pytest.approx((0.6 + 0.5) / 100), 2)
    both = thesis.over_classes({"a": ious, "b": np.zeros((101, 7))})
    assert thesis.summarize_curve(both).maximum == pytest.approx(0.3)  # classes weigh the same, not images


def test_bands_are_percentiles_of_the_mean():
    values = np.random.default_rng(1).uniform(0.4, 0.8, 400)
    low, high = thesis.bootstrap_band(np.stack([values, np.full(400, 0.5)]))
    spread = 1.645 * values.std() / 20
    assert (low[0], high[0]) == (
        pytest.approx(values.mean() - spread, abs=2e-3),
        pytest.approx(values.mean() + spread, abs=2e-3),
    )
    assert low[1] == pytest.approx(0.5) == high[1]


def test_margins_of_layers_by_steps(scenes):
    found = thesis.layers_by_steps(scenes)
    assert found.shape == (3 + 1, 3 + 1)
    at_half = np.searchsorted(metrics.THRESHOLDS, 0.5)
    heats = [al.maps.upscale(e.maps["car"], 64, "bicubic") for e in scenes]
    assert found[-1, -1] == pytest.approx(metrics.miou_curve(heats, [e.truth for e in scenes])[at_half].mean())
    layers = [list(e.layers.values()) for e in scenes]
    heats = [al.maps.upscale(one[2][1], 64, "bicubic") for one in layers]
    assert found[2, 1] == pytest.approx(metrics.miou_curve(heats, [e.truth for e in scenes])[at_half].mean())


def test_resolutions_have_their_layers_alone(scenes, gallery):
    found = thesis.by_resolution(scenes)
    assert list(found) == [16]
    heats = [al.daam(one, layers=16).upscale(64)["car"] for one in gallery.recordings(scenes)]
    expected = metrics.miou_curve(heats, [e.truth for e in scenes])
    assert np.abs(found[16] - expected).mean() < 0.01


@pytest.mark.parametrize(("per", "count"), [("layer", 3), ("step", 3)])
def test_correlations(scenes, gallery, per, count):
    found = thesis.correlations(scenes, per)
    assert found.shape == (count, count)
    np.testing.assert_allclose(np.diag(found), 1)
    np.testing.assert_allclose(found, found.T)
    maps = [list(al.daam(one, per=per).values()) for one in gallery.recordings(scenes)]
    first, last = (np.concatenate([m[k]["car"].ravel() for m in maps]) for k in (0, -1))
    assert found[0, -1] == pytest.approx(np.corrcoef(first, last)[0, 1], abs=0.01)


def test_the_table_of_maxima(experiment):
    table = tables.miou([experiment])
    rows = {(row[1], row[2]): row for row in table.rows}
    row = rows["rendered", "rider"]
    heats = experiment.heats("Linear DAAM, optimized", "rendered", "rider")
    curve = metrics.miou_curve(heats, [e.truth for e in experiment.tests["rendered", "rider"]]).mean(1)
    assert row[3] == 3 and row[7] == pytest.approx(100 * curve.max())
    assert row[9:] == [31.0, 21.3, 47.6, 43.1]
    everything = np.mean([experiment.ious("DAAM", "rendered", name).mean(1) for name in thesis.PROMPT_WORDS], axis=0)
    assert rows["rendered", "all"][4] == pytest.approx(100 * everything.max())
    area = {(r[1], r[2]): r for r in tables.miou([experiment], area=True).rows}["rendered", "all"]
    assert area[4] == pytest.approx(100 * np.trapezoid(everything, metrics.THRESHOLDS))


def test_tables_are_files_that_repeat(experiment, tmp_path):
    made = [tables.images, tables.miou, tables.training_sizes, tables.chosen_threshold]
    for table in (make([experiment]) for make in made):
        paths = table.save(tmp_path)
        before = [path.read_bytes() for path in paths]
        experiment._ious.clear()
        assert [path.read_bytes() for path in table.save(tmp_path)] == before
        rows = list(csv.reader(paths[0].read_text().splitlines()))
        assert rows[0] == list(table.header) and len(rows) == len(table.rows) + 1
        assert {len(row) for row in rows} == {len(table.header)}
        assert paths[1].read_text().count("\n") >= len(rows) + 2 and table.caption in paths[1].read_text()


def test_the_images_table_lists_what_was_dropped(experiment):
    for row in tables.images([experiment]).rows:
        absent = [str(e.number) for e in experiment.sets[row[1], row[2]] if not e.shown]
        assert row[6] == (" ".join(absent) or "none") and row[7] == "none"


def test_thresholds_are_chosen_on_the_images_learned_from(experiment):
    found = tables.at_chosen_threshold(experiment, "DAAM", "rendered")["car"]
    train = experiment.ious("DAAM", "rendered", "car", train=True)
    tau = train.mean(1).argmax()
    np.testing.assert_array_equal(found, experiment.ious("DAAM", "rendered", "car")[tau])
    columns = tables.as_columns({"a": np.array([1.0, 2.0]), "b": np.array([3.0])})
    np.testing.assert_array_equal(columns, [[1, np.nan], [2, np.nan], [np.nan, 3]])


@pytest.mark.parametrize(
    ("difference", "images", "verdict"),
    [
        ((0.1, 0.01, 0.2), 30, "holds"),
        ((0.1, -0.01, 0.2), 30, "open"),
        ((-0.1, -0.2, -0.01), 30, "does not hold"),
        ((0.1, 0.01, 0.2), 9, "open"),
    ],
)
def test_verdicts(difference, images, verdict):
    assert findings.Evidence("tiny", "rendered", "so", difference, images).verdict == verdict


def test_findings_say_what_was_measured(experiment):
    found = findings.findings([experiment])
    assert len(found) == 8 and all(one.evidence for one in found[:7])
    assert not found[7].evidence  # all maps have one size
    linear = next(e for e in found[0].evidence if e.track == "rendered")
    ious = [tables.at_chosen_threshold(experiment, m, "rendered") for m in ("DAAM", "Linear DAAM")]
    means = [np.mean([v.mean() for v in by_class.values()]) for by_class in ious]
    assert linear.difference[0] == pytest.approx(means[0] - means[1])
    start = next(e for e in found[6].evidence if e.track == "rendered")
    examples = [e for name in thesis.PROMPT_WORDS for e in experiment.tests["rendered", name]]
    heats = [al.maps.upscale(e.maps.start, 64) for e in examples]
    apart = [h[~e.truth].mean() - h[e.truth].mean() for h, e in zip(heats, examples, strict=True)]
    assert start.images == 12 and start.difference[0] == pytest.approx(np.mean(apart), rel=1e-4)
    page = findings.page(found, "about")
    assert page.count("\n## ") == 8 and "tiny, rendered (12 images)" in page


def test_sizes_of_maps_are_compared(monkeypatch):
    """Small maps that show the object, large ones that show what is beside it: the small ones are better."""
    truth, examples = np.zeros((32, 32), bool), []
    truth[8:16, 8:24] = True
    for shift in range(12):
        small = truth[::4, ::4] + np.zeros((2, 8, 8)) + shift / 1000
        large = np.roll(truth, 16, 0)[::2, ::2] + np.zeros((2, 16, 16)) + shift / 1000
        examples.append(SimpleNamespace(layers={"small": small, "large": large}, truth=truth))
    tests = {("generated", "car"): examples}
    names = {"generated": ["car"], "rendered": []}
    x = SimpleNamespace(model="two sizes", tests=tests, names=lambda track: names[track])
    (evidence,) = findings._resolution([x]).evidence
    assert (evidence.track, evidence.images, evidence.verdict) == ("generated", 12, "does not hold")
    small, large = (float(v) for v in re.findall(r"([\d.]+) from", evidence.text))
    assert small > 85 > 50 > large and evidence.difference[0] == pytest.approx((large - small) / 100, abs=0.01)


def test_pages_show_every_figure_and_table(experiment, tmp_path):
    fig, axes = plots.grid(1, 1)
    plots.show_image(axes[0, 0], np.zeros((4, 4)))
    plots.save_figure(fig, tmp_path / "07_black.png", caption="A black square.", pdf=True)
    assert pages.captions(tmp_path) == {"07_black.png": "A black square."}
    page = pages.contents(tmp_path, [tables.images([experiment])], "about")
    assert "![A black square.](07_black.png)" in page and "## 07_images" in page
    about = json.loads(pages.manifest(tmp_path, {"quick": True}, [experiment], 1.5))
    assert set(about["sha256"]) == {"07_black.png", "07_black.pdf"}
    assert about["seeds"]["generated, car"] == [0, 1, 2, 3, 4] and about["models"]["tiny"]["guidance_scale"] == 4.0


def test_the_thesis_model_has_its_revision_and_scheduler(monkeypatch, pipe, tmp_path):
    asked = {}
    monkeypatch.setattr(thesis.gallery, "load_pipeline", lambda name, **options: asked.update({name: options}) or pipe)
    before = pipe.scheduler
    try:
        gallery = thesis.Gallery.load(THESIS, tmp_path)
        assert asked == {THESIS: {"revision": "d28fc8045793886e512c5389771d3b3d560f9575"}}
        assert type(gallery.pipe.scheduler).__name__ == "PNDMScheduler" and gallery.segmenter is None
        assert gallery.call == {"num_inference_steps": 30, "guidance_scale": 7.5}
    finally:
        pipe.scheduler = before


def test_stable_diffusion_2_base_goes_through(tmp_path):
    """Its map sizes, layers, heads, text width, image size and scheduler; an eighth of its channels, random weights."""
    gallery = thesis.Gallery(stable_diffusion_2_base(narrow=8), tmp_path, masks=tmp_path, num_inference_steps=2)
    images = gallery.generated("car", [0, 1])
    assert images[0].image.size == (512, 512) and not images[0].shown and len(images[0].timesteps) == 3
    heights = [steps.shape[-1] for steps in images[0].layers.values()]
    assert heights == [64, 64, 32, 32, 16, 16, 16, 16, 16, 32, 32, 32, 64, 64, 64]  # the thesis's 15
    assert images[0].maps.start.shape == (64, 64)
    mask = np.zeros((512, 512), np.uint8)
    mask[100:300, 100:300] = 255
    for e in images:
        Image.fromarray(mask).save(tmp_path / f"{e.path.stem}.png")
    images = gallery.generated("car", [0, 1])
    token = gallery.learn(images[:1], replace(PRESETS["thesis-softmax"], epochs=2))
    assert len(token.value) == 1024 and gallery.softmax(token, images[1:]).shape == (1, 64, 64)
    assert gallery.rendered("car", 1)[0].linear["car"].shape == (64, 64)
    assert not gallery.bundled
