"""Widgets without a browser: what they do when a control changes, and what they say when something is wrong."""

import contextlib
import io
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_pipelines import PROMPT as SAID, SMALL

import attnlab as al
from attnlab import widgets
from attnlab.dataset import Dataset, Recipe, export_coco, generate_dataset
from attnlab.dataset.rules import Filters
from attnlab.widgets import views

PROMPT = "a burning house with fire and smoke"
WORDS = PROMPT.split()


@pytest.fixture(scope="module")
def pipe():
    return al.load_pipeline("tiny")


@pytest.fixture(scope="module")
def made(pipe):
    return views.generate(pipe, PROMPT, seed=11, steps=4)


@pytest.fixture
def explorer(pipe, made):
    return widgets.explore(pipe, PROMPT, steps=4, image=made[0], recording=made[1])


@pytest.fixture(scope="module")
def small():
    """`small(family)`: an explorer of a small transformer that has drawn an image, as by a click on Generate."""
    pipes = {}

    def open_(family, **options):
        pipe = pipes.setdefault(family, SMALL[family]()[0])
        explorer = widgets.explore(pipe, SAID, steps=3, size=64 if family == "sana" else 32, **options)
        explorer.start()
        explorer.form.thread.join()
        assert explorer.image is not None, explorer.report.value
        return explorer

    return open_


def pixels_of(picture):
    return np.asarray(Image.open(io.BytesIO(picture.png)))


def shown(explorer):
    slots = [slot for slot in explorer.pictures.children if slot.layout.display != "none"]
    return {slot.children[1].label: slot.children[1] for slot in slots}


def titles(explorer):
    return {slot.children[1].label: slot.children[0].value for slot in explorer.pictures.children}


def test_maps_are_those_of_the_map_functions(made):
    recording = made[1]
    names = list(recording.trace.sizes)[:2]
    chosen = {"layers": names, "steps": [1, 2], "heads": [0]}
    daam = views.word_maps(recording, ["smoke", "fire"], "DAAM", **chosen)
    np.testing.assert_array_equal(daam["fire"], al.daam(recording, **chosen)["fire"])
    ovam = views.word_maps(recording, ["a tree"], "OVAM", **chosen)
    np.testing.assert_array_equal(ovam["a tree"], al.ovam(recording, "a tree", **chosen)["a tree"])
    linear = views.word_maps(recording, ["tree"], "linear", **chosen)
    np.testing.assert_array_equal(linear["tree"], al.linear_daam(recording, **chosen)["tree"])
    with pytest.raises(ValueError, match="tree: not in the prompt"):
        views.word_maps(recording, ["tree"], "DAAM")
    with pytest.raises(ValueError, match="choose one of DAAM, OVAM, linear"):
        views.word_maps(recording, ["fire"], "daam")


def test_one_scale_for_all_maps_shows_the_weaker_ones_as_weaker(made):
    maps = {"strong": np.full((4, 4), 0.8), "weak": np.full((4, 4), 0.2)}
    black = np.zeros((8, 8, 3), np.uint8)
    each, together = (views.side_by_side(black, maps, opacity=1, scale=scale) for scale in ("each", "together"))
    np.testing.assert_array_equal(each["weak"], each["strong"])
    assert together["weak"].mean() < 0.6 * together["strong"].mean()
    np.testing.assert_array_equal(views.side_by_side(black, maps, opacity=0)["weak"], black)


def test_a_word_that_is_not_there_does_not_shine(explorer, made):
    """ "zeppelin" alone would end the scale at its own small maximum, and look as real as "smoke"."""
    explorer.more.value = "zeppelin"
    explorer.words.chips["smoke"][1].value = False
    assert explorer.maps.scale.value == "together" and explorer.maps.method.value == "OVAM"
    heat = al.ovam(made[1], "zeppelin")["zeppelin"]
    assert heat.max() < 0.5 * views.strongest(made[1]) == 0.5 * max(al.daam(made[1])[word].max() for word in WORDS)
    assert f"max {heat.max():.2g}" in titles(explorer)["zeppelin"] and titles(explorer)["image"] == "<b>image</b> "
    dim = pixels_of(shown(explorer)["zeppelin"])
    explorer.maps.scale.value = "each"
    assert pixels_of(shown(explorer)["zeppelin"]).mean() > 1.3 * dim.mean()
    explorer.maps.method.value = "linear"
    assert "max -" in titles(explorer)["zeppelin"] or views.strongest(made[1], "linear") > 0


