"""Pictures of what quantization does: deviation, noise, sensitivity, grids, Taylor, beneficial noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qdiff_jax.analysis.beneficial import Beneficial
from qdiff_jax.analysis.column import (
    COLOURS,
    LINES,
    MARKERS,
    STEPS_LABEL,
    column,
    dress,
    legend,
    line_style,
    note,
    plain_log,
    short,
)
from qdiff_jax.analysis.deviation import Deviation
from qdiff_jax.analysis.histograms import GridUse, Histograms
from qdiff_jax.analysis.noise import NoiseCorrelation
from qdiff_jax.analysis.sensitivity import Sensitivity
from qdiff_jax.analysis.subject import parse_bits
from qdiff_jax.analysis.taylor import Taylor


def _positive(values: np.ndarray) -> np.ndarray:
    """A logarithmic axis leaves a gap where there is nothing to show."""
    return np.where(values > 0, values, np.nan)


def _minus(text: str) -> str:
    """The sign as matplotlib writes it at its own ticks."""
    return text.replace("-", "\u2212")


def deviation_figure(result: Deviation) -> Figure:
    """Accumulated and single-step deviation over the steps, noise on the left."""
    figure, (axes,) = column([2.6])
    steps = np.arange(len(result.timesteps))
    for k, name in enumerate(result.accumulated):
        style = {**line_style(k + 4), "linestyle": "-"}
        axes.plot(
            steps, _positive(result.accumulated[name])[::-1], label=f"{name}, own path", **style
        )
        style = {**style, "linestyle": ":", "markerfacecolor": "white"}
        label = f"{name}, this step alone"
        axes.plot(steps, _positive(result.single[name])[::-1], label=label, **style)
    axes.set_yscale("log")
    places = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 6)).round()).astype(int)
    axes.set_xticks(places, [f"{result.timesteps[::-1][i]:.4g}" for i in places])
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.35)
    dress(axes, "timestep t of the step (sampling runs to the right)", "relative MSE of the state")
    legend(axes, loc="upper left", ncols=2, columnspacing=0.8)
    return figure


def noise_figure(result: NoiseCorrelation) -> Figure:
    """The error against the estimate where it follows it most, and the regression by step."""
    figure, (top, middle, bottom) = column([1.9, 1.6, 1.6])
    name, step = result.shown
    eps, error = result.points
    top.plot(eps, error, ".", color=COLOURS[2], markersize=1.0, alpha=0.4, rasterized=True)
    ends = np.array([eps.min(), eps.max()])
    slope, bias = result.slope[name][step], result.bias[name][step]
    label = f"slope {_minus(f'{slope:.3g}')}, R\u00b2 {result.r2[name][step]:.3f}"
    top.plot(ends, slope * ends + bias, color=COLOURS[4], linewidth=1.2, label=label)
    low, high = np.quantile(error, [0.002, 0.998])
    room = max(high - low, 1e-12) * 0.3
    top.set_ylim(low - room, high + room)
    title = f"{name}, t = {result.timesteps[step]:g}"
    dress(
        top,
        "full-precision estimate \u03b5 (in std of noise)",
        "its error (in std of noise)",
        title,
    )
    legend(top, loc="upper right")
    for k, name in enumerate(result.slope):
        style = line_style(k + 4)
        middle.plot(result.timesteps, _positive(result.r2[name]), label=name, **style)
        style = {**style, "linestyle": "-"}
        bottom.plot(result.timesteps, result.kurtosis[name], **style)
        style = {**style, "linestyle": ":", "markerfacecolor": "white"}
        bottom.plot(result.timesteps, result.skewness[name], **style)
    middle.set_yscale("log")
    bottom.axhline(0.0, color="#555555", linewidth=0.8)
    bottom.set_yscale("symlog", linthresh=1.0)
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, place: _minus(f"{value:g}")))
    low, high = bottom.get_ylim()
    bottom.set_ylim(min(2.0 * low, -1.0), max(2.0 * high, 1.0))
    dress(
        middle, STEPS_LABEL, "R\u00b2 of error on \u03b5", "share of the error that follows \u03b5"
    )
    dress(
        bottom,
        STEPS_LABEL,
        "moment of residual",
        "solid: excess kurtosis, dotted: skewness (Gaussian: 0)",
    )
    legend(middle)
    return figure


def sensitivity_figure(result: Sensitivity) -> Figure:
    """The error that each operand causes when it alone has few bits, in order of execution."""
    figure, panels = column([2.0, 2.0])
    for axes, names, errors, what in (
        (panels[0], result.weights, result.weight_error, "weights"),
        (panels[1], result.activations, result.activation_error, "activations"),
    ):
        for b, bits in enumerate(result.bits):
            style = {**line_style(b + 3), "markersize": 2.2, "linewidth": 0.5}
            axes.plot(_positive(errors[b]), label=f"{bits} bits", **style)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.35)
        coarse = errors[int(np.argmin(result.bits))]
        for rank, i in enumerate(np.argsort(coarse)[::-1][:2]):
            axes.annotate(
                short(names[i].removesuffix(":weight")),
                (i, coarse[i]),
                xytext=(0.98, 0.97 - 0.1 * rank),
                textcoords="axes fraction",
                ha="right",
                va="top",
                fontsize=6.0,
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "#777777"},
            )
        dress(
            axes,
            f"{what} in order of execution",
            "relative MSE of \u03b5",
            f"one of the {what} alone",
        )
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        legend(axes, loc="upper left", ncols=3, columnspacing=0.8, handletextpad=0.3)
    return figure


def _on_grid(axes: Axes, use: GridUse, bits: int, what: str) -> None:
    density, edges = np.histogram(use.values, bins=60, density=True)
    axes.stairs(density, edges, fill=True, color=COLOURS[2], alpha=0.8)
    # Logarithmic, for a range is decided by its few largest values. 256 lines over the bars would hide
    # them: a fine grid is a comb below.
    axes.set_yscale("log")
    low, high = 0.5 * density[density > 0].min(), density.max()
    coarse = len(use.levels) <= 16
    top, width = (high, 0.6) if coarse else (low * (high / low) ** 0.08, 0.2)
    axes.vlines(use.levels, low, top, color=COLOURS[4], linewidth=width, zorder=3)
    axes.plot([], [], color=COLOURS[4], linewidth=0.8, label=f"{bits}-bit grid")
    axes.set_ylim(low, high * (high / low) ** 0.25)
    text = f"SQNR {use.sqnr_db:.1f} dB, codes {use.entropy:.1f} of {bits} bits, clipped {use.clipped:.1%}"
    dress(axes, what, "density", text)
    legend(axes, loc="upper right")


def histograms_figure(result: Histograms) -> Figure:
    """One layer's weights and input on their grids."""
    figure, (top, bottom) = column([1.9, 1.9])
    site = short(result.site)
    where = f"weight, {site}, channel {result.channel}"
    _on_grid(top, result.weights, result.verdict["w_bits"], where)
    _on_grid(bottom, result.activations, result.verdict["a_bits"], f"input of {site}")
    return figure


