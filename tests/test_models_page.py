"""The page of models that can be recorded is what its script writes; all of it where RUN_ALL is set, else a part."""

import os

import models
import pytest
from small_pipelines import SMALL

TEXT = models.PAGE.read_text("utf-8")
LINES = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("|")]


def test_every_small_pipeline_has_a_line():
    assert list(models.TITLES) == list(SMALL)
    assert [line[0] for line in LINES] == ["family", "---", *models.TITLES.values()]
    assert TEXT.startswith(models.HEAD)


def test_what_was_found_wrong_is_on_no_page():
    assert not any("no" in line for line in LINES)


@pytest.mark.parametrize("name", ["flux_distilled", "sana_sprint"])
def test_a_line_is_what_the_script_finds(name):
    assert models.line(name) in LINES


@pytest.mark.skipif("RUN_ALL" not in os.environ, reason="a minute: the same checks run in test_transformers.py")
def test_the_page_is_what_the_script_writes():
    assert models.page() == TEXT
