"""A name means one thing in attnlab and experiments: no two modules, classes, functions or constants share one."""

import ast
from collections import defaultdict
from pathlib import Path

import attnlab

ROOT = Path(attnlab.__file__).parents[1]
SAME = {  # met in several modules, and the same thing in each
    "CLASSES",  # names of the classes of a rendered world
    "HELD_OUT",  # first seed of a rendered world that no bundled model saw
    "THINGS",  # its classes whose things are counted
    "main",  # runs a command line
    "render",  # makes a scene of a rendered world
}


def names_of(path):
    """(kind, public name) of a module and of what it defines at its top."""
    if path.stem not in ("__init__", "__main__"):
        yield "module", path.stem
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield "class" if isinstance(node, ast.ClassDef) else "name", node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from (("name", part.id) for part in ast.walk(target) if isinstance(part, ast.Name))


def shared(root):
    """{(kind, name): modules} of public names that more than one module of attnlab and experiments defines."""
    where = defaultdict(set)
    for path in sorted(path for folder in ("attnlab", "experiments") for path in (root / folder).rglob("*.py")):
        for kind, name in names_of(path):
            if not name.startswith("_") and name not in SAME:
                where[kind, name].add(str(path.relative_to(root)))
    return {key: sorted(paths) for key, paths in where.items() if len(paths) > 1}


def test_no_name_has_two_meanings():
    assert not shared(ROOT)


def test_names_that_are_the_same_thing_are_still_met_twice():
    """Otherwise `SAME` would excuse a new meaning."""
    everywhere = [name for folder in ("attnlab", "experiments") for path in (ROOT / folder).rglob("*.py")
                  for name in {name for _, name in names_of(path)}]  # fmt: skip
    assert all(everywhere.count(name) > 1 for name in SAME)


def test_shared_names_are_seen(tmp_path):
    for name, text in {
        "attnlab/maps/heat.py": "PARTS = 1\nclass Recipe: ...\n_HIDDEN = 2\ndef main(): ...\n",
        "experiments/thesis/heat.py": "PARTS: int = 2\nx, y = 1, 2\n_HIDDEN = 3\ndef main(): ...\n",
        "experiments/other.py": "class Recipe:\n    PARTS = 1\ndef y(): ...\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert set(shared(tmp_path)) == {("module", "heat"), ("name", "PARTS"), ("class", "Recipe"), ("name", "y")}
