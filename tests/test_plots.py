"""Plots: what is drawn lies where it should, files repeat, and nothing outside the figure changes."""

import importlib
import itertools

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import colors, pyplot as plt
from PIL import Image

from attnlab import plots
from attnlab.scenes import street

STREET = street.CLASSES


def settings():
    return {name: mpl.rcParams[name] for name in mpl.rcParams if name != "backend"}  # that one is found on first use


@pytest.fixture(autouse=True)
def _leaves_no_trace():
    """No setting stays changed, no figure stays open."""
    before = settings()
    yield
    after = settings()
    plt.close("all")
    assert after == before


@pytest.fixture
def ax():
    """Axes that fill a figure of 160 x 240 pixels, so that rendered pixels can be counted."""
    return plt.figure(figsize=(2.4, 1.6), dpi=100).add_axes((0, 0, 1, 1))


@pytest.fixture
def image():
    """Gray image of 64 rows and 96 columns."""
    return np.full((64, 96, 3), 128, np.uint8)


def rendered(ax):
    ax.figure.canvas.draw()
    return np.asarray(ax.figure.canvas.buffer_rgba())[..., :3].astype(float)


def center_of(weights):
    """Center of mass as (row, column) fractions of the picture."""
    grid = np.indices(weights.shape) + 0.5
    return (grid * weights).sum(axis=(1, 2)) / weights.sum() / weights.shape


def test_importing_changes_no_setting():
    with mpl.rc_context():
        mpl.rcdefaults()
        before = settings()
        importlib.reload(plots)
        assert settings() == before


def test_every_class_has_a_color_of_its_own_also_in_gray():
    assert set(STREET) <= set(plots.CLASS_COLORS)
    rgb = np.array([colors.to_rgb(plots.CLASS_COLORS[name]) for name in STREET])
    gray = np.sort(255 * rgb @ (0.299, 0.587, 0.114))
    assert np.diff(gray).min() >= 10
    assert min(np.abs(a - b).sum() for a, b in itertools.combinations(rgb, 2)) > 0.12


@pytest.mark.parametrize("cell", [(0, 0), (3, 5), (2, 1)])
def test_a_small_map_lies_exactly_over_its_image(ax, image, cell):
    heat = np.zeros((4, 6))
    heat[cell] = 1.0
    middle = (np.array(cell) + 0.5) / heat.shape
    assert plots.show_heat(ax, heat, image=image, vmax=1) is ax
    assert ax.images[0].get_extent() == ax.images[1].get_extent() == [-0.5, 95.5, 63.5, -0.5]
    brightest = np.argwhere(rendered(ax)[..., 0] >= rendered(ax)[..., 0].max() - 1).mean(axis=0) / (160, 240)
    np.testing.assert_allclose(brightest, middle, atol=0.09)  # smoothed: within half a cell
    blended = plots.overlay(image, heat)
    assert blended.shape == image.shape and blended.dtype == np.uint8
    strongest = np.argwhere(blended[..., 0] == blended[..., 0].max()).mean(axis=0) + 0.5
    np.testing.assert_allclose(strongest / image.shape[:2], middle, atol=0.09)


def test_a_map_alone_shows_its_own_pixels(ax):
    heat = np.array([[0.0, 1.0, 2.0], [4.0, 3.0, 0.5]])
    plots.show_heat(ax, heat)
    picture = rendered(ax)
    expected = 255 * plt.colormaps["inferno"](heat / 4)[..., :3]
    np.testing.assert_allclose(picture[40::80, 40::80], expected, atol=1.5)


def test_heat_colors_start_at_zero_and_end_at_vmax(ax):
    heat = np.array([[1.0, 2.0], [-1.0, 4.0]])
    plots.show_heat(ax, heat, "map", vmax=8.0, colorbar=True)
    assert ax.images[0].get_clim() == (0, 8) and ax.get_title() == "map" and len(ax.figure.axes) == 2
    plots.show_heat(ax, heat)
    assert ax.images[1].get_clim() == (0, 4)
    plots.show_heat(ax, heat - 10)  # a linear map may be negative everywhere
    assert ax.images[2].get_clim() == (-11, -6)


