"""A wheel: what an install without a checkout has, and what `attnlab` does there; what is said of its release."""

import os
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder

import attnlab

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
RECIPES = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "recipes").glob("*.yaml"))}
NOTEBOOKS = {path.stem: path.read_text("utf-8") for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
IMPORTING = [stem for stem, text in NOTEBOOKS.items() if re.search(r'"(from|import) experiments\b', text)]
NEEDS = "needs the repository"


def build(folder, version):
    """Build a wheel without a network, in this process; return its path."""
    [path] = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=[version])
    return Path(path)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with what a wheel installs. Packing the bundled weights takes most of its 3 s."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build(folder, "standard")) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def attnlab_in(site, tmp_path):
    """Run `attnlab` of the wheel in an empty folder: (exit status, standard output, standard error)."""

    def run(*argv):
        outside = {**os.environ, "PYTHONPATH": str(site)}
        command = [sys.executable, "-m", "attnlab", *argv]
        done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout, done.stderr

    return run


def test_a_wheel_has_the_package_its_data_notebooks_and_recipes(site):
    names = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    hidden = {"__pycache__", ".ipynb_checkpoints"}
    files = [path for path in (ROOT / "attnlab").rglob("*") if path.is_file() and not hidden & {*path.parts}]
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    assert {"attnlab/models/tiny/unet/diffusion_pytorch_model.safetensors", "attnlab/widgets/picture.js"} <= expected
    expected |= {f"attnlab/notebooks/{stem}.ipynb" for stem in NOTEBOOKS} | {
        f"attnlab/recipes/{name}" for name in RECIPES
    }
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_a_wheel_finds_its_own_recipes(site):
    module = runpy.run_path(str(site / "attnlab/dataset/shipped.py"))  # by itself, as importing torch takes long
    found = {path.name: path.read_text("utf-8") for path in module["known_recipes"]().values()}
    assert found == RECIPES and module["find_recipe"]("flood-tiny") == site / "attnlab/recipes/flood-tiny.yaml"


def test_an_editable_install_copies_no_notebook(tmp_path):
    """A copy would stay as it was while the notebooks of the checkout change."""
    with zipfile.ZipFile(build(tmp_path, "editable")) as wheel:
        [path] = [name for name in wheel.namelist() if ".dist-info/" not in name]
        assert path.endswith(".pth") and wheel.read(path).decode().split() == [str(ROOT)]


def test_a_wheel_lists_its_notebooks_and_which_need_the_repository(attnlab_in):
    status, out, err = attnlab_in("list")
    assert (status, err) == (0, "")
    listed = {part.split()[0]: part for part in out.strip().split("\n\n")}
    assert list(listed) == list(NOTEBOOKS)
    assert [stem for stem, part in listed.items() if NEEDS in part] == IMPORTING and "04_dbscan_masks" not in IMPORTING


def test_what_needs_the_repository_is_refused_before_anything_runs(attnlab_in, tmp_path):
    status, out, err = attnlab_in("run", "04", "05")
    assert (status, out) == (2, "") and f"05_disaster_dataset: {NEEDS}" in err and "pip install -e ." in err
    status, _, err = attnlab_in("run", "all")
    assert status == 2 and f"{', '.join(IMPORTING)}: {NEEDS}" in err
    assert list(tmp_path.iterdir()) == []


def test_metadata(site):
    [path] = site.glob("*.dist-info/METADATA")
    metadata = HeaderParser().parsestr(path.read_text("utf-8"))
    assert metadata["Version"] == attnlab.__version__ and metadata["License-Expression"] == PROJECT["license"]
    pythons = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier") if "Python ::" in line]
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text("utf-8"))
    assert pythons == workflow["jobs"]["test"]["strategy"]["matrix"]["python-version"]


def test_one_version_everywhere():
    version = PROJECT["version"]
    assert attnlab.__version__ == version == yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"]
    headings = re.findall(r"^## \[(\S+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert headings[0] == version


def test_citation():
    """As the Citation File Format 1.2.0 asks; every paper that the README's first lines name is there."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software" and citation["license"] == PROJECT["license"]
    for reference in citation["references"]:
        assert reference["title"] and reference["type"] in {"article", "conference-paper"}
        assert all({"family-names", "given-names"} <= author.keys() for author in reference["authors"])
    cited = {reference["identifiers"][0]["value"] for reference in citation["references"]}
    readme = (ROOT / "README.md").read_text("utf-8")
    assert {f"arXiv:{number}" for number in re.findall(r"arxiv\.org/abs/([\d.]+)", readme)} <= cited