def test_words_of_a_pixel_are_ranked_by_their_attention(made):
    recording = made[1]
    maps = al.daam(recording)
    row, column = np.unravel_index(maps["fire"].argmax(), maps["fire"].shape)
    at = (row + 0.5) / maps["fire"].shape[0], (column + 0.5) / maps["fire"].shape[1]
    ranked = views.rank_words(recording, *at)
    assert dict(ranked)["fire"] == pytest.approx(maps["fire"].max())
    assert [share for _, share in ranked] == sorted((share for _, share in ranked), reverse=True)
    curves = views.curves_at(recording, "fire", *at)
    assert len(curves["step"]) == 4 and len(curves["layer"]) == len(recording.trace.sizes)
    with Image.open(io.BytesIO(views.pixel_figure(recording, (20, 40), (64, 64)))) as picture:
        assert min(picture.size) > 100


def test_choosing_words_and_sliders_changes_the_pictures(explorer):
    assert list(shown(explorer)) == ["image", "smoke"]
    smoke = pixels_of(shown(explorer)["smoke"])
    explorer.words.chips["fire"][1].value = True
    assert list(shown(explorer)) == ["image", "fire", "smoke"]
    np.testing.assert_array_equal(pixels_of(shown(explorer)["smoke"]), smoke)
    explorer.maps.ranges["steps"].value = (3, 3)
    assert (pixels_of(shown(explorer)["smoke"]) != smoke).any()
    explorer.maps.opacity.value = 0
    np.testing.assert_array_equal(pixels_of(shown(explorer)["smoke"]), pixels_of(shown(explorer)["image"]))
    assert explorer.maps.chosen["steps"] == [3] and explorer.still().shape[0] == 256


def test_any_word_can_be_asked_for(explorer):
    explorer.more.value = "  a   tree "
    assert "a tree" in shown(explorer) and explorer.maps.method.value == "OVAM" and explorer.more.value == ""
    explorer.maps.method.value = "DAAM"
    assert "a tree: not in the prompt" in explorer.report.value
    explorer.maps.method.value = "linear"
    explorer.more.value = " ".join(["tree"] * 60)
    assert "window" in explorer.report.value or "long" in explorer.report.value


def test_it_can_begin_with_words_that_the_prompt_lacks(pipe, made):
    explorer = widgets.explore(pipe, PROMPT, words=["tree", "a  car"], image=made[0], recording=made[1])
    assert list(shown(explorer)) == ["image", "tree", "a car"] and explorer.maps.method.value == "OVAM"


def test_words_that_were_asked_for_stay_when_another_image_is_made(explorer, pipe):
    explorer.add("a tree")
    explorer.take(*views.generate(pipe, "a car on a road", seed=1, steps=2))
    assert list(explorer.words.chips) == ["a (1)", "car", "on", "a (2)", "road", "a tree"]
    assert list(shown(explorer)) == ["image", "a tree"]
    explorer.maps.method.value = "DAAM"
    assert list(shown(explorer)) == ["image"] and "a tree: not in the prompt" in explorer.report.value


def test_learned_words_are_offered(pipe, made):
    image, recording = made
    token = al.fit_token([recording], [np.asarray(image)[..., 0] > 150], init="fire", name="glow")
    explorer = widgets.explore(pipe, PROMPT, image=image, recording=recording, tokens=al.TokenLibrary([token]))
    explorer.maps.method.value = "linear"
    explorer.words.chips["glow"][1].value = True
    assert "glow" in shown(explorer)