def test_overlay_blends(image):
    half = np.rint(64 + 255 * np.array(plt.colormaps["inferno"](1.0)[:3]) / 2)
    warm = plots.overlay(image, np.ones((3, 5)), opacity=0.5)
    assert warm.shape == image.shape
    np.testing.assert_allclose(warm[5, 5], half, atol=1)
    np.testing.assert_array_equal(plots.overlay(image, np.ones((3, 5)), vmax=1e6, opacity=0.5)[0, 0], [64, 64, 66])
    np.testing.assert_array_equal(
        plots.overlay(image, np.zeros((3, 5))), plots.overlay(image, np.ones((3, 5)), vmax=1e9)
    )


def test_the_image_below_a_map_is_gray_so_that_only_heat_has_colors(ax):
    """An orange sky is no heat: a red, a green and a blue pixel of one brightness look alike below the same map."""
    weights = np.array([0.299, 0.587, 0.114])
    colored = (0.1 * np.eye(3) / weights).astype(np.float32)[None]
    cold = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    plots.show_heat(ax, cold[:1], image=colored, vmax=1)
    below = ax.images[0].get_array()[0]
    assert np.ptp(below) <= 1 and below.mean() == pytest.approx(25.5, abs=1)
    np.testing.assert_array_equal(plots.overlay(colored, cold[:1], vmax=1, opacity=0), np.rint(255 * colored))
    assert np.ptp(plots.overlay(colored, cold[:1], vmax=1).astype(float)[0], axis=0).max() <= 1
    assert np.ptp(plots.overlay(colored, cold[:1], vmax=1, opacity=0.4).astype(float)[0], axis=0).max() > 5


def test_the_maximum_of_a_map_is_in_its_corner_unless_maps_share_a_scale(ax, image):
    heat = np.array([[0.0, 0.4567]])
    plots.show_heat(ax, heat, image=image, vmax=1)
    plots.show_heat(plt.figure().gca(), heat)
    assert not ax.texts
    plots.show_heat(ax, heat, image=image)
    assert [text.get_text() for text in ax.texts] == ["max 0.46"]
    box = ax.texts[0].get_window_extent()
    assert 200 < box.x1 <= 240 and 0 <= box.y0 < 10  # of 240 x 160


def test_one_bar_explains_all_maps_of_a_figure():
    fig, axes = plots.grid(2, 2)
    for ax in axes.flat:
        plots.show_heat(ax, np.eye(2))
    before = fig.get_figwidth()
    plots.heat_bar(fig, "attention")
    assert len(fig.axes) == 5 and fig.get_figwidth() > before
    bar = fig.axes[-1]
    fig.canvas.draw()
    assert [text.get_text() for text in bar.get_yticklabels()] == ["0", "max"] and bar.get_ylabel() == "attention"
    assert bar.get_window_extent().x0 > max(ax.get_window_extent().x1 for ax in axes.flat)
    plots.heat_bar(fig, vmax=2)
    assert fig.axes[-1].get_ylim() == (0, 2)


def test_images_of_every_kind_look_the_same(image):
    kinds = (image, image / 255, Image.fromarray(image))
    drawn = [plots.show_image(plt.figure().gca(), kind, "title").images[0].get_array() for kind in kinds]
    for array in drawn:
        np.testing.assert_array_equal(array, image)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((3, 64, 96)), "channels last"),
        (np.zeros(64), "rgb"),
        (np.full((4, 4, 3), 255.0), r"float in 0\.\.1"),
        (np.zeros((4, 4, 3), int), "uint8"),
        (np.full((4, 4, 3), np.nan), "nan"),
    ],
)
def test_an_array_that_is_no_image_is_refused(ax, bad, message):
    with pytest.raises(ValueError, match=message):
        plots.show_image(ax, bad)


def test_a_gray_image_is_shown_in_gray(ax):
    plots.show_image(ax, np.array([[0.0, 1.0]]))
    assert ax.images[0].get_array().tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_a_mask_is_tinted_where_it_is(ax, image):
    mask = np.zeros((8, 12), bool)
    mask[5:7, 1:4] = True
    plots.show_mask(ax, image, mask, color="fire", title="fire")
    picture = rendered(ax)
    changed = np.abs(picture - 128).sum(axis=2) > 60
    np.testing.assert_allclose(center_of(changed), (6 / 8, 2.5 / 12), atol=0.005)
    assert 0.95 < changed.mean() / mask.mean() < 1.35  # the outline adds a rim
    assert picture[120, 50, 0] > picture[120, 50, 2] + 40  # orange
    assert ax.get_title() == "fire"
    plots.show_mask(ax, None, ~mask, color="sky")  # a second class leaves the first one as it was
    np.testing.assert_allclose(rendered(ax)[120, 50], picture[120, 50], atol=1)
    assert np.abs(rendered(ax)[20, 200] - picture[20, 200]).sum() > 60


