"""The widgets as people use them: in JupyterLab, with a mouse and with keys. Times are printed, with pytest -s."""

import io
import json
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
import papermill
import pytest
from PIL import Image
from small_pipelines import SMALL

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
SHOTS = Path(__file__).resolve().parents[2] / "runs/browser"
CONTRAST = Path(__file__).with_name("contrast.js").read_text()


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

    def __init__(self, page, lab, name):
        self.page, self.lab, self.name = page, lab, name

    def open(self, name=None):
        """Open this notebook or another one, in a new window of JupyterLab."""
        address, token, _ = self.lab
        name = name or self.name
        where = f"{address}/lab/workspaces/{secrets.token_hex(4)}/tree/{name}?token={token}"
        self.page.goto(where, timeout=120_000)
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
        ready = ".jp-Notebook-ExecutionIndicator[data-status='idle']"
        self.page.wait_for_selector(ready, timeout=120_000, state="attached")
        self.page.wait_for_load_state("networkidle")  # widgets that come before their manager is loaded are lost

    def save(self):
        path = self.lab[2] / self.name
        before = path.stat().st_mtime_ns
        self.page.keyboard.press("Control+s")
        for _ in range(100):
            if path.stat().st_mtime_ns != before:
                return self.page.wait_for_timeout(500)  # JupyterLab writes, then signs
            self.page.wait_for_timeout(200)
        raise AssertionError("the notebook was not saved")

    def end_kernels(self):
        address, token, _ = self.lab
        with urllib.request.urlopen(f"{address}/api/sessions?token={token}") as answer:
            running = json.load(answer)
        for each in running:
            ended = urllib.request.Request(f"{address}/api/sessions/{each['id']}?token={token}", method="DELETE")
            urllib.request.urlopen(ended).close()

    def choose_theme(self, name):
        self.page.locator(".lm-MenuBar-itemLabel", has_text="Settings").click()
        self.page.locator(".lm-Menu-itemLabel", has_text="Theme").first.hover()
        self.page.get_by_text(f"JupyterLab {name}", exact=True).click()
        self.page.wait_for_function("n => document.body.dataset.jpThemeName === `JupyterLab ${n}`", arg=name)
        self.page.wait_for_timeout(500)  # colors fade into each other

    def shot(self, name, shown=None):
        """Write a screenshot of what the cell shows to runs/browser."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        shown = shown or self.page.locator(".jp-OutputArea-output", has=self.pictures).last
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
    context = chromium.new_context(viewport={"width": 1280, "height": 1500})
    page = context.new_page()
    page.set_default_timeout(60_000)

    def open_(source):
        name = f"{secrets.token_hex(4)}.ipynb"
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        cells = [nbformat.v4.new_code_cell(source)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), lab[2] / name)
        found = Notebook(page, lab, name)
        found.open()
        found.run()
        return found

    yield open_
    context.close()


EXPLORE = """
import os, psutil, attnlab as al
from attnlab import widgets

pipe = al.load_pipeline("tiny")
explorer = widgets.explore(pipe, "a burning house with fire and smoke", seed=11, steps=8)
memory = psutil.Process().memory_info
explorer
"""
REPEAT = """
display(explorer)
explorer.start(); explorer.form.thread.join()
used = []
for k in range(50):
    explorer.words.chips["fire"][1].value = k % 2 == 0
    explorer.inspect(k, k)
    used.append(memory().rss)
print("memory", (used[-1] - used[4]) / 1e6)
explorer.form.steps.value = 500; explorer.start()
again = widgets.explore(pipe, steps=2); again.start(); again.form.thread.join()
print("running", explorer.form.thread.is_alive(), again.image is not None)
"""
MASK = """
import attnlab as al
from attnlab import widgets
from attnlab.widgets import views

image, recording = views.generate(al.load_pipeline("tiny"), "a burning house with fire and smoke", seed=11, steps=8)
widgets.explore_mask(al.daam(recording)["smoke"], image)
"""
PAINT = """
import attnlab as al
from attnlab import widgets
from attnlab.widgets import views

pipe = al.load_pipeline("tiny")
made = [views.generate(pipe, "a burning house with fire and smoke", seed=s, steps=8) for s in (11, 12, 13)]
painter = widgets.paint_token(*made[0], made[1:])
painter
"""
BROWSE = """
from attnlab import widgets
from attnlab.dataset import Recipe, generate_dataset

