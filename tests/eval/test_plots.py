"""plots: what each picture holds, that no text leaves it, and that misuse is explained."""

import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from matplotlib.text import Text

from qdiff_jax.eval import plots

VARIANTS = ("fp32", "rtn_w8a8", "rtn_w4a8", "brecq_w4a8", "tfmq_w4a8")
TIMESTEPS = np.arange(0, 1000, 50)[::-1]


def images(count=5, channels=3):
    rng = np.random.default_rng(0)
    return {name: rng.uniform(-1, 1, size=(count, 4, 4, channels)) for name in VARIANTS}


def curves():
    decay = 1e-3 * (1 + np.exp(-TIMESTEPS / 200))
    return {name: decay * index for index, name in enumerate(VARIANTS)}


def ranges(sites):
    width = np.linspace(1.0, 4.0, len(TIMESTEPS))[::-1, None] * np.ones((1, sites))
    return -width, width, [f"down_{i}_block_0/conv1" for i in range(sites)]


def drawn_texts(figure):
    """The texts of a figure with the box of each, in pixels."""
    FigureCanvasAgg(figure).draw()
    texts = figure.findobj(Text)
    return {text.get_text(): text.get_window_extent() for text in texts if text.get_text()}


@pytest.mark.parametrize(
    "figure",
    [
        lambda: plots.samples_figure(images()),
        lambda: plots.samples_figure(
            dict.fromkeys(["a_rather_long_variant_name"], images()["fp32"])
        ),
        lambda: plots.error_figure(TIMESTEPS, curves()),
        lambda: plots.temporal_figure(TIMESTEPS, curves()),
        lambda: plots.ranges_figure(TIMESTEPS, *ranges(60)),
        lambda: plots.ranges_figure(TIMESTEPS[:1], *(v[:1] for v in ranges(2)[:2]), ["a", "b"]),
    ],
    ids=["samples", "one_variant", "error", "temporal", "ranges", "ranges_small"],
)
def test_nothing_is_cut_off(figure):
    """Ink that would leave the picture touches its outermost pixels."""
    canvas = FigureCanvasAgg(figure())
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert all((edge == 255).all() for edge in edges)
    assert (pixels != 255).any()


def test_line_labels_do_not_overlap():
    close = {f"variant_{i}": np.full(TIMESTEPS.shape, 1e-3 * (1 + 1e-4 * i)) for i in range(9)}
    boxes = drawn_texts(plots.error_figure(TIMESTEPS, close))
    labels = sorted((boxes[name] for name in close), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 0.5 for low, high in zip(labels, labels[1:]))


def test_samples_has_a_block_for_each_variant_with_the_noise_in_the_same_place():
    shown = images(count=5)
    shown["rtn_w4a8"][3, 0, 0] = np.nan
    figure = plots.samples_figure(shown, columns=2)
    assert [axes.get_title() for axes in figure.axes] == list(VARIANTS)
    tiles = {axes.get_title(): np.asarray(axes.images[0].get_array()) for axes in figure.axes}
    assert tiles["fp32"].shape == (3 * 4 + 2, 2 * 4 + 1, 3)
    # Image 3 stands in the second row, second column.
    np.testing.assert_allclose(tiles["fp32"][5:9, 5:9], shown["fp32"][3] * 0.5 + 0.5)
    np.testing.assert_array_equal(tiles["rtn_w4a8"][5, 5], [1, 0, 1])  # magenta: not finite
    np.testing.assert_array_equal(tiles["fp32"][10:, 5:], 1.0)  # nothing after the fifth image
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["0\u20131", "2\u20133", "4"]


def test_samples_clips_and_takes_grey_images():
    grey = {"fp32": np.full((1, 4, 4, 1), 7.0)}
    tile = np.asarray(plots.samples_figure(grey).axes[0].images[0].get_array())
    np.testing.assert_array_equal(tile, np.ones((4, 4, 3)))


@pytest.mark.parametrize("draw", [plots.error_figure, plots.temporal_figure])
def test_curves_are_logarithmic_sorted_and_distinct(draw):
    figure = draw(TIMESTEPS, curves())
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert [line.get_label() for line in axes.lines] == list(VARIANTS[1:])
    assert all((np.diff(line.get_xdata()) > 0).all() for line in axes.lines)
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 4
    assert "fp32: zero" in figure.get_supxlabel()  # named, since it cannot be drawn
    drawn = {text.get_text() for text in axes.texts}
    assert drawn == set(VARIANTS[1:])