def test_an_outline_follows_pixel_edges_over_the_picture_below(ax, image):
    mask = np.zeros((8, 12), bool)
    mask[5:7, 1:4] = True
    mask[0, 11] = True  # at the border
    plots.show_image(ax, image)
    assert plots.outline(ax, mask, "car") is ax
    segments = np.array(ax.collections[0].get_segments())
    lengths = np.abs(np.diff(segments, axis=1)).sum(axis=(1, 2))
    assert lengths.sum() == pytest.approx(8 * (2 * (2 + 3) + 4))  # perimeters in image pixels, 8 a mask pixel
    first = segments[segments[..., 0].max(axis=1) < 40].reshape(-1, 2)
    np.testing.assert_allclose([first.min(axis=0), first.max(axis=0)], [[7.5, 39.5], [31.5, 55.5]])
    np.testing.assert_allclose(ax.collections[0].get_color()[0][:3], colors.to_rgb(plots.CLASS_COLORS["car"]))


def test_what_is_no_mask_or_map_is_not_drawn(ax, image):
    """A tint over all of an image, or an even plane, would look like a result."""
    mask = np.eye(8)
    for draw in (lambda m: plots.show_mask(ax, image, m), lambda m: plots.outline(ax, m)):
        draw(mask)
        for wrong in (mask * 255, mask * 0.5, np.where(mask, np.nan, 0)):
            with pytest.raises(ValueError, match="must hold booleans or zeros and ones"):
                draw(wrong)
    for wrong in (mask * np.nan, np.where(mask, np.inf, 0)):
        for draw in (lambda h: plots.show_heat(ax, h), lambda h: plots.overlay(image, h)):
            with pytest.raises(ValueError, match="the heat map holds NaN or infinity"):
                draw(wrong)
    with pytest.raises(ValueError, match=r"labels are 0 to 0, .* there is"):
        plots.show_labels(ax, mask * 0.5, ["sky"])


def test_labels_take_their_class_colors_and_only_those_present_are_listed(ax):
    labels = np.array([[0, 2, 2], [2, 0, 3]])
    plots.show_labels(ax, labels, ["sky", "car", "smoke", "pylon"])
    drawn = ax.images[0].get_array()
    for (row, column), name in {(0, 0): "sky", (0, 1): "smoke", (1, 0): "smoke", (1, 1): "sky"}.items():
        np.testing.assert_allclose(drawn[row, column, :3], colors.to_rgb(plots.CLASS_COLORS[name]))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["sky", "smoke", "pylon"]
    with pytest.raises(ValueError, match=r"labels are 0 to 1, as there are 2 names; there is \[2, 3\]"):
        plots.show_labels(ax, labels, ["sky", "car"])


def test_clusters_leave_the_rest_of_the_image_visible(ax, image):
    plots.show_clusters(ax, np.array([[0, 1], [2, -1]]), image=image)
    first, second, noise = (ax.images[1].get_array()[i] for i in [(0, 1), (1, 0), (1, 1)])
    assert ax.images[1].get_array()[0, 0, 3] == 0 and first[3] > 0.5
    assert not np.allclose(first, second) and noise[0] == noise[1] == noise[2]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["cluster 1", "cluster 2", "noise"]
    plots.show_clusters(plt.figure().gca(), np.zeros((3, 4), int))  # nothing found is a picture too