classes = {"fire": "burning", "smoke": "smoke"}
recipe = Recipe(prompts=["a burning house with smoke"], classes=classes, images=16, steps=4)
widgets.browse_dataset(generate_dataset(recipe, "fires").folder)
"""
SAVED = """
import numpy as np
import attnlab as al
from attnlab import widgets
from tqdm.auto import tqdm

for _ in tqdm(range(3), desc="other people's bar"):
    pass
for _ in tqdm(range(3), leave=False):
    pass
ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64)
display(widgets.explore_mask(ramp, np.uint8(255 * np.stack([ramp] * 3, -1)), settings={"method": "threshold"}))
widgets.explore(al.load_pipeline("tiny"), "a burning house with fire and smoke", seed=11, steps=4)
"""
EVERY = """
import attnlab as al
from attnlab import widgets
from attnlab.dataset import Recipe, generate_dataset
from attnlab.widgets import views

pipe = al.load_pipeline("tiny")
image, recording = views.generate(pipe, "a burning house with fire and smoke", seed=11, steps=4)
heat = al.daam(recording)["smoke"]
explorer = widgets.explore(pipe, image=image, recording=recording, words=["zeppelin"])
explorer.maps.method.value = "DAAM"
explorer.inspect(20, 20)
painted = al.threshold_mask(al.daam(recording).upscale(64)["smoke"], 0.5)
failed = widgets.paint_token(image, recording)
failed.learn()
recipe = Recipe(prompts=["a burning house with smoke"], classes={"fire": "burning"}, images=2, steps=2)
every = [
    widgets.explore(pipe), explorer, widgets.inspect_pixel(image, recording), widgets.explore_mask(heat, image),
    failed, widgets.paint_token(image, recording, mask=painted),
    widgets.browse_dataset(generate_dataset(recipe, "every").folder),
]
display(*every)
"""
JOINT = """
import attnlab as al
from attnlab import widgets

