"""The pages that people read first name what is there: links, pictures, notebooks."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("", "docs/", "experiments/", "attnlab/models/*/")
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(f"{folder}*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_notebook_is_in_the_readme():
    text = (ROOT / "README.md").read_text("utf-8")
    assert [path.stem for path in sorted(ROOT.glob("notebooks/*.ipynb")) if f"[{path.stem}]" not in text] == []
