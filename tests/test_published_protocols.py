"""Published protocols: layouts of folders, what is missing in them, numbers, runs that go on."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from sklearn.metrics import average_precision_score
from small_pipelines import SMALL
from small_pipelines.joint import flux_parts

import attnlab as al
from attnlab.scenes import street
from experiments.studies import published_protocols as protocols

SCENES = Path(__file__).parent / "data/two_scenes"  # of write_scenes
CAR, DOG, BUS = 7, 12, 6  # of Pascal VOC


def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if path.parent.name == "SegmentationClass":
        image.putpalette(range(256))  # as VOC's are: one channel of numbers, which have colors
    image.save(path)


@pytest.fixture
def scenes(tmp_path):
    """A folder of two scenes, that a test may change."""
    return Path(shutil.copytree(SCENES, tmp_path / "scenes"))


@pytest.fixture
def voc(tmp_path):
    """A folder like VOC2012, of masks 30 x 40: one class, two, none, and one whose second class is one lost pixel."""
    folder, masks = tmp_path / "VOC2012", {name: np.zeros((30, 40), np.uint8) for name in ("a", "b", "c", "d")}
    for mask in masks.values():
        mask[:2] = 255
    masks["a"][10:20], masks["b"][10:20], masks["b"][22:], masks["d"][:, 5:9] = CAR, DOG, BUS, BUS
    for name, mask in masks.items():
        save(mask, folder / f"SegmentationClass/{name}.png")
        save(np.full((30, 40, 3), 90, np.uint8), folder / f"JPEGImages/{name}.jpg")
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    (folder / "ImageSets/Segmentation/val.txt").write_text("a\nb\nc\nd\n")
    return folder


# Folders


def test_rendered_scenes_are_a_folder_of_classes(scenes):
    protocol, cases = protocols.open_protocol(scenes)
    assert protocol is protocols.IMAGENET_SEGMENTATION and len(cases) == 2
    for case in cases:
        scene = street.render(int(case.name))
        np.testing.assert_array_equal(np.asarray(Image.open(case.image)), scene.image)
        inside = np.flatnonzero((2 * np.arange(protocols.SIDE) + 1) % 7)  # centers that are not between two pixels
        rows = ((inside + 0.5) * 64 / protocols.SIDE).astype(int)
        truth = protocols.truth_of(case)[inside][:, inside]
        np.testing.assert_array_equal(truth, scene.mask(case.word)[rows][:, rows])
        assert case.beside and scene.words[case.word] not in {street.WORDS[word] for word in case.beside}


def test_words_beside_are_those_of_the_protocol_where_none_are_said(scenes):
    text = (scenes / "classes.csv").read_text().splitlines()
    (scenes / "classes.csv").write_text("\n".join(line.rpartition(",")[0] for line in text))
    assert {case.beside for case in protocols.open_protocol(scenes)[1]} == {protocols.IMAGENET_SEGMENTATION.beside}


def test_all_missing_files_are_listed(scenes):
    first, second = protocols.open_protocol(scenes)[1]
    first.mask.unlink(), second.mask.unlink(), second.image.unlink()
    with pytest.raises(FileNotFoundError) as error:
        protocols.open_protocol(scenes)
    names = [f"masks/{first.name}.png", f"images/{second.name}.jpg", f"masks/{second.name}.png"]
    assert str(error.value).split("\n- ") == [f"3 of 4 files are missing in {scenes}:", *names]
    (scenes / "classes.csv").write_text("name,word\n" + "".join(f"{k},car\n" for k in range(30)))
    with pytest.raises(FileNotFoundError, match=r"(?s)60 of 60 files.*- and 40 more$"):
        protocols.open_protocol(scenes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,word\n../a,car\na,\na,car,x;y\na,car\nb,car\n", r"lines \[2, 3, 4, 5\] are not `name,word`"),
        ("file,class\na,car\n", r"lines \[2\] are not"),
        ("name,word\n", "has no line below"),
    ],
)
def test_lines_that_are_none(tmp_path, text, message):
    (tmp_path / "classes.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        protocols.open_protocol(tmp_path)


def test_neither_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither classes"):
        protocols.open_protocol(tmp_path / "none")


def test_images_of_one_class_are_taken_from_voc(voc):
    protocol, cases = protocols.open_protocol(voc)
    assert protocol is protocols.VOC_SINGLE_CLASS
    assert [(case.name, case.word, case.label) for case in cases] == [("a", "car", CAR), ("d", "bus", BUS)]
    truth = protocols.truth_of(cases[0])
    rows = ((np.arange(protocols.SIDE) + 0.5) * 30 // protocols.SIDE).astype(int)
    expected = np.select([rows < 2, (rows >= 10) & (rows < 20)], [255, 1], 0)
    np.testing.assert_array_equal(truth, np.broadcast_to(expected[:, None], truth.shape))
    (voc / "SegmentationClass/c.png").unlink(), (voc / "JPEGImages/b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 8 files .*\n- JPEGImages/b.jpg\n- SegmentationClass/c.png$"):
        protocols.open_protocol(voc)


def test_voc_without_an_image_of_one_class(voc):
    (voc / "ImageSets/Segmentation/val.txt").write_text("b\nc\n")
    with pytest.raises(ValueError, match="none of the 2 masks"):
        protocols.open_protocol(voc)


def test_a_mask_of_colors_is_refused(scenes):
    case = protocols.open_protocol(scenes)[1][0]
    save(np.zeros((9, 9, 3), np.uint8), case.mask)
    with pytest.raises(ValueError, match="has 3 channels"):
        protocols.truth_of(case)


# Numbers


def average_precision(scores, labels):
    """Sum over thresholds, from the highest, of precision times what recall gains there."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        recall = (labels & chosen).sum() / labels.sum()
        total += (recall - before) * (labels & chosen).sum() / chosen.sum()
        before = recall
    return total


