"""The picture of four troubles before and after methods."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from qdiff_jax.analysis.column import STEPS_LABEL, column, dress, legend, line_style, short
from qdiff_jax.analysis.remedies import Remedies


def remedies_figure(result: Remedies) -> Figure:
    """One panel for each trouble that was measured, one line for each variant, of which the first is the one
    without a remedy. A variant has one style in all panels, and each panel names its own."""
    lines = [
        (values, label, title)
        for values, label, title in (
            (result.activations, "rel. error of activations", "ranges over t (median activation)"),
            (result.accumulated, "rel. MSE of the state", "accumulated over the steps"),
            (result.temporal, "1 \u2212 cos, temporal", "temporal features"),
        )
        if values
    ]
    measured = [values for values, _, _ in lines] + ([result.skips] if result.layers else [])
    names = list(dict.fromkeys(name for values in measured for name in values))
    styles = {name: line_style(index) for index, name in enumerate(names)}
    figure, panels = column([1.7] * len(measured))
    for axes, (values, label, title) in zip(panels, lines):
        for name, line in values.items():
            shown = np.where(line > 0, line, np.nan)
            axes.plot(result.timesteps, shown, label=name, **styles[name])
        axes.set_yscale("log")
        dress(axes, STEPS_LABEL, label, title)
    if result.layers:
        axes = panels[-1]
        places = np.arange(len(result.layers))
        for name, values in result.skips.items():
            style = {**styles[name], "linestyle": "none", "markersize": 4.0}
            axes.plot(places, np.where(values > 0, values, np.nan), label=name, **style)
        axes.set_yscale("log")
        axes.set_xticks(places, [short(name).split("/")[0] for name in result.layers], rotation=45)
        dress(axes, "block that reads a skip", "rel. error of smaller map", "skip concatenations")
    for axes in panels:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.35)  # room for the names
        wide = sum(len(text) for text in axes.get_legend_handles_labels()[1]) > 34
        legend(axes, loc="upper right", ncols=1 if wide else 2, columnspacing=0.8)
    return figure
