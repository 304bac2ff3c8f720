"""Curves over the timestep, one for every variant, readable without a legend or colour vision."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colour-blind safe set, without its yellow, which is too faint on white. Markers
# and line styles differ as well, so that no reading depends on colour alone.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
INK = "#222222"


def spread(places: np.ndarray, least: float) -> np.ndarray:
    """Moves label places in [0, 1] apart until neighbours are `least` away, keeping their order."""
    order = np.argsort(places, kind="stable")
    least = min(least, 1.0 / max(len(places) - 1, 1))
    moved = np.clip(places[order], 0.0, 1.0)
    for index in range(1, len(moved)):
        moved[index] = max(moved[index], moved[index - 1] + least)
    moved[-1] = min(moved[-1], 1.0)
    for index in range(len(moved) - 2, -1, -1):
        moved[index] = min(moved[index], moved[index + 1] - least)
    result = np.empty_like(moved)
    result[order] = moved
    return result


def _label_ends(axes: Axes, ends: dict[str, tuple[float, float, str]]) -> None:
    """Writes each line's name beside its right end, moved apart and tied to it by a leader."""
    low, high = np.log10(axes.get_ylim())
    heights = np.array([(np.log10(y) - low) / (high - low) for _, y, _ in ends.values()])
    places = spread(heights, 0.058)
    for (name, (x, y, colour)), place in zip(ends.items(), places):
        axes.annotate(
            name,
            xy=(x, y),
            xycoords="data",
            xytext=(1.05, place),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 1.0, "shrinkA": 2, "shrinkB": 2},
        )


def lines_figure(
    timesteps: np.ndarray, curves: Mapping[str, np.ndarray], title: str, ylabel: str
) -> Figure:
    """A line per variant over the timesteps, on a logarithmic axis, named at its right end.

    Args:
      timesteps: [S], in any order.
      curves: variant name -> [S], in any order of magnitude. Values that are not finite or not
        positive leave a gap; a curve with nothing to draw is named below the picture with the
        reason.
      title, ylabel: as shown.

    Raises ValueError when a shape does not fit.
    """
    timesteps = np.asarray(timesteps, np.float64)
    values = {name: np.asarray(value, np.float64) for name, value in curves.items()}
    wrong = {name: v.shape for name, v in values.items() if v.shape != timesteps.shape}
    if timesteps.ndim != 1 or not values or wrong:
        raise ValueError(
            f"{title}: needs timesteps [S] and an [S] curve for every variant; the timesteps have "
            f"shape {timesteps.shape}, and these differ: {wrong}."
        )
    order = np.argsort(timesteps, kind="stable")
    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    ends, absent = {}, []
    for index, (name, value) in enumerate(values.items()):
        x, y = timesteps[order], value[order]
        shown = np.isfinite(y) & (y > 0)  # a logarithmic axis has no place for the others
        if not shown.any():
            absent.append(f"{name}: " + ("zero" if (y == 0).all() else "not finite"))
            continue
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(
            x,
            np.where(shown, y, np.nan),
            color=colour,
            linestyle=LINES[index % len(LINES)],
            marker=MARKERS[index % len(MARKERS)],
            markevery=max(1, len(x) // 15),
            markersize=4.5,
            linewidth=1.6,
            label=name,
        )
        ends[name] = (x[shown][-1], y[shown][-1], colour)
    axes.set_title(title, fontsize=11, color=INK)
    axes.set_xlabel("timestep t  (small: near the image; large: noise)", color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    if ends:
        _label_ends(axes, ends)
    if absent:
        note = "Not on a log axis \u2013 " + "; ".join(absent)
        figure.supxlabel(note, fontsize=7.5, color="#555555", x=0.01, ha="left")
    return figure