def examples(count=3):
    """Maps, masks and truths whose numbers are right by hand; the last 30 rows of a truth are ignored."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        heat = rng.integers(3, 20, (7, 14)).astype(np.float32)  # with ties
        truth = np.kron(rng.random((7, 7)) < 0.3, np.ones((32, 32))).astype(np.uint8)
        truth[-30:] = 255
        yield heat, heat > heat.mean(), truth


def test_numbers_of_an_image_against_a_reference_in_float64():
    for heat, mask, truth in examples():
        found = protocols.compare(heat, mask, truth)
        fine = np.kron(heat.astype(float), np.ones((32, 16)))
        known, scores = truth != 255, (fine - fine.min()) / (fine.max() - fine.min())
        expected = [[((truth == i) & (np.kron(mask, np.ones((32, 16))) == j)).sum() for j in (0, 1)] for i in (0, 1)]
        assert found["counts"] == expected and np.sum(expected) == known.sum()
        both = np.r_[1 - scores[known], scores[known]], np.r_[truth[known] == 0, truth[known] == 1]
        assert found["precision"] == pytest.approx(average_precision(*both), abs=1e-12)
        assert found["precision"] == pytest.approx(average_precision_score(both[1], both[0]), abs=1e-12)
        assert protocols.compare(4 * heat - 3, mask, truth) == found  # which is a unit's matter


def test_a_flat_map_and_a_perfect_one():
    truth = np.zeros((224, 224), np.uint8)
    truth[:100] = 1
    assert protocols.compare(truth.astype(float), truth > 0, truth) == {
        "counts": [[124 * 224, 0], [0, 100 * 224]],
        "precision": 1.0,
    }
    flat = np.ones((4, 4))
    found = protocols.compare(flat, flat > flat.mean(), truth)
    assert found["counts"] == [[124 * 224, 0], [100 * 224, 0]] and 0 < found["precision"] < 1


def test_summary_over_images():
    """Pixels are summed over images; doubled counts masks together with their complements, as published code does."""
    images = list(examples())
    found = [protocols.compare(*image) for image in images]
    summary = protocols.summarize_protocol(found, 50)
    known = [truth != 255 for *_, truth in images]
    truth = np.concatenate([image[2][k] for image, k in zip(images, known, strict=True)]) == 1
    mask = np.concatenate([np.kron(i[1], np.ones((32, 16)))[k] for i, k in zip(images, known, strict=True)]) == 1

    def both(mask, truth):
        return np.mean([(mask & truth).sum() / (mask | truth).sum(), (~mask & ~truth).sum() / (~mask | ~truth).sum()])

    expected = {"accuracy": (mask == truth).mean(), "mIoU": both(mask, truth)}
    expected["mIoU, doubled"] = both(np.r_[mask, ~mask], np.r_[truth, ~truth])
    expected["mAP"] = np.mean([one["precision"] for one in found])
    assert {name: row[0] for name, row in summary.items()} == pytest.approx(expected, abs=1e-12)
    assert all(low < value < high for value, low, high in summary.values())
    alone = protocols.summarize_protocol(found[:1], 20)  # drawn again and again
    assert all(low == pytest.approx(value) == high for value, low, high in alone.values())
    assert 100 * 0.831 / (2 - 0.831) == pytest.approx(71.0, abs=0.1)  # the published pair


# Maps


def noise(case):
    return al.seed(zlib.crc32(case.name.encode()))


def test_a_unet_has_the_map_of_the_word(pipe):
    protocol, cases = protocols.open_protocol(SCENES)
    run = protocols.ProtocolRun(pipe, protocol, cases, timestep=300)
    image, heat, mask = run.maps(cases[0])
    np.testing.assert_array_equal(image, np.asarray(Image.open(cases[0].image)))
    by_hand = al.record_image(pipe, image, f"a {cases[0].word}", timesteps=300, generator=noise(cases[0]))
    np.testing.assert_array_equal(heat, al.daam(by_hand)[cases[0].word])
    np.testing.assert_array_equal(mask, heat > heat.mean())
    assert run.settings["cut"] == "mean" and run.settings["layers"] is None
    with pytest.raises(ValueError, match="cut='argmax': mean, or in joint attention"):
        protocols.ProtocolRun(pipe, protocol, cases, cut="argmax")
    long = [cases[0]._replace(word=" ".join(["house"] * 99))]
    with pytest.raises(ValueError, match="cannot be generated"):
        protocols.ProtocolRun(pipe, protocol, long).check()


def flux(blocks):
    """FLUX of random weights, with so many blocks of two streams."""
    parts = SMALL["flux"]()[0].components
    pipe = FluxPipeline(**parts | {"transformer": flux_parts(num_layers=blocks, num_single_layers=1)["transformer"]})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_layers_are_those_of_the_protocol():
    """The real FLUX has 19 blocks; in others they are as deep."""
    six, nineteen = flux(6), flux(19)
    for protocol, last in ((protocols.IMAGENET_SEGMENTATION, 17), (protocols.VOC_SINGLE_CLASS, 18)):
        layers = protocols.ProtocolRun(nineteen, protocol, []).settings["layers"]
        assert layers == [f"transformer_blocks.{k}.attn" for k in range(14, last + 1)]
        layers = protocols.ProtocolRun(six, protocol, []).settings["layers"]
        assert layers == ["transformer_blocks.4.attn", "transformer_blocks.5.attn"]
    assert protocols.ProtocolRun(six, protocol, [], layers=("single",)).settings["layers"] == ["single"]


@pytest.mark.parametrize("protocol", [protocols.IMAGENET_SEGMENTATION, protocols.VOC_SINGLE_CLASS])
def test_joint_attention_has_maps_of_outputs(protocol):
    """The mean of each layer's softmax of products and its mean; or where the class has the largest mean product."""
    case, pipe = protocols.open_protocol(SCENES)[1][0], flux(6)
    run = protocols.ProtocolRun(pipe, protocol, [case], size=32)
    _, heat, mask = run.maps(case)
    words = [case.word, *case.beside]
    image = Image.open(case.image).resize((32, 32), Image.Resampling.BICUBIC)
    options = {"layers": run.settings["layers"], "texts": words, "outputs": True, "generator": noise(case)}
    trace = al.record_image(pipe, image, f"a {case.word}", timesteps=500, **options)[0].trace
    products = []
    for name in trace.sizes:
        pixels = trace.outputs[name].double()
        tokens = [sorted({t for w in trace.beside[word].words for t in w.tokens}) for word in words]
        concepts = [trace.beside[w].outputs[name][t].double().mean(0) for w, t in zip(words, tokens, strict=True)]
        products.append((torch.stack(concepts) @ pixels.T).unflatten(-1, trace.sizes[name]))
    scores = torch.stack(products)
    if protocol.cut == "mean":
        expected = scores.softmax(1).mean(0)[0].numpy()
        inside = expected > expected.mean()
    else:
        expected, inside = scores.mean(0).softmax(0)[0].numpy(), (scores.mean(0).argmax(0) == 0).numpy()
    np.testing.assert_allclose(heat, expected, atol=1e-5)
    near = np.abs(expected - expected.mean()) < 1e-5 if protocol.cut == "mean" else np.zeros_like(inside)
    np.testing.assert_array_equal(mask[~near], inside[~near])


# Runs


def test_a_run_goes_on(pipe, tmp_path):
    protocol, cases = protocols.open_protocol(SCENES)
    run, folder = protocols.ProtocolRun(pipe, protocol, cases), tmp_path / "scores"
    found = run.run(folder)
    assert found == [protocols.compare(*run.maps(case)[1:], protocols.truth_of(case)) for case in cases]
    first, second = (folder / f"{case.name}.json" for case in cases)
    first.unlink()
    second.write_text(json.dumps(marked := {"counts": [[1, 0], [0, 1]], "precision": 1.0}))
    assert run.run(folder) == [found[0], marked]  # what was there is not computed again
    for other in ({"timestep": 100}, {"cases": cases[:1]}):
        with pytest.raises(ValueError, match="another folder"):
            protocols.ProtocolRun(**{"pipe": pipe, "protocol": protocol, "cases": cases} | other).run(folder)
    table = protocols.protocol_table(run, protocols.summarize_protocol(found, 20)).splitlines()
    assert "this run: tiny" in table[2] and all("published, not run here" in line for line in table[3:])
    assert len(table) == 3 + len(protocol.published) and len({line.count("|") for line in table}) == 1
