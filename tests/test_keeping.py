"""Records that are kept, of those that are made: the shortest run with what is wanted, however it was interrupted."""

import hashlib
import json
import shutil
import time
from dataclasses import replace
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from attnlab.dataset import Dataset, Filters, Recipe, generate_dataset, making, shards, verify_dataset
from attnlab.dataset.keeping import ENOUGH, Originals, Selection, classes_of, count_reasons

RECIPE = Recipe(
    prompts=["a burning house with fire and smoke", "a house and a tree", "a burning tree with fire"],
    classes={"fire": "fire", "smoke": "smoke"},
    kept={"fire": 3, "smoke": 4, "background": 2},
    steps=1,
    batch=2,
    shard=1,
    threads=1,
    filters=Filters(area=(0.05, 0.95), flat=None, blank=None, duplicates=None),
)


def line(index, *classes, rejected=None, hash=0, negative=False):
    """A record as a shard has it."""
    areas = {"fire": None, "smoke": 0.0} | dict.fromkeys(classes, 0.1)
    return {"index": index, "areas": areas, "rejected": rejected, "hash": f"{hash:016x}", "negative": negative}


@pytest.mark.parametrize("most", [0, 2, 2.5, 30, 64])
def test_near_duplicates_are_those_of_a_plain_loop(most):
    """Of hashes that differ from earlier ones in few bits, more of them than there was room for at first."""
    rng = np.random.default_rng(0)
    hashes = [int(x) for x in rng.integers(0, 2**64, 1500, np.uint64)]
    flips = [sum(1 << int(bit) for bit in rng.choice(64, rng.integers(6), replace=False)) for _ in hashes]
    hashes += [own ^ flip for own, flip in zip(hashes, flips, strict=True)]
    order = rng.permutation(3000)
    hashes = [hashes[i] for i in order]
    originals, kept = Originals(), []
    for index, own in enumerate(hashes):
        near = next((i for i, other in kept if (own ^ other).bit_count() <= most), None)
        assert originals.near(own, most) == near
        if near is None:
            kept.append((index, own))
            originals.add(index, own)
    assert len(kept) == 1 if most == 64 else most == 30 or 1024 < len(kept) < 3000


def test_records_are_chosen_one_by_one():
    """Each with the first reason that holds; a class that has enough comes along with another that has not."""
    recipe = replace(RECIPE, kept={"fire": 2, "smoke": 1, "background": 1}, filters=Filters(duplicates=0))
    selection = Selection(recipe)
    for given, reason in [
        (line(0, "fire", rejected="mask too small", hash=1), "mask too small"),
        (line(1, "fire", hash=1), None),
        (line(2, "fire", hash=1), "near duplicate of 000001"),
        (line(3, "smoke", hash=2), None),
        (line(4, "smoke", hash=3), ENOUGH),
        (line(5, "smoke", hash=3), ENOUGH),  # 4 is not kept, so this one is no duplicate
        (line(6, hash=4), ENOUGH),  # all of it is ignored: no class, and no negative
        (line(7, "fire", "smoke", hash=5), None),
        (line(8, "fire", hash=6), ENOUGH),
    ]:
        assert selection.judge(given) == reason and not selection.is_enough
    assert selection.counts == {"fire": 2, "smoke": 2, "background": 0} and selection.lacking == {"background": 1}
    assert selection.judge(line(9, negative=True, hash=7)) is None and selection.is_enough


def test_any_record_counts_where_no_class_is_named():
    selection = Selection(replace(RECIPE, kept=2, images=None))
    assert [selection.judge(line(i, *names)) for i, names in enumerate([("fire",), ()])] == [None, None]
    assert selection.is_enough and selection.counts == {"images": 2}
    every = Selection(replace(RECIPE, kept=None))
    assert every.judge(line(0)) is None and not every.is_enough and not every.lacking


def test_classes_of_a_record_are_those_with_an_area():
    assert classes_of(line(0, "smoke")) == ["smoke"] and classes_of(line(0)) == []
    assert classes_of(line(0, negative=True)) == ["background"]