widgets.explore(al.load_pipeline("./flux"), "a burning house with fire and smoke", seed=11, steps=4, size=64)
"""
SLOWEST = 0.2  # seconds, median, from a click to the picture


def timed(nb, act, index=1):
    """Seconds from an action in the page to the next picture on a canvas."""
    before = nb.shown(index)
    started = time.perf_counter()
    act()
    nb.page.wait_for_function(
        f"() => +document.querySelectorAll('canvas.attnlab-picture')[{index}].dataset.shown > {before}", timeout=20_000
    )
    return time.perf_counter() - started


def table(rows):
    print(*(f"{name:34} median {np.median(x) * 1e3:4.0f} ms, of {len(x)}" for name, x in rows.items()), sep="\n")


def test_generate_choose_words_move_sliders_point_at_pixels(notebook):
    nb = notebook(EXPLORE)
    page = nb.page
    started = time.perf_counter()
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function("() => document.querySelector('.widget-hprogress .progress-bar').style.width > '0%'")
    first = time.perf_counter() - started
    nb.pictures.nth(1).wait_for()
    nb.shot("explore")
    picture = nb.pixels(1)
    page.get_by_role("button", name="fire", exact=True).click()
    nb.pictures.nth(2).wait_for()
    assert (nb.pixels(1) != picture).any(), "fire comes before smoke"
    field = page.get_by_placeholder("another word or token, then Enter")
    field.fill("a tree")
    field.press("Enter")
    nb.pictures.nth(3).wait_for()
    nb.shot("explore_words")
    opacity = page.locator(".widget-hslider:has(label:text('opacity')) .noUi-handle, .widget-slider .noUi-handle").first
    opacity.focus()
    times = {"word": [], "opacity": [], "method": []}
    for k in range(20):
        times["opacity"].append(timed(nb, lambda k=k: opacity.press("ArrowLeft" if k % 2 else "ArrowRight")))
    for k in range(20):
        method = ("linear", "OVAM")[k % 2]
        times["method"].append(timed(nb, page.get_by_role("button", name=method, exact=True).click))
    chip = page.get_by_role("button", name="a tree", exact=True)
    for _ in range(20):
        times["word"].append(timed(nb, chip.click))
    nb.pictures.first.click(position={"x": 130, "y": 60})
    words = page.locator("img.widget-image")
    words.wait_for()
    times["pixel"] = []
    for k in range(20):
        before, started = words.get_attribute("src"), time.perf_counter()
        cell = {"x": 8 + 16 * (k % 16), "y": 60 + 64 * (k // 16)}  # of 16 x 16
        nb.pictures.first.click(position=cell)
        page.wait_for_function("src => document.querySelector('img.widget-image').src !== src", arg=before)
        times["pixel"].append(time.perf_counter() - started)
    table(times)
    print(f"first progress of Generate after {first * 1e3:.0f} ms")
    nb.pictures.first.press("ArrowDown")
    nb.shot("inspect_pixel")
    for name, x in times.items():
        assert np.median(x) < 5 * SLOWEST, f"{name}: the widget stalls"  # how fast it is, the printed table says
    page.get_by_role("button", name="Stop").wait_for(state="visible")
    assert not page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count()


def test_a_model_with_joint_attention(notebook, lab):
    """FLUX of random weights: its words, layers and single steps are there; what has no maps is said or hidden."""
    SMALL["flux"]()[0].save_pretrained(lab[2] / "flux")
    nb = notebook(JOINT)
    page = nb.page
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("4 steps recorded").wait_for()
    nb.pictures.nth(1).wait_for()
    timed(nb, page.get_by_role("button", name="house", exact=True).click)
    whole = nb.pixels(1)
    sliders = page.locator(".widget-hslider:visible")
    assert [text.split("\n")[0] for text in sliders.all_inner_texts()] == ["opacity", "layers", "steps"]
    assert not page.get_by_role("button", name="OVAM").count()
    first_step = timed(nb, lambda: sliders.nth(2).locator(".noUi-handle").last.press("PageDown"))
    assert (nb.pixels(1) != whole).any()
    print(f"the steps before the last: {first_step * 1e3:.0f} ms")
    field = page.get_by_placeholder("another word or token, then Enter")
    field.fill("burning house")
    field.press("Enter")
    nb.pictures.nth(3).wait_for()
    nb.pictures.first.click(position={"x": 130, "y": 60})
    page.locator("img.widget-image").wait_for()
    field.fill("a zebra")
    field.press("Enter")
    page.get_by_text("record_again(pipe, recording, texts='a zebra')").wait_for()
    for theme in ("Dark", "Light"):
        nb.choose_theme(theme)
        found = page.evaluate(CONTRAST)
        assert len(found) > 20 and not [(ratio, text) for ratio, text, whole in found if ratio < 4.5 or not whole]
        nb.shot(f"joint_{theme.lower()}")
    assert not page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count()


def test_memory_stays_and_nothing_runs_on(notebook):
    nb = notebook(EXPLORE + REPEAT)
    grown = float(nb.printed.split("memory ")[1].split()[0])
    print(f"memory after 50 interactions, over that after 5: {grown:.1f} MB")
    assert grown < 100 and "running False True" in nb.printed


def test_a_slider_changes_the_mask(notebook):
    nb = notebook(MASK)
    before = nb.pixels(0)
    handle = nb.page.locator(".noUi-handle").first
    handle.focus()
    times = [timed(nb, lambda: handle.press("ArrowLeft"), 0) for _ in range(20)]
    table({"level": times})
    assert (nb.pixels(0) != before).any()
    assert "mask: {method: dbscan, level: 0.2" in nb.page.locator("code", has_text="method").inner_text()
    nb.shot("explore_mask")


def test_a_mask_is_painted_a_token_fitted_and_saved(notebook, lab):
    nb = notebook(PAINT)
    page, canvas = nb.page, nb.pictures.first
    page.get_by_role("button", name="Fit").click()
    page.get_by_text("nothing is painted").wait_for()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for y in np.linspace(0.03, 0.27, 7):  # over the smoke
        page.mouse.move(box["x"] + 0.42 * box["width"], box["y"] + y * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.78 * box["width"], box["y"] + y * box["height"], steps=12)
        page.mouse.up()
    page.get_by_role("button", name="Fit").click()
    nb.pictures.nth(3).wait_for()
    canvas.press("ArrowRight")
    canvas.press(" ")  # the keyboard paints, too
    nb.shot("paint_token")
    page.locator("button.widget-button", has_text="Save").click()
    page.get_by_text("which has 1 tokens").wait_for()
    assert (lab[2] / "tokens.safetensors").exists()


def test_a_data_set_is_paged_and_a_pair_marked(notebook, lab):
    nb = notebook(BROWSE)
    nb.pictures.nth(3).wait_for()
    nb.shot("browse_dataset")
    nb.page.locator("button.widget-toggle-button", has_text="bad").first.click()
    nb.page.get_by_text("1 marked as bad").wait_for()
    assert json.loads((lab[2] / "fires/bad.json").read_text())
    nb.page.get_by_label("marked as bad only").check()
    nb.page.get_by_text("page 1 of 1; 1 pairs").wait_for()


def test_a_saved_notebook_shows_pictures_after_its_kernel_has_ended(notebook, lab):
    nb = notebook(SAVED)
    page, stills = nb.page, nb.page.locator("img.widget-image")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("4 steps recorded").wait_for()
    seen = nb.pixels(1)
    nb.save()
    nb.end_kernels()
    nb.open()
    stills.nth(2).wait_for()
    page.wait_for_timeout(1000)
    outputs = page.locator(".jp-OutputArea").first
    assert "Error displaying" not in outputs.inner_text() and "3/3" in outputs.inner_text()
    sizes = [one.bounding_box()["width"] for one in stills.all()]
    assert sizes[0] == 1 and 250 < sizes[1] < 300 and sizes[2] > 500  # a closed bar, a mask, an image and its map
    shown = np.asarray(Image.open(io.BytesIO(stills.nth(2).screenshot())).convert("RGB"))
    nb.shot("saved", outputs)
    height, width = seen.shape[:2]
    assert np.abs(shown[:height, :width].astype(int) - seen).mean() < 3, "the picture is what the widget showed last"
    nb.save()  # by a window that has no widget: the pictures stay
    nb.open()
    stills.nth(2).wait_for()
    # executed without a browser
    done = lab[2] / "done.ipynb"
    papermill.execute_notebook(lab[2] / nb.name, done, cwd=lab[2], progress_bar=False)
    nb.open(done.name)
    page.locator(".jp-RenderedImage img").nth(1).wait_for()
    page.wait_for_timeout(1000)
    assert "Error displaying" not in outputs.inner_text()


def test_every_text_can_be_read(notebook, chromium):
    """In both themes, at 100 and 150 % zoom, each text has a contrast of 4.5 or more, and none is cut off."""
    nb = notebook(EVERY)
    nb.pictures.nth(6).wait_for()
    nb.save()
    zoomed = chromium.new_context(viewport={"width": 853, "height": 1000}, device_scale_factor=1.5)
    near = Notebook(zoomed.new_page(), nb.lab, nb.name)
    try:
        near.open()
        near.pictures.nth(6).wait_for()
        for page in (nb.page, near.page):
            page.set_viewport_size(page.viewport_size | {"height": 4000})  # all of it in one screenshot
        for theme in ("Dark", "Light"):
            for name, one in {"100": nb, "150": near}.items():
                one.choose_theme(theme)
                found = one.page.evaluate(CONTRAST)
                print(f"{theme}, {name} %: {len(found)} texts, least contrast {min(found)[0]:.2f}")
                assert len(found) > 80 and {"press Generate to make the image", "zeppelin: not in the prompt"} <= {
                    text.split(";")[0] for _, text, _ in found
                }
                assert not [(ratio, text) for ratio, text, whole in found if ratio < 4.5 or not whole]
                one.shot(f"every_{theme.lower()}_{name}", one.page.locator(".jp-OutputArea").first)
    finally:
        zoomed.close()


@pytest.mark.parametrize("width", [480])
def test_it_can_be_used_in_a_narrow_window(notebook, width):
    nb = notebook(EXPLORE)
    nb.page.set_viewport_size({"width": width, "height": 900})
    nb.page.get_by_role("button", name="Generate").click()
    nb.pictures.nth(1).wait_for()
    nb.shot("narrow")
    inside = nb.page.evaluate("""() => [...document.querySelectorAll('canvas.attnlab-picture')].map(
        c => c.getBoundingClientRect().right <= window.innerWidth)""")
    assert json.dumps(inside) == "[true, true]"
