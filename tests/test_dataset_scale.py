"""The study of large data sets, small: what it writes is a data set, what it kills changes nothing."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from attnlab.dataset import Dataset, generate_dataset, verify_dataset
from experiments.studies import dataset_scale


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "index"
    dataset_scale.make_index(folder, 120)
    return folder


def test_a_large_index_is_a_data_set(index):
    dataset = Dataset(index)
    assert len(dataset) == 120 and [line["index"] for line in dataset.records] == list(range(120))
    assert dataset[119].metadata["prompt"] == dataset.recipe.prompt(119) and dataset[119].labels.any()
    one, other = dataset.records[3]["versions"], dataset.records[119]["versions"]
    assert one["torch"] is other["torch"] and all(a is b for a, b in zip(one, other, strict=True)), "held once"
    assert (index / "images/000119.png").samefile(index / "images/000019.png")


@pytest.mark.parametrize("name", dataset_scale.STAGES)
def test_stages_do_what_they_say(index, tmp_path, name):
    found = dataset_scale.STAGES[name](Dataset(index), tmp_path)
    objects = {"COCO": "coco.json", "COCO polygons": "polygons.json"}
    if name in objects:
        assert len(json.loads((tmp_path / objects[name]).read_text())["images"]) == 120 and found > 10_000
    elif name == "split":
        assert sum(found.values()) == 120
    else:
        assert found == (0 if name == "near duplicates" else 120)


def test_a_data_set_is_made_and_watched(tmp_path):
    recipe = replace(dataset_scale.recipe_of(20), steps=1, batch=4, shard=1)
    made = dataset_scale.measure_making("one", recipe, tmp_path / "made")
    assert made["files"] == len([path for path in (tmp_path / "made").rglob("*") if path.is_file()])
    assert made["killed after shards"] is None and verify_dataset(tmp_path / "made") == []
    generate_dataset(recipe, tmp_path / "again")
    assert dataset_scale.hash_files(tmp_path / "again")["sha256 of all"] == made["sha256 of all"]


def test_rate_of_drawing_plainly_and_as_a_data_set(tmp_path, monkeypatch):
    """By a clock that a plain image moves by 1 and a shard by 5."""
    now, making, seed = [0], dataset_scale.make_shard, dataset_scale.seed

    def make_shard(*given):
        now[0] += 5
        return making(*given)

    def seed_of(number):
        now[0] += 1
        return seed(number)

    monkeypatch.setattr(dataset_scale, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(dataset_scale, "make_shard", make_shard)
    monkeypatch.setattr(dataset_scale, "seed", seed_of)
    recipe = replace(dataset_scale.recipe_of(40), batch=2, shard=2, steps=1)
    found = dataset_scale.measure_rate(recipe, 2, tmp_path / "rate")
    assert found == {"images": 4, "rounds": 2, "seconds": {"plain": 4, "data set": 5}, "rate": [0.8, 0.8, 0.8]}
    assert len((tmp_path / "rate/.parts/00000/records.jsonl").read_text().splitlines()) == 4


def test_workers_of_dask_keep_no_profiles():
    """After two of the seconds of which each would keep one: what they hold would grow for 1,000 seconds."""
    pytest.importorskip("distributed")
    with dataset_scale.begin_cluster() as client:
        client.submit(time.sleep, 2.5).result()
        kept = client.run(lambda dask_worker: len(dask_worker.profile_history))
    assert list(kept.values()) == [0, 0]


def test_memory_that_grows_has_a_slope():
    flat, steep = ([(n, 100 + slope * n) for n in range(0, 1000, 10)] for slope in (0, 0.5))
    assert dataset_scale.fit_memory(flat)["MB per 1000 records"] == 0
    assert dataset_scale.fit_memory(steep)["MB per 1000 records"] == 500
    assert dataset_scale.fit_memory(steep[:2]) == {"samples": 2}
