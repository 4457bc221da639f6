"""The segmenter: it learns what can be learned, repeats with its seed, and is scored as scikit-learn scores."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import jaccard_score
from torch.optim.optimizer import register_optimizer_step_pre_hook

from attnlab.metrics import class_ious
from attnlab.segmentation import Segmenter, augment, learn, train_segmenter
from attnlab.segmentation.model import ARCHITECTURES, UNet, as_input
from experiments.studies.pair_quality import features, frechet_distance

CLASSES = ("ground", "red", "green")


def squares(count, seed=0, size=32):
    """Images of noise with a red and a green square; labels 1 and 2."""
    rng = np.random.default_rng(seed)
    images, labels = (
        rng.integers(0, 90, (count, size, size, 3), dtype=np.uint8),
        np.zeros((count, size, size), np.uint8),
    )
    for image, label in zip(images, labels, strict=True):
        for number in (1, 2):
            y, x = rng.integers(0, size - 12, 2)
            image[y : y + 12, x : x + 12, number - 1] = 250
            label[y : y + 12, x : x + 12] = number
    return images, labels


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_learns_and_repeats(architecture, tmp_path):
    images, labels = squares(40)
    before = torch.get_rng_state()
    segmenter = train_segmenter(images, labels, CLASSES, architecture=architecture, steps=40, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    tests = squares(10, seed=9)
    assert class_ious(segmenter.evaluate(*tests)).min() > 0.6
    found = segmenter.segment(tests[0])
    again = train_segmenter(images, labels, CLASSES, architecture=architecture, steps=40, seed=1)
    np.testing.assert_array_equal(again.segment(tests[0]), found)
    assert not np.array_equal(Segmenter.new(CLASSES, architecture, seed=2).segment(tests[0]), found)
    loaded = Segmenter.from_pretrained(segmenter.save_pretrained(tmp_path))
    assert type(loaded.model) is type(segmenter.model) and loaded.classes == CLASSES
    np.testing.assert_array_equal(loaded.segment(tests[0]), found)


def test_extra_pairs_are_half_of_every_batch():
    images, labels = squares(4)
    extra = np.zeros_like(images), np.full_like(labels, 2)
    x, y = learn.draw_batch([(images, labels), extra], 10, (), np.random.default_rng(0))
    assert x.shape == (10, 3, 32, 32) and (y.flatten(1) == 2).all(1).sum() == 5
    flipped = [any(np.array_equal(one, other[:, ::-1]) for other in labels) for one in y[:5].numpy()]
    assert 0 < sum(flipped) < 5  # images and labels are turned together
    for a, b in zip(x[:5], y[:5], strict=True):
        assert (a[0][b == 1] > 0.9).sum() > 90  # red is still where the label says 1


@pytest.mark.parametrize("name", ["rotate90", "crop", "cutmix", "copy-paste"])
def test_labels_are_augmented_with_their_images(name):
    """In a batch, colors say the labels before and after; most pairs are no longer what they were."""
    labels = np.random.default_rng(0).integers(0, 3, (8, 4, 4)).repeat(4, 1).repeat(4, 2).astype(np.uint8)
    images = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0)], np.uint8)[labels]
    x, y = learn.draw_batch([(images, labels)], 16, [name], np.random.default_rng(0))
    seen = (x > 0).long()
    assert torch.equal(seen[:, 0] + 2 * seen[:, 1], y)
    before = [one.tobytes() for one in (*labels, *labels[:, :, ::-1])]
    assert sum(one.astype(np.uint8).tobytes() not in before for one in y.numpy()) >= 4


def test_model_input_is_from_minus_one_to_one():
    images = np.array([[[[0, 51, 255]]]], np.uint8)
    torch.testing.assert_close(as_input(images), torch.tensor([-1.0, -0.6, 1.0]).reshape(1, 3, 1, 1))


def test_what_a_training_is_made_of(monkeypatch):
    """Batches, starting weights and dropout of its seed alone; a rate that falls to a step from zero."""
    pairs, whole, seen = squares(30), learn.as_input, []
    monkeypatch.setattr(learn, "as_input", lambda x: seen.append((torch.initial_seed(), x.tobytes())) or whole(x))
    start, rates = [], []

    def look(optimizer, *call):
        group = optimizer.param_groups[0]
        start.append(group["params"][0].detach().clone())
        rates.append((group["lr"], group["weight_decay"]))

    stop = register_optimizer_step_pre_hook(look)
    for seed in (5, 5, 6):
        train_segmenter(*pairs, CLASSES, steps=4, batch=3, lr=0.01, seed=seed, progress=False)
    stop.remove()
    assert [seed for seed, _ in seen] == [5] * 8 + [6] * 4
    assert seen[:4] == seen[4:8] and len({batch for _, batch in seen}) == 8
    assert torch.equal(start[0], start[4]) and not torch.equal(start[0], start[8])
    np.testing.assert_allclose(rates, [(0.01, 0.01), (0.0075, 0.01), (0.005, 0.01), (0.0025, 0.01)] * 3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ignored_pixels_teach_nothing(architecture):
    """All that counts is of one class: the others lose alike, the last one too."""
    images, labels = squares(8)[0], np.full((8, 32, 32), 255, np.uint8)
    labels[:, :8, :8] = 1
    options = {"steps": 3, "batch": 4, "lr": 0.01, "progress": False}
    segmenter = train_segmenter(images, labels, CLASSES, architecture=architecture, **options)
    scores = segmenter.logits(as_input(images)).detach().mean((0, 2, 3))
    before = Segmenter.new(CLASSES, architecture, 0).logits(as_input(images)).detach().mean((0, 2, 3))
    change = (scores - before).tolist()
    assert change[1] > 0 > max(change[0], change[2])


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    images, truth = (
        rng.integers(0, 255, (5, 16, 16, 3), dtype=np.uint8),
        rng.integers(0, 3, (5, 16, 16), dtype=np.uint8),
    )
    truth[:, :2] = 255
    segmenter = Segmenter.new(tuple("abcd"), seed=0)
    confusion = segmenter.evaluate(images, truth)
    valid, found = truth != 255, segmenter.segment(images)
    assert confusion.sum() == valid.sum() and confusion.shape == (5, 4, 4)
    expected = jaccard_score(truth[valid], found[valid], labels=range(4), average=None, zero_division=0)
    np.testing.assert_allclose(np.nan_to_num(class_ious(confusion)), expected)


def test_pairs_have_to_fit():
    images, labels = squares(2)
    for wrong, message in [
        ((images[..., 0], labels), r"images are uint8 \(image, row, column, rgb\)"),
        ((images, labels[:, :5]), "a label map has its image's size"),
        ((images, labels + 7), "labels are 0 to 2 or 255"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_segmenter(*wrong, CLASSES, steps=1)
    oblong = images[:, :16], labels[:, :16]
    for options, message in [
        ({"steps": 0}, "steps=0: give a whole number, 1 or more"),
        ({"batch": 2.5}, "batch=2.5"),
        ({"batch": 1, "extra": (images, labels)}, "batch=1: give a whole number, 2 or more"),
        ({"seed": -1}, "seed=-1: give a whole number, 0 or more"),
        ({"lr": 0}, "lr=0: give a number above 0"),
        ({"lr": np.nan}, "lr=nan"),
        ({"lr": "1e-3"}, "lr='1e-3': give a number above 0"),
        ({"classes": ("a", "a", "b")}, "classes are 1 to 255 different names"),
        ({"extra": oblong}, r"images are \(32, 32\), those of extra \(16, 32\): give them one size"),
        ({"images": oblong[0], "labels": oblong[1], "augmentations": ["rotate90"]}, "rotate90 is for squares"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_segmenter(**{"images": images, "labels": labels, "classes": CLASSES, "steps": 1} | options)


def test_images_have_to_fit_a_segmenter():
    segmenter, unet = (Segmenter.new(CLASSES, name) for name in ARCHITECTURES)
    images = squares(2)[0]
    sixteen = Image.fromarray(np.full((32, 32), 40_000, np.uint16))
    expected = segmenter.segment(np.full((1, 32, 32, 3), round(40_000 / 257), np.uint8))
    np.testing.assert_array_equal(segmenter.segment([sixteen]), expected)
    for wrong, message in [
        ([], r"images of the sizes \[\]: give one or more of one size"),
        ([images[0], images[0][:16]], r"sizes \[\(16, 32, 3\), \(32, 32, 3\)\]"),
        (images[0], "images are uint8"),
    ]:
        with pytest.raises(ValueError, match=message):
            segmenter.segment(wrong)
    with pytest.raises(ValueError, match="batch=0"):
        segmenter.segment(images, batch=0)
    for wrong in ({"shuffle": 0}, {"num_classes": 0}, {"channels": (8, 12)}, {"channels": ()}, {"channels": (0,)}):
        with pytest.raises(ValueError, match=": give "):
            UNet.new(**{"num_classes": 2} | wrong)
    with pytest.raises(ValueError, match=r"images are \(30, 32\): give sides that 8 divides"):
        unet.segment(images[:, :30])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_segmenters_are_read_whole_or_not_at_all(architecture, tmp_path):
    folder = Segmenter.new(CLASSES, architecture).save_pretrained(tmp_path / "whole")
    (weights,) = folder.glob("*.safetensors")
    (folder / "classes.json").write_text('["a", "b"]')
    with pytest.raises(ValueError, match=r"files of two models: weights of 3 classes, classes.json of 2"):
        Segmenter.from_pretrained(folder)
    for damaged in ("", "{}", '["a", "a"]', "3"):
        (folder / "classes.json").write_text(damaged)
        with pytest.raises(ValueError, match="has damaged files"):
            Segmenter.from_pretrained(folder)
    (folder / "classes.json").write_text('["a", "b", "c"]')
    held = load_file(weights)
    some = sorted(held)[0]
    save_file({name: x for name, x in held.items() if name != some}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=f"weights are missing or of another model, {some} among them"):
        Segmenter.from_pretrained(folder)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"no weights as .safetensors. A .bin or .pt is a pickle"):
        Segmenter.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="holds no segmenter"):
        Segmenter.from_pretrained(tmp_path / "nowhere")


def test_ways_of_mixing(monkeypatch):
    """What each batch is drawn from, by the color of its images: the pairs are black, the extra ones white."""
    labels, seen = np.zeros((30, 16, 16), np.uint8), []
    labels[:, :8] = 1
    black, white = (np.full((30, 16, 16, 3), value, np.uint8) for value in (0, 255))
    whole = learn.as_input
    monkeypatch.setattr(learn, "as_input", lambda x: seen.append(x[:, 0, 0, 0] > 0) or whole(x))
    options = {"extra": (white, labels), "steps": 4, "batch": 8, "progress": False}
    for mix in learn.MIXES:
        train_segmenter(black[:10], labels[:10], tuple("ab"), mix=mix, **options)
    half, pool, pretrain = (np.stack(seen[i : i + 4]) for i in (0, 4, 8))
    assert (half.sum(1) == 4).all()
    assert 0.5 < pool.mean() < 0.95  # three of four pairs are white
    assert pretrain[:2].all() and not pretrain[2:].any()
    with pytest.raises(ValueError, match="mix='third': choose one of half, pool, pretrain"):
        train_segmenter(black, labels, tuple("ab"), mix="third")
    with pytest.raises(ValueError, match="architecture='forest': choose one of segformer, unet"):
        train_segmenter(black, labels, tuple("ab"), architecture="forest")
    with pytest.raises(ValueError, match="no augmentation 'blur'; there are flip, rotate90, crop"):
        train_segmenter(black, labels, tuple("ab"), augmentations=["flip", "blur"])


def test_augmentations_are_applied_in_order(monkeypatch):
    images, labels = squares(4)
    calls = []
    table = augment.AUGMENTATIONS
    for name in ("rotate90", "color"):
        whole = table[name]
        monkeypatch.setitem(table, name, lambda *a, name=name, whole=whole: calls.append(name) or whole(*a))
    options = {"augmentations": ["color", "rotate90"], "steps": 2, "batch": 4, "progress": False}
    train_segmenter(images, labels, CLASSES, **options)
    assert calls == ["color", "rotate90"] * 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_tell_worlds_apart(architecture):
    segmenter = Segmenter.new(CLASSES, architecture)
    (a, _), (b, _), (dark, _) = squares(60), squares(60, seed=1), squares(60, seed=2)
    of = [features(segmenter, x) for x in (a, b, dark // 4)]
    assert of[0].shape == (60, 128 if architecture == "segformer" else 96) and of[0].dtype == np.float64
    assert frechet_distance(of[0], of[2]) > 2 * frechet_distance(of[0], of[1])
    again = features(segmenter, a, batch=7)
    np.testing.assert_allclose(again, of[0], atol=0.02 * np.abs(of[0]).max())  # other batches round otherwise
