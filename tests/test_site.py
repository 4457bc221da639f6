"""The site: every public name has a page, links follow their pages, quoted errors and figures are there."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import links
import pytest
import reference
import sources

import attnlab

ROOT = Path(__file__).resolve().parents[1]


def templates():
    """Texts of all strings in attnlab; what an f-string puts in is an ellipsis."""
    for path in (ROOT / "attnlab").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_public_name_has_a_page():
    homes, pages = reference.homes(), reference.pages()
    names = ["attnlab", *(found.name for found in pkgutil.walk_packages(attnlab.__path__, "attnlab."))]
    for module in names:
        value = importlib.import_module(module) if not module.endswith("__main__") else None
        for name in getattr(value, "__all__", ()):
            page = pages[f"{homes[module, name]}.rst"]
            described = rf"^\.\. (autofunction|autoclass|py:data):: {name}$"
            if inspect.ismodule(getattr(value, name)):
                described = rf"^\.\. automodule:: {module}\.{name}$"
            assert re.search(described, page, re.MULTILINE), f"{module}.{name}"


def test_every_page_of_the_reference_is_listed_on_one_other():
    pages = reference.pages()
    trees = [part for text in pages.values() for part in re.findall(r"toctree::\n.*\n\n((?: +\S.*\n)*)", text)]
    listed = [line.split("<")[-1].strip(" >") for tree in trees for line in tree.splitlines()]
    assert sorted(listed) == sorted(path[4:-4] for path in pages if path != "api/index.rst")


def test_names_of_attnlab_have_pages_of_their_own():
    stub = ast.parse((ROOT / "attnlab/__init__.pyi").read_text("utf-8"))
    names = [n.name for node in stub.body if isinstance(node, ast.ImportFrom) and node.module for n in node.names]
    documents = [reference.homes()["attnlab", name] for name in names]
    assert documents == [f"api/attnlab.{name}" for name in names]
    index = reference.pages()["api/index.rst"]
    assert [name for name in names if f"\n   {name}\n" not in index] == []


def test_a_constant_has_its_value_and_what_the_source_says_of_it():
    assert reference.constant("attnlab.metrics", "THRESHOLDS").splitlines()[:2] == [
        ".. py:data:: THRESHOLDS",
        "   :value: np.linspace(0, 1, 101)",
    ]
    assert "as fractions of each map's maximum" in reference.constant("attnlab.metrics", "THRESHOLDS")
    assert "   times that maps are propagated" in reference.constant("attnlab.maps.softmax", "MAX_POWER")


def test_links_follow_their_pages():
    """A page to its new place, a file to its copy; other addresses, places and code stay."""
    pages = {"README.md": "index.md", "docs/tour.md": "tour.md", "docs/notebooks/04_dbscan_masks.md": "notebooks/04.md"}
    taken = []

    def take(wanted):
        taken.append(wanted)
        return f"files/{wanted}"

    text = "[a](../tour.md#in-python) [b](https://arxiv.org) [c](#here) "
    text += "[![d](../../figures/04_words.png)](../../README.md)"
    code = "\n```\n[x](nothing.md)\n```\n"
    assert sources.follow(text + code + "[e](../../LICENSE)", "docs/notebooks/04_dbscan_masks.md", pages, take) == (
        "[a](../tour.md#in-python) [b](https://arxiv.org) [c](#here) [![d](../files/figures/04_words.png)](../index.md)"
        + code
        + "[e](../files/LICENSE)"
    )
    assert taken == ["figures/04_words.png", "LICENSE"]
    with pytest.raises(ValueError, match=r"README\.md links to docs/nothing\.md, which is no file"):
        sources.follow("[x](docs/nothing.md)", "README.md", pages, take)


def test_every_notebook_is_in_one_group():
    grouped = sorted(number for numbers in sources.GROUPS.values() for number in numbers)
    assert grouped == sorted(path.name[:2] for path in ROOT.glob("notebooks/*.ipynb"))


def test_what_is_wrong_with_a_site_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "homes", lambda: {("attnlab", "daam"): "api/attnlab.daam"})
    (tmp_path / "api").mkdir()
    page = tmp_path / "api/attnlab.daam.html"
    page.write_text('<h1 id="attnlab.daam">daam</h1> <a href="../index.html#top">home</a>')
    home = '<p id="top"><a href="api/attnlab.daam.html#attnlab.daam">daam</a> <a href="https://arxiv.org">paper</a></p>'
    (tmp_path / "index.html").write_text(home)
    assert list(links.problems(tmp_path)) == []
    (tmp_path / "index.html").write_text('<script src="https://cdn.org/x.js"></script> <img src="no.png">')
    page.write_text('<a href="#daam">daam</a>')
    links._read.cache_clear()
    assert list(links.problems(tmp_path)) == [
        "api/attnlab.daam.html links to #daam, a place that is not there",
        "index.html loads https://cdn.org/x.js: a site works offline",
        "index.html links to no.png, which is not there",
        "attnlab.daam has no place in api/attnlab.daam.html",
    ]
    monkeypatch.setattr(links, "LARGEST", 10)
    assert "at most 10 are wanted" in list(links.problems(tmp_path))[-1]


def test_every_quoted_error_is_one_of_attnlab():
    """Each message of docs/errors.md stands in the sources as it is quoted, but for what differs from case to case."""
    quoted = re.findall(r"^> `(.*)`$", (ROOT / "docs/errors.md").read_text("utf-8"), re.MULTILINE)
    known = list(templates())
    assert [message for message in quoted if not any(message in text for text in known)] == []
    assert len(quoted) >= 25


def test_every_figure_is_in_the_gallery():
    """Write a sentence for it in docs/gallery.md where this fails; the thesis's have theirs in figures/07_thesis.md."""
    text = (ROOT / "docs/gallery.md").read_text("utf-8") + (ROOT / "figures/07_thesis.md").read_text("utf-8")
    names = [path.name for path in (ROOT / "figures").iterdir() if path.suffix in (".png", ".gif")]
    assert sorted(name for name in names if not re.search(rf"[(/]{name}\)", text)) == []