def test_generating_in_the_background(pipe):
    explorer = widgets.explore(pipe, PROMPT, seed=3, steps=3)
    explorer.start()
    explorer.start()  # a second click while it runs
    assert "generating already" in explorer.report.value or explorer.image is not None
    explorer.form.thread.join()
    image, _ = views.generate(pipe, PROMPT, seed=3, steps=3)
    np.testing.assert_array_equal(np.asarray(explorer.image), np.asarray(image))
    assert explorer.form.progress.value == 3 and not explorer.form.generate.disabled and explorer.form.stop.disabled


def test_words_beyond_the_text_window_are_named(pipe):
    prompt = "smoke" + " fire" * (pipe.tokenizer.model_max_length - 4) + " umbrellastand under a tree"
    explorer = widgets.explore(pipe, prompt, steps=1)
    with pytest.warns(UserWarning, match="fills the model's window"):  # for those who look at no widget
        explorer.start()
        explorer.form.thread.join()
    assert "no room for &#x27;umbrellastand under a tree&#x27;" in explorer.report.value
    names = list(explorer.words.chips)
    assert names[0] == "smoke" and names[-1] == f"fire ({len(names) - 1})" and len(names) > 20


def test_what_is_of_the_image_before_is_not_shown_beside_the_next_one(explorer, pipe):
    explorer.pictures.children[1].children[1].point = [20, 40]
    explorer.take(*views.generate(pipe, PROMPT, seed=1, steps=2))
    assert explorer.pixel.layout.display == "none" and not explorer.pictures.children[1].children[1].point


def test_a_pipeline_keeps_its_own_progress_bar(pipe, capfd):
    before = pipe._progress_bar_config
    pipe.set_progress_bar_config(leave=False)
    views.generate(pipe, PROMPT, steps=1)
    assert pipe._progress_bar_config == {"leave": False} and "it/s" not in capfd.readouterr().err
    pipe.set_progress_bar_config(**before)


def test_warnings_are_caught_no_longer_than_a_widget_works(pipe):
    """One that is caught in a thread while another catches would leave all later ones of the notebook unseen."""
    explorer = widgets.explore(pipe, PROMPT, steps=2)
    for busy in (False, True):
        with pytest.warns(UserWarning, match="of the notebook"):
            explorer.start()
            turns = 0
            while explorer.form.thread.is_alive():
                turns += 1
                with explorer.report.saying() if busy else contextlib.nullcontext():
                    explorer.form.thread.join(0.001)
            warnings.warn("of the notebook", stacklevel=1)
        assert turns > 9, "controls wait for the generation"


def test_stopped_on_the_way_it_can_be_started_again(pipe):
    explorer = widgets.explore(pipe, PROMPT, steps=200)
    explorer.start()
    explorer.form.end(wait=True)
    assert "stopped" in explorer.report.value and explorer.image is None and explorer.form.progress.value < 200
    assert not explorer.form.generate.disabled and not pipe.unet._forward_pre_hooks
    explorer.form.steps.value = 2
    explorer.start()
    explorer.form.thread.join()
    assert explorer.image is not None


def test_another_explorer_of_the_pipeline_ends_the_first_one(pipe):
    first, second = widgets.explore(pipe, PROMPT, steps=200), widgets.explore(pipe, PROMPT, steps=2)
    first.start()
    second.start()
    second.form.thread.join()
    assert not first.form.thread.is_alive() and second.image is not None
    assert "another explorer was opened or started" in first.report.value and "Generate" in first.report.value
    second.close()
    assert not [t for t in threading.enumerate() if "_generate" in t.name]


@pytest.mark.parametrize("prompt", ["", "   "])
def test_an_empty_prompt_is_said_in_the_widget(pipe, prompt):
    explorer = widgets.explore(pipe, prompt)
    assert "press Generate" in explorer.report.value and explorer.still().min() < 9  # it says that it is empty
    explorer.start()
    assert "the prompt is empty" in explorer.report.value and not explorer.form.generate.disabled
    explorer.more.value = "tree"
    assert "generate an image first" in explorer.report.value


