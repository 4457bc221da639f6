"""Odd parameters, recipes and files, drawn with a fixed seed: the right result, or attnlab's own words, nothing else.

An error counts as refused in words where attnlab raised it itself and it has a sentence to say. An error of a library
from deep below, a wrong result without a word, and an interrupt that is swallowed do not.
"""

import random
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROMPT, count_hooks

import attnlab as al
from attnlab import masks, metrics
from attnlab.dataset import Dataset, Recipe, generate_dataset, verify_dataset
from attnlab.recording.checks import check_generation

CASES = {"record": 80, "maps": 150, "masks": 150, "metrics": 120, "recipes": 150, "yaml": 80, "tensors": 150}
CASES |= {"data set": 60}
OWN = str(Path(al.__file__).parent)
ODD = [
    None, True, False, -1, 0, 1, 3, 7, 2**70, -0.5, 0.5, 1.0, 1.5, float("nan"), float("inf"), "", " ", "x", "smoke",
    "zebra", "cpu", "../x", "a\u2028b", "{}", "{x}", [], [0], [1, "x"], [None], ["smoke"], (1, 2), {}, {"a": 1},
]  # fmt: skip
"""What a parameter, a line of YAML or a cell of a notebook can hold."""
ARRAYS = [
    np.zeros((9, 7)), np.ones((9, 7), bool), np.ones((9, 7), np.uint8), np.full((9, 7), 255, np.uint8), np.eye(9, 7),
    np.full((9, 7), np.nan), np.full((9, 7), np.inf), np.zeros((0, 7)), np.zeros(9), np.zeros((2, 9, 7)), np.eye(7, 9),
    np.full((9, 7), 3), np.full((9, 7), 1j), np.full((9, 7), "x"), [[0, 1], [1, 0]], [], None, torch.eye(9, 7), "x",
]  # fmt: skip
IMAGES = ("heat", "image", "mask", "truth", "masks", "heats", "truths", "self_attention")  # parameters that are arrays


def test_there_are_enough_cases():
    assert sum(CASES.values()) >= 500


