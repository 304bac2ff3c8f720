"""The dress of a figure for one column of a paper: 3.3 inches wide, vector and bitmap, colour-blind safe.

As in `eval.plots`, nothing touches pyplot; markers and line styles differ beside colours.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qdiff_jax.eval.curves import COLOURS, INK, LINES, MARKERS
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.eval.plots import render

WIDTH_INCHES = 3.3
_DPI = 300
_LABEL, _TICK = 7.5, 6.5  # points: what a column's body text of 9 to 10 allows
STEPS_LABEL = "timestep t (small: near the image)"


def column(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure of column width with one panel below the other, of these heights in inches."""
    figure = Figure(figsize=(WIDTH_INCHES, float(sum(heights))), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, hspace=0.04)
    axes = figure.subplots(len(heights), 1, height_ratios=list(heights), squeeze=False)
    return figure, list(axes[:, 0])


def dress(axes: Axes, xlabel: str, ylabel: str, title: str = "", grid: bool = True) -> None:
    """Labels with units, small type, no frame where no axis is."""
    axes.set_xlabel(xlabel, fontsize=_LABEL, color=INK)
    axes.set_ylabel(ylabel, fontsize=_LABEL, color=INK)
    axes.set_title(title, fontsize=_LABEL, color=INK, loc="left")
    axes.tick_params(which="both", labelsize=_TICK, colors=INK, width=0.6, length=2.5)
    axes.spines[:].set_linewidth(0.6)
    if grid:
        axes.grid(True, which="major", color="#DDDDDD", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def legend(axes: Axes, **options) -> None:
    """A legend in small type that does not hide the data."""
    options = {"loc": "best", "frameon": True, "framealpha": 0.85, "edgecolor": "none", **options}
    axes.legend(fontsize=_TICK, handlelength=2.2, borderpad=0.2, labelspacing=0.25, **options)


def legend_below(figure: Figure, axes: Axes) -> None:
    """What `axes` shows, in two columns below all panels, in type that is small enough to fit."""
    handles, labels = axes.get_legend_handles_labels()
    options = {"loc": "outside lower center", "ncols": 2, "frameon": False, "columnspacing": 1.0}
    size = 6.0
    for _ in range(8):
        made = figure.legend(handles, labels, fontsize=size, **options)
        figure.draw_without_rendering()
        if made.get_window_extent().width <= figure.bbox.width:
            return
        made.remove()
        size *= 0.9
    figure.legend(handles, labels, fontsize=size, **{**options, "ncols": 1})


def line_style(index: int) -> dict:
    """Colour, line and marker of the index-th curve, the same in every picture."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 3.0,
        "linewidth": 1.1,
    }


def step_ticks(axes: Axes, timesteps: np.ndarray, most: int = 6) -> None:
    """Timesteps under an axis that counts steps (heat-maps draw steps at equal distances)."""
    places = np.unique(np.linspace(0, len(timesteps) - 1, min(len(timesteps), most)).round())
    places = places.astype(int)
    axes.set_xticks(places, [f"{timesteps[i]:.4g}" for i in places])


def plain_log(axes: Axes) -> None:
    """Ordinary numbers at a logarithmic y axis that spans few decades; to be called after the limits."""
    low, high = axes.get_ylim()
    if not (np.isfinite([low, high]).all() and low > 0) or high / low > 1e3:
        return
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks: list[float] = []
    for marks in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), range(1, 10)):
        ticks = [m * 10.0**d for d in decades for m in marks if low <= m * 10.0**d <= high]
        if len(ticks) >= 3:
            break
    else:
        ticks = [v for v in MaxNLocator(4).tick_values(low, high) if low <= v <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)


def colour_bar(figure: Figure, picture, axes: Axes | Sequence[Axes], label: str) -> None:
    """The scale of a picture's colours, beside one panel or along several."""
    bar = figure.colorbar(picture, ax=axes, pad=0.02, aspect=18)
    bar.set_label(label, fontsize=_LABEL, color=INK)
    bar.ax.tick_params(labelsize=_TICK, width=0.6, length=2.5)
    bar.outline.set_linewidth(0.6)


def note(axes: Axes, text: str, x: float, y: float, **options) -> None:
    """Small text at a place in units of the panel."""
    options = {"ha": "left", "va": "top", **options}
    axes.text(x, y, text, transform=axes.transAxes, fontsize=_TICK, color=INK, **options)


def short(name: str) -> str:
    """A site's or block's name as a picture has room for it."""
    return name.replace("_block_", ".").replace("_attn_", ".attn").replace(":input", "")


def save(figure: Figure, stem: str | pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes stem.png (300 dpi) and stem.pdf, each whole or not at all; returns both paths."""
    png, pdf = render(figure, _DPI)
    stem = pathlib.Path(stem)
    return (
        write_atomic(stem.with_name(stem.name + ".png"), png),
        write_atomic(stem.with_name(stem.name + ".pdf"), pdf),
    )