def test_a_pixel_is_inspected(explorer):
    explorer.pictures.children[0].children[1].point = [20, 40]
    assert explorer.pixel.layout.display == "block" and bytes(explorer.pixel.value).startswith(b"\x89PNG")


def test_pixels_are_inspected_one_after_the_other(made):
    inspector = widgets.inspect_pixel(*made)
    first = bytes(inspector.found.value)
    assert inspector.picture.point == [32, 32] and inspector.still().shape[1] > 500
    inspector.picture.point = [20, 63]
    assert widgets.inspect_pixel(*made, point=np.array([20, 63])).found.value == inspector.found.value
    assert bytes(inspector.found.value) != first and "row 20, column 63" in inspector.report.value
    with pytest.raises(ValueError, match=r"pixel \(64, 0\) is not in the image, which has 64 rows"):
        widgets.inspect_pixel(*made, point=(64, 0))


def test_the_mask_explorer_makes_the_masks_of_the_mask_functions(made):
    heat = al.daam(made[1]).upscale(64)["smoke"]
    truth = al.threshold_mask(heat, 0.5)
    explorer = widgets.explore_mask(heat, made[0], truth)
    np.testing.assert_array_equal(explorer.mask, al.dbscan_mask(heat))
    explorer.sliders["level"].value = 0.6
    np.testing.assert_array_equal(explorer.mask, al.dbscan_mask(heat, level=0.6))
    explorer.method.value = "threshold"
    explorer.sliders["level"].value = 0.5
    np.testing.assert_array_equal(explorer.mask, truth)
    assert "IoU 1.000" in explorer.report.value and "mask: {method: threshold, level: 0.5}" in explorer.recipe.value
    assert Recipe(prompts=["fire"], classes={"fire": "fire"}, mask=explorer.settings).mask == explorer.settings
    explorer.method.value = "dbscan"
    explorer.sliders["min_samples"].value = 30
    assert "noise" in explorer.report.value and not explorer.mask.any()
    explorer.method.value = "random_walker"
    explorer.sliders["low"].value = 0.9  # above high
    assert "low" in explorer.report.value and not explorer.recipe.value and not explorer.mask.any()
    assert (explorer.still() == np.asarray(made[0]).repeat(4, 0).repeat(4, 1)).all()
    begun = widgets.explore_mask(heat, made[0], settings={"method": "threshold", "level": 0.5})
    np.testing.assert_array_equal(begun.mask, truth)
    with pytest.raises(ValueError, match="truth of the image's size"):
        widgets.explore_mask(heat, made[0], truth[:10])
    with pytest.raises(ValueError, match="settings radius: there are sliders for eps"):
        widgets.explore_mask(heat, made[0], settings={"radius": 2})


