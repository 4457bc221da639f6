"""Write a page with pictures of every executed notebook: `make docs`, from the runs in runs/.

A page is `docs/notebooks/NN_name.md`: text and code of the notebook, what its run in `runs/NN` printed, and pictures.
Those that lie in `figures/` are linked, others (stills of widgets) are written beside the page.
"""

import copy
import hashlib
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

from attnlab.storage import replacing, write_text

__all__ = ["code_digest", "main", "page"]

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs/notebooks"
_SAVED = re.compile(r"^\s*\S*?(\d\d_\w+\.(?:png|gif))\s*$", re.MULTILINE)  # what a cell prints of a figure it saved
_PROGRESS = re.compile(r"[^\n]*\r")  # a bar that was drawn again on its line


def code_digest(source: nbformat.NotebookNode) -> str:
    """Return a short digest of a notebook's code: a page with another one is older than its notebook."""
    code = "\n\n".join(cell.source for cell in source.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def page(source: nbformat.NotebookNode, run: nbformat.NotebookNode, name: str) -> tuple[str, dict[str, bytes]]:
    """Return Markdown of a notebook with the outputs of its run, and the pictures that lie beside it.

    ValueError where the run is of other code.
    """
    ran = [cell for cell in run.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    if code_digest(source) != code_digest(nbformat.from_dict({**run, "cells": ran})):
        raise ValueError(f"runs/{name[:2]} is of an earlier {name}: attnlab run {name[:2]}")
    cells = []
    for cell, done in zip(source.cells, ran, strict=True):
        cells.append(copy.deepcopy(cell))
        if cell.cell_type == "code":
            cells[-1].outputs, figures = _outputs(done.outputs)
            cells += [nbformat.v4.new_markdown_cell(f"![{figure}](../../figures/{figure})") for figure in figures]
    exporter = MarkdownExporter()
    resources = {"unique_key": name, "output_files_dir": "."}
    body, resources = exporter.from_notebook_node(nbformat.from_dict({**source, "cells": cells}), resources)
    given = {k: v for k, v in run.metadata.papermill.parameters.items() if k != "out"}
    options = "".join(f" -p {key} {str(value).lower()}" for key, value in given.items())
    head = f"*[The notebook](../../notebooks/{name}.ipynb), as `attnlab run {name[:2]}{options}` left it.*"
    title, rest = body.lstrip().split("\n", 1)
    rest = rest.replace("![png](./", "![what the cell shows](")
    pictures = {Path(path).name: data for path, data in resources["outputs"].items()}
    return f"<!-- code {code_digest(source)} -->\n{title}\n\n{head}\n{rest.rstrip()}\n", pictures


def _outputs(outputs):
    """Return the outputs that a page shows, and the names of the figures that it links."""
    shown, figures = [], []
    for output in outputs:
        if output.output_type == "stream":
            text = _PROGRESS.sub("", output.text) if output.name == "stdout" else ""
            figures += _SAVED.findall(text)
            text = "\n".join(line for line in text.splitlines() if not _SAVED.match(line))
            if text.strip():
                shown.append(nbformat.v4.new_output("stream", name="stdout", text=text + "\n"))
        elif "data" in output:
            kept = {kind: output.data[kind] for kind in ("image/png", "text/plain") if kind in output.data}
            shown.append(nbformat.v4.new_output("display_data", data=dict(list(kept.items())[:1])))
    figures = [name for name in figures if (ROOT / "figures" / name).exists()]
    if figures:  # what else the cell shows is the same pictures again
        shown = [output for output in shown if "data" not in output]
    return shown, figures


def main() -> int:
    """Write all pages; 1 where a run is missing or of earlier code."""
    PAGES.mkdir(exist_ok=True)
    missing = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        ran = ROOT / "runs" / path.stem[:2] / path.name
        try:
            text, pictures = page(nbformat.read(path, 4), nbformat.read(ran, 4), path.stem)
        except (FileNotFoundError, ValueError) as error:
            missing.append(str(error))
            continue
        for old in PAGES.glob(f"{path.stem}_*.*"):
            old.unlink()
        for name, data in pictures.items():
            with replacing(PAGES / name) as part:
                part.write_bytes(data)
        write_text(PAGES / f"{path.stem}.md", text)
        print(PAGES.relative_to(ROOT) / f"{path.stem}.md")
    print("\n".join(missing), file=sys.stderr, end="\n" if missing else "")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