def test_reasons_are_counted():
    given = ["near duplicate of 000001", "flat map of fire", "near duplicate of 000002", "flat map of smoke"]
    assert list(count_reasons(given).items()) == [
        ("near duplicate", 2),
        ("flat map of fire", 1),
        ("flat map of smoke", 1),
    ]


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return generate_dataset(RECIPE, tmp_path_factory.mktemp("made") / "kept")


def test_a_data_set_ends_with_the_last_record_that_is_wanted(kept):
    """It is what the records of the same recipe without an end say, cut off there."""
    lines = sorted([*kept.records, *kept.rejected], key=lambda one: one["index"])
    assert [one["index"] for one in lines] == list(range(len(lines))) and len(lines) < len(RECIPE)
    assert [one["prompt"] for one in lines] == [RECIPE.prompts[i % 3] for i in range(len(lines))]
    counts = dict.fromkeys(RECIPE.kept, 0)
    for number, one in enumerate(lines):
        short = {name for name, n in RECIPE.kept.items() if counts[name] < n}
        assert short, f"there is enough without record {number}"
        has = {name for name, area in one["areas"].items() if area} or {"background"}
        if "reason" not in one:
            assert has & short
            counts.update({name: counts[name] + 1 for name in has})
        else:
            assert (one["reason"] == ENOUGH) == (not has & short) or one["reason"].startswith(("mask", "no mask"))
    assert all(counts[name] >= n for name, n in RECIPE.kept.items())
    assert any(one["reason"] == ENOUGH for one in kept.rejected), "or the classes would not need to be balanced"


def test_negatives_are_marked(kept):
    negatives = [pair for pair in kept if pair.metadata["negative"]]
    assert len(negatives) == 2 and not any(pair.labels.any() for pair in negatives)
    assert all(pair.labels.any() for pair in kept if not pair.metadata["negative"])
    assert {pair.metadata["prompt"] for pair in negatives} == {"a house and a tree"}


def test_the_card_says_what_was_wanted_and_why_others_were_rejected(kept):
    card = (kept.folder / "README.md").read_text("utf-8")
    made = len(kept) + len(kept.rejected)
    assert f"{made} images were made, {len(kept)} kept (3 fire, 4 smoke, 2 background were wanted, in at most " in card
    assert "| 0 | background | nothing: negatives | 2 |  | 2 |" in card
    refused = sum(one["reason"] == ENOUGH for one in kept.rejected)
    assert f"| reason | images |\n| --- | --- |\n| {ENOUGH} | {refused} |" in card


