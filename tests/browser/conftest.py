"""A real JupyterLab in a real browser, for the widgets."""

import io
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
SHOTS = Path(__file__).resolve().parents[2] / "runs/browser"


@pytest.fixture(scope="session")
def chromium():
    """A browser; without one, or without playwright, the tests are skipped, and say what to install."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[browser]'")
    if CHROMIUM is None:
        pytest.skip("no browser: install chromium (apt install chromium)")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", *QUIET])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(address, token, folder) of a running JupyterLab."""
    folder, token = tmp_path_factory.mktemp("lab"), secrets.token_hex(8)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}"]
    command += [f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={token}", "--ServerApp.port_retries=0"]
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_settings(folder / ".lab"))
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (folder / "lab.log").read_text()
                time.sleep(0.5)
        yield address, token, folder
    finally:
        server.terminate()
        server.wait(20)


def _settings(folder):
    """An environment with settings of its own: no news, and nobody's workspace is touched."""
    news = folder / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')
    own = {"JUPYTERLAB_SETTINGS_DIR": folder / "settings", "JUPYTERLAB_WORKSPACES_DIR": folder / "workspaces"}
    return os.environ | {name: str(path) for name, path in own.items()}


class Notebook:
    """A notebook that is open in JupyterLab, its cells run."""

    def __init__(self, page):
        self.page = page

    def shot(self, name):
        """A picture of what the cell shows, in runs/browser."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        shown = self.page.locator(".jp-OutputArea-output", has=self.pictures).last
        shown.screenshot(path=SHOTS / f"{name}.png")

    def run(self, timeout=120_000):
        """Run the first cell, and wait until the kernel has done so."""
        prompt = self.page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").first
        for _ in range(10):  # a click is lost while the kernel is not connected yet
            prompt.click()
            self.page.locator("jp-button[data-command='notebook:run-cell-and-select-next']").click()
            self.page.wait_for_timeout(1500)
            if prompt.inner_text().strip() != "[ ]:":
                break
        text = "document.querySelector('.jp-CodeCell .jp-InputPrompt').innerText.trim()"
        self.page.wait_for_function(f"() => /^\\[\\d+\\]:$/.test({text})", timeout=timeout)

    @property
    def pictures(self):
        return self.page.locator("canvas.attnlab-picture")

    def pixels(self, index=0):
        """What a canvas shows, as it is on the screen."""
        return np.asarray(Image.open(io.BytesIO(self.pictures.nth(index).screenshot())).convert("RGB"))

    @property
    def printed(self):
        """What the cell printed."""
        return " ".join(self.page.locator("[data-mime-type='application/vnd.jupyter.stdout']").all_inner_texts())

    def shown(self, index=0):
        """How many pictures the canvas has shown so far."""
        return int(self.pictures.nth(index).get_attribute("data-shown"))


@pytest.fixture
def notebook(chromium, lab):
    """`notebook(source)`: a new notebook with this cell, run."""
    address, token, folder = lab
    context = chromium.new_context(viewport={"width": 1280, "height": 1500})
    page = context.new_page()
    page.set_default_timeout(20_000)

    def open_(source):
        name = f"{secrets.token_hex(4)}.ipynb"
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        cells = [nbformat.v4.new_code_cell(source)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / name)
        page.goto(f"{address}/lab/workspaces/{name[:8]}/tree/{name}?token={token}", timeout=120_000)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=120_000, state="attached")
        found = Notebook(page)
        found.run()
        return found

    yield open_
    context.close()