def test_curves_have_the_colors_of_their_classes(ax):
    x = np.linspace(0, 1, 11)
    ys = {"all": x, "car": x**2, "smoke": 1 - x}
    plots.curves(ax, x, ys, bands={"car": (x**2 - 0.1, x**2 + 0.1)}, xlabel="tau", ylabel="mIoU")
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == list(ys) and lines["all"].get_linestyle() == "--" and lines["car"].get_linestyle() == "-"
    assert colors.same_color(lines["car"].get_color(), plots.CLASS_COLORS["car"])
    assert np.mean(colors.to_rgb(lines["smoke"].get_color())) < 0.7  # readable on white
    np.testing.assert_array_equal(lines["smoke"].get_ydata(), 1 - x)
    assert len(ax.collections) == 1 and (ax.get_xlabel(), ax.get_ylabel()) == ("tau", "mIoU")
    with pytest.raises(ValueError, match="rider"):
        plots.curves(ax, x, ys, bands={"rider": (x, x)})


def test_curves_over_a_logarithm(ax):
    plots.curves(ax, [1, 2, 20], {"a": [0, 1, 2], "b": [1, 1, 1]}, log=True)
    assert ax.get_xscale() == "log" and [text.get_text() for text in ax.get_xticklabels()] == ["1", "2", "20"]


def test_every_curve_may_have_its_own_x(ax):
    plots.curves(ax, {"a": [0, 1], "b": [5]}, {"a": [2, 3], "b": [4]}, bands={"a": ([1, 2], [3, 4])})
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["a"].get_xdata()) == [0, 1] and list(lines["b"].get_xdata()) == [5]
    assert lines["b"].get_marker() == "*" and lines["a"].get_marker() == "o"
    plots.curves(ax, range(20), {"many": range(20)})
    assert ax.lines[-1].get_marker() == "None"  # points as close as these would make a thick line


def test_dots_lie_in_the_row_of_their_name_with_their_intervals(ax):
    values, spans = {"a": [0.5, 1.0], "b": [0.25, np.nan]}, {"a": ([0.4, 0.8], [0.6, 1.2])}
    plots.dots(ax, ["car", "road"], values, spans, xlabel="IoU", title="gain")
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["a"].get_xdata()) == [0.5, 1.0] and lines["b"].get_xdata()[0] == 0.25
    rows = np.stack([lines[name].get_ydata() for name in "ab"], 1)
    assert (np.diff(rows) > 0).all() and (abs(rows - [[0], [1]]) < 0.5).all()  # one below the other, in their row
    assert ax.get_ylim() == (1.5, -0.5)  # the first name on top
    first = ax.collections[0].get_segments()
    np.testing.assert_allclose(np.array(first)[..., 0], [[0.4, 0.6], [0.8, 1.2]])
    np.testing.assert_allclose(np.array(first)[:, 0, 1], lines["a"].get_ydata())
    assert [text.get_text() for text in ax.get_yticklabels()] == ["car", "road"] and ax.get_xlabel() == "IoU"
    assert lines["a"].get_marker() != lines["b"].get_marker()  # also told apart in gray
    with pytest.raises(ValueError, match="'a' has 1 dots for 2 names"):
        plots.dots(ax, ["car", "road"], {"a": [1]})


def test_matrix_writes_numbers_and_frames_the_best(ax):
    values = np.array([[0.1, 0.25, np.nan], [0.5, 0.9, 0.3]])
    plots.matrix(ax, values, ["down", "up"], [1, 5, 10], highlight=(1, 2), fmt=".1f", xlabel="step")
    written = {text.get_position(): text.get_text() for text in ax.texts}
    assert written == {(0, 0): "0.1", (1, 0): "0.2", (0, 1): "0.5", (1, 1): "0.9", (2, 1): "0.3"}
    assert ax.patches[0].get_xy() == (1.5, 0.5)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["down", "up"]
    with pytest.raises(ValueError, match="3 row and 2 column"):
        plots.matrix(ax, values, [1, 2, 3], [1, 2])


def test_matrices_to_compare_share_their_colors(ax):
    plots.matrix(ax, [[0.2, 0.4]], ["up"], [1, 2], limits=(0, 1))
    assert ax.images[0].get_clim() == (0, 1)


def test_matrix_without_numbers_has_a_color_bar(ax):
    plots.matrix(ax, np.eye(3), range(3), range(3), fmt=None)
    assert not ax.texts and len(ax.figure.axes) == 2


