"""The bench of instances: COCO's own numbers, intervals, and a small run from end to end."""

import contextlib
import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from attnlab.scenes import street
from experiments.studies import cut_instances
from experiments.studies.cut_instances import average_precision, main, match_things, summarize_cuts


def annotation(image, kind, box, score=None, **more):
    mask = np.zeros((64, 64), bool)
    mask[box[0] : box[2], box[1] : box[3]] = True
    found = cut_instances._annotation(mask, image, street.CLASSES[kind]) | more
    return found | {"score": score} if score is not None else found


def drawn(seed, images=5):
    """Random things of two classes, and random findings near and far from them."""
    rng, truths, found = np.random.default_rng(seed), [], []
    for image, kind in itertools.product(range(images), (6, 8)):
        for _ in range(rng.integers(0, 4)):
            y, x = rng.integers(0, 40, 2)
            height, width = rng.integers(3, 20, 2)  # some are too small to count
            crowd = int(rng.uniform() < 0.15)
            truths.append(annotation(image, kind, (y, x, y + height, x + width), iscrowd=crowd))
            for _ in range(rng.integers(0, 3)):
                dy, dx = rng.integers(-2, 4, 2).clip(min=(-y, -x))
                box = (y + dy, x + dx, y + dy + height, x + dx + width)
                found.append(annotation(image, kind, box, float(rng.uniform())))
    return truths, found


@pytest.mark.parametrize("seed", range(6))
def test_ap50_is_that_of_coco(seed):
    truths, found = drawn(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        both = []
        for annotations in (truths, found):
            one = COCO()
            one.dataset = {
                "info": {},
                "images": [{"id": i, "height": 64, "width": 64} for i in range(1, 6)],
                "categories": [{"id": 6}, {"id": 8}],
                "annotations": [{"iscrowd": 0, **a, "id": i} for i, a in enumerate(annotations, 1)],
            }
            one.createIndex()
            both.append(one)
        measured = COCOeval(*both, "segm")
        measured.params.areaRng[0] = [0.004 * 64**2, 1e10]
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    assert average_precision(*match_things(truths, found, 5), 5) == pytest.approx(measured.stats[1], abs=1e-9)


def test_a_scene_drawn_twice_counts_twice():
    """One scene with its thing found, one without: AP50 1/2; of the first twice 2/3, to the 101 steps of recall."""
    truths = [annotation(image, 8, (0, 0, 20, 20)) for image in (0, 1)]
    rows = match_things(truths, [annotation(0, 8, (0, 0, 20, 18), 0.5)], 2)
    bench = cut_instances._Bench(*rows)
    for weights, expected in (((1, 1), 51 / 101), ((2, 1), 67 / 101), ((1, 0), 1), ((0, 1), 0)):
        assert bench.precision(np.array(weights)) == pytest.approx(expected)
    assert np.isnan(bench.precision(np.array([0, 0])))


def test_intervals_and_differences():
    """A method that finds every thing against one that finds those of half of the scenes."""
    things = [(i, 8, 1) for i in range(40)]
    better, worse = ([(i, 8, 0.5, True) for i in range(0, 40, step)] for step in (1, 2))
    results = {
        ("tiny", seed): {
            "things": dict.fromkeys(("exact", "words"), things),
            "found": {task: [better, worse] for task in ("exact", "words")},
        }
        for seed in (0, 1)
    }
    settings = [{"method": "connected"}, {"method": "dbscan"}]
    found = summarize_cuts(results, settings, ["tiny"], [0, 1], [i < 10 for i in range(40)], 200)
    assert found["AP50"]["exact"]["all"]["connected"]["all models"] == [1.0, 1.0, 1.0]
    mean, low, high = found["AP50"]["words"]["all"]["dbscan"]["tiny"]
    assert mean == pytest.approx(51 / 101, abs=1e-4) and 0.3 < low < 0.45 and 0.55 < high < 0.7
    first = found["differences"][0]
    assert first["of"] == ["connected", "dbscan"] and first["AP50"][1] > 0 and first["p"] == pytest.approx(2 / 201)
    assert first["p by Holm"] == pytest.approx(8 / 201)  # of two tasks, with all scenes and those that touch
    assert found["touching"] == 10 and found["scenes"] == 40


def test_scenes_whose_things_touch():
    forest = next(s for s in map(street.render, itertools.count(street.HELD_OUT)) if "forest" in s.caption)
    lonely = next(s for s in map(street.render, itertools.count(street.HELD_OUT)) if s.instances.max() == 1)
    assert cut_instances._touches(forest) and not cut_instances._touches(lonely)


def test_a_small_run_goes_on_and_repeats(tmp_path):
    """The second call reads what the first one found, and says the same."""
    given = ["--models", "tiny", "--tuning", "2", "--scenes", "4", "--seeds", "1", "--resamples", "10"]
    given += ["--workers", "1", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "found.json")]
    main([*given, "--picture", str(tmp_path / "cuts.png")])
    text = (tmp_path / "found.json").read_text()
    found = json.loads(text)
    assert [one["method"] for one in found["settings"]] == ["connected", "dbscan", "edges"]
    exact = found["AP50"]["exact"]["all"]["connected"]["all models"][0]
    assert 0.5 < exact <= 1 and exact >= found["AP50"]["words"]["all"]["connected"]["all models"][0]
    assert len(found["tried"]) == len(cut_instances.CUT_GRID) and len(found["differences"]) == 12
    assert Image.open(tmp_path / "cuts.png").width > 300
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    main(given)
    assert (tmp_path / "found.json").read_text() == text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()} == kept
    with pytest.raises(SystemExit):
        main([*given, "--seeds", "0"])
