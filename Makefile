# Every target makes .venv first if it is missing or older than pyproject.toml or constraints.txt.
# Another interpreter: make PYTHON=python3.12 ...
PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help run test test-browser screenshots lab figures docs site

help:
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile | expand -t 16

run: .venv/installed ## draw a burning house, mask its smoke, make a small labeled data set (notebooks 04 and 05)
	@echo "make run: notebook 04 draws a burning house, maps a word's attention and turns the map into a mask;"
	@echo "notebook 05 makes 36 such pairs: a labeled data set of disasters"
	@$(BIN)/attnlab run 04
	@$(BIN)/attnlab run 05 -p images 1
	@echo "the image, its maps and its mask: runs/04; the labeled data set: runs/05/dataset"

test: .venv/installed ## lint, format check, every test and every notebook
	@echo "make test: ruff check, ruff format --check, pytest on every core, up to 4 (every notebook runs once)"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-browser: .venv/installed ## the widgets in a real JupyterLab; needs chromium (apt install chromium)
	@$(BIN)/pip install --quiet -c constraints.txt -e ".[test,browser]"
	@echo "make test-browser: JupyterLab and Chromium start; screenshots go to runs/browser"
	@$(BIN)/python -m pytest tests/browser -s

screenshots: test-browser ## the README's pictures of the widgets, from the tests' browser
	@for name in explore_words inspect_pixel explore_mask paint_token browse_dataset; do \
	  cp runs/browser/$$name.png figures/inspector_$$name.png; done; ls figures/inspector_*

lab: .venv/installed ## open the notebooks in JupyterLab
	@echo "make lab: JupyterLab on the notebooks; Ctrl-C here ends it"
	@$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

figures: .venv/installed ## run every notebook and copy its figures to figures/
	@echo "make figures: every notebook runs, 07 in full, then figures/ gets their pictures and the tables of 07"
	@$(BIN)/attnlab run all
	@$(BIN)/attnlab run 07 -p quick false
	@mkdir -p figures && cp runs/[0-9][0-9]/*.png runs/[0-9][0-9]/*.gif runs/07/07_*.csv runs/07/07_*.md \
	  runs/07/07_*.json figures/
	@sed -n 's/^`\(07_.*\)/\1/p' figures/07_thesis.md && ls figures/*
	@$(BIN)/python docs/pages.py

docs: .venv/installed ## docs/notebooks: pages with the pictures of the runs in runs/ (attnlab run all); then make site
	@$(BIN)/python docs/pages.py
	@$(MAKE) --no-print-directory site

site: .venv/docs ## README, docs/ and the reference as a site: runs/site/html/index.html
	@echo "make site: Sphinx, from sources that it writes to runs/site/sources; a dead link or a warning is an error"
	@rm -rf runs/site && mkdir -p runs/site/sources
	@$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs -d runs/site/doctrees \
	  runs/site/sources runs/site/html
	@echo "open runs/site/html/index.html"

.venv/docs: .venv/installed
	@$(BIN)/pip install --quiet -c constraints.txt -e ".[test,docs]"
	@touch $@

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	  echo "attnlab needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "installing into .venv with $(PYTHON): minutes, and some gigabytes where torch comes with CUDA"
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	@touch $@
