"""List the pages of the API reference, and what stands on each: every public name has one home.

A name of `attnlab` itself has a page of its own; other public names of a folder or module stand on its page, and those
that only its inner modules list on theirs.
"""

import ast
import importlib
import inspect
import pkgutil
from functools import cache
from types import ModuleType

import attnlab

__all__ = ["constant", "homes", "modules", "pages"]

_TASKS = {  # folders that names of attnlab come from, in the order of their use
    "Load a model": ("pipelines",),
    "Record what it looks at": ("recording",),
    "Make maps of words": ("maps",),
    "Cut a map to a mask": ("masks",),
    "Learn words from masks": ("learning", "tokens"),
    "Segment images": ("segmentation",),
}
_LONGEST = 120  # letters of a constant's value; longer ones are left out


@cache
def modules() -> dict[str, ModuleType]:
    """Return {dotted name: module} of attnlab, its folders and its modules, outer ones first."""
    names = [found.name for found in pkgutil.walk_packages(attnlab.__path__, "attnlab.")]
    names = [name for name in names if not name.endswith("__main__")]
    return {name: importlib.import_module(name) for name in ["attnlab", *sorted(names, key=lambda n: n.count("."))]}


@cache
def homes() -> dict[tuple[str, str], str]:
    """Return {(module, public name): document of the site} where each is described."""
    found, places = {}, {}
    for module, value in modules().items():
        for name in value.__all__:
            if inspect.ismodule(getattr(value, name)):
                found[module, name] = f"api/{module}.{name}"
                continue
            document = f"api/{module}.{name}" if module == "attnlab" else f"api/{module}"
            found[module, name] = places.setdefault(_origin(module, name), document)
    return found


def _is_code(value):
    return isinstance(value, type) or inspect.isroutine(value)  # an alias, list[int], is neither


def _origin(module, name):
    """Return the module that defines a name which another lists, and the name."""
    value = getattr(modules()[module], name)
    if _is_code(value):
        return value.__module__, name
    defining = [other for other, held in modules().items() if getattr(held, name, None) is value]
    return next(((other, name) for other in defining if _assigned(other, name)), (module, name))


@cache
def _assigned(module, name):
    """Return the statement that binds a name at the top of a module and the one after it; None if there is none."""
    body = ast.parse(inspect.getsource(modules()[module])).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(getattr(part, "id", None) == name for target in targets if target for part in ast.walk(target)):
            return node, after
    return None


def constant(module: str, name: str) -> str:
    """Return the reST of a constant: its value if that is short, and what the source says of it.

    Parameters
    ----------
    module, name : str
        A dotted module that lists the constant, and the constant's name.
    """
    place, _ = _origin(module, name)
    node, after = _assigned(place, name)
    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
        text = inspect.cleandoc(after.value.value)
    else:
        text = inspect.getsource(modules()[place]).splitlines()[node.lineno - 1].partition("  # ")[2]
    value = ast.unparse(node.value)
    shown = [f"   :value: {value}"] if len(value) <= _LONGEST else []
    return "\n".join([f".. py:data:: {name}", *shown, "", *(f"   {line}" for line in text.splitlines()), ""])


def _described(module, names):
    """Return the reST of names that stand on a page: classes and functions, then constants."""
    value, parts, constants = modules()[module], [], []
    for name in names:
        one = getattr(value, name)
        if isinstance(one, type):
            parts.append(f".. autoclass:: {name}\n   :members:\n")
        elif inspect.isroutine(one):
            parts.append(f".. autofunction:: {name}\n")
        else:
            constants.append(constant(module, name))
    return "\n".join([*parts, *constants])


def _summary(names):
    """Return a table of names with the first line of each."""
    return "\n".join([".. autosummary::", "   :nosignatures:", "", *(f"   {name}" for name in names), ""])


def _module_page(module):
    """Return the reST of a module's page: what it is for, its names, the pages of its inner modules."""
    value, document = modules()[module], f"api/{module}"
    inner = sorted({page.removeprefix("api/") for page in homes().values() if page.startswith(f"{document}.")})
    inner = [page for page in inner if not any(page.startswith(f"{other}.") for other in inner)]
    own = [name for name in value.__all__ if homes()[module, name] == document]
    elsewhere = [homes()[module, name].removeprefix("api/") for name in value.__all__ if name not in own]
    elsewhere = [name for name in elsewhere if name not in modules()]
    shown = [name for name in own if _is_code(getattr(value, name))]
    parts = [_heading(module), f".. automodule:: {module}", "", f".. currentmodule:: {module}", ""]
    if elsewhere:
        parts.append(_summary(elsewhere))
    if len(shown) > 1:
        parts.append(_summary(shown))
    parts.append(_described(module, own))
    if inner:
        parts += ["Inner modules", "-------------", "", _toctree(inner)]
    return "\n".join(parts)


def _index():
    """Return the reST of the reference's first page: names of attnlab by what they are for, then the folders."""
    value = modules()["attnlab"]
    names = [name for name in value.__all__ if not inspect.ismodule(getattr(value, name))]
    own = {name: _origin("attnlab", name)[0].split(".")[1] for name in names}
    parts = [_heading("Reference"), ".. automodule:: attnlab", "", ".. currentmodule:: attnlab", ""]
    parts.append(_toctree([f"{name} <attnlab.{name}>" for name in own], ":hidden:"))  # first in the sidebar
    for task, folders in _TASKS.items():
        names = [name for name, folder in own.items() if folder in folders]
        parts += [task, "-" * len(task), "", _summary(names)]
    folders = [name for name in modules() if name.count(".") == 1]
    parts += ["Folders and modules", "-" * 19, "", _toctree(folders)]
    return "\n".join(parts)


def _heading(text):
    return f"{text}\n{'=' * len(text)}\n"


def _toctree(names, option=":maxdepth: 1"):
    return "\n".join([".. toctree::", f"   {option}", "", *(f"   {name}" for name in names), ""])


def pages() -> dict[str, str]:
    """Return {path in the site: reST} of every page of the reference."""
    found = {"api/index.rst": _index()}
    for document in sorted(set(homes().values())):
        name = document.removeprefix("api/")
        if name in modules():
            text = _module_page(name)
        else:
            short = name.removeprefix("attnlab.")
            text = "\n".join([_heading(name), ".. currentmodule:: attnlab", "", _described("attnlab", [short])])
        found[f"{document}.rst"] = text
    return found
