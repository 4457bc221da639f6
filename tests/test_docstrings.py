"""What is public says so, and is documented in one form: numpydoc, as scikit-image writes it.

ruff's D rules (pyproject.toml) hold that there is a docstring and how its first line reads; this holds the sections.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import attnlab

ROOT = Path(attnlab.__file__).parent
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__main__.py")
SECTIONS = ["Parameters", "Attributes", "Returns", "Yields", "Raises", "Warns", "See Also", "Notes", "References"]
SECTIONS.append("Examples")
ITEM = re.compile(r"\*{0,2}\w+(, \*{0,2}\w+)*( : \S.*)?")  # "heat : (row, column) array", "low, high : float"
PLAIN = 90  # characters of a type; a longer one is prose that belongs into the line below


def module_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))


def sections(doc):
    """{heading: lines} of a docstring; AssertionError for an unknown heading, or headings in another order."""
    lines, found, current = inspect.cleandoc(doc).splitlines(), {}, None
    for i, line in enumerate(lines):
        below = lines[i + 1] if i + 1 < len(lines) else ""
        if below and set(below) == {"-"} and line:
            assert line in SECTIONS and len(line) == len(below), f"{line!r} is no section of numpydoc, underlined"
            current = found.setdefault(line, [])
        elif current is not None and not (line and set(line) == {"-"}):
            current.append(line)
    order = [SECTIONS.index(name) for name in found]
    assert order == sorted(order), f"sections stand in the order {', '.join(SECTIONS)}"
    return found


def entries(lines):
    """[(head, description)] of a section's entries: a head at the margin, its description indented below."""
    found = []
    for line in lines:
        if line and not line.startswith(" "):
            found.append((line, []))
        elif line.strip() and found:
            found[-1][1].append(line.strip())
    return [(head, " ".join(text)) for head, text in found]


def check(doc, parameters=None, required=False):
    """AssertionError where a docstring is not in the one form; `parameters` are those of a function."""
    found = sections(doc)
    for name in set(found) & set(SECTIONS[:6]):
        for head, text in entries(found[name]):
            assert text, f"{name}: {head!r} has no description in the line below it, indented"
            assert len(head) <= PLAIN, f"{name}: {head!r} is a type and a description in one"
            if name in ("Parameters", "Attributes"):
                assert ITEM.fullmatch(head), f"{name}: {head!r} is not `name : type`"
                assert " : " in head or text.startswith("As "), f"{name}: {head!r} has no type"
    if parameters is None:
        return
    assert "Parameters" in found or not (required and len(parameters) > 1), "has no section Parameters"
    if "Parameters" in found:
        named = [n.strip("* ") for head, _ in entries(found["Parameters"]) for n in head.split(" : ")[0].split(",")]
        assert named == parameters, f"documents {named}, takes {parameters}"


def parameters_of(function):
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def public_members(cls):
    """(name, function) of the methods and properties that a class defines itself."""
    for name, value in vars(cls).items():
        value = getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(value) and value.__module__.startswith("attnlab"):
            yield name, value


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_are_listed_and_documented(path):
    tree, module = ast.parse(path.read_text("utf-8")), module_of(path)
    public = getattr(module, "__all__", None)
    assert public is not None, "has no __all__"
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    hidden = [node.name for node in defined if not node.name.startswith("_") and node.name not in public]
    assert not hidden or path == ROOT / "__init__.py", f"{hidden}: into __all__, or with an underscore"
    api = path.name == "__init__.py" or path.parent == ROOT  # what users call says what it takes
    for name in public:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value) if callable(value) else value):
            documented(name, value, api)


def documented(name, value, api):
    try:
        assert value.__doc__, "has no docstring"
        check(value.__doc__, None if inspect.isclass(value) else parameters_of(value), api)
        for member, function in public_members(value) if inspect.isclass(value) else ():
            name = f"{value.__name__}.{member}"
            assert function.__doc__, "has no docstring"
            check(function.__doc__, parameters_of(function))
    except AssertionError as error:
        raise AssertionError(f"{value.__module__}.{name}: {error}") from None


def test_no_module_takes_what_another_hides():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("attnlab")):
                hidden = [one.name for one in node.names if one.name.startswith("_")]
                assert not hidden, f"{path.relative_to(ROOT)}:{node.lineno} imports {hidden}"


GOOD = """Say it.

Parameters
----------
a, b : int
    Two numbers.
c
    As in `d`.

Raises
------
ValueError
    Never.
"""


@pytest.mark.parametrize(
    ("doc", "message"),
    [
        (GOOD.replace("    Two numbers.\n", ""), "no description"),
        (GOOD.replace("a, b : int", "a : int"), "documents"),
        (GOOD.replace("    As in `d`.", "    A number."), "no type"),
        (GOOD.replace("Raises\n------", "Throws\n------"), "no section"),
        (GOOD.replace("ValueError\n    Never.", "ValueError : never"), "no description"),
        (
            GOOD.replace(
                "int", "a number, which is the first or second one of all those that there are, and more of it"
            ),
            "in one",
        ),
    ],
)
def test_other_forms_are_seen(doc, message):
    check(GOOD, ["a", "b", "c"])
    with pytest.raises(AssertionError, match=message):
        check(doc, ["a", "b", "c"])