def test_a_painted_thing_becomes_a_token(made, tmp_path):
    image, recording = made
    mask = al.threshold_mask(al.daam(recording).upscale(64)["fire"], 0.5)
    painter = widgets.paint_token(image, recording, [(image, recording)], library=tmp_path / "words.safetensors")
    painter.learn()
    assert "nothing is painted" in painter.report.value and painter.save.disabled
    painter.canvas.painted = mask
    np.testing.assert_array_equal(painter.canvas.painted, mask)
    painter.name.value, painter.start.value = "glow", "fire"
    painter.learn()
    assert painter.token.metadata["iou"] > 0.6 and len(painter.gallery.children) == 2
    painter.keep()
    assert list(al.TokenLibrary.load(tmp_path / "words.safetensors")) == ["glow"]
    wide = painter.still().shape[1]
    painter.clear()
    assert painter.token is None and painter.save.disabled and "paint the thing" in painter.report.value
    assert painter.gallery.layout.display == "none" and not painter.canvas.mask and painter.still().shape[1] < wide
    painter.canvas.painted = mask
    painter.learn()
    assert painter.token and painter.gallery.layout.display is None and not painter.save.disabled
    painter.name.value = ""
    painter.learn()
    assert "has no name" in painter.report.value
    painter.canvas.painted = np.ones_like(mask)
    painter.learn()
    assert "all of it is painted" in painter.report.value
    painter.tool.value = "erase"
    assert painter.canvas.brush == -3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    recipe = Recipe(
        prompts=["a burning {thing} with smoke"],
        lists={"thing": ["house", "tree"]},
        classes={"fire": "burning", "smoke": "smoke"},
        images=7,
        steps=1,
        filters=Filters(area=None, flat=None, duplicates=None),
    )
    return generate_dataset(recipe, tmp_path_factory.mktemp("set") / "fires").folder


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen_image", "pixart_sigma", "sana"])
def test_an_explorer_of_a_transformer(family, small):
    """Its words, layers, single steps and pixels; progress is counted in steps, whatever a pipeline calls back."""
    explorer = small(family)
    recording, ranges = explorer.recording, explorer.maps.ranges
    assert explorer.form.progress.value == 3 and list(shown(explorer)) == ["image", "car"]
    assert list(explorer.words.chips)[1:3] == ["burning", "house"]
    explorer.more.value = "burning house"
    assert "burning house" in shown(explorer) and explorer.maps.method.value == "DAAM", "a phrase of the prompt"
    whole = pixels_of(shown(explorer)["car"])
    ranges["layers"].value = (0, 0)
    first = al.daam(recording, layers=next(iter(recording.trace.sizes)))["car"]
    assert (pixels_of(shown(explorer)["car"]) != whole).any() and f"max {first.max():.2g}" in titles(explorer)["car"]
    ranges["layers"].value = (0, ranges["layers"].max)
    ranges["steps"].value = (1, 1)
    again = recording if recording.trace.queries else al.record_again(explorer.pipe, recording, steps=[1])
    step = al.daam(again, steps=[1] if recording.trace.queries else None)["car"]
    assert f"max {step.max():.2g}" in titles(explorer)["car"] and ranges["steps"].layout.display is None
    ranges["steps"].value = (0, 2)
    np.testing.assert_array_equal(pixels_of(shown(explorer)["car"]), whole)
    explorer.inspect(20, 10)
    assert explorer.pixel.layout.display == "block" and not explorer.report.failed, explorer.report.value
    inspector = widgets.inspect_pixel(explorer.image, recording, (20, 10))
    assert inspector.found.value == explorer.pixel.value


def test_what_joint_attention_does_not_tell_is_hidden_or_said(small):
    """Heads were averaged, and other texts are not there: neither a slider nor a button for them, and no traceback."""
    glow = al.Token("glow", np.ones(32, np.float32))
    explorer = small("flux", words=["a tree"], tokens=[glow])
    maps = explorer.maps
    assert maps.method.options == ("DAAM",) and maps.method.layout.display == "none"
    assert maps.ranges["heads"].layout.display == "none" and maps.ranges["layers"].layout.display is None
    asked = "a tree: not in the prompt, the only text whose maps this recording has"
    assert asked in explorer.report.value and list(shown(explorer)) == ["image"]
    explorer.words.chips["a tree"][1].value = False
    assert "a tree" not in explorer.report.value, "what was wrong before is forgotten"
    explorer.words.chips["glow"][1].value = True
    assert "glow: not in the prompt, the only text" in explorer.report.value
    explorer.words.chips["glow"][1].value = False
    explorer.more.value = "a zebra"
    assert "record_again(pipe, recording, texts=&#x27;a zebra&#x27;)" in explorer.report.value
    assert list(views.curves_at(explorer.recording, "house", 0.5, 0.5)) == ["layer"]
    heat = al.daam(explorer.recording)["house"]
    assert widgets.explore_mask(heat, explorer.image).mask.shape == (32, 32)
    with pytest.raises(ValueError, match="a recording has no linear map"):
        widgets.paint_token(explorer.image, explorer.recording)


