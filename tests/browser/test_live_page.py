"""The live page as visitors use it: opened as a file, with the mouse, with keys, light and dark, wide and narrow."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import live
import numpy as np
import pytest
from test_inspector import CHROMIUM, CONTRAST, QUIET, SHOTS

import attnlab as al

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/live/index.html").as_uri()
CELLS = 16
TEXTS = "body :not([type=range], [type=checkbox])"  # those of the whole page; values of these are not shown
EVERYTHING = CONTRAST.replace(".jp-OutputArea-output :is(.jupyter-widgets, .jupyter-widgets *)", TEXTS)
SCORES = "() => pictures.map((picture) => picture.scores)"
TIMES = """() => {
  window.times = [];
  const begun = { at: 0 };
  addEventListener("keydown", (event) => (begun.at = event.timeStamp), true);
  addEventListener("input", () => requestAnimationFrame(() => {
    const drawn = new MessageChannel(); // its message comes after the frame
    drawn.port1.onmessage = () => times.push(performance.now() - begun.at);
    drawn.port2.postMessage(0);
  }), true);
}"""
COSTS = """() => [...Array(50)].map((_, i) => {
  const before = performance.now();
  type("first", vocabulary[i]);
  return performance.now() - before;
})"""


def visit(act, width=1400, height=900, **options):
    """Return act(page) on the opened page; AssertionError where it logged anything or asked for other files.

    In a thread of its own: the browser of other tests may still hold the event loop of this one.
    """
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[browser]'")
    if CHROMIUM is None:
        pytest.skip("no browser: install chromium (apt install chromium)")

    def run():
        said, asked = [], []
        with api.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", *QUIET])
            page = browser.new_page(viewport={"width": width, "height": height}, **options)
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(PAGE)
            result = act(page)
            browser.close()
        assert said == []
        folder = PAGE.rsplit("/", 1)[0]
        assert {url.removeprefix(folder) for url in asked if not url.startswith("data:")} == {
            "/index.html", "/style.css", "/data.js", "/live.js"
        }  # fmt: skip
        return result

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


@pytest.fixture(scope="module")
def linears():
    """Linear maps of the images, drawn again."""
    pipe = al.load_pipeline(live.MODEL)
    pipe.set_progress_bar_config(disable=True)
    return [live.draw(pipe, *chosen)[1] for chosen in live.PROMPTS]


def test_maps_are_those_of_linear_daam(linears):
    """Three words of each image, and a mixture."""

    def act(page):
        found = {}
        for word in ("smoke", "tree", "car"):
            page.fill("#first", word)
            found[word] = page.evaluate(SCORES)
        page.fill("#second", "water")
        page.locator("#share").fill("30")
        assert page.inner_text("#mixture") == "70% car + 30% water"
        assert page.inner_text("#code").endswith('linear @ (0.7 * linear.embed("car") + 0.3 * linear.embed("water"))')
        return found, page.evaluate(SCORES), page.locator("figcaption output").all_inner_texts()

    found, mixed, maxima = visit(act)
    worst = 0
    for k, linear in enumerate(linears):
        expected = {word: linear[word] for word in found}
        mixture = linear @ (0.7 * linear.embed("car") + 0.3 * linear.embed("water"))
        for word, heat in expected.items():
            worst = max(worst, np.abs(np.reshape(found[word][k], heat.shape) - heat).max() / np.abs(heat).max())
        worst = max(worst, np.abs(np.reshape(mixed[k], mixture.shape) - mixture).max() / np.abs(mixture).max())
        assert float(maxima[k]) == pytest.approx(mixture.max(), abs=0.02)
    print(f"largest difference to al.linear_daam: {worst:.5f} of a map's maximum")
    assert worst < 1e-2


def test_what_is_drawn_are_the_scores(linears):
    """Nothing is drawn where a score is below 0, and the last color at the highest where the scale is the word's."""
    maps = np.stack([linear.upscaled("water", 128) for linear in linears])
    image, row, column = (int(at) for at in np.unravel_index(maps.argmax(), maps.shape))
    read = """([k, at]) => {
      const { data } = pictures[k].canvas.getContext("2d").getImageData(0, 0, SIDE, SIDE);
      return [[...data.filter((_, i) => i % 4 === 3)], [...data.slice(4 * at, 4 * at + 3)]];
    }"""

    def act(page):
        page.fill("#first", "water")
        page.check("#own")
        return [page.evaluate(read, [k, row * 128 + column]) for k in range(len(linears))]

    drawn = visit(act)
    alpha = np.reshape([values for values, _ in drawn], maps.shape)
    assert (alpha[maps < -0.02] == 0).all() and (alpha[maps > 0.02] >= 75).all()
    assert np.abs(np.subtract(drawn[image][1], (255, 250, 190))).max() < 20


