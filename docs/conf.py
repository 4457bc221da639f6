"""Settings of Sphinx for the site: `make site`.

Before Sphinx reads, `sources.py` writes what it reads; after it wrote, `links.py` checks what it wrote.
"""

import inspect
import re
import sys
from pathlib import Path

from numpy.typing import ArrayLike
from sphinx.util import logging
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import stringify_annotation

import attnlab

sys.path.insert(0, str(Path(__file__).parent))
import links
import reference
import sources

project, author, release = "attnlab", "the attnlab authors", attnlab.__version__
copyright = author  # of no year: the same sources make the same site
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc"]
templates_path = ["_templates"]
exclude_patterns = ["extra", "files"]

myst_heading_anchors = 4
highlight_language = "none"  # of code that names no language: what commands print
default_role = "py:obj"  # of `daam` in a docstring
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!attnlab\.).*|.*\._\w+")]  # others' names, code that is no name, hidden names

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autosummary_generate = False  # docs/reference.py lists the pages
python_maximum_signature_line_length = 88
numpydoc_show_class_members = False

html_theme = "pydata_sphinx_theme"
html_title = "attnlab"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_context = {"default_mode": "auto"}
html_sidebars = {"*": []}  # of pages without others below them
html_theme_options = {
    "header_links_before_dropdown": 5,
    "navbar_align": "left",
    "navbar_end": ["live", "theme-switcher"],
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "footer_start": ["copyright"],
    "footer_end": [],
}

_ARRAY_LIKE = stringify_annotation(ArrayLike, "smart")  # a long union, which nobody reads
_QUOTED = re.compile(r"(?<!`)`(\w+)`(?!`)")
_LENGTH = re.compile(r"\|(\w+)\|")  # |u|, which reST would take for a substitution


def _mark(app, what, name, value, options, lines):
    """Mark a docstring's code as such: an indented block, and the names of the function's own parameters."""
    try:
        own = inspect.signature(value).parameters
    except (TypeError, ValueError):  # a module, a property
        own = {}
    marked, before = [], ""
    for line in lines:
        starts = line.startswith("    ") and not before and marked and not marked[-2:-1][0].startswith(" ")
        if starts and not marked[-2].endswith("::"):
            marked += [".. code-block:: python", ""]
        if not line.lstrip().startswith(">>>"):
            line = _LENGTH.sub(r"\\|\1\\|", line)
            line = _QUOTED.sub(lambda found: f"`{found[0]}`" if found[1] in own else found[0], line)
        marked.append(line)
        before = line.strip()
    lines[:] = marked


def _shorten(app, what, name, value, options, signature, returned):
    """Write ArrayLike where a signature has all the types that are like arrays."""
    return signature and signature.replace(_ARRAY_LIKE, "ArrayLike"), returned


def _resolve(app, env, node, shown):
    """Link what a docstring calls by its last name, `daam`, to the one thing that is called so, if there is one."""
    if node.get("reftype") != "obj":
        return None
    objects, wanted = env.domains.python_domain.objects, node["reftarget"]
    kinds = ("function", "class", "data", *(["method", "property", "attribute"] if "." in wanted else []))
    home = reference.homes().get(tuple(wanted.rpartition(".")[::2]))  # attnlab.masks.dbscan_mask is attnlab.dbscan_mask
    short = wanted.rpartition(".")[2] if home else wanted
    found = [(name, one) for name, one in objects.items() if name.endswith(f".{short}") and one.objtype in kinds]
    found = [(name, one) for name, one in found if home in (None, one.docname)]
    if len(found) != 1:
        return None if wanted.startswith("attnlab.") else shown
    return make_refnode(app.builder, node["refdoc"], found[0][1].docname, found[0][1].node_id, shown)


def _lay_out(app, config):
    """Write the sources; the page without Python is copied beside the others, where there is one."""
    sources.lay_out(Path(app.srcdir))
    if Path(app.srcdir, "extra").is_dir():
        config.html_extra_path = [str(Path(app.srcdir, "extra"))]
        config.html_context["has_live"] = True  # for the button of _templates/live.html


def _check(app, error):
    """Warn of all that is wrong with the site; a warning is an error in `make site`."""
    for path in Path(app.outdir, "_static").rglob("*.map"):  # 2 MB for those who debug the theme
        path.unlink()
    for problem in links.problems(Path(app.outdir)) if error is None else ():
        logging.getLogger(__name__).warning(problem)


def setup(app):
    """Connect the functions above to Sphinx."""
    app.connect("config-inited", _lay_out)
    app.connect("autodoc-process-docstring", _mark, priority=100)  # before numpydoc, which reads the sections
    app.connect("autodoc-process-signature", _shorten)
    app.connect("missing-reference", _resolve)
    app.connect("build-finished", _check)
