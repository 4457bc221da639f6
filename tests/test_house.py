"""The house stays small and easy to see: how much there is of what, counted. `python tests/test_house.py` prints it."""

import ast
from collections import defaultdict
from pathlib import Path

import attnlab

ROOT = Path(attnlab.__file__).parent
CORE = ("recording", "maps", "masks.py", "metrics.py", "tokens.py", "pipelines.py", "storage.py")
# rows of a table, what people write as YAML, what a scene is drawn from, what is kept of an image: fields, no state
TABLES = {"Family", "Generation", "Recipe", "Trace", "World"}


def modules():
    return sorted(path for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)


def room(path):
    """Name at the top of the package that a module belongs to."""
    return path.relative_to(ROOT).parts[0]


def lines(paths):
    return sum(len(path.read_text("utf-8").splitlines()) for path in paths)


def top_names():
    """Names at the top of the package, as git sees them."""
    return sorted(path.name for path in ROOT.iterdir() if path.name != "__pycache__")


def arrows():
    """Pairs of names at the top of which one imports the other."""
    found = set()
    for path in modules():
        package = path.relative_to(ROOT).parent.parts
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1]
                names = [node.module] if node.module else [name.name for name in node.names]
                found |= {(room(path), [*base, *name.split(".")][0]) for name in names}
    inside = {Path(name).stem for name in top_names()}
    return {(Path(a).stem, b) for a, b in found if b in inside and Path(a).stem != b}


def classes():
    """{class name: (lines, attributes)}: names bound to self, or declared in a body of data alone."""
    found = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                bound = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and is_bound(n)}
                declared = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
                found[node.name] = (node.end_lineno - node.lineno + 1, len(bound | declared))
    return found


def is_bound(node):
    return isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"


def core():
    return [path for path in modules() if room(path) in CORE]


def test_few_names_at_the_top():
    assert len(top_names()) <= 20, top_names()


def test_the_package_is_thin():
    assert lines(path for path in modules() if room(path) != "scenes") <= 17530
    assert lines(core()) <= 7660


def test_few_arrows_between_rooms():
    assert len(arrows()) <= 55, sorted(arrows())


def test_no_class_is_large():
    large = {name: size for name, size in classes().items() if size[0] > 150 or (size[1] > 12 and name not in TABLES)}
    assert not large, large


def main():
    rooms = defaultdict(list)
    for path in modules():
        rooms[room(path)].append(path)
    for name, paths in sorted(rooms.items()):
        print(f"{name:16} {lines(paths):6} lines, {len(paths)} modules")
    longest, widest = (max(classes().items(), key=lambda item: item[1][k] * (item[0] not in TABLES)) for k in (0, 1))
    print(f"names at the top of attnlab/: {len(top_names())}")
    print(f"lines without scenes/: {lines(path for path in modules() if room(path) != 'scenes')}")
    print(f"lines of the core ({', '.join(CORE)}): {lines(core())}")
    print(f"arrows between names at the top: {len(arrows())}")
    print(f"longest class: {longest[0]}, {longest[1][0]} lines; most attributes: {widest[0]}, {widest[1][1]}")


if __name__ == "__main__":
    main()