def test_two_processes_make_the_same_and_little_more(kept, tmp_path, monkeypatch):
    """Beyond the shard that ends the data set, not more than each of them has begun."""
    made, finish = [], making._finish

    def look(out, recipe):
        made.extend(path for path in (out / making.SHARDS).iterdir() if path.is_dir())
        finish(out, recipe)

    monkeypatch.setattr(making, "_finish", look)
    found = generate_dataset(RECIPE, tmp_path / "kept", workers=2)
    assert contents(found.folder) == contents(kept.folder)
    assert -(-(len(kept) + len(kept.rejected)) // 2) <= len(made) <= -(-(len(kept) + len(kept.rejected)) // 2) + 2


def test_threads_of_a_cluster_make_the_same(kept, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 2, "dashboard_address": None, "processes": False}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        found = generate_dataset(RECIPE, tmp_path / "kept", client=client)
        assert contents(found.folder) == contents(kept.folder)


def test_killed_at_any_moment_it_ends_with_the_same(kept, tmp_path):
    context, out, rng = get_context("forkserver"), tmp_path / "kept", np.random.default_rng(0)
    context.set_forkserver_preload([making.__name__])
    killed = 0
    for _ in range(4):
        before = set(out.glob(f"{making.SHARDS}/*.partial-*"))
        maker = context.Process(target=generate_dataset, args=(RECIPE, out))
        maker.start()
        while maker.is_alive() and not set(out.glob(f"{making.SHARDS}/*.partial-*")) - before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        killed += maker.is_alive()
        maker.kill()
        maker.join()
    assert killed > 1
    assert contents(generate_dataset(RECIPE, out).folder) == contents(kept.folder)


def test_cut_off_while_it_is_put_together(kept, tmp_path, monkeypatch):
    """With a shard too many: before each file that is moved, written or deleted."""

    def cut(function, calls, last):
        def wrapped(*given, **named):
            if next(calls) == last:
                raise KeyboardInterrupt
            return function(*given, **named)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(making, "_finish", cut(None, count(), 0))
        with pytest.raises(KeyboardInterrupt):
            generate_dataset(RECIPE, tmp_path / "all")
    (tmp_path / "all" / making.SHARDS / "enough").unlink()
    shards.make_shard(RECIPE, tmp_path / "all", -(-(len(kept) + len(kept.rejected)) // 2))
    whole = {place: getattr(*place) for place in ((Path, "replace"), (Path, "rename"), (shutil, "rmtree"))}
    for cuts in count(0, 3):
        out, calls = shutil.copytree(tmp_path / "all", tmp_path / str(cuts)), count()
        with monkeypatch.context() as patch:
            for place, function in whole.items():
                patch.setattr(*place, cut(function, calls, cuts))
            try:
                generate_dataset(RECIPE, out)
                break
            except KeyboardInterrupt:
                pass
        assert contents(generate_dataset(RECIPE, out).folder) == contents(kept.folder)
    assert cuts > 20


def test_too_few_are_kept_with_a_warning_that_says_why(tmp_path):
    recipe = replace(RECIPE, images=2, kept={"fire": 3, "background": 2}, filters=Filters(area=(0.98, 0.99)))
    said = (
        r"few lacks 3 of 3 fire, after all 6 images; rejected: .*mask too small \d.*; change prompts or filters, or al"
    )
    for _ in ("made", "read again"):
        with pytest.warns(UserWarning, match=said):
            found = generate_dataset(recipe, tmp_path / "few")
    assert len(found) == 2 and verify_dataset(found.folder) == []
    assert "**3 fire are lacking** after all 6" in (found.folder / "README.md").read_text("utf-8")


def edit(folder, name, change):
    path = folder / name
    lines = [json.loads(text) for text in path.read_text("utf-8").splitlines()]
    path.write_text("".join(json.dumps(one) + "\n" for one in change(lines)), "utf-8")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("metadata", lambda x: x[:-1], "are lacking, though"),
        ("metadata", lambda x: x[1:], "records, the recipe"),
        ("metadata", lambda x: [*x, x[-1] | {"index": x[-1]["index"] + 1}], "though the recipe wants none after"),
        ("metadata", lambda x: [*x[:-1], x[-1] | {"negative": None}], "negative is None, by its masks"),
        ("metadata", lambda x: [one | {"negative": not one["negative"]} for one in x], "by its masks False"),
        (
            "rejected",
            lambda x: [one | {"reason": "enough of its classes"} for one in x[::-1]],
            "rejected.jsonl was altered",
        ),
        ("metadata", lambda x: [one | {"areas": {"fire": 0.5}} for one in x], "though the recipe wants no more of its"),
    ],
)
def test_a_run_that_was_altered_is_listed(kept, tmp_path, name, change, said):
    folder = shutil.copytree(kept.folder, tmp_path / "kept")
    assert verify_dataset(folder) == []
    edit(folder, f"{name}.jsonl", change)
    problems = verify_dataset(folder)
    assert any(said in problem for problem in problems), problems


def test_a_worker_stops_where_there_is_enough(tmp_path):
    (tmp_path / making.SHARDS).mkdir()
    (tmp_path / making.SHARDS / "enough").touch()
    assert shards.make_shard(RECIPE, tmp_path, 3) == 0
    assert [path.name for path in (tmp_path / making.SHARDS).iterdir()] == ["enough"]


def test_a_late_worker_does_not_open_a_finished_data_set(kept):
    with pytest.raises(FileNotFoundError):
        shards.make_shard(RECIPE, kept.folder, 0)
    assert making._is_finished(kept.folder) and len(Dataset(kept.folder)) == len(kept)