def taylor_figure(result: Taylor) -> Figure:
    """True loss against the second-order prediction, as points, and their ratio along the perturbation."""
    figure, (top, bottom) = column([2.4, 2.0])
    span = np.concatenate([result.loss, result.predicted])
    ends = np.array([span.min() * 0.4, span.max() * 2.5])
    top.plot(ends, ends, color="#555555", linewidth=0.8, label="second order exact")
    top.fill_between(ends, 0.5 * ends, 1.5 * ends, color="#BBBBBB", alpha=0.4, linewidth=0)
    for k, (name, style) in enumerate(_setting_styles(result.settings).items()):
        point = {**style, "markersize": 4.0, "linestyle": "none"}
        top.plot(result.predicted[k], result.loss[k], label=_setting(name), **point)
        ratio = result.along[k] / (result.predicted[k] * result.fractions**2)
        bottom.plot(result.fractions, ratio, **style, markersize=2.2, linewidth=0.9)
    top.set_xscale("log")
    top.set_yscale("log")
    dress(
        top,
        "predicted loss, relative to mean \u03b5\u00b2",
        "true loss (same unit)",
        "squared distance to full precision",
    )
    legend(top, loc="upper left", ncols=2, columnspacing=0.6, handletextpad=0.2)
    bottom.axhspan(0.5, 1.5, color="#BBBBBB", alpha=0.4, linewidth=0)
    bottom.axhline(1.0, color="#555555", linewidth=0.8)
    bottom.set_yscale("log")
    plain_log(bottom)
    dress(bottom, "fraction of the perturbation", "true / predicted", "band: within a half")
    return figure