def test_a_key_is_answered_in_less_than_50_ms():
    def act(page):
        page.evaluate(TIMES)
        page.click("#first")
        for word in ("smoke", "fire", "mountains", "car", "sky"):
            page.keyboard.press("Control+a")
            page.keyboard.type(word, delay=60)
        page.wait_for_timeout(300)
        return page.evaluate("chosen.first"), page.evaluate("times"), page.evaluate(COSTS)

    word, times, costs = visit(act)
    print(f"from a key to the picture: median {np.median(times):.1f} ms, slowest {max(times):.1f} ms of {len(times)}")
    print(f"of that the page's own work: median {np.median(costs):.1f} ms")
    assert word == "sky" and len(times) >= 20
    assert np.median(costs) < 50 and np.median(times) < 150  # loosely: the machine may be at work on other things


def test_what_begins_a_word_is_enough_and_what_is_none_is_said():
    def act(page):
        page.fill("#first", "smo")
        assert page.inner_text("#mixture").startswith("smoke")
        page.fill("#first", "zeppelin")
        assert 'No word of the captions begins with "zeppelin"' in page.inner_text("#message")
        assert page.get_attribute("#first", "aria-invalid") == "true"
        assert page.inner_text("#mixture").startswith("smoke"), "the last word stays"
        page.fill("#first", "Red")
        assert page.inner_text("#message") == "" and page.inner_text("#mixture").startswith("red")
        page.fill("#second", "")
        assert page.inner_text("#mixture") == "red" and page.locator("#share").is_disabled()
        page.locator("#words button", has_text="river").click()  # goes to the field that was used last
        assert page.input_value("#second") == "river" and page.locator("#share").is_enabled()
        assert page.locator("#words [aria-pressed=true]").all_inner_texts() == ["river"]

    visit(act)


def strongest_of(cell, image=0):
    """Words with their scores at a cell, strongest first, from the stored data."""
    data = live.read()
    matrix, vectors = (live.unpack(packed) for packed in (data["images"][image]["matrix"], data["vectors"]))
    scores = vectors @ matrix[cell, :-1] + matrix[cell, -1]
    words = [word for group in data["words"].values() for word in group]
    return [(words[i], scores[i]) for i in np.argsort(-scores)]


def test_a_click_lists_the_words_of_a_pixel():
    def act(page):
        picture = page.locator(".picture").nth(1)  # the first map
        box = picture.bounding_box()
        at = {"x": (11 + 0.5) / CELLS * box["width"], "y": (7 + 0.5) / CELLS * box["height"]}
        picture.hover(position={"x": 5, "y": 5})
        assert page.inner_text("#where").startswith("Row 1, column 1 of 16 x 16:")
        picture.click(position=at)
        picture.hover(position={"x": 5, "y": 5})
        held = page.inner_text("#where")
        listed = [text.split() for text in page.locator("#strongest button").all_inner_texts()]
        page.locator("#strongest button").first.click()
        assert page.input_value("#first") == listed[0][0], "a listed word can be chosen"
        picture.click(position=at)  # lets go
        picture.hover(position={"x": 5, "y": 5})
        assert page.inner_text("#where").startswith("Row 1, column 1 of 16 x 16:")
        return held, listed

    held, listed = visit(act)
    assert held.startswith("Row 8, column 12 of 16 x 16 (click again to let go): tree ")
    expected = strongest_of(7 * CELLS + 11)[: len(listed)]
    assert len(listed) == 8 and [float(score) for _, score in listed] == pytest.approx(
        [score for _, score in expected], abs=0.011
    )
    assert listed[0][0] == expected[0][0]


def test_everything_can_be_done_with_keys():
    def act(page):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        while page.evaluate("document.activeElement.className") != "picture":
            page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.ariaLabel").startswith("Map of tree: a burning house")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#where").startswith("Row 10, column 10 of 16 x 16")
        page.focus("#first")
        page.keyboard.press("ArrowDown")
        assert page.input_value("#first") == "trees" == page.evaluate("chosen.first")
        page.keyboard.press("ArrowUp")
        assert page.input_value("#first") == "tree"
        page.focus("#share")
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#mixture") == "99% tree + 1% water"

    visit(act)


@pytest.mark.parametrize("width", [1400, 420, 320])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read(scheme, width):
    """Each text has a contrast of 4.5 or more, and nothing sticks out of the window."""

    def act(page):
        picture = page.locator(".picture").nth(1)
        picture.click(position={"x": 80, "y": 70})
        page.fill("#second", "zeppelin")  # the message counts
        texts = page.evaluate(EVERYTHING)
        page.fill("#second", "water")
        page.evaluate("scrollTo(0, 0)")
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"live_{scheme}_{width}.png")
        return texts, page.evaluate("document.documentElement.scrollWidth")

    texts, needed = visit(act, width, color_scheme=scheme)
    print(f"{scheme}, {width} wide: {len(texts)} texts, least contrast {min(texts)[0]:.2f}")
    assert needed <= width and len(texts) > 100
    assert [(ratio, text) for ratio, text, _ in texts if ratio < 4.5] == []
