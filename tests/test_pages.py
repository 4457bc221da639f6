"""The pages that people read first name what is there: links, pictures, notebooks."""

import re
from pathlib import Path

import nbformat
import pages
import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("", "docs/", "docs/notebooks/", "experiments/", "attnlab/models/*/")
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(f"{folder}*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)  # code calls a[b](c)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_notebook_is_in_the_readme():
    text = (ROOT / "README.md").read_text("utf-8")
    assert [path.stem for path in sorted(ROOT.glob("notebooks/*.ipynb")) if f"[{path.stem}]" not in text] == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_no_page_is_older_than_its_notebook(path):
    """Run the notebook and `make docs` where this fails."""
    text = (ROOT / f"docs/notebooks/{path.stem}.md").read_text("utf-8")
    assert text.startswith(f"<!-- code {pages.code_digest(nbformat.read(path, 4))} -->")
    assert str(ROOT) not in text and "Traceback" not in text


def test_a_page_shows_what_a_run_printed_and_drew():
    """Figures are linked, other pictures lie beside it, bars are left out, and another code is refused."""
    new, pixel = nbformat.v4, "iVBORw0KGgo="
    code = [new.new_code_cell("word = 1"), new.new_code_cell("draw(word)"), new.new_code_cell("widget")]
    source = new.new_notebook(cells=[new.new_markdown_cell("# A question?\nWhat follows."), *code])
    given = new.new_code_cell("word = 2", metadata={"tags": ["injected-parameters"]})
    run = new.new_notebook(cells=[source.cells[0], code[0], given, *map(nbformat.from_dict, code[1:])])
    run.metadata.papermill = {"parameters": {"word": 2, "out": "/home/me/runs/04"}}
    stream = {"output_type": "stream", "name": "stdout"}
    figure = {"output_type": "display_data", "data": {"image/png": pixel}, "metadata": {}}
    still = {"text/plain": "a widget", "image/png": pixel, "application/vnd.jupyter.widget-view+json": {}}
    run.cells[3].outputs = [{**stream, "text": " 10%\r 99%\rIoU 0.5\nruns/04/04_pipeline.png\n"}, figure]
    run.cells[3].outputs += [{**stream, "name": "stderr", "text": "a warning"}]
    run.cells[4].outputs = [{**figure, "data": still}]
    run = nbformat.from_dict(run)
    text, pictures = pages.page(source, run, "04_dbscan_masks")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert lines[1:4] == ["# A question?", f"*{lines[2][1:-1]}*", "What follows."]
    assert "as `attnlab run 04 -p word 2` left it" in lines[2] and "/home" not in text
    assert "IoU 0.5" in lines and "![04_pipeline.png](../../figures/04_pipeline.png)" in lines
    assert "99%" not in text and "warning" not in text and text.count("![") == 2 and len(pictures) == 1
    assert f"![what the cell shows]({next(iter(pictures))})" in lines
    source.cells[2].source = "draw(other)"
    with pytest.raises(ValueError, match="runs/04 is of an earlier 04_dbscan_masks: attnlab run 04"):
        pages.page(source, run, "04_dbscan_masks")
