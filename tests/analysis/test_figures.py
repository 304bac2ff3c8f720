"""Every picture on results made by hand: files, width, labels with units, legends, safe colours."""

import matplotlib.colors as mcolors
import numpy as np
import pytest
from matplotlib.collections import Collection
from matplotlib.image import imread
from matplotlib.patches import Patch

from qdiff_jax.analysis.column import COLOURS, column, legend_below, save
from qdiff_jax.analysis.registry import ANALYSES

from . import drawn_results

STEP = "timestep t (small: near the image)"
# What each panel says of its axes, x then y; None where the ticks are names.
LABELS = {
    "ranges": [(STEP, "range / its median over t"), (STEP, "channel (sorted)")],
    "skips": [("activation (its own units)", "density"), (None, "std of h / std of skip")],
    "temporal": [
        ("timestep t", "timestep t'"),
        ("timestep t", "1 \u2212 cosine"),
        ("timestep t", "t' \u2212 t (timesteps)"),
    ],
    "outliers": [
        ("channel (sorted)", "largest |activation|"),
        ("depth (share of the layers)", "largest / median channel"),
    ],
    "deviation": [
        ("timestep t of the step (sampling runs to the right)", "relative MSE of the state")
    ],
    "noise": [
        ("full-precision estimate \u03b5 (in std of noise)", "its error (in std of noise)"),
        (STEP, "R\u00b2 of error on \u03b5"),
        (STEP, "moment of residual"),
    ],
    "sensitivity": [
        ("weights in order of execution", "relative MSE of \u03b5"),
        ("activations in order of execution", "relative MSE of \u03b5"),
    ],
    "histograms": [("weight, up_1.0/conv2, channel 3", "density"), ("input of", "density")],
    "softmax": [
        ("probability p", "share of values \u2265 p"),
        (STEP, "tail exponent \u03b1"),
        (STEP, "log2 error / uniform"),
    ],
    "taylor": [
        ("predicted loss, relative to mean \u03b5\u00b2", "true loss (same unit)"),
        ("fraction of the perturbation", "true / predicted"),
    ],
    "beneficial": [
        ("paired difference / its std (95 % interval)", None),
        ("Frechet distance (feature units\u00b2)", None),
    ],
}
CASES = {name: getattr(drawn_results, name) for name in LABELS}
CASES["softmax of 12 layers"] = lambda: drawn_results.softmax(12)
CASES["beneficial without real images"] = lambda: drawn_results.beneficial(real=False)


def _panels(figure):
    """Axes of data and axes of colour bars."""
    bars = [axes for axes in figure.axes if hasattr(axes, "_colorbar")]
    return [axes for axes in figure.axes if axes not in bars], bars


def _colours(artists) -> set[str]:
    """What is drawn of them, as hex, without greys, white and what is invisible."""
    found = set()
    for artist in artists:
        if isinstance(artist, Collection) and artist.get_array() is not None:
            continue  # coloured by a map, which is asked for its name
        if isinstance(artist, Patch):
            given = [artist.get_facecolor(), artist.get_edgecolor()]
        elif isinstance(artist, Collection):
            given = [*artist.get_facecolor(), *artist.get_edgecolor()]
        else:
            given = [artist.get_color()]
        rgba = np.array([mcolors.to_rgba(colour) for colour in given]).reshape(-1, 4)
        coloured = (np.ptp(rgba[:, :3], axis=1) > 1e-6) & (rgba[:, 3] > 0)
        found |= {mcolors.to_hex(colour[:3]).upper() for colour in rgba[coloured]}
    return found


def _drawn(axes):
    return [*axes.lines, *axes.patches, *axes.collections]


def _explained(figure) -> set[str]:
    legends = [axes.get_legend() for axes in figure.axes]
    return {c for held in legends if held for c in _colours(held.legend_handles)}


def test_every_analysis_has_a_picture_here():
    assert set(LABELS) == set(ANALYSES)