def _setting_styles(settings: Sequence[str]) -> dict[str, dict]:
    """The colour says the bits of the weights, marker and line those of the activations."""
    bits = {name: parse_bits(name) for name in settings}
    weights, inputs = (list(dict.fromkeys(pair[side] for pair in bits.values())) for side in (0, 1))
    return {
        name: {
            "color": COLOURS[(weights.index(w) + 2) % len(COLOURS)],
            "marker": MARKERS[(inputs.index(a) + 1) % len(MARKERS)],
            "linestyle": LINES[inputs.index(a) % len(LINES)],
        }
        for name, (w, a) in bits.items()
    }


def _setting(name: str) -> str:
    return name.upper().replace("A32", "")


def beneficial_figure(result: Beneficial) -> Figure:
    """Mean paired difference of every metric under each sampler, in units of its scatter over seeds, and
    below it the Frechet distances to real images where there were some."""
    rows = len(result.samplers) * 3
    heights = [0.8 + 0.3 * len(result.paired)]
    heights += [0.85 + 0.22 * rows] if result.frechet else []
    figure, panels = column(heights)
    axes = panels[0]
    labels = []
    for place, (key, pair) in enumerate(result.paired.items()):
        sampler, metric = key.split("/")
        keys = [f"{sampler}/{name}/{metric}" for name in (result.coarse, result.fine)]
        scatter = float(np.std(result.values[keys[0]] - result.values[keys[1]]))
        unit = scatter if scatter else 1.0
        sign = 1.0 if metric == "confidence" else -1.0
        style = _sampler_style(result.samplers.index(sampler))
        axes.errorbar(sign * pair.mean / unit, -place, xerr=pair.half_width / unit, **style)
        height = 1.0 - (place + 0.5) / len(result.paired)
        note(axes, f"{pair.wins:.0%}", 0.99, height, ha="right", va="center")
        labels.append(f"{sampler}: {metric.replace('_', ' ')}")
    axes.axvline(0.0, color="#555555", linewidth=0.8)
    axes.set_yticks(-np.arange(len(labels)), labels)
    axes.set_ylim(-len(labels) + 0.5, 0.5)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -0.2), max(high, 0.2) + 0.25 * (max(high, 0.2) - min(low, -0.2)))
    dress(axes, "paired difference / its std (95 % interval)", "")
    against = "" if result.frechet else "\nmeasured against full precision only"
    title = f"right: {result.coarse} better than {result.fine}; %: seeds it wins{against}"
    axes.set_title(title, fontsize=7.0, loc="right")
    if result.frechet:
        _frechet_panel(panels[1], result)
    return figure


def _sampler_style(k: int) -> dict:
    return {
        "color": COLOURS[(5, 4)[k % 2]],
        "marker": ("o", "s")[k % 2],
        "markersize": 4.0,
        "linewidth": 1.1,
        "capsize": 2.0,
        "linestyle": "none",
    }


def _frechet_panel(axes: Axes, result: Beneficial) -> None:
    labels, notes = [], {}
    for k, sampler in enumerate(result.samplers):
        for name in ("full", result.fine, result.coarse):
            interval = result.frechet[f"{sampler}/{name}"]
            reach = interval.high - interval.estimate
            axes.errorbar(interval.estimate, -len(labels), xerr=reach, **_sampler_style(k))
            labels.append(f"{sampler}: {name}")
        gap = result.frechet[f"{sampler}/difference"]
        notes[len(labels) - 1] = f"{result.coarse} \u2212 {result.fine}:\n" + _minus(
            f"{gap.estimate:+.2g} [{gap.low:+.2g}, {gap.high:+.2g}]"
        )
    for place, text in notes.items():
        note(axes, text, 0.99, 1.0 - place / len(labels), ha="right", va="center")
    axes.set_yticks(-np.arange(len(labels)), labels)
    axes.set_ylim(-len(labels) + 0.5, 0.5)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.8 * (high - low))
    dress(
        axes,
        "Frechet distance (feature units\u00b2)",
        "",
        f"to real images, {result.verdict['pairs']} samples",
    )
