"""What an install brings: never torchvision, and nothing that is used without being listed."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import attnlab

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text("utf-8")
FORBIDDEN = {"torchvision", "torchaudio"}  # built for one torch each; a wrong one breaks transformers and diffusers


def reached_from(name, extras):
    """Names of all distributions that installing name[extras] brings, by the metadata of what is installed."""
    reached, todo = set(), [(canonicalize_name(name), frozenset(extras))]
    seen = set()
    while todo:
        if (item := todo.pop()) in seen:
            continue
        seen.add(item)
        name, extras = item
        reached.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another system
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return reached


def test_torchvision_is_not_reached_with_any_extra():
    reached = reached_from("attnlab", PROJECT.get("optional-dependencies", {}))
    assert {"torch", "diffusers", "transformers", "safetensors", "pytest"} <= reached
    assert not reached & FORBIDDEN


def test_constraints_are_versions_and_nothing_else():
    lines = [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    assert not re.search(r"://|\+cpu", CONSTRAINTS)
    names = [line.split("==")[0] for line in lines]
    assert lines == sorted(lines) and len(names) == len(set(names))
    assert [n for n in names if n in FORBIDDEN or re.match(r"nvidia|cuda|triton", n)] == []
    assert "torch==2.13.0" in lines


def test_everything_installed_by_the_project_is_pinned():
    pinned = {line.split("==")[0] for line in CONSTRAINTS.splitlines()}
    extras = PROJECT["optional-dependencies"]
    direct = [*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)]
    assert {canonicalize_name(Requirement(line).name) for line in direct} <= pinned


def test_every_import_is_a_listed_dependency():
    listed = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    owners = metadata.packages_distributions()
    for path in Path(attnlab.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.split(".")[0] for name in names} - {"attnlab"} - sys.stdlib_module_names:
                owned = {canonicalize_name(owner) for owner in owners.get(name, [name])}
                assert owned & listed, f"{path.name} imports {name}: list {owned} in pyproject.toml"


def test_environment_has_no_second_list():
    lines = (ROOT / "environment.yml").read_text("utf-8").split("dependencies:")[1].split("\n")
    assert [line.strip(" -") for line in lines if line.strip()] == [
        "python=3.11",
        "pip",
        "pip:",
        "c constraints.txt",
        "e .[test]",
    ]
