"""attnlab list, run, check: real notebooks in a temporary folder, real kernels where a run is the point."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import nbformat
import pytest

from attnlab.cli import runner
from attnlab.cli.commands import list_files, main
from attnlab.cli.runner import read_parameters

PARAMETERS = """prompt = "a burning house with smoke"  # what is drawn; guidance = 7.5, "é" # included
word = "smoke"  # the word to segment
seed = 7  # of the random numbers
eps = 1.5  # DBSCAN radius in pixels
keep_all = False  # keep every cluster
sizes = [1.0, 2.0]  # two scales
options = {"a": 1}  # passed on
mask = None  # a file, or none
out = "runs/04"  # folder for figures and metrics.json"""

WRITE = """from pathlib import Path
Path(out, "data").mkdir()
Path(out, "data/1.png").write_text("made")
Path(out, "data/2.png").write_text("made")"""

MAKE = """from pathlib import Path
from attnlab.dataset import Filters, Recipe, generate_dataset
own = {"steps": 20, "seed": seed, "batch": 1, "shard": 1, "threads": 1}
all_of_them = Filters(area=None, flat=None, duplicates=None)
recipe = Recipe(prompts=["a house"], classes={"house": "house"}, images=8, filters=all_of_them, **own)
generate_dataset(recipe, Path(out) / "dataset")"""

PROGRAM = [sys.executable, "-c", "import sys; from attnlab.cli import main; sys.exit(main())"]

BODY = """import json, os, sys
from pathlib import Path
Path(out, "04_mask.png").write_bytes(b"figure")
values = {"prompt": prompt, "word": word, "seed": seed, "eps": eps, "keep_all": keep_all, "sizes": sizes}
values |= {"mask": mask, "options": options, "python": sys.executable, "cwd": os.getcwd(), "out": out}
Path(out, "metrics.json").write_text(json.dumps(values))
if word == "wrong":
    raise ValueError("no such word")
if word == "dies":
    os._exit(9)
if word == "sleeps":
    import time
    time.sleep(60)"""