def test_a_variant_keeps_its_style_whatever_is_drawn_before_it():
    full = plots.error_figure(TIMESTEPS, curves())
    nothing = curves() | {"rtn_w8a8": np.full(TIMESTEPS.shape, np.nan)}
    partial = plots.error_figure(TIMESTEPS, nothing)
    styles = [
        {line.get_label(): (line.get_color(), line.get_linestyle()) for line in f.axes[0].lines}
        for f in (full, partial)
    ]
    assert "rtn_w8a8: not finite" in partial.get_supxlabel()
    assert styles[1] == {name: styles[0][name] for name in VARIANTS[2:]}


def test_ranges_shows_the_bits_that_one_shared_range_loses():
    lo = np.array([[-1.0, 0.0, 2.0], [-4.0, 0.0, 2.0]])
    hi = np.array([[1.0, 1.0, 2.0], [4.0, 1.0, 2.0]])
    figure = plots.ranges_figure(np.array([900, 0]), lo, hi, ["wide", "steady", "constant"])
    picture = np.asarray(figure.axes[0].images[0].get_array())
    # Sites down, timesteps ascending across: t = 0 fills the shared range, t = 900 a quarter of it.
    np.testing.assert_allclose(picture, [[0, 2], [0, 0], [0, 0]])
    boxes = drawn_texts(figure)
    assert {"wide", "steady", "constant", "\u22124 \u2026 4", "0 \u2026 1"} <= set(boxes)


def test_pictures_are_written_as_readable_pngs_with_a_pdf_beside(tmp_path):
    lo, hi, names = ranges(3)
    written = [
        plots.plot_samples(images(), tmp_path / "new" / "samples.png"),
        plots.plot_error(TIMESTEPS, curves(), tmp_path / "error.png"),
        plots.plot_temporal(TIMESTEPS, curves(), tmp_path / "temporal.png"),
        plots.plot_ranges(TIMESTEPS, lo, hi, names, tmp_path / "ranges.png"),
    ]
    for path in written:
        height, width, _ = imread(path).shape
        assert 250 < height < 4000
        assert 600 < width < 4000
        vector = path.with_suffix(".pdf").read_bytes()
        assert vector.startswith(b"%PDF")
        # The page has the picture's size, in points instead of pixels.
        page = [float(v) for v in re.search(rb"/MediaBox \[ 0 0 (\S+) (\S+) \]", vector).groups()]
        np.testing.assert_allclose(page, [width * 72 / 150, height * 72 / 150], atol=1)
        assert b"/Type3" not in vector
    there = {p for p in tmp_path.rglob("*") if p.is_file()}
    assert there == {p.with_suffix(end) for p in written for end in (".png", ".pdf")}


def test_equal_pictures_are_equal_files(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("a", "b"):
        plots.plot_error(TIMESTEPS, curves(), tmp_path / f"{name}.png")
    for end in ("png", "pdf"):
        assert (tmp_path / f"a.{end}").read_bytes() == (tmp_path / f"b.{end}").read_bytes()
    assert "glyph" not in caplog.text  # a font's subset is told glyph by glyph


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.samples_figure({}), "same shape|of one shape"),
        (lambda: plots.samples_figure({"a": np.zeros((2, 4, 4, 2))}), "1 or 3"),
        (
            lambda: plots.samples_figure(
                {"a": np.zeros((2, 4, 4, 3)), "b": np.zeros((3, 4, 4, 3))}
            ),
            "'b'",
        ),
        (lambda: plots.samples_figure(images(), columns=0), "at least one image column"),
        (lambda: plots.error_figure(TIMESTEPS, {"a": np.ones(3)}), r"'a': \(3,\)"),
        (lambda: plots.error_figure(TIMESTEPS, {}), "every variant"),
        (lambda: plots.ranges_figure(TIMESTEPS, *ranges(3)[:2], ["a"]), "S=1 sites"),
        (
            lambda: plots.ranges_figure(np.zeros(1), np.ones((1, 1)), np.zeros((1, 1)), ["odd"]),
            r"\['odd'\]",
        ),
    ],
)
def test_misuse_is_explained(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
