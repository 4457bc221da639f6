"""The study of scarce labels: who sees which scenes, what decides, what is compared, and that it goes on."""

import json
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from attnlab.metrics import class_ious
from attnlab.scenes import aerial
from experiments.bundled import train_aerial
from experiments.studies import joint_pairs, scarce_arms, scarce_labels, scarce_plan, scarce_sets, scarce_tables
from experiments.studies.plateau import Plateau, pairs_loss
from experiments.studies.scarce_arms import ARMS
from experiments.studies.scarce_jobs import ScarceLabels, ScarceParts
from experiments.studies.scarce_labels import ScarceRun

TUNING = scarce_sets.FIRST_TUNING_SET
STUDY = ScarceLabels(
    ratio=2, tuning_seeds=1, unlabeled=4, validation=5, tests=6, plateau=Plateau(steps=2, every=2, batch=2),
    channels=(32,), batch=2, drawing_steps=1, unlabeled_steps=2, shared_steps=2, own_steps=2, checkpoint=2,
)  # fmt: skip
PARTS = ScarceParts(STUDY, sizes=(3,), curve=(2, 3), sets=1)


def files(work):
    return {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file() and path.name != "record.json"}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All stages, in a process that is killed once, and then in this one."""
    work = tmp_path_factory.mktemp("scarce")
    code = "from tests.test_scarce_labels import PARTS, Path, ScarceRun; ScarceRun(PARTS, Path(%r)).run()"
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests")])
    code = code.replace("tests.test_", "test_") % str(work)
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, cwd=work)
    deadline = time.time() + 600
    while not list(work.glob("segmenters/*0900*")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait() != 0  # it was not through
    before = {path: when for path, when in files(work).items() if path.suffix == ".json" and path.parent != work}
    assert before
    ScarceRun(PARTS, work).run()
    after = files(work)
    assert all(after[path] == when for path, when in before.items())  # what was there was not made again
    return work


def test_nobody_sees_the_scenes_of_another():
    block, first = scarce_sets.BLOCK, scarce_sets.FIRST_LABELED_SEED
    starts = [scarce_sets.FIRST_UNLABELED_SEED, scarce_sets.FIRST_SCARCE_VALIDATION_SEED]
    starts += [scarce_sets.FIRST_SCARCE_TEST_SEED, train_aerial.FIRST_VALIDATION_SEED, train_aerial.FIRST_TEST_SEED]
    ranges = [(0, aerial.HELD_OUT), (first, first + block * (TUNING + 10))]  # all bundled models, all labeled sets
    ranges += [(start, start + 5000) for start in starts]
    assert all(end <= start for (_, end), (start, _) in pairwise(sorted(ranges)))
    assert max(joint_pairs.FIRST_FURTHER_SEED, train_aerial.FIRST_SEGMENTER_SEED) + 20_000 < aerial.HELD_OUT
    few, more = scarce_sets.labeled_set(1, 2), scarce_sets.labeled_set(1, 3)
    np.testing.assert_array_equal(few[1], more[1][:2])
    np.testing.assert_array_equal(scarce_sets.further_scenes(1, 2, 1)[0], more[0][2:])
    np.testing.assert_array_equal(more[0][0], aerial.render(first + block).image)
    with pytest.raises(ValueError, match="smaller sizes or ratios"):
        scarce_sets.further_scenes(0, 400, 601)


def test_a_killed_study_goes_on_and_trains_nothing_twice(done, monkeypatch, caplog):
    before = files(done)
    monkeypatch.setattr(scarce_labels, "train_to_plateau", None)  # would fail
    ScarceRun(PARTS, done).run()
    assert files(done) == before
    record = json.loads((done / "record.json").read_text())
    rows = record["segmenters"]
    assert {row["arm"] for row in rows} == set(ARMS) and {row["set"] for row in rows} == {0, TUNING}
    assert {row["scenes"] for row in rows if row["arm"] == "labels"} == {2, 3}
    assert all(("test" in row) == (row["set"] < TUNING) for row in rows)  # test scenes take no part in tuning
    drawn = [row for row in rows if row["arm"] == "drawn" and row["set"] == TUNING]
    assert sorted((row["weight"], row["seed"]) for row in drawn) == [("0.25", 0), ("1.0", 0)]
    assert not [row for row in rows if row["arm"] in ("filtered", "cleaned", "rare") and row["set"] == TUNING]
    models = {(row["model"], row["scenes"], row["set"]) for row in record["models"]}
    assert models == {("unlabeled", 4, 0)} | {(kind, 3, k) for kind in ("own", "shared") for k in (0, TUNING)}
    assert {(row["drawn"], row["set"]) for row in record["quality"]} == {
        (name, 0) for name in ("own", "shared", "rare")
    }
    assert len(scarce_tables.gain_rows(record)) == len(ARMS) - 1
    assert all(len(table.splitlines()) > 2 for table in scarce_tables.record_tables(record))
    with pytest.raises(ValueError, match="holds a run with other settings"):
        ScarceRun(replace(PARTS, study=replace(STUDY, ratio=1)), done).run(())
    with pytest.raises(TypeError):
        ScarceRun(replace(PARTS, sets=2), done).run(("curve",))  # a further set is trained, where it can be


def test_weights_are_chosen_by_validation_scenes_of_the_tuning_set(tmp_path):
    run = ScarceRun(replace(PARTS, study=replace(STUDY, tuning_seeds=2)), tmp_path)
    folder = tmp_path / "segmenters"
    folder.mkdir()

    def put(arm, n, k, weight, s, value):
        text = json.dumps({"validation": value, "test": [1 - value] * 7})
        (folder / f"{arm} {n:04d} {k:04d} {weight} {s:04d}.json").write_text(text)

    put("drawn", 3, TUNING, "0.25", 0, 0.9)
    put("drawn", 3, TUNING, "1.0", 0, 0.2)
    with pytest.raises(FileNotFoundError, match="run --stage tune first"):
        run.choose("drawn", 3)
    put("drawn", 3, TUNING, "0.25", 1, 0.1)
    put("drawn", 3, TUNING, "1.0", 1, 0.9)  # the better one in the mean over seeds
    for weight, value in (("0.25", 0.9), ("1.0", 0.1)):
        for s in range(2):
            put("drawn", 2, TUNING, weight, s, value)  # of another size
            put("drawn", 3, 0, weight, s, value)  # of a set that is not for tuning
            put("soft", 3, TUNING, weight, s, value)
    assert run.choose("drawn", 3) == run.choose("filtered", 3) == "1.0" and run.choose("soft", 3) == "0.25"
    assert run.choose("exact", 3) == run.choose("labels", 3) == "1"
    own = ScarceRun(replace(PARTS, study=replace(STUDY, own_weights=True)), tmp_path)
    with pytest.raises(FileNotFoundError):
        own.choose("filtered", 3)
    chosen = replace(own.parts, sets=2).arm_jobs(dict.fromkeys(((arm, 3) for arm in ARMS), "x"))[1]
    assert ("soft", 3, 1, "x", 0) in chosen and not [job for job in chosen if job[2] == TUNING or job[0] == "labels"]


def test_jobs_are_no_more_than_the_arms_need():
    parts = replace(PARTS, sets=2)
    few = replace(parts, arms=("rare", "exact"))
    assert few.tuned_arms() == ("drawn",) and few.drawing_jobs(True) == [("shared", 3, TUNING)]
    assert few.drawing_jobs(False) == [("rare", 3, 0), ("rare", 3, 1)]
    assert few.model_jobs(False) == ([("unlabeled", 4, 0)], [("shared", 3, 0), ("shared", 3, 1)])
    assert replace(PARTS, arms=("published",)).model_jobs(True) == ([], [("own", 3, TUNING)])
    assert replace(PARTS, arms=("consistent",)).model_jobs(True) == ([], [])
    own = replace(PARTS, arms=("rare",), study=replace(STUDY, own_weights=True))
    assert own.tuned_arms() == ("rare",) and {job[0] for job in own.tuning_jobs()[1]} == {"rare"}
    assert {job[2] for job in parts.curve_jobs()} == {0, 1} and len(replace(PARTS, sets=9).curve_jobs()) == 6
    wrong = [({"arms": ("none",)}, "no arm none: there are labels"), ({"sets": 0}, "0 sets")]
    wrong += [({"sizes": (400,)}, "sizes of 1 to 333"), ({"curve": (0,)}, "sizes of 1 to 333")]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            replace(PARTS, **options).check()


def test_each_segmenter_is_trained_on_what_its_job_says(done, monkeypatch):
    train, seen = scarce_labels.train_to_plateau, []

    def spy(*given):
        seen.append((given, train(*given)))
        return seen[-1][1]

    monkeypatch.setattr(scarce_labels, "train_to_plateau", spy)
    study = replace(STUDY, plateau=Plateau(steps=3, every=1, batch=2))
    run = ScarceRun(replace(PARTS, study=study), done)
    found = [run.train(*job) for job in (("labels", 3, 0, "1", 4), ("drawn", 3, 0, "0.25", 4), ("labels", 2, 1, "1", 0),
                                         ("soft", 3, TUNING, "1.0", 0))]  # fmt: skip
    labeled = scarce_sets.labeled_set(0, 3)
    for (pairs, classes, valid, settings, _, _, seed), _ in seen[:2]:
        np.testing.assert_array_equal(pairs[0], labeled[0])
        np.testing.assert_array_equal(pairs[1], labeled[1])
        np.testing.assert_array_equal(valid[0], scarce_sets.scarce_validation(5)[0])
        assert classes == aerial.CLASSES and settings == study.plateau and seed == 4  # arms of a place are paired
    assert seen[0][0][4] is None and seen[1][0][4] is not None and seen[1][0][5] == 0.25 and seen[2][0][6] == 100
    np.testing.assert_array_equal(seen[2][0][0][0], scarce_sets.labeled_set(1, 2)[0])
    wanted = class_ious(seen[1][1].evaluate(*scarce_sets.scarce_tests(6)))
    np.testing.assert_allclose(np.array(found[1]["test"], float), wanted, atol=1e-5)
    assert found[1]["validation"] == max(miou for _, miou in seen[1][1].curve) and "test" not in found[3]
    assert pickle.loads(pickle.dumps(run.train)).__self__ == run  # it goes to other processes
    assert (done / "teachers/0003 0000 0004/classes.json").exists()


def test_joint_models_learn_what_their_job_says(done, monkeypatch):
    fitted, drawn = [], []
    monkeypatch.setattr(scarce_labels.pair_generators, "fit_and_keep", lambda *given: fitted.append(given))
    monkeypatch.setattr(scarce_labels.pair_generators, "draw_pairs", lambda *given, **more: drawn.append((given, more)))
    run = ScarceRun(PARTS, done)
    for job in (("unlabeled", 4, 0), ("own", 3, 2), ("shared", 3, 2), ("shared", 3, 5)):
        run.train_model(*job)
    (of_many, many), (of_few, few), (of_both, both) = ((one[0], one[1]) for one in fitted[:3])
    labeled, unlabeled = scarce_sets.labeled_set(2, 3), scarce_sets.unlabeled_scenes(4)
    np.testing.assert_array_equal(few[1], labeled[1])
    np.testing.assert_array_equal(many[0], unlabeled[0])
    np.testing.assert_array_equal(both[1], np.concatenate([labeled[1][[0, 1, 2, 0]], unlabeled[1]]))
    assert (many[1] == 255).all() and of_many.metadata["proportions"] == []
    np.testing.assert_allclose(of_few.metadata["proportions"], of_both.metadata["proportions"], atol=1e-4)
    assert of_both.metadata["mean"] == of_many.metadata["mean"] != of_few.metadata["mean"]
    assert [one[2].name for one in fitted[:3]] == ["unlabeled 0004 0000", "own 0003 0002", "shared 0003 0002"]
    assert [one[3].seed for one in fitted] == [0, 3, 3, 6]  # sets have batches and starting weights of their own
    validation = scarce_sets.scarce_validation(5)
    for _, _, _, schedule, check, batch in fitted:
        np.testing.assert_array_equal(check[0], validation[0])
        assert schedule.steps == 2 and schedule.checkpoint == 2 and batch == 2
    assert (fitted[0][4][1] == 255).all()  # nor do labels of validation scenes decide about unlabeled ones
    np.testing.assert_array_equal(fitted[1][4][1], validation[1])
    run.draw("rare", 3, 2)
    run.draw("own", 3, 5)
    assert [(given[2:], more["rare"], given[0].name) for given, more in drawn] == [
        ((6, 3), True, "shared 0003 0002"), ((6, 6), False, "own 0003 0005")
    ]  # fmt: skip


def test_what_is_added_is_that_of_the_same_set(done):
    run = ScarceRun(PARTS, done)
    assert run._added("labels", 3, 0) is None
    np.testing.assert_array_equal(run._added("exact", 3, 1)[0], scarce_sets.further_scenes(1, 3, 6)[0])
    np.testing.assert_array_equal(run._added("consistent", 3, 1)[0], scarce_sets.unlabeled_scenes(4)[0])
    files = {"published": "own 0003 0900", "drawn": "shared 0003 0900", "soft": "shared 0003 0900"}
    for arm, name in files.items():
        with np.load(done / f"drawn/{name}.npz") as file:
            np.testing.assert_array_equal(run._added(arm, 3, TUNING)[0], file["images"])
            assert len(file["images"]) == 6
    with np.load(done / "drawn/rare 0003 0000.npz") as file:
        np.testing.assert_array_equal(run._added("rare", 3, 0)[1], file["labels"])
    assert (run._added("rare", 3, 0)[0] != run._added("drawn", 3, 0)[0]).any()


def test_levers_change_masks_and_nothing_else(done):
    run = ScarceRun(PARTS, done)
    labeled, added = scarce_sets.labeled_set(0, 3), run._added("drawn", 3, 0)
    teacher = scarce_labels.Segmenter.from_pretrained(run._teacher(3, 0, 0))

    def value(loss):
        return float(loss(teacher, teacher, np.random.default_rng(0)).detach())

    for arm in ("published", "drawn", "exact", "rare"):
        loss, notes = scarce_arms.arm_loss(arm, 2, labeled, added, None)
        assert value(loss) == value(pairs_loss(added, 2)) and notes == {}
    cleaned = scarce_arms.clean_regions(added[1], scarce_arms.SMALLEST_REGION)
    loss, notes = scarce_arms.arm_loss("cleaned", 2, labeled, added, None)
    assert value(loss) == value(pairs_loss((added[0], cleaned), 2)) and notes["changed"] > 0 == notes["ignored"]
    loss, notes = scarce_arms.arm_loss("filtered", 2, labeled, added, teacher)
    assert 0 < notes["ignored"] == notes["changed"] < 1
    losses = scarce_arms.pixel_losses(teacher, *labeled)
    limits = scarce_arms.class_losses(losses, labeled[1], 7)  # of the labeled scenes, not of the drawn ones
    kept = scarce_arms.filter_pixels(scarce_arms.pixel_losses(teacher, *added), added[1], limits)
    assert value(loss) == value(pairs_loss((added[0], kept), 2))
    other = added[0], np.zeros_like(added[1])
    for arm in ("soft", "consistent"):  # neither looks at masks
        assert value(scarce_arms.arm_loss(arm, 2, labeled, added, teacher)[0]) == value(
            scarce_arms.arm_loss(arm, 2, labeled, other, teacher)[0]
        )
    assert scarce_arms.arm_loss("labels", 2, labeled, None, None) == (None, {})


def rows(arm, n, values, weight="1.0"):
    """Rows of an arm with mIoU by set and seed."""
    fixed = {"arm": arm, "scenes": n, "weight": weight, "validation": 0.5, "step": 7}
    return [fixed | {"set": k, "seed": s, "test": [x, x, None]} for (k, s), x in values.items()]


def test_gains_are_paired_by_set_and_corrected_over_all_arms():
    level = {0: 0.1, 1: 0.5, 2: 0.3, 3: 0.9}  # sets differ by far more than arms do
    base = {(k, s): x + 0.001 * s for k, x in level.items() for s in range(2)}
    drawn = {(k, s): base[k, s] + 0.01 * (k + 1) for k in range(3) for s in range(2)}  # of three sets: 0.01, 0.02, 0.03
    exact = {(k, 0): base[k, 0] + 0.2 + 0.001 * k for k in range(3)}
    consistent = {(k, s): base[k, s] + 0.005 * (-1) ** k for k in range(2) for s in range(2)}
    tuning = [row | {"arm": "soft", "set": TUNING} for row in rows("labels", 25, {(0, 0): 0.4})]
    for row in tuning:
        del row["test"]
    record = {"segmenters": [*rows("exact", 25, exact), *rows("drawn", 25, drawn), *rows("labels", 25, base), *tuning,
                             *rows("consistent", 25, consistent), *rows("drawn", 50, drawn)]}  # fmt: skip
    found = {row["arm"]: row for row in scarce_tables.gain_rows(record)}
    assert list(found) == ["drawn", "consistent", "exact"]  # none of 50 scenes, where labels alone are missing
    one = found["drawn"]
    assert one["gain"] == pytest.approx(0.02) and one["sets"] == 3 and one["mIoU"] == pytest.approx(0.3005 + 0.02)
    error, p = 0.01 / np.sqrt(3), 0.0741799
    assert found["exact"]["p"] < 0.001 and one["p"] == pytest.approx(2 * p, abs=1e-4)  # two that are left
    half = 6.2053 * error  # Student's t at 0.0125, two degrees of freedom
    assert one["smallest"] == pytest.approx(half, rel=1e-3) and one["low"] == pytest.approx(0.02 - half, abs=1e-5)
    assert one["high"] == pytest.approx(0.02 + half, abs=1e-5)
    assert one["over consistent"] == pytest.approx((0.005 + 0.025) / 2)
    assert found["consistent"]["over consistent"] is None
    table = scarce_tables.gains_markdown(record)
    assert "| +0.020 |" in table and table.count("\n") == 4
    curve = scarce_tables.curve_table(record).splitlines()
    assert len(curve) == 3 and curve[2].startswith("| 25 | 0.500 | 0.451 | 7 | 8")


def test_the_plan_counts_every_training_once():
    parts = replace(PARTS, study=ScarceLabels(), sizes=(50,), curve=(50,), sets=4)
    hours = scarce_plan.expected_hours(parts)
    labeled = 2000 * scarce_plan.SECONDS["labeled step"] + 20 * scarce_plan.SECONDS["look"]
    assert hours["curve"] == pytest.approx(3 * labeled / 3600)
    alone = scarce_plan.expected_hours(replace(parts, arms=("labels",)))
    assert alone["arms"] == pytest.approx(labeled / 3600)  # of the fourth set; the curve has the others
    assert alone["generators"] == 0 and alone["tune"] == pytest.approx(3 * labeled / 3600)
    table = scarce_plan.plan_table(parts)
    assert "4 sets, 8 tests" in table and f"| all | {sum(hours.values()):.1f} |" in table


def test_the_command_plans_and_refuses(capsys, caplog, tmp_path):
    with caplog.at_level("INFO"):
        scarce_labels.main(["--stage", "plan", "--work", str(tmp_path / "none")])
    assert "core hours" in caplog.text and not (tmp_path / "none").exists()
    with pytest.raises(SystemExit):
        scarce_labels.main(["--arms", "none", "--work", str(tmp_path / "none")])
    assert "no arm none: there are labels" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        scarce_labels.main(["--help"])
    assert "--own-weights" in capsys.readouterr().out
