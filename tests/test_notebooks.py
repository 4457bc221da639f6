"""Each notebook keeps the conventions of the house and runs to its end."""

import json
import re
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
from PIL import Image

from attnlab.cli.runner import read_parameters, run_notebook

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Parameters that make a run short, where the defaults take more than about a minute: {"04_dbscan_masks": {"steps": 4}}
QUICK = {
    "02_open_vocabulary_maps": {"scenes": 8},
    "03_token_optimization": {"scenes": 40, "tests": 2, "training": 40, "shots": [1, 2], "images": 4, "published": []},
    "05_disaster_dataset": {"images": 1, "steps": 10},
    "06_joint_image_mask_diffusion": {"samples": 12, "steps": 8},
    "07_thesis_figures": {"images": 4, "steps": 6, "training": [1]},
    "08_benchmarks": {"geometry": "tiny", "size": 64, "recorded": 8, "pairs": 10},
}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def numbers_in(value):
    """All numbers of a metrics file, however deep."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(item)
    elif isinstance(value, int | float):
        yield value


def refuse(constant):
    raise ValueError(f"metrics.json holds {constant}")


def test_numbers_are_unique_and_quick_names_exist():
    numbers = [path.stem[:2] for path in NOTEBOOKS]
    assert len(numbers) == len(set(numbers)), "attnlab run NN and runs/NN need one notebook for each number"
    assert QUICK.keys() <= {path.stem for path in NOTEBOOKS}


@every_notebook
def test_is_committed_stripped(path):
    check = subprocess.run([sys.executable, "-m", "nbstripout", "--verify", str(path)], capture_output=True, text=True)
    assert check.returncode == 0, f"type: nbstripout {path.relative_to(FOLDER.parent)}"


@every_notebook
def test_keeps_the_conventions(path):
    notebook = json.loads(path.read_text("utf-8"))
    cells = [
        (cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in notebook["cells"]
    ]
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3", "plain papermill asks for the kernel's name"
    assert notebook["metadata"]["kernelspec"].get("language") == "python"
    assert cells[0][0] == "markdown" and cells[0][1].startswith("# "), "begins with its title"
    assert cells[-1][0] == "markdown", "ends with what to try next"
    assert sum("parameters" in tags for *_, tags in cells) == 1
    too_long = [source.splitlines()[0] for kind, source, _ in cells if kind == "code" and source.count("\n") >= 25]
    assert not too_long, "code cells of more than 25 lines: move what they define into attnlab"


@every_notebook
def test_each_parameter_is_explained(path):
    parameters = read_parameters(path)  # raises where a default is no JSON type
    assert [name for name, parameter in parameters.items() if not parameter.help] == []
    assert parameters["out"].default == f"runs/{path.stem[:2]}"
    assert set(papermill.inspect_notebook(path)) == set(parameters), "plain papermill misreads a second = in a line"
    assert QUICK.get(path.stem, {}).keys() <= parameters.keys()


@every_notebook
def test_runs_and_writes_metrics_and_figures(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a notebook leans on no folder but `out`
    folder = run_notebook(path, QUICK.get(path.stem, {}), tmp_path / "runs")
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"), parse_constant=refuse)
    assert list(numbers_in(metrics)), "metrics.json holds no number"
    figures = sorted(folder.glob(f"{path.stem[:2]}_*.png"))
    assert figures, "no figure named after the notebook's number"
    for figure in figures:
        with Image.open(figure) as image:
            assert min(image.size) > 16 and len(image.convert("RGB").getcolors(1 << 24)) > 1, f"{figure.name} is blank"
    assert {item.name for item in tmp_path.iterdir()} == {"runs"}, "wrote outside `out`"
    for cell in json.loads((folder / path.name).read_text("utf-8"))["cells"]:
        outputs, source = cell.get("outputs", []), "".join(cell["source"])
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        printed = "".join("".join(output.get("text", "")) for output in outputs)
        saved = ".png" in printed and ".save(" not in source  # a figure, not a plain image
        assert pictures == 1 or not saved, f"shows {pictures} pictures, not 1:\n{source}"
        assert not any("warn" in "".join(output.get("text", "")).lower() for output in outputs), f"warns:\n{source}"