def test_texts_beside_an_image_and_tokens_of_its_outputs_are_shown(small):
    """As they are of single steps, for which the denoiser is asked with the same texts."""
    explorer = small("flux")
    recording = al.record_again(explorer.pipe, explorer.recording, texts=["a red tree", "snow"], outputs=True)
    linear = al.linear_daam(recording)
    glow = al.fit_token(linear, [linear["snow"] > np.median(linear["snow"])], init="snow", name="glow")
    explorer = widgets.explore(explorer.pipe, tokens=[glow], image=explorer.image, recording=recording)
    maps = explorer.maps
    assert maps.method.options == views.MAP_METHODS
    explorer.more.value = "a red tree"
    found = al.ovam(recording, "a red tree")["a red tree"]
    assert maps.method.value == "OVAM" and f"max {found.max():.2g}" in titles(explorer)["a red tree"]
    maps.ranges["steps"].value = (1, 1)
    step = al.record_again(explorer.pipe, recording, steps=1, texts="a red tree")
    found = al.ovam(step, "a red tree")["a red tree"]
    assert f"max {found.max():.2g}" in titles(explorer)["a red tree"]
    maps.ranges["steps"].value = (0, 2)
    assert "car: not read beside the image; choose DAAM or linear" in explorer.report.value
    explorer.words.chips["car"][1].value = False
    assert not explorer.report.failed
    maps.method.value = "linear"
    explorer.words.chips["glow"][1].value = True
    assert list(shown(explorer))[1:] == ["glow", "a red tree"] and not explorer.report.failed, explorer.report.value
    assert f"max {linear[glow].max():.2g}" in titles(explorer)["glow"]
    painter = widgets.paint_token(explorer.image, recording, word="snow")
    painter.canvas.painted = np.arange(32)[:, None] + np.zeros(32) < 9
    painter.learn()
    assert painter.token.space == "output"
    calls = al.record_again(explorer.pipe, recording, texts="snow", keep="calls")
    explorer = widgets.explore(explorer.pipe, words=["snow"], image=explorer.image, recording=calls)
    assert explorer.maps.method.options == ("OVAM",) and list(shown(explorer)) == ["image", "snow"]
    assert not explorer.report.failed, explorer.report.value


def test_any_word_can_be_asked_of_a_transformer_with_cross_attention(small):
    explorer = small("pixart_sigma")
    explorer.more.value = "a red tree"
    found = al.ovam(explorer.recording, "a red tree")["a red tree"]
    assert explorer.maps.method.value == "OVAM" and f"max {found.max():.2g}" in titles(explorer)["a red tree"]
    assert not explorer.report.failed, "no warning that is of other packages, and for programmers"
    explorer.maps.method.value = "DAAM"
    assert "a red tree: not in the prompt; choose OVAM or linear" in explorer.report.value
    painter = widgets.paint_token(explorer.image, explorer.recording)
    painter.canvas.painted = al.threshold_mask(al.daam(explorer.recording).upscale(32)["house"], 0.5)
    painter.learn()
    assert painter.token is not None


def test_controls_fit_the_recording_before_and_the_next_one(small, made):
    """Models may change from image to image: what is hidden for one comes back for the other."""
    explorer, other = small("flux"), small("sd3")
    explorer.take(*made)
    assert explorer.maps.method.options == views.MAP_METHODS and explorer.maps.method.layout.display is None
    assert explorer.maps.ranges["heads"].layout.display is None and not explorer.report.failed
    explorer.maps.method.value = "linear"
    explorer.take(other.image, other.recording)
    assert explorer.maps.method.value == "DAAM" and list(shown(explorer)) == ["image", "smoke"]


@pytest.mark.parametrize(("keep", "methods"), [("maps", ("DAAM",)), ("sum", ("linear",)), ("queries", None)])
def test_what_was_kept_is_what_can_be_chosen(pipe, keep, methods):
    with al.record(pipe, keep=keep) as recording:
        image = pipe(PROMPT, generator=al.seed(11), num_inference_steps=2).images[0]
    explorer = widgets.explore(pipe, PROMPT, image=image, recording=recording)
    assert explorer.maps.method.options == (methods or views.MAP_METHODS) and not explorer.report.failed
    explorer.maps.ranges["layers"].value = (0, 1)
    explorer.maps.ranges["heads"].value = (0, 0)
    assert list(shown(explorer)) == ["image", "smoke"] and not explorer.report.failed, explorer.report.value
    assert (explorer.maps.ranges["steps"].layout.display == "none") == (keep != "queries")


