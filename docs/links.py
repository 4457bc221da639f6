"""Check a built site, the last step of `make site`: it is whole, works offline, and is small.

Every link inside it leads to a file and a place that are there, and every public name of attnlab has a place.
"""

from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import reference

__all__ = ["LARGEST", "problems"]

LARGEST = 30 * 2**20  # bytes of a site
_LOADS = ("img", "script", "link", "iframe", "source", "video")  # what a browser fetches without being asked


class _Page(HTMLParser):
    """The ids of a page, and its links: (tag, address)."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append((tag, value))


@cache
def _read(path):
    return _Page(path.read_text("utf-8"))


def problems(folder: Path) -> Iterator[str]:
    """Yield what is wrong with a site, one sentence each.

    Parameters
    ----------
    folder : Path
        Where the site's index.html is.
    """
    folder = folder.resolve()
    for path in sorted(folder.rglob("*.html")):
        name = path.relative_to(folder)
        if name.parts[0] == "_static":  # the theme's own
            continue
        for tag, link in _read(path).links:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                if tag in _LOADS and address.scheme != "data":
                    yield f"{name} loads {link}: a site works offline"
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                yield f"{name} links to {link}, which is not there"
            elif address.fragment and target.suffix == ".html" and unquote(address.fragment) not in _read(target).ids:
                yield f"{name} links to {link}, a place that is not there"
    for (module, public), document in reference.homes().items():
        page = folder / f"{document}.html"
        ids = _read(page).ids if page.is_file() else set()
        if not any(one == f"module-{module}.{public}" or one.endswith(f".{public}") for one in ids):
            yield f"{module}.{public} has no place in {document}.html"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LARGEST:
        yield f"the site has {size} bytes, at most {LARGEST} are wanted"