def judge(action, says):
    """Run something; return its result, or None where attnlab refuses in words. AssertionError for another error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return action()
    except Exception as error:
        raised = traceback.extract_tb(error.__traceback__)[-1]
        words = len(str(error.args[0] if isinstance(error, KeyError) else error).split())
        if not raised.filename.startswith(OWN) or not raised.line.startswith("raise ") or words < 4:
            where = f"{raised.filename}:{raised.lineno}: {raised.line}"
            raised = f"{type(error).__name__}: {str(error)[:150]}"
            raise AssertionError(f"{says} gave {raised} at {where}") from error
        return None


def every(kind, case):
    """Run all cases of a kind, each with a seed of its own, and name every one that failed."""
    failed, refused = [], 0
    for number in range(CASES[kind]):
        try:
            refused += case(random.Random(f"{kind} {number}")) is None
        except AssertionError as error:
            failed.append(f"{number}: {error}")
    assert not failed, "\n".join(failed)
    return refused


def odd_call(draw, right, names, count=2):
    """Some right arguments with one or two replaced by something odd."""
    chosen = draw.sample(names, min(len(names), draw.randint(1, count)))
    return {**right, **{name: _odd(draw, name) for name in chosen}}


def _odd(draw, name):
    if name not in IMAGES:
        return draw.choice(ODD)
    return [draw.choice(ARRAYS) for _ in range(draw.randint(1, 3))] if name.endswith("s") else draw.choice(ARRAYS)


def test_parameters_of_recording(pipe, generate):
    names = ["layers", "steps", "branch", "keep", "texts", "self_attention", "dtype", "device", "generator", "parts"]
    names += ["agreement"]

    def case(draw):
        options = odd_call(draw, {}, names)

        def action():
            with al.record(pipe, **options) as recording:
                generate(steps=1)
            return recording

        made = judge(action, f"record({options})")
        assert count_hooks(pipe) == 0
        assert made is None or (len(made) == 1 and made.trace.steps == [0]), f"record({options}) recorded {made}"
        return made

    assert 0 < every("record", case) < CASES["record"]


def test_parameters_of_maps(pipe, generate, recording):
    maps = al.daam(recording)
    with al.record(pipe, agreement=8) as agreeing:
        generate(steps=1)
    common = ["layers", "steps", "heads", "mode"]
    functions = [
        (al.daam, {"recording": recording}, [*common, "per"]),
        (al.ovam, {"recording": recording, "text": "a tree"}, [*common, "text", "context", "padded", "per"]),
        (al.linear_daam, {"recording": recording}, [*common, "scaled"]),
        (al.goca, {"recording": agreeing}, ["text", "words", "layers", "mode"]),
        (maps.upscale, {"size": 8}, ["size", "mode"]),
        (al.seed, {"number": 7}, ["number"]),
        (maps.__getitem__, {"query": 1}, ["query"]),
        (recording.encode, {"text": "x"}, ["text"]),
        (al.propagate, {"maps": maps, "self_attention": torch.eye(4), "size": (2, 2)}, ["size", "power"]),
        (check_generation, {"pipe": pipe, "prompt": PROMPT}, CHECKED),
    ]

    def case(draw):
        function, right, names = draw.choice(functions)
        call = odd_call(draw, right, names)
        made = judge(lambda: [function(**call)], named(function, call))
        arrays = made[0].values() if made and isinstance(made[0], dict) else made or []
        values = [getattr(one, "values", one) for one in arrays if isinstance(one, np.ndarray | al.HeatMaps)]
        assert all(np.isfinite(one).all() and one.size for one in values), f"{named(function, call)} gave {values}"
        return made

    assert 0 < every("maps", case) < CASES["maps"]


CHECKED = ["prompt", "words", "steps", "guidance", "seed", "size"]


def named(function, call):
    """What was called, short enough to read."""
    return f"{function.__name__}({', '.join(f'{name}={repr(value)[:60]}' for name, value in call.items())})"


def test_parameters_of_masks():
    heat = np.random.default_rng(0).uniform(size=(9, 7))
    image = np.random.default_rng(1).integers(0, 256, (9, 7, 3), np.uint8)
    functions = [
        (masks.threshold_mask, {"heat": heat}, ["level", "heat"]),
        (masks.otsu_mask, {"heat": heat}, ["heat"]),
        (masks.dbscan_mask, {"heat": heat}, ["quantile", "level", "eps", "min_samples", "keep", "min_area", "heat"]),
        (masks.random_walker_mask, {"heat": heat, "image": image}, ["low", "high", "beta", "image", "heat"]),
        (masks.mask_by, {"settings": {"method": "otsu"}, "heat": heat, "image": image}, ["settings", "heat", "image"]),
        (masks.vote_mask, {"heats": [heat] * 3}, ["heats", "level", "agree"]),
    ]

    def case(draw):
        function, right, names = draw.choice(functions)
        call = odd_call(draw, right, names)
        made = judge(lambda: function(**call), named(function, call))
        fits = made is None or (made.dtype in (bool, np.uint8) and made.ndim == 2)
        assert fits, f"{named(function, call)} gave {made}"
        return made

    assert 0 < every("masks", case) < CASES["masks"]


def test_parameters_of_metrics():
    truth = np.random.default_rng(0).uniform(size=(9, 7)) > 0.5
    heat = truth.astype(float)
    functions = [
        (metrics.iou, {"mask": truth, "truth": truth}, ["mask", "truth"]),
        (metrics.miou_curve, {"heats": [heat], "truths": [truth]}, ["heats", "truths", "thresholds"]),
        (metrics.pointing_game, {"heat": heat, "truth": truth}, ["heat", "truth"]),
        (metrics.confusion, {"labels": truth, "predicted": truth, "num_classes": 2}, ["num_classes", "per_image"]),
    ]

    def case(draw):
        function, right, names = draw.choice(functions)
        call = odd_call(draw, right, names)
        return judge(lambda: function(**call), named(function, call))

    assert 0 < every("metrics", case) < CASES["metrics"]


RECIPE = {"prompts": [PROMPT], "classes": {"fire": "burning", "smoke": "smoke"}, "images": 2, "steps": 1}


def test_recipes():
    names = list(Recipe.__dataclass_fields__)

    def case(draw):
        call = odd_call(draw, RECIPE, names, 3)

        def action():
            recipe = Recipe(**call)
            recipe.check(al.load_pipeline("tiny", device="cpu").tokenizer) if draw.random() < 0.1 else None
            return recipe, len(recipe), recipe.digest

        return judge(action, f"Recipe({call})")

    assert 0 < every("recipes", case) < CASES["recipes"]


def damaged(draw, content):
    """Bytes with some of them flipped, dropped, doubled or cut off."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at, kind = draw.randrange(max(len(content), 1)), draw.randrange(4 if len(content) > 1 else 1)
        if kind == 0:
            content[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del content[at : at + draw.randint(1, 20)]
        elif kind == 2:
            content[at:at] = content[at : at + draw.randint(1, 20)]
        elif len(content) > 2:
            del content[max(at, 1) :]
    return bytes(content)


def test_recipe_files(tmp_path):
    path = Recipe(**RECIPE, lists={}).save(tmp_path / "recipe.yaml")
    content = path.read_bytes()

    def case(draw):
        path.write_bytes(damaged(draw, content))
        return judge(lambda: Recipe.load(path), f"a recipe of {path.read_bytes()}")

    assert 0 < every("yaml", case) < CASES["yaml"]


def test_files_of_tensors(recording, tmp_path):
    """A damaged file gives what it held, or is refused: never another map."""
    token = al.Token("thing", torch.ones(128), 0.5, metadata={"model": "tiny"})
    path, encoder = tmp_path / "file", recording.encoder
    linear = al.linear_daam(recording)
    library = al.TokenLibrary([token])
    kinds = [
        (recording.save, lambda: al.ovam(al.Recording.load(path, encoder), "a tree").values),
        (linear.save, lambda: al.LinearMap.load(path, encoder)["tree"]),
        (library.save, lambda: al.TokenLibrary.load(path)["thing"].value.numpy()),
    ]
    whole = []
    for save, read in kinds:
        save(path)
        whole.append((path.read_bytes(), read()))

    def case(draw):
        number = draw.randrange(len(kinds))
        content, expected = whole[number]
        path.write_bytes(damaged(draw, content))
        made = judge(kinds[number][1], f"a damaged file of kind {number}")
        assert made is None or np.array_equal(made, expected), f"a damaged file of kind {number} gave another result"
        return made

    assert 0 < every("tensors", case)


SAID_BY_NOTHING = ("README.md", "contact_sheet.png")  # for people to look at


def test_folders_of_data_sets(tmp_path):
    """Whatever is damaged: `verify_dataset` lists it or the folder is refused, and what can be read is a pair."""
    folder = tmp_path / "set"
    generate_dataset(Recipe(**RECIPE), folder)
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert verify_dataset(folder) == []

    def case(draw):
        path = draw.choice(list(files))
        path.write_bytes(damaged(draw, files[path]))
        found = judge(lambda: verify_dataset(folder), f"verify_dataset with a damaged {path.name}")
        judge(lambda: [pair.labels for pair in Dataset(folder)], f"Dataset with a damaged {path.name}")
        path.write_bytes(files[path])
        assert found != [] or path.name in SAID_BY_NOTHING, f"verify_dataset says nothing of a damaged {path.name}"
        return found

    every("data set", case)


@pytest.mark.parametrize("number", range(5))
def test_interrupts_are_passed_on(pipe, generate, number):
    """Ctrl-C at any module of the model: it ends the block, whole steps stay, no hook does."""
    draw = random.Random(number)
    module, calls = draw.choice(list(pipe.unet.modules())), Counter()

    def stop(*call):
        calls["all"] += 1
        if calls["all"] == 3:
            raise KeyboardInterrupt

    handle = module.register_forward_hook(stop)
    try:
        with al.record(pipe, keep="maps", texts=["a tree"], self_attention=16) as recording:
            generate(steps=4)
    except KeyboardInterrupt:
        assert not recording.traces or not recording.complete
    finally:
        handle.remove()
    assert count_hooks(pipe) == 0
