"""The segmenter: it learns what can be learned, repeats with its seed, and is scored as scikit-learn scores."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import jaccard_score, recall_score
from sklearn.utils.class_weight import compute_class_weight
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import (
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    SegformerModel,
)

from attnlab.metrics import class_ious
from attnlab.pipelines import BUNDLED
from attnlab.scenes import street
from attnlab.segmentation import Segmenter, augment, learn, start_segmenter, train_segmenter
from attnlab.segmentation.model import ARCHITECTURES, UNet, as_input
from experiments.studies.pair_quality import features, frechet_distance

CLASSES = ("ground", "red", "green")
PROCESSOR = SegformerImageProcessorPil(do_resize=False)  # scales as ImageNet's photographs are


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


def segformer(folder, kind=SegformerModel, classes=("cat", "dog"), processor=PROCESSOR):
    """A folder of a small SegFormer with random weights, as transformers saves it."""
    config = SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8, 16, 32, 32], num_attention_heads=[1, 1, 2, 2], strides=[2] * 4,
        decoder_hidden_size=32, id2label=dict(enumerate(classes)),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    if processor:
        processor.save_pretrained(folder)
    return folder


def scenes(count, first, names, size=32):
    """Rendered scenes with a label for each of some classes, 0 for the others."""
    rendered = [street.render(seed, size) for seed in range(first, first + count)]
    labels = [sum(n * scene.mask(name) for n, name in enumerate(names, 1)) for scene in rendered]
    return np.stack([scene.image for scene in rendered]), np.stack(labels).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "classes", "said"),
    [
        (SegformerModel, CLASSES, "the folder has no head: it is new"),
        (SegformerForImageClassification, CLASSES, "the folder has no head: it is new"),
        (SegformerForSemanticSegmentation, CLASSES, "the last layer, for ground, red, green, is new"),
        (SegformerForSemanticSegmentation, ("cow", "dog"), "the last layer, for cow, dog, is new"),
    ],
)
def test_a_start_takes_what_fits_and_says_what_is_new(kind, classes, said, tmp_path):
    folder = segformer(tmp_path, kind)
    with pytest.warns(UserWarning, match=said):
        started = start_segmenter(folder, classes, seed=3)
    assert started.classes == classes and started.model.config.num_labels == len(classes)
    held, encoder = kind.from_pretrained(folder), started.model.segformer.state_dict()
    own = (held if kind is SegformerModel else held.segformer).state_dict()
    assert len(encoder) > 50 and all(torch.equal(x, own[name]) for name, x in encoder.items())
    if kind is SegformerForSemanticSegmentation:
        assert torch.equal(started.model.decode_head.linear_fuse.weight, held.decode_head.linear_fuse.weight)
    with pytest.warns(UserWarning):
        again, other = (start_segmenter(folder, classes, seed).model.state_dict() for seed in (3, 4))
    assert all(torch.equal(x, again[name]) for name, x in started.model.state_dict().items())
    last = "decode_head.classifier.weight"
    assert not torch.equal(other[last], again[last])


def test_a_head_for_the_same_classes_stays(tmp_path):
    folder = segformer(tmp_path, SegformerForSemanticSegmentation, CLASSES)
    whole, images = SegformerForSemanticSegmentation.from_pretrained(folder).eval(), squares(2)[0]
    logits = start_segmenter(folder, CLASSES).logits(as_input(images)).detach()
    seen = PROCESSOR(list(images), return_tensors="pt")["pixel_values"]
    expected = torch.nn.functional.interpolate(whole(seen).logits.detach(), (32, 32), mode="bilinear")
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.2, 0.3, 0.4]}, {"do_normalize": False},
                {"do_rescale": False, "image_mean": [120, 110, 100], "image_std": [60, 60, 50]},
                {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]}]
)  # fmt: skip
def test_images_are_scaled_as_the_preprocessor_says_also_after_saving(options, tmp_path):
    processor = SegformerImageProcessorPil(do_resize=False, **options)
    folder = segformer(tmp_path / "start", processor=processor)
    images = squares(3)[0]
    with pytest.warns(UserWarning):
        started = start_segmenter(folder, CLASSES)
    seen = processor(list(images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(started._scaled(as_input(images)), seen, atol=1e-4, rtol=1e-4)
    saved = started.save_pretrained(tmp_path / "saved")
    loaded = Segmenter.from_pretrained(saved)
    np.testing.assert_array_equal(loaded.segment(images), started.segment(images))
    assert (loaded.mean, loaded.std) == (started.mean, started.std)
    theirs = SegformerForSemanticSegmentation.from_pretrained(saved).eval()
    assert tuple(theirs.config.id2label.values()) == CLASSES
    own = SegformerImageProcessorPil.from_pretrained(saved)(list(images), return_tensors="pt")["pixel_values"]
    logits = torch.nn.functional.interpolate(theirs(own).logits.detach(), (32, 32), mode="bilinear")
    torch.testing.assert_close(logits, started.logits(as_input(images)).detach(), atol=1e-4, rtol=1e-4)


def test_without_a_preprocessor_images_are_scaled_as_imagenets(tmp_path):
    with pytest.warns(UserWarning):
        started = start_segmenter(segformer(tmp_path / "a", processor=None), CLASSES)
    assert (started.mean, started.std) == (tuple(PROCESSOR.image_mean), tuple(PROCESSOR.image_std))
    plain = Segmenter.new(CLASSES).save_pretrained(tmp_path / "b")
    (plain / "preprocessor_config.json").unlink()  # as earlier versions saved
    x = as_input(squares(1)[0])
    assert torch.equal(Segmenter.from_pretrained(plain)._scaled(x), x)


def test_trained_weights_are_a_better_start_than_random_ones(tmp_path):
    """From a folder of random weights, on rendered scenes; then a few steps for other classes."""
    names, others = ("sky", "ground", "road"), ("building", "ground", "sky")
    random = segformer(tmp_path / "random")
    options = {"steps": 120, "batch": 8, "lr": 1e-3, "progress": False}
    with pytest.warns(UserWarning, match="no head"):
        trained = train_segmenter(*scenes(40, 0, names), ("other", *names), start=random, **options)
    trained = trained.save_pretrained(tmp_path / "trained")
    pairs, tests, found = scenes(16, 500, others), scenes(24, street.HELD_OUT, others), {}
    for start in (random, trained):
        with pytest.warns(UserWarning):
            few = train_segmenter(*pairs, ("other", *others), start=start, **options | {"steps": 10})
        found[start] = np.nanmean(class_ious(few.evaluate(*tests)))
    assert found[trained] > found[random] + 0.05, found


def test_the_head_learns_faster_than_a_trained_encoder(tmp_path):
    rates = []
    stop = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append([(len(g["params"]), g["lr"]) for g in optimizer.param_groups])
    )
    pairs, folder = squares(4), segformer(tmp_path)
    for lr in (None, 1e-3):
        with pytest.warns(UserWarning):
            found = train_segmenter(*pairs, CLASSES, start=folder, steps=1, batch=2, lr=lr, progress=False)
    stop.remove()
    rates = [[(count, round(lr, 9)) for count, lr in one] for one in rates]
    sizes = [sum(1 for _ in part.parameters()) for part in (found.model.segformer, found.model.decode_head)]
    assert rates == [[(sizes[0], 6e-5), (sizes[1], 6e-4)], [(sizes[0], 1e-3), (sizes[1], 1e-2)]]


def test_a_start_is_refused_before_anything_is_trained(tmp_path):
    pairs = squares(2)
    bin_only, odd, cut = (segformer(tmp_path / name) for name in ("bin", "odd", "cut"))
    (bin_only / "model.safetensors").rename(bin_only / "pytorch_model.bin")
    (odd / "preprocessor_config.json").write_text('{"image_std": [1, 0, 1]}')
    held = load_file(cut / "model.safetensors")
    some = sorted(held)[0]
    save_file({name: x for name, x in held.items() if name != some}, cut / "model.safetensors", {"format": "pt"})
    for start, kind, message in [
        (tmp_path / "none", FileNotFoundError, "no folder with a config.json; `hf download nvidia/mit-b0"),
        (tmp_path, FileNotFoundError, "name one that has"),
        (BUNDLED / "street-segmenter", ValueError, "it is of a UNet, not of a segformer"),
        (bin_only, ValueError, r"no weights as .safetensors. A .bin or .pt is a pickle"),
        (odd, ValueError, "does not say how images are scaled: .*image_std above 0"),
        (cut, ValueError, "weights are missing or of another model, segformer[.].*bias among them"),
    ]:
        with pytest.raises(kind, match=message):
            train_segmenter(*pairs, CLASSES, start=start, steps=1)


def rare(count, seed):
    """Noise with a red square, and a green dot that is hard to tell from it."""
    images, labels = squares(count, seed)
    rng = np.random.default_rng(seed)
    images[labels == 2], labels[labels == 2] = 40, 0
    for image, label in zip(images, labels, strict=True):
        y, x = rng.integers(2, 28, 2)
        image[y : y + 2, x : x + 2], label[y : y + 2, x : x + 2] = (60, 130, 60), 2
    return images, labels


def test_class_weights_raise_the_recall_of_a_rare_class():
    pairs, tests, recalls = rare(40, 0), rare(20, 1), {}
    assert 0 < (pairs[1] == 2).mean() < 0.005
    for weights in (None, "balanced"):
        options = {"class_weights": weights, "steps": 40, "batch": 8, "seed": 1, "progress": False}
        found = train_segmenter(*pairs, CLASSES, **options).segment(tests[0])
        recalls[weights] = recall_score(tests[1].ravel(), found.ravel(), labels=[2], average=None)[0]
    assert recalls["balanced"] > 0.5 > 0.1 > recalls[None], recalls


def test_balanced_weights_are_scikit_learns(monkeypatch):
    images, labels = rare(12, 0)
    labels[:, :5] = 255
    seen, whole = [], learn.F.cross_entropy
    monkeypatch.setattr(learn.F, "cross_entropy", lambda x, y, w=None, **k: seen.append(w) or whole(x, y, w, **k))
    options = {"steps": 1, "batch": 2, "progress": False}
    four, extra = (*CLASSES, "blue"), (images[:2], labels[:2])
    train_segmenter(images, labels, four, class_weights="balanced", extra=extra, **options)
    valid = np.concatenate([labels, labels[:2]])
    valid = valid[valid != 255]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=valid)
    np.testing.assert_allclose(seen[0], [*expected, 1], rtol=1e-6)  # of blue there is no pixel
    train_segmenter(images, labels, CLASSES, class_weights=(1, 2.5, 3), **options)
    assert seen[1].tolist() == [1, 2.5, 3]
    train_segmenter(images, labels, CLASSES, **options)
    assert seen[2] is None
    for wrong, message in [
        ("heavy", "class_weights='heavy': give 'balanced', or a number for each class"),
        ((1, 2), "a number above 0 for each of ground, red, green"),
        ((1, 2, 0), "above 0"),
        ((1, 2, np.nan), "above 0"),
        ((1, 2, "3"), "above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_segmenter(images, labels, CLASSES, class_weights=wrong, **options)


def test_an_early_stop_returns_the_best_weights_and_not_the_last():
    """The second half of the training has wrong labels: all that was learned is lost again."""
    (images, labels), valid = squares(30), squares(8, seed=9)
    wrong = np.array([1, 2, 0], np.uint8)[labels]
    options = {"mix": "pretrain", "extra": (images, labels), "steps": 60, "batch": 8, "progress": False, "lr": 3e-3}
    last = train_segmenter(images, wrong, CLASSES, **options)
    best = train_segmenter(images, wrong, CLASSES, valid=valid, patience=4, **options)
    steps, mious = zip(*best.curve, strict=True)
    reached = np.nanmean(class_ious(best.evaluate(*valid)))
    assert reached == max(mious) > 0.5 > mious[-1] and last.curve == []
    assert reached > np.nanmean(class_ious(last.evaluate(*valid))) + 0.3
    assert steps == tuple(range(3, 3 * len(steps) + 1, 3)) and len(steps) - 1 - np.argmax(mious) == 4
    assert not best.model.training


def test_validation_changes_no_batch():
    """Looked at, and trained to the end: the weights are those of a training without it, or earlier ones."""
    pairs, valid = squares(12), squares(4, seed=9)
    options = {"steps": 7, "batch": 4, "progress": False, "seed": 2}
    plain = train_segmenter(*pairs, CLASSES, **options)
    looked = train_segmenter(*pairs, CLASSES, valid=valid, patience=100, **options)
    assert [step for step, _ in looked.curve] == [*range(1, 8)]
    assert looked.curve[-1][1] == np.nanmean(class_ious(plain.evaluate(*valid)))
    images, labels = valid
    for wrong, message in [
        (images, "valid is .images, labels."),
        ((images, np.full_like(labels, 255)), "valid has no pixel of a class, all are 255"),
        ((images, labels + 5), "labels are 0 to 2 or 255"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_segmenter(*pairs, CLASSES, valid=wrong, **options)
    with pytest.raises(ValueError, match="patience=0"):
        train_segmenter(*pairs, CLASSES, valid=valid, patience=0, **options)
