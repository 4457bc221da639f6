"""Lay out the sources of the site, from the repository's own pages: the first step of `make site`.

The repository's own pages are copied, each to the place in the site that `documents` names, and every relative link of
theirs follows: to a page's new place, to a copy of a picture, or to a copy of any other file. Pages that only list
others (notebooks, models, the reference) are written here.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import reference
from PIL import Image

from attnlab.storage import write_text

__all__ = ["GROUPS", "documents", "follow", "lay_out"]

ROOT = Path(__file__).parents[1]
GROUPS = {  # notebooks in the order in which a newcomer meets them
    "Begin here": ("01", "02", "04"),
    "Words that are learned from masks": ("03", "10", "11"),
    "Labeled data sets": ("05", "12", "06"),
    "How good, and at what cost": ("09", "13", "14", "07", "08"),
    "Where the bundled models come from": ("00",),
}
LIVE = "docs/live"  # a page without Python, copied as it is
_LINK = re.compile(r"(!?)\[((?:!\[[^\]]*\]\([^)]*\)|[^\[\]])*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_THUMBNAIL = 640  # pixels of a side, at most: twice what the gallery shows, for fine screens
_SMALL = 128  # pictures of at most so many pixels a side are enlarged, so that no browser blurs them
_NAVIGATION = """
```{{toctree}}
:hidden:

tour
notebooks/index
gallery
results
api/index
{more}
```
"""


def documents() -> dict[str, str]:
    """Return {path in the repository: path in the site} of every page that is copied."""
    pages = {"README.md": "index.md", "figures/07_thesis.md": "thesis.md", "figures/07_findings.md": "findings.md"}
    pages |= {
        f"docs/{name}.md": f"{name}.md"
        for name in ("tour", "models", "exports", "results", "gallery", "glossary", "errors")
    }
    pages |= {"CONTRIBUTING.md": "contributing.md", "experiments/README.md": "experiments.md"}
    if (ROOT / "CHANGELOG.md").exists():
        pages["CHANGELOG.md"] = "changelog.md"
    for path in sorted((ROOT / "docs/notebooks").glob("*.md")):
        pages[f"docs/notebooks/{path.name}"] = f"notebooks/{path.name}"
    for path in sorted((ROOT / "attnlab/models").glob("*/README.md")):
        pages[path.relative_to(ROOT).as_posix()] = f"models/{path.parent.name}.md"
    return pages


def follow(text: str, path: str, pages: dict[str, str], take: Callable[[str], str]) -> str:
    """Return a page's Markdown with its relative links as they are in the site.

    ValueError where a link leads to no file. Code in fences is left alone.

    Parameters
    ----------
    text, path : str
        The page, and where it lies in the repository.
    pages : dict of str to str
        As `documents` gives it.
    take : callable
        Gets the path of another file in the repository, and returns where the site has it.
    """

    def link(match):
        image, label, target, anchor = match[1], _LINK.sub(link, match[2]), match[3], match[4] or ""
        if not target or re.match(r"\w+:", target):
            return f"{image}[{label}]({target}{anchor})"
        wanted = os.path.normpath(os.path.join(os.path.dirname(path), target))
        if not (ROOT / wanted).is_file():
            raise ValueError(f"{path} links to {target}, which is no file")
        place = os.path.relpath(pages.get(wanted) or take(wanted), os.path.dirname(pages[path]) or ".")
        if wanted.startswith(f"{LIVE}/"):  # no page of Sphinx, which would offer it as a download
            return f'<a href="{place}">{label}</a>'
        return f"{image}[{label}]({place}{anchor})"

    end, parts = 0, []
    for fence in _FENCED.finditer(text):
        parts += [_LINK.sub(link, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join(parts) + _LINK.sub(link, text[end:])


def lay_out(folder: Path) -> None:
    """Write all sources of the site into a new folder."""
    pages = documents()
    for path, place in pages.items():

        def take(wanted, small=place == "gallery.md"):
            return _copy(wanted, folder, small)

        text = follow((ROOT / path).read_text("utf-8"), path, pages, take)
        if path == "README.md":
            text += _NAVIGATION.format(more="\n".join(_more(pages)))
        _write(folder / place, text)
    for place, text in {**_lists(pages), **reference.pages()}.items():
        _write(folder / place, text)
    if (ROOT / LIVE).is_dir():
        _copy_live_page(folder, pages)


def _copy(wanted, folder, small):
    """Copy a file that is no page, and return where it is; `small` makes a thumbnail of a picture."""
    if wanted.startswith(f"{LIVE}/"):
        return wanted.removeprefix("docs/")
    place = f"{'thumbnails' if small else 'files'}/{wanted}"
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    if not wanted.endswith(".png"):
        shutil.copyfile(ROOT / wanted, folder / place)
        return place
    place = f"{place.removesuffix('.png')}.webp"  # a quarter smaller, with the same pixels
    with Image.open(ROOT / wanted) as picture:
        if max(picture.size) <= _SMALL:
            picture = picture.resize([4 * side for side in picture.size], Image.Resampling.NEAREST)
        elif small:
            picture = picture.convert("RGBA")
            picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
        picture.save(folder / place, lossless=not small, method=1, quality=80 if small else 0)
    return place


def _copy_live_page(folder, pages):
    """Copy the page without Python, whose links to Markdown become links to pages."""
    shutil.copytree(ROOT / LIVE, folder / "extra/live")

    def link(match):
        wanted = os.path.normpath(os.path.join(LIVE, match[1]))
        return f'href="../{pages[wanted].removesuffix(".md")}.html"'

    page = folder / "extra/live/index.html"
    write_text(page, re.sub(r'href="([^":]+\.md)"', link, page.read_text("utf-8")))


def _more(pages):
    """List the entries of the navigation after the first ones."""
    yield from ("models", "exports", "glossary", "errors", "models/index", "experiments", "contributing")
    if "CHANGELOG.md" in pages:
        yield "changelog"


def _lists(pages):
    """Return {place: text} of the pages that list notebooks and models."""
    notebooks = "# Notebooks\n\nEach answers one question, and is shown here as its run left it.\n"
    for group, numbers in GROUPS.items():
        chosen = [Path(place).stem for place in pages.values() for n in numbers if place.startswith(f"notebooks/{n}_")]
        lines = [f"{name[:2]} {_title(ROOT / f'docs/notebooks/{name}.md')} <{name}>" for name in chosen]
        lines.sort(key=lambda line: numbers.index(line[:2]))
        notebooks += f"\n## {group}\n\n" + _toctree([*lines, *(["/findings", "/thesis"] if "07" in numbers else [])])
    models = "# Bundled models\n\nWhat each was trained on, how well it does, and where it fails.\n\n"
    models += _toctree(Path(place).stem for place in pages.values() if place.startswith("models/"))
    return {"notebooks/index.md": notebooks, "models/index.md": models}


def _toctree(entries):
    return "```{toctree}\n:maxdepth: 1\n\n" + "\n".join(entries) + "\n```\n"


def _title(path):
    return re.search(r"^# (.*)$", path.read_text("utf-8"), re.MULTILINE)[1]


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