@pytest.mark.parametrize(
    ("family", "says"),
    [("animate_diff", "AnimateDiffPipeline makes films"), ("qwen_image_edit", "no attribute"), ("flux_fill", "format")],
)
def test_a_pipeline_that_wants_more_than_a_prompt_says_so(family, says):
    explorer = widgets.explore(SMALL[family]()[0], SAID, steps=1, size=64)
    explorer.start()
    explorer.form.thread.join()
    assert says in explorer.report.value and explorer.report.failed and not explorer.form.generate.disabled


@pytest.mark.parametrize("family", ["flux", "pixart_sigma"])
def test_a_transformer_is_stopped_on_the_way(family):
    explorer = widgets.explore(SMALL[family]()[0], SAID, steps=200, size=32)
    explorer.start()
    explorer.form.end(wait=True)
    assert "stopped" in explorer.report.value and explorer.image is None
    assert not explorer.pipe.transformer._forward_pre_hooks


def test_a_data_set_is_browsed_and_marked(folder, tmp_path):
    browser = widgets.browse_dataset(folder)
    total = len(browser.dataset)
    assert "page 1 of 2" in browser.report.value and len(browser.sheet.children) == 12 and browser.back.disabled
    browser.turn(1)
    assert len(browser.sheet.children) == total - 12 and browser.ahead.disabled
    browser.text.value = "TREE"
    assert {browser.dataset.records[i]["prompt"] for i in browser.found} == {"a burning tree with smoke"}
    name = browser.dataset.records[browser.found[0]]["file_name"]
    browser.sheet.children[0].children[2].value = True
    assert Dataset(folder).bad == {name}
    browser.text.value, browser.marked.value = "", True
    assert [browser.dataset.records[i]["file_name"] for i in browser.found] == [name]
    exported = export_coco(Dataset(folder), tmp_path / "coco.json").read_text()
    assert name not in exported and exported.count('"file_name"') == total - 1
    browser.mark(browser.found[0], False)
    assert Dataset(folder).bad == set()
    with pytest.raises(KeyError, match="no image other"):
        browser.dataset.mark("other.png")
    browser.marked.value = False
    browser.score.value = 1.0
    assert not browser.found and "0 pairs" in browser.report.value
    browser.score.value = 0.0
    broken = browser.dataset.records[1]["file_name"]
    (folder / broken).write_bytes(b"no image")
    browser.turn(0)
    first, second = browser.sheet.children[:2]
    assert len(browser.sheet.children) == 12 and isinstance(first.children[0], widgets.Picture)
    assert broken.split("/")[-1] in second.children[0].value and browser.still().shape[1] > 500
    second.children[-1].value = True  # exports leave it out
    assert Dataset(folder).bad == {broken}


def test_a_widget_is_a_still_picture_as_well(explorer):
    bundle = explorer._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(bundle)


def test_no_progress_bar_is_a_widget():
    """A widget's bar, tqdm.auto's in a notebook, is an error message as soon as its kernel has ended."""
    root = Path(__file__).parents[1]
    files = [path for folder in ("attnlab", "experiments", "notebooks") for path in (root / folder).rglob("*.[pi]*y*")]
    assert len(files) > 100
    assert not [path for path in files if "tqdm.auto" in (text := path.read_text("utf-8")) or "tqdm.notebook" in text]


def test_what_is_painted_in_another_size_is_forgotten():
    picture = widgets.Picture(np.zeros((4, 6, 3), np.uint8))
    picture.painted = np.eye(4, 6, dtype=bool)
    picture.show(np.ones((4, 6, 3), np.uint8))
    assert picture.painted.sum() == 4
    picture.show(np.zeros((8, 8, 3), np.uint8))
    assert not picture.painted.any() and picture.painted.shape == (8, 8)
