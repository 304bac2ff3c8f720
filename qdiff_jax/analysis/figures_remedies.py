"""The picture of four troubles before and after methods."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from qdiff_jax.analysis.column import STEPS_LABEL, column, dress, legend, line_style, short
from qdiff_jax.analysis.remedies import Remedies


def remedies_figure(result: Remedies) -> Figure:
    """One panel for each trouble, one line for each variant; the first is the one without a remedy."""
    heights = [1.9, 1.5, 1.5] + ([1.7] if result.layers else [])
    figure, panels = column(heights)
    curves = (result.activations, result.accumulated, result.temporal)
    labels = ("rel. error of activations", "rel. MSE of the state", "1 \u2212 cos, temporal")
    titles = (
        "ranges over t (median activation)",
        "accumulated over the steps",
        "temporal features",
    )
    for axes, values, label, title in zip(panels, curves, labels, titles):
        for index, (name, line) in enumerate(values.items()):
            shown = np.where(line > 0, line, np.nan)
            axes.plot(result.timesteps, shown, label=name, **line_style(index))
        axes.set_yscale("log")
        dress(axes, STEPS_LABEL, label, title)
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(low, high * (high / low) ** 0.45)
    legend(panels[0], loc="upper right", ncols=2, columnspacing=0.8)
    if result.layers:
        axes = panels[3]
        places = np.arange(len(result.layers))
        for index, (name, values) in enumerate(result.skips.items()):
            style = {**line_style(index), "linestyle": "none", "markersize": 4.0}
            axes.plot(places, np.where(values > 0, values, np.nan), label=name, **style)
        axes.set_yscale("log")
        axes.set_xticks(places, [short(name).split("/")[0] for name in result.layers], rotation=45)
        dress(axes, "block that reads a skip", "rel. error of smaller map", "skip concatenations")
    return figure