def test_grid_has_cells_of_the_asked_size_and_keeps_its_titles():
    fig, axes = plots.grid(2, 3, cell=1.5, aspect=0.5, column_titles=["a", "b", "c"], row_titles=["x", "y"])
    assert axes.shape == (2, 3) and plots.grid(1, 1)[1].shape == (1, 1)
    assert 4.5 <= fig.get_size_inches()[0] < 5 and 1.5 <= fig.get_size_inches()[1] < 2
    x = np.linspace(0, 1, 5)
    plots.curves(axes[0, 0], x, {"car": x})
    plots.show_image(axes[1, 0], np.zeros((5, 10, 3)))
    assert axes[0, 0].get_title() == "a" and axes[0, 0].get_ylabel() == "x" and axes[1, 0].get_ylabel() == "y"
    assert len(axes[0, 0].get_xticks()) > 2 and len(axes[1, 0].get_xticks()) == 0  # curves bring their ticks back
    assert axes[0, 0].title.get_fontsize() == plots.STYLE["axes.titlesize"]
    with pytest.raises(ValueError, match="column_titles has 2 entries for 3 columns"):
        plots.grid(1, 3, column_titles=["a", "b"])


def test_long_titles_are_broken_and_nothing_overlaps():
    fig, axes = plots.grid(1, 2, cell=1.6, column_titles=["the map of a word that is not in the prompt", "mask"])
    fig.canvas.draw()
    left, right = (ax.title.get_window_extent() for ax in axes[0])
    assert "\n" in axes[0, 0].get_title() and left.x1 < right.x0
    assert left.x0 >= 0 and left.y1 <= fig.bbox.y1 + 1


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_a_saved_figure_repeats_byte_for_byte(tmp_path, image, suffix):
    def save(name):
        fig, axes = plots.grid(1, 2, column_titles=["a", "b"])
        plots.show_mask(axes[0, 0], image, np.eye(4, 6), "fire")
        plots.curves(axes[0, 1], [0, 1], {"fire": [0, 1]})
        return plots.save_figure(fig, tmp_path / "new folder" / f"{name}{suffix}")

    first, second = save("first"), save("second")
    assert first.read_bytes() == second.read_bytes() and first.stat().st_size > 1000
    assert b"atplotlib" not in first.read_bytes()
    assert sorted(first.parent.iterdir()) == [first, second]  # nothing unfinished is left


def test_an_interrupted_save_keeps_the_old_figure(tmp_path, monkeypatch):
    fig, _ = plots.grid(1, 1)
    path = plots.save_figure(fig, tmp_path / "figure.png")
    old = path.read_bytes()

    def half_written(unfinished, **_):
        unfinished.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(fig, "savefig", half_written)
    with pytest.raises(KeyboardInterrupt):
        plots.save_figure(fig, path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"'figure\.jpg'"):
        plots.save_figure(fig, tmp_path / "figure.jpg")


def test_a_caption_travels_with_its_figure(tmp_path):
    fig, axes = plots.grid(1, 1)
    plots.show_image(axes[0, 0], np.zeros((4, 4)))
    path = plots.save_figure(fig, tmp_path / "dark.png", caption="Nothing to see.", pdf=True)
    with Image.open(path) as picture:
        assert picture.text == {"Description": "Nothing to see."}
    assert b"Nothing to see." in path.with_suffix(".pdf").read_bytes()


def test_a_sheet_shows_each_pair_side_by_side():
    images = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 120, 250)])
    labels = np.stack([np.full((4, 4), number, np.uint8) for number in (0, 1, 0)])
    fig = plots.pair_sheet(images, labels, ["water", "road"], columns=2, row_titles=["first", "second"])
    drawn = [[image.get_array() for image in ax.images] for ax in fig.axes]
    assert [len(one) for one in drawn] == [1] * 6 + [0, 0]  # two rows of two pairs, the last place is empty
    assert [int(one[0][0, 0, 0]) for one in drawn[0:6:2]] == [10, 120, 250]
    for one, number in zip(drawn[1:6:2], (0, 1, 0), strict=True):
        np.testing.assert_allclose(one[0][0, 0, :3], colors.to_rgb(plots.CLASS_COLORS[["water", "road"][number]]))
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["water", "road"]
    assert [fig.axes[k].get_ylabel() for k in (0, 4)] == ["first", "second"]
    fig.canvas.draw()
    assert fig.legends[0].get_window_extent().x0 > fig.axes[3].get_window_extent().x1
