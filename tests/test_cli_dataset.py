"""attnlab dataset: from a recipe to splits that other tools read, by lines that are typed; what is wrong is said."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image
from test_splits import made, picture

from attnlab.cli.commands import main
from attnlab.dataset import Dataset, Recipe, verify_dataset

FEW = {"lists": {"thing": ["house", "car"]}, "prompts": ["water and a {thing}"], "classes": {"water": "water"}}
FEW |= {"steps": 2, "threads": 1, "images": 2, "filters": {"area": None, "flat": None, "blank": None}}


def run(capsys, *argv):
    """Exit status, standard output, standard error."""
    try:
        status = main(["dataset", *map(str, argv)])
    except SystemExit as stop:  # argparse's own way out
        status = stop.code
    return status, *capsys.readouterr()


@pytest.fixture(autouse=True)
def _signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a recipe in it, and a shell standing there; home is elsewhere."""
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(FEW))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A data set of 40 rendered scenes, the last four twice."""
    return made(tmp_path_factory.mktemp("made") / "scenes", [*range(40), *range(36, 40)], ["water", "a fire"]).folder


def test_what_is_made_is_verified_shown_and_counted(here, capsys):
    status, out, err = run(capsys, "make", "few.yaml", "~/my floods")
    dataset = Dataset(here / "home/my floods")
    assert (status, len(dataset)) == (0, 4) and "4 pairs of water; 0 rejected" in out and "4/4" in err
    assert verify_dataset(dataset.folder) == []
    assert run(capsys, "make", "~/my floods")[0] == 0  # goes on where nothing is left to do
    status, out, _ = run(capsys, "verify", "~/my floods")
    assert status == 0 and out.endswith("all is well\n")
    status, out, _ = run(capsys, "preview", "home/my floods")
    assert status == 0 and out.splitlines()[-1] == "my floods_preview.png"
    assert Image.open("my floods_preview.png").size[0] > 4 * 128
    status, out, _ = run(capsys, "stats", "--json", "home/my floods")
    counts = json.loads(out)["home/my floods"]
    assert counts["prompts"] == {"water and a house": [2, 0], "water and a car": [2, 0]}
    assert counts["classes"]["water"]["pixels"] == sum(int((pair.labels == 1).sum()) for pair in dataset)
    (dataset.folder / "masks/000001.png").unlink()
    status, out, _ = run(capsys, "verify", "home/my floods")
    assert status == 1 and "masks/000001.png is missing" in out


def test_a_dry_run_writes_nothing_and_values_can_be_typed(here, capsys):
    status, out, _ = run(
        capsys, "make", "few.yaml", "made", "--dry-run", "-p", "kept", "{water: 3}", "-p", "images", "50"
    )
    assert status == 0 and "prompts: 2; images: 100 at most; model: tiny\n  water and a house\n" in out
    seconds, size = re.search(r"measured on 2 images: ([\d.]+) s and (\d+) kB each", out).groups()
    assert float(seconds) > 0 and 2 <= int(size) < 30  # an image of 64 x 64, its mask and its line
    assert (
        "classes: water; kept: {'water': 3}\n" in out
        and "3 images, if all are kept, of 50 in shards of 50: 0:00:" in out
        and "all 100 images: 0:" in out
    )
    assert [path.name for path in here.iterdir()] == ["few.yaml"]


def test_recipes_that_come_along_are_listed(capsys):
    status, out, _ = run(capsys, "recipes")
    assert status == 0 and re.search("^flood-tiny +Floods: ", out, re.M) and len(out.splitlines()) >= 8


def test_photos_are_previewed_and_estimated(here, capsys):
    for k in range(3):
        Path("photos").mkdir(exist_ok=True)
        picture(k).save(f"photos/{k}.png")
    (here / "look.yaml").write_text("{photos: photos, prompts: [a house], classes: {house: house}, threads: 1}")
    status, out, _ = run(capsys, "make", "look.yaml", "--dry-run")
    assert status == 0 and "images: 3 at most" in out and "measured on 2 images" in out
    one = ["-p", "photos", "{where: photos/*2.png, looks: 2}"]
    status, out, _ = run(capsys, "make", "look.yaml", "--dry-run", *one)
    assert status == 0 and "images: 1 at most" in out
    status, out, _ = run(capsys, "preview", "look.yaml", "--images", 2)
    assert re.match(r"\d kept, \d rejected\n", out) and (status == 0) == ("\nlook_preview.png\n" in out)


def test_a_dry_run_opens_every_photo(here, capsys):
    Path("photos").mkdir()
    picture(0).save("photos/00.png")
    for k in range(1, 13):
        Path(f"photos/{k:02}.png").write_bytes(b"no image")
    (here / "look.yaml").write_text("{photos: photos, prompts: [a house], classes: {house: house}}")
    status, out, err = run(capsys, "make", "look.yaml", "--dry-run")
    assert status and not out and "12 of 13 photos cannot be labeled, mend them or move them away:" in err
    assert [f"photo {k:02}.png cannot be read: cannot identify" in err for k in range(13)] == [False] + [True] * 10 + [
        False
    ] * 2 and "and 2 more" in err


def test_a_preview_of_a_recipe_draws_some_prompts_with_each_class(here, capsys):
    status, out, _ = run(capsys, "preview", "few.yaml", "--images", 2, "--out", "here/seen.png", "-p", "seed", "5")
    assert (status, out.splitlines()[0]) == (0, "2 kept, 0 rejected") and Image.open("here/seen.png").height < 140
    nothing = ["-p", "filters", "{area: [0.999, 1.0]}"]
    status, out, err = run(capsys, "preview", "few.yaml", "--images", 1, "--out", "none.png", *nothing)
    assert status == 1 and "1 rejected: mask too small" in out and "no image to show" in err
    assert not (here / "none.png").exists()


def test_splits_are_exported_and_leak_nothing(scenes, here, capsys):
    status, out, err = run(capsys, "export", scenes, "yolo", "out", "--split", "0.7", "0.3", "--seed", "2")
    assert (status, err) == (0, "") and re.search(r"train +3[01] .*\nval +1[34] ", out), out
    assert "next: yolo segment train data=out/data.yaml" in out
    assert "data='my out/data.yaml'" in run(capsys, "export", scenes, "yolo", "my out")[1]  # as shells take it
    folders = sorted(str(path) for path in (here / "out/images").iterdir())
    assert run(capsys, "leaks", *folders)[:2] == (0, f"{', '.join(folders)}: 0 near duplicates\n")
    status, out, _ = run(capsys, "leaks", scenes)
    assert status == 1 and f"{scenes}: 4 near duplicates, 4 with the same pixels" in out
    (here / "empty").mkdir()
    status, out, err = run(capsys, "leaks", scenes, scenes, here / "empty")
    assert (status, out) == (2, "") and f"no images in {here / 'empty'}" in err
    status, out, _ = run(capsys, "leaks", scenes)
    assert f"{scenes}/images/000040.png is {scenes}/images/000036.png (same pixels)" in out
    status, out, _ = run(capsys, "export", scenes, "coco", "coco.json", "--by", "prompt", "--split", "0.5", "0.5")
    prompts = [{r["prompt"] for r in Dataset(scenes).records if r["file_name"] in names} for names in coco_files(out)]
    assert status == 0 and len(prompts) == 2 and not prompts[0] & prompts[1]


def coco_files(printed):
    """The file names in each COCO file whose path was printed."""
    paths = [line for line in printed.splitlines() if line.endswith(".json")]
    return [{image["file_name"] for image in json.loads(open(path).read())["images"]} for path in paths]


def test_forms_have_options_of_their_own(scenes, here, capsys):
    assert run(capsys, "export", scenes, "yolo", "plain")[0] == 0
    assert run(capsys, "export", scenes, "yolo", "wide", "--enlarged")[0] == 0
    plain, wide = (sorted((here / name / "labels").rglob("*.txt")) for name in ("plain", "wide"))
    assert [path.read_text() for path in plain] != [path.read_text() for path in wide]
    assert run(capsys, "export", scenes, "coco", "coco.json", "--polygons")[0] == 0
    assert isinstance(json.loads((here / "coco.json").read_text())["annotations"][0]["segmentation"], list)
    status, _, err = run(capsys, "export", scenes, "voc", "out", "--enlarged")
    assert status == 2 and "--enlarged is for yolo, not for voc" in err and not (here / "out").exists()


@pytest.mark.parametrize("form", ["voc", "segformer"])
def test_other_formats_are_exported_whole(scenes, here, capsys, form):
    status, out, err = run(capsys, "export", scenes, form, "out")
    assert (status, err) == (0, "") and "44 pairs of fire, smoke, water" in out
    assert len([*(here / "out").rglob("*.png"), *(here / "out").rglob("*.jpg")]) >= 88


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (
            ["make", "flod-tiny", "made"],
            "no such file (did you mean flood-tiny?); recipes that come with attnlab:\n  flood",
        ),
        (["make", "few.yaml", "made", "-p", "step", "3"], "a recipe has no 'step'; did you mean steps?"),
        (["make", "few.yaml", "made", "-p", "steps", "many"], "steps is 'many': it is a whole number"),
        (["make", "few.yaml", "made", "-p", "steps", "[1"], "-p steps '[1' is not YAML"),
        (["make", "few.yaml", "few.yaml"], "is a file"),
        (["make", "few.yaml", "made", "--workers", "0"], "workers=0"),
        (["make", "few.yaml", "made", "-p", "classes", "{fire: fire}", "--dry-run"], "no prompt has the word 'fire'"),
        (["verify", "nosuch"], "nosuch holds no data set"),
        (["stats", "nosuch"], "it holds no data set"),
        (["preview", "few.yaml", "--images", "0"], "--images 0"),
        (["export", "nosuch", "yolo", "out"], "it holds no data set"),
        (["export", "nosuch", "xml", "out"], "invalid choice: 'xml'"),
        (["leaks", "nosuch"], "no folder nosuch"),
        (["leaks", ".", "--within", "-1"], "within=-1"),
        ([], "required: make | recipes | verify | preview | stats | export | leaks"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_made(here, capsys, typed, says):
    status, _, err = run(capsys, *typed)
    assert (status, [path.name for path in here.iterdir()]) == (2, ["few.yaml"]) and says in err, err


@pytest.mark.parametrize(("parts", "says"), [(["0.9"], "train and val"), (["0.9", "0.2"], "0.9 + 0.2 is 1.1")])
def test_shares_that_are_none_are_refused(scenes, here, capsys, parts, says):
    status, _, err = run(capsys, "export", scenes, "yolo", "out", "--split", *parts)
    assert status == 2 and says in err and not (here / "out").exists()


def test_a_stopped_run_says_how_to_go_on_and_goes_on(here, capsys):
    """Ctrl-C: status 130, what is finished is kept, and the line that is printed ends the work."""
    line = [sys.executable, "-m", "attnlab", "dataset", "make", "few.yaml", "made", "-p", "images", "20"]
    line += ["-p", "batch", "1", "-p", "shard", "1"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as work:
        end = time.monotonic() + 100
        while not [*here.glob("made/.parts/0000?")] and time.monotonic() < end:
            time.sleep(0.05)
        work.send_signal(signal.SIGINT)
        said = work.communicate()[1]
    assert work.returncode == 130
    go_on = "attnlab dataset make few.yaml made --workers 1 -p images 20 -p batch 1 -p shard 1"
    assert said.rstrip().endswith(f"stopped; what is finished is kept, and this goes on:\n  {go_on}"), said
    shards = len([path for path in here.glob("made/.parts/*") if path.name.isdecimal()])
    assert 1 <= shards < 40 and Recipe.load(here / "made/recipe.yaml").images == 20
    shutil.copytree("made/.parts/00000", "before")
    assert run(capsys, *go_on.split()[2:])[0] == 0 and len(Dataset("made")) > 30
    before = (here / "before/images/000000.png").read_bytes()
    assert before == (here / "made/images/000000.png").read_bytes() and verify_dataset("made") == []


def test_help_is_quick_to_come():
    """No line that only parses may load torch."""
    code = "import sys; from attnlab.cli import main\ntry: main(['dataset', 'export', '--help'])\n"
    code += "except SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n") and "--split" in done.stdout