@pytest.mark.parametrize("case", CASES)
def test_a_picture_reads_in_a_column(case, tmp_path):
    name = case.split()[0]
    figure = ANALYSES[name].draw(CASES[case]())
    png, pdf = save(figure, tmp_path / name)
    assert (png.name, pdf.name) == (f"{name}.png", f"{name}.pdf")
    assert pdf.read_bytes().startswith(b"%PDF")
    pixels = imread(png)[..., :3]
    assert pixels.shape[1] == 990  # 3.3 inches at 300 dpi
    # Ink that would leave the picture touches its outermost pixels.
    assert all((edge == 1).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))

    panels, bars = _panels(figure)
    expected = LABELS[name][: 1 if "without" in case else None]
    assert len(panels) == len(expected)
    for axes, labels in zip(panels, expected):
        for axis, label in zip((axes.xaxis, axes.yaxis), labels):
            if label is None:
                ticks = [tick.get_text() for tick in axis.get_ticklabels()]
                assert all(text.strip("-\u2212.0123456789") for text in ticks)
            else:
                assert axis.get_label_text().startswith(label)
    assert all(bar.get_ylabel() for bar in bars)

    maps = {picture.get_cmap().name for axes in panels for picture in axes.images}
    maps |= {c.get_cmap().name for a in panels for c in a.collections if c.get_array() is not None}
    assert maps <= {"cividis"}
    safe = {colour.upper() for colour in COLOURS}
    by_depth = case == "softmax of 12 layers"
    for axes in panels:
        colours = _colours(_drawn(axes))
        if by_depth and axes is not panels[0]:
            assert len(colours) == 12
            assert bars
            continue
        assert colours <= safe
        joined = [line for line in axes.lines if line.get_linestyle() != "None"]
        lines = _colours([line for line in joined if len(line.get_xdata()) > 1])
        if len(lines) > 1:
            assert lines <= _explained(figure)


def test_without_real_images_the_picture_says_so():
    figure = ANALYSES["beneficial"].draw(drawn_results.beneficial(real=False))
    assert "measured against full precision only" in figure.axes[0].get_title("right")
    figure = ANALYSES["beneficial"].draw(drawn_results.beneficial())
    assert "only" not in figure.axes[0].get_title("right")
    notes = [text.get_text() for text in figure.axes[1].texts]
    assert [text.startswith("w4a8 \u2212 w8a8") for text in notes] == [True, True]


def test_colours_by_depth_run_over_the_whole_map():
    """Twelve layers in seven cycled colours would give two layers one colour."""
    axes = ANALYSES["softmax"].draw(drawn_results.softmax(12)).axes[1]
    brightness = [np.mean(mcolors.to_rgb(line.get_color())) for line in axes.lines]
    assert len(brightness) == 12
    assert all(np.diff(brightness) > 0)


def test_no_two_settings_of_bits_look_alike():
    """Nine settings and seven colours: the colour says the weights' bits, the marker the activations'."""
    result = drawn_results.taylor()
    top, bottom = ANALYSES["taylor"].draw(result).axes
    looks = {}
    for line in top.lines[1:]:
        looks[line.get_label()] = (line.get_color(), line.get_marker())
    assert list(looks) == ["W8", "W4", "W2", "W8A8", "W4A8", "W4A4"]
    assert len(set(looks.values())) == len(looks)
    assert looks["W4"][0] == looks["W4A8"][0] == looks["W4A4"][0]
    assert looks["W8A8"][1] == looks["W4A8"][1]
    along = [(line.get_color(), line.get_marker()) for line in bottom.lines[: len(looks)]]
    assert along == list(looks.values())


@pytest.mark.parametrize("length", [5, 40, 200])
def test_a_legend_below_the_panels_fits_into_the_column(length):
    figure, (axes,) = column((2.0,))
    for i in range(6):
        axes.plot([i], [i], label="x" * (length + i))
    legend_below(figure, axes)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["x" * (length + i) for i in range(6)]
    if length < 200:
        assert legend.get_window_extent().width <= figure.bbox.width