def write_notebook(path, parameters, *code, title="# A question"):
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook.cells = [nbformat.v4.new_markdown_cell(title), tagged, *map(nbformat.v4.new_code_cell, code)]
    nbformat.write(notebook, path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with two notebooks, and a shell standing in it."""
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path / "notebooks/04_dbscan_masks.ipynb", PARAMETERS, BODY, title="# Where is the smoke?\nText.")
    write_notebook(tmp_path / "notebooks/01_record.ipynb", 'seed = 3  # seed\nout = "runs/01"  # out', "seed + 1")
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def run(capsys, *argv):
    """Exit status, standard output, standard error."""
    try:
        status = main(list(argv))
    except SystemExit as stop:  # argparse's own way out
        status = stop.code
    return status, *capsys.readouterr()


def wait_for(pattern):
    """The first file that fits, as soon as there is one."""
    end = time.monotonic() + 100
    while time.monotonic() < end:
        if found := sorted(Path().glob(pattern)):
            return found[0]
        time.sleep(0.05)
    raise TimeoutError(pattern)


def folders(runs="runs"):
    return sorted(path.name for path in Path(runs).iterdir() if path.is_dir())


def sources(path):
    return [cell.source for cell in nbformat.read(path, 4).cells]


def test_a_reader_that_has_enough():
    """As in `attnlab list | head -1`: no word about it. This reader leaves first, so that no chance decides."""
    reading, writing = os.pipe()
    os.close(reading)
    listed = subprocess.run([*PROGRAM, "list"], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (listed.returncode, listed.stderr) == (141, "")


@pytest.mark.parametrize(
    ("typed", "says"),
    [("list", "04_dbscan_masks  Where is the smoke?"), ("--version", f"attnlab {metadata.version('attnlab')}")],
)
def test_the_module_is_the_program(project, typed, says):
    done = subprocess.run([sys.executable, "-m", "attnlab", typed], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and says in done.stdout.splitlines()


def test_list_shows_name_title_and_parameters_in_columns(project, capsys):
    status, out, err = run(capsys, "list")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert "04_dbscan_masks  Where is the smoke?" in lines
    rows = lines[lines.index("04_dbscan_masks  Where is the smoke?") + 1 :][:9]
    assert re.match(r'  word +a text +"smoke" +the word to segment$', rows[1])
    assert re.match(r"  keep_all +true or false +false +keep every cluster$", rows[4])
    assert rows[0].endswith('what is drawn; guidance = 7.5, "é" # included')
    assert len({row.index(text) for row, text in zip(rows[1:4], ("the word", "of the", "DBSCAN"), strict=True)}) == 1


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["04", "-p", "wrod", "smoke"], "no parameter 'wrod'; did you mean word?"),
        (["04", "-p", "seed", "abc"], "seed is a whole number, for instance -p seed 7; 'abc' is not"),
        (["04", "-p", "seed", "2.5"], "seed is a whole number"),
        (["04", "-p", "seed", "true"], "seed is a whole number"),
        (["04", "-p", "eps", "nan"], "eps is a number"),
        (["04", "-p", "eps", "wide"], "eps is a number"),
        (["04", "-p", "keep_all", "yes"], "keep_all is true or false, for instance -p keep_all false"),
        (["04", "-p", "keep_all", "1"], "keep_all is true or false"),
        (["04", "-p", "sizes", "1 2"], "sizes is a JSON list, for instance -p sizes '[1.0, 2.0]'"),
        (["04", "-p", "sizes", '[1, "two"]'], "sizes is a JSON list"),
        (["04", "-p", "options", "[]"], "options is a JSON object"),
        (["04", "-p", "out", "elsewhere"], "--runs FOLDER"),
        (["04", "-p", "word"], "expected 2 arguments"),
        (["01", "04", "-p", "word", "fire"], "01_record has no parameter 'word'"),
        (["09"], "'09' is no notebook; there is\n  01_record\n  04_dbscan_masks"),
        (["0"], "'0' is no notebook"),
        ([""], "'' is no notebook"),
        (["04", "--notebooks", "nowhere"], "no notebooks in nowhere"),
    ],
)
def test_a_line_that_cannot_be_run_is_refused_before_a_kernel_starts(project, capsys, monkeypatch, typed, says):
    monkeypatch.setitem(sys.modules, "papermill", None)  # importing it would be an error
    status, out, err = run(capsys, "run", *typed)
    assert (status, out) == (2, "")
    assert says in err
    assert not (project / "runs").exists()


def test_a_notebook_that_imports_experiments_needs_them(project, capsys, monkeypatch):
    """Beside the package or in the folder where the notebook will run; a name that only begins so is another."""
    write_notebook(project / "notebooks/05_study.ipynb", PARAMETERS, "from experiments.studies import few_shot")
    write_notebook(project / "notebooks/06_own.ipynb", PARAMETERS, "import experiments_of_mine")
    needing = re.compile(r"^(\w+)  .*\n  needs the repository", re.M)
    assert needing.findall(run(capsys, "list")[1]) == []  # a checkout has them
    monkeypatch.setattr(runner, "CHECKOUT", project / "elsewhere")
    assert needing.findall(run(capsys, "list")[1]) == ["05_study"]
    status, out, err = run(capsys, "run", "01", "05")
    assert (status, out) == (2, "") and err.startswith("attnlab: 05_study: needs the repository")
    assert not (project / "runs").exists()
    (project / "experiments").mkdir()
    (project / "experiments/__init__.py").touch()
    assert needing.findall(run(capsys, "list")[1]) == []


def test_an_ambiguous_name_lists_what_it_could_mean(project, capsys):
    write_notebook(project / "notebooks/04_other.ipynb", "seed = 1  # seed")
    status, _, err = run(capsys, "run", "04")
    assert status == 2 and "more than one" in err and "04_other" in err and "01_record" not in err


@pytest.mark.parametrize(
    "text", ["{}", "not json", '{"cells": [{"metadata": {"tags": ["parameters"]}, "source": "x = 1 +"}]}']
)
def test_a_file_that_is_no_notebook_is_named(project, capsys, text):
    (project / "notebooks/04_dbscan_masks.ipynb").write_text(text)
    for line in (["list"], ["run", "04"]):
        status, _, err = run(capsys, *line)
        assert status == 2 and "04_dbscan_masks.ipynb" in err


def test_run_fills_its_folder_with_typed_values_and_lists_the_files(project, capsys):
    values = {"word": "3", "seed": "-3", "eps": "2", "keep_all": "True", "sizes": "[1, 2.5]", "mask": "a.png"}
    typed = [part for name, value in values.items() for part in ("-p", name, value)]
    status, out, _ = run(capsys, "run", "4", *typed)
    assert status == 0
    files = ["runs/04/04_dbscan_masks.ipynb", "runs/04/04_mask.png", "runs/04/metrics.json"]
    assert [line.strip() for line in out.splitlines() if line.startswith("  ")] == files
    assert sorted(os.listdir("runs/04")) == [".written.json", *(name[8:] for name in files)]
    assert folders() == ["04"]
    metrics = json.loads((project / "runs/04/metrics.json").read_text())
    expected = {"word": "3", "seed": -3, "eps": 2.0, "keep_all": True, "sizes": [1, 2.5], "mask": "a.png"}
    assert expected.items() <= metrics.items() and isinstance(metrics["eps"], float)
    assert metrics["options"] == {"a": 1} and metrics["prompt"] == "a burning house with smoke"
    assert metrics["out"] == "runs/04"  # not the name that the folder had while the notebook ran
    assert metrics["cwd"] == str(project)
    assert 'out = "runs/04"' in sources("runs/04/04_dbscan_masks.ipynb")[2]
    assert "unfinished" not in (project / "runs/04/04_dbscan_masks.ipynb").read_text()


def test_the_kernel_is_this_interpreter_whatever_python3_is_registered(project, capsys, monkeypatch):
    spec = project / "jupyter/kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(
        json.dumps({"argv": ["/no/python", "{connection_file}"], "display_name": "x", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(project / "jupyter"))
    assert run(capsys, "run", "04")[0] == 0
    assert json.loads((project / "runs/04/metrics.json").read_text())["python"] == sys.executable


def test_a_failed_run_shows_the_error_and_leaves_the_last_good_result(project, capsys):
    assert run(capsys, "run", "04")[0] == 0
    for word, fault, marked in [
        ("wrong", "In [3]: ValueError: no such word", "An Exception was encountered at"),
        ("dies", "DeadKernelError: Kernel died", "Stopped here: DeadKernelError"),
    ]:
        status, out, err = run(capsys, "run", "04", "01", "-p", "seed", "5", "--runs", "other")  # a good run elsewhere
        status, out, err = run(capsys, "run", "04", "-p", "word", word)
        assert status == 1 and "done" not in out
        executed = next(line for line in err.splitlines() if ".ipynb" in line).split(": ")[1]
        assert f"04_dbscan_masks failed: {fault}" in err and re.match(r"runs/04\.unfinished-\w{8}/", executed)
        assert marked in "\n".join(sources(executed)) and "the same parameters go on" in err
        assert json.loads((project / "runs/04/metrics.json").read_text())["word"] == "smoke"
    assert re.fullmatch(r"04 04\.unfinished-\w+ 04\.unfinished-\w+", " ".join(folders()))


def test_several_notebooks_the_ones_after_a_failure_run_too(project, capsys):
    write_notebook(project / "notebooks/02_fails.ipynb", "seed = 1  # seed", "1 / 0")
    write_notebook(project / "notebooks/03_works.ipynb", "seed = 1  # seed", "seed")
    status, out, err = run(capsys, "run", "02", "03", "-p", "seed", "2", "--runs", "deep/results")
    assert status == 1 and "ZeroDivisionError" in err and "1 of 2 notebooks failed" in err
    assert sorted(os.listdir("deep/results")) == [".02.lock", ".03.lock", "02.failed.ipynb", "03"]
    assert "deep/results/02.failed.ipynb" in err and "go on" not in err
    assert "deep/results/03/03_works.ipynb" in out


def test_runs_that_cannot_be_written_are_refused(project, capsys, monkeypatch):
    (project / "file").write_text("")
    status, _, err = run(capsys, "run", "04", "--runs", "file")
    assert status == 2 and "cannot write results to file" in err
    (project / "old").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != Path("old"))  # as on a read-only disk
    status, out, err = run(capsys, "run", "04", "--runs", "old")
    assert status == 2 and "cannot write results to old: it is read-only; name another" in err and not out


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("elsewhere")], ids=["file", "link"])
def test_a_folder_that_cannot_be_replaced_is_refused_before_any_notebook_runs(project, capsys, make):
    (project / "runs").mkdir()
    make(project / "runs/04")
    status, _, err = run(capsys, "run", "01", "04")
    assert status == 2 and "runs/04 is a link or a file" in err and "--runs FOLDER" in err
    assert os.listdir("runs") == ["04"]


def test_what_a_run_did_not_write_is_kept(project, capsys):
    """Files that were added or changed, however deep; what is as the run left it is replaced."""
    write_notebook(project / "notebooks/04_dbscan_masks.ipynb", 'out = "runs/04"  # out', WRITE)
    folder = project / "runs/04"

    def again():
        status, out, _ = run(capsys, "run", "04")
        assert status == 0 and (folder / "data/1.png").read_text() == "made"
        return re.findall(r"it is kept as (.+)", out)

    assert again() == []
    (folder / ".ipynb_checkpoints").mkdir()  # JupyterLab's, where a notebook was opened
    (folder / ".ipynb_checkpoints/04.ipynb").touch()
    (folder / "data/2.png").unlink()
    assert again() == []
    for k, (name, text) in enumerate([("data/bad.json", "[1]"), ("data/1.png", "edit")], 1):  # edited: of the same size
        (folder / name).write_text(text)
        assert again() == [f"runs/04.kept-{k}"] and (project / f"runs/04.kept-{k}" / name).read_text() == text
    assert folders() == ["04", "04.kept-1", "04.kept-2"]


def test_a_killed_run_goes_on_with_its_data_set_and_two_at_once_are_refused(project, capsys):
    write_notebook(project / "notebooks/04_dbscan_masks.ipynb", 'seed = 3  # seed\nout = "runs/04"  # out', MAKE)
    process = subprocess.Popen([*PROGRAM, "run", "04"])
    first = wait_for("runs/*/dataset/.parts/00000/images/000000.png")
    made = first.stat().st_mtime_ns
    status, _, err = run(capsys, "run", "04", "-p", "seed", "4")
    assert status == 1 and "runs/04 is being made by another run" in err
    process.kill()
    process.wait()
    status, _, err = run(capsys, "run", "04")
    assert (status, folders()) == (0, ["04"]), err
    assert (project / "runs/04/dataset/images/000000.png").stat().st_mtime_ns == made
    assert len((project / "runs/04/dataset/metadata.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_where_the_notebook_is(project, by):
    process = subprocess.Popen([*PROGRAM, "run", "04", "-p", "word", "sleeps"], stderr=subprocess.PIPE, text=True)
    folder = wait_for("runs/*/metrics.json").parent
    process.send_signal(by)
    assert (
        "04_dbscan_masks failed: interrupted" in (err := process.communicate(timeout=60)[1]) and "Traceback" not in err
    )
    assert process.returncode == 130
    assert "## Stopped here: interrupted" in sources(folder / "04_dbscan_masks.ipynb")
    assert folders() == [folder.name] and folder.name.startswith("04.unfinished-")


def test_defaults_that_json_lacks_are_refused(project):
    write_notebook(project / "notebooks/05_tuple.ipynb", "size = (1, 2)  # a tuple")
    with pytest.raises(ValueError, match="size is a tuple"):
        read_parameters(project / "notebooks/05_tuple.ipynb")


def test_check_says_all_is_well(capsys):
    status, out, _ = run(capsys, "check")
    assert status == 0 and out.splitlines()[-1] == "all is well"
    names = ("python", "attnlab", "torch", "diffusers", "transformers", "numpy", "scikit-learn")
    for name in (*names, "gpu", "dtype", "memory", "device", "model"):
        assert re.search(rf"^{name} +\S", out, re.M), name
    assert "nbstripout" not in out  # an extra's


def test_check_with_a_model_that_is_not_there_says_what_to_do(capsys):
    status, out, _ = run(capsys, "check", "--model", "/no/such/folder")
    assert status == 1
    todo = out.split("to do:")[1]
    assert "1. model /no/such/folder:" in todo and "all is well" not in out


@pytest.mark.parametrize("missing", ["papermill", "attnlab"])  # attnlab: a checkout that was never installed
def test_check_with_a_package_missing_says_what_to_type(capsys, monkeypatch, missing):
    version = metadata.version

    def without(name):
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    if missing == "attnlab":
        monkeypatch.setattr(metadata, "distributions", lambda **search: [])
    status, out, _ = run(capsys, "check")
    assert status == 1 and f"1. {missing} is missing: pip install -c constraints.txt -e ." in out
    monkeypatch.setattr(runner, "CHECKOUT", Path("elsewhere"))
    assert f"1. {missing} is missing: pip install {missing}\n" in run(capsys, "check")[1]


def test_check_finds_a_torchvision_that_breaks_imports(tmp_path, capsys, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, out, _ = run(capsys, "check")
    assert status == 1 and "nms does not exist" in out and "pip uninstall torchvision" in out
    assert "torchvision" not in sys.modules


def test_of_a_folder_with_many_files_their_number_is_listed(tmp_path):
    for name in ("b.txt", "a.txt", "few/c.txt", *(f"many/{i}.png" for i in range(13))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listed = [str(entry).removeprefix(f"{tmp_path}/") for entry in list_files(tmp_path)]
    assert listed == ["a.txt", "b.txt", "few/c.txt", "many/ (13 files)"]
