"""The house: a module imports only from floors below its own, and importing attnlab does nothing else."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import attnlab

ROOT = Path(attnlab.__file__).parent
FLOORS = {
    0: ["masks", "metrics", "pipelines", "scenes", "storage"],
    1: ["plots", "recording", "segmentation", "tokens", "training"],
    2: ["joint", "maps"],
    3: ["dataset", "learning"],
    4: ["widgets"],
    5: ["cli"],
    6: ["__main__"],
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imports_of(path):
    """(line, dotted name inside attnlab) of each import of the package, those inside functions too."""
    package = ("attnlab", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "attnlab":
                    yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            dotted = ".".join([*base, *([node.module] if node.module else [])])
            if dotted == "attnlab" or (node.level and not node.module):  # from . import words
                yield from ((node.lineno, f"{dotted}.{name.name}") for name in node.names)
            elif dotted.startswith("attnlab."):
                yield node.lineno, dotted


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_floors_below(path):
    own = path.relative_to(ROOT).with_suffix("").parts[0]
    assert own in FLOOR_OF, f"attnlab/{own} has no floor: give it one in tests/test_layers.py and in CONTRIBUTING.md"
    for line, name in imports_of(path):
        other = name.removeprefix("attnlab").strip(".").split(".")[0]
        if other == own and path.parent != ROOT:
            continue  # siblings in a folder
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        assert other in FLOOR_OF, f"{where}: from attnlab's own modules only, not the package as a whole"
        assert FLOOR_OF[other] < FLOOR_OF[own], f"{where}: floor {FLOOR_OF[other]} is not below {FLOOR_OF[own]}"


def test_nothing_in_attnlab_imports_experiments():
    found = [path for path in MODULES if re.search(r"^\s*(from|import) experiments\b", path.read_text("utf-8"), re.M)]
    assert not found


def test_no_circle_inside_a_folder():
    """Modules of one folder import one another in one direction."""
    for folder in {path.parent for path in MODULES} - {ROOT}:
        names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        package = ".".join(["attnlab", *folder.relative_to(ROOT).parts])
        uses = {
            name: {
                one for _, dotted in imports_of(folder / f"{name}.py") for one in [dotted.removeprefix(f"{package}.")]
            }
            & names
            for name in names
        }
        while free := [name for name, used in uses.items() if not used & set(uses)]:
            for name in free:
                del uses[name]
        assert not uses, f"{package}: {uses} import one another in a circle"


def test_imports_are_read_in_all_their_spellings(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "scenes").mkdir()
    top, inner = tmp_path / "maps.py", tmp_path / "scenes/street.py"
    top.write_text(
        "import attnlab.cli\nfrom attnlab import words\nfrom . import masks\ndef f():\n    from .tokens import T\n"
    )
    inner.write_text("from .scene import Scene\nfrom ..maps import daam\nfrom .. import plots\nimport numpy\n")
    assert {name for _, name in imports_of(top)} == {"attnlab." + n for n in ("cli", "words", "masks", "tokens")}
    assert {name for _, name in imports_of(inner)} == {"attnlab." + n for n in ("scenes.scene", "maps", "plots")}


def test_every_name_of_the_stub_is_there_and_comes_from_where_it_says():
    """`attnlab/__init__.pyi` is what editors read and what is imported late; `al.` has that and nothing else."""
    stub = [
        node for node in ast.parse((ROOT / "__init__.pyi").read_text("utf-8")).body if isinstance(node, ast.ImportFrom)
    ]
    assert {name.name for node in stub for name in node.names} == set(attnlab.__all__)
    for node in stub:
        for name in node.names:
            value = getattr(attnlab, name.name)
            home = value.__module__ if node.module else value.__name__
            assert name.asname == name.name and f"{home}.".startswith(f"attnlab.{node.module or name.name}.")
    with pytest.raises(AttributeError):
        attnlab.nothing  # noqa: B018


QUIET = """
import socket, sys
import numpy, torch
state = numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_num_threads()
def refuse(*args):
    raise AssertionError("import attnlab opened a connection")
socket.socket.connect = refuse
import attnlab
after = numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_num_threads()
assert state == after, "import attnlab changed a global random state or the number of threads"
assert "torchvision" not in sys.modules
"""

UNSTYLED = """
import matplotlib
before = matplotlib.rcParams.copy()
import attnlab
assert matplotlib.rcParams == before, "import attnlab changed rcParams"
"""


@pytest.mark.parametrize("code", [QUIET, UNSTYLED], ids=["quiet", "unstyled"])
def test_import_does_nothing(tmp_path, code):
    """No output, no folder (a home of its own shows them), no connection, no global state."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "HF_", "MPL", "TORCH"))}
    environment = {**kept, "HOME": str(home), "USERPROFILE": str(home), "TMPDIR": str(home), "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=home, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    if code is QUIET:  # importing matplotlib makes a folder of its own
        assert list(home.iterdir()) == []
