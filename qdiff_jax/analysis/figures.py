"""Pictures of what full precision does: ranges, skips, temporal features, outliers, softmax."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from qdiff_jax.analysis.column import (
    COLOURS,
    STEPS_LABEL,
    colour_bar,
    column,
    dress,
    legend,
    line_style,
    plain_log,
    short,
    step_ticks,
)
from qdiff_jax.analysis.outliers import Outliers
from qdiff_jax.analysis.ranges import Ranges
from qdiff_jax.analysis.skips import Skips
from qdiff_jax.analysis.softmax import Softmax
from qdiff_jax.analysis.temporal import TemporalInformation

_NAMED_LAYERS = 6  # more names than this hide the curves
# cividis without its yellow end, which is too faint for a line on white.
_DEPTHS = ListedColormap(matplotlib.colormaps["cividis"](np.linspace(0.0, 0.85, 256)), "depths")


def ranges_figure(result: Ranges) -> Figure:
    """Ranges over the timestep, relative to each activation's median, and by channel at one site."""
    figure, (top, bottom) = column([2.0, 1.9])
    middle = np.median(result.width, axis=0)
    relative = result.width / np.where(middle > 0, middle, 1.0)[None, :]
    for i in range(relative.shape[1]):
        top.plot(result.timesteps, relative[:, i], color="#BBBBBB", linewidth=0.4, zorder=1)
    top.plot([], [], color="#BBBBBB", linewidth=0.8, label=f"{len(result.names)} activations")
    ranked = np.argsort(np.where(result.temporal, -1.0, result.ratio))[::-1]
    for k, i in enumerate(ranked[:3]):
        label = f"{short(result.names[i])} ({result.ratio[i]:.3g}\u00d7)"
        top.plot(result.timesteps, relative[:, i], label=label, zorder=2, **line_style(k + 4))
    top.set_yscale("log")
    shown = relative[np.isfinite(relative) & (relative > 0)]
    # Clipped below 1/100: a range that all but vanishes at one step would flatten all others.
    low, high = max(shown.min() * 0.9, 0.01), shown.max()
    top.set_ylim(low, high * (high / low) ** 0.5)  # the upper third is for the legend
    plain_log(top)
    dress(top, STEPS_LABEL, "range / its median over t")
    legend(top, loc="upper center")

    order = np.argsort(result.channels.mean(axis=0))[::-1]
    picture = bottom.imshow(
        result.channels[:, order].T, aspect="auto", cmap="cividis", interpolation="nearest"
    )
    step_ticks(bottom, result.timesteps)
    dress(bottom, STEPS_LABEL, "channel (sorted)", short(result.site), grid=False)
    colour_bar(figure, picture, bottom, "largest |activation|")
    return figure


def skips_figure(result: Skips) -> Figure:
    """The values of the two parts at one block, and the ratio of their spreads at every block."""
    figure, (top, bottom) = column([1.9, 1.9])
    for part, (name, hatch) in enumerate((("h", ""), ("skip", "////"))):
        colour = COLOURS[(5, 1)[part]]
        top.stairs(result.densities[part], result.edges, color=colour, linewidth=1.0)
        top.stairs(
            result.densities[part],
            result.edges,
            fill=True,
            facecolor=colour,
            edgecolor=colour,
            alpha=0.35,
            hatch=hatch,
            linewidth=0.0,
            label=f"{name} (std {_pooled(result)[part]:.3g})",
        )
    top.set_yscale("log")
    floor = result.densities[result.densities > 0].min()
    top.set_ylim(floor * 0.7, result.densities.max() * 2.0)
    dress(top, "activation (its own units)", "density", f"input of {short(result.block)}")
    legend(top)

    # h above the skip counts up, the other way round down: which part is wide is part of the story.
    ratio = result.std[..., 0] / np.maximum(result.std[..., 1], 1e-12)
    places = np.arange(len(result.blocks))
    low, mid, high = (f(ratio, axis=0) for f in (np.min, np.median, np.max))
    bottom.vlines(places, low, high, color=COLOURS[5], linewidth=3.0, alpha=0.35)
    bottom.plot(places, mid, "o", color=COLOURS[5], markersize=3.5)
    bottom.axhline(1.0, color="#555555", linewidth=0.8)
    bottom.set_yscale("log")
    bottom.set_xticks(places, [short(b) for b in result.blocks], rotation=30, ha="right")
    dress(bottom, "", "std of h / std of skip", "bar: over timesteps, dot: median")
    plain_log(bottom)
    return figure


def _pooled(result: Skips) -> np.ndarray:
    std = result.std[:, result.blocks.index(result.block)]
    return np.sqrt(np.mean(std**2, axis=0))


def temporal_figure(result: TemporalInformation) -> Figure:
    """Similarity of full-precision features by (t, t'), and what quantization does to them."""
    figure, (top, middle, bottom) = column([2.3, 1.5, 1.6])
    t = result.timesteps
    q = t[:: result.stride]
    picture = top.pcolormesh(
        q, q, result.cosine, cmap="cividis", shading="nearest", rasterized=True
    )
    top.set_aspect("equal")
    dress(top, "timestep t", "timestep t'", "full precision", grid=False)
    colour_bar(figure, picture, top, "cosine similarity")
    for k, (name, error) in enumerate(result.error.items()):
        style = {**line_style(k + 4), "markevery": max(1, len(t) // 12)}
        middle.plot(t, np.where(error > 0, error, np.nan), label=name, **style)
        shift = result.shift[name]
        low, high = shift.min(axis=0), shift.max(axis=0)
        bottom.fill_between(t, low, high, color=style["color"], alpha=0.2, linewidth=0)
        label = f"{name}: {result.verdict[f'{name}/mismatch']:.0%} mistaken"
        bottom.plot(t, shift.mean(axis=0), label=label, **style)
    middle.set_yscale("log")
    dress(middle, "timestep t", "1 \u2212 cosine", "features: quantized against full precision")
    dress(bottom, "timestep t", "t' \u2212 t (timesteps)", "nearest t' (band: over blocks)")
    if result.error:
        legend(middle)
        legend(bottom)
    return figure


def outliers_figure(result: Outliers) -> Figure:
    """The channels of the worst input in order of size, and largest / median at every layer."""
    figure, (top, bottom) = column([1.8, 2.1])
    sizes = np.sort(result.magnitudes)[::-1]
    top.bar(np.arange(len(sizes)), sizes, width=1.0, color=COLOURS[5], linewidth=0)
    median = float(np.median(sizes))
    top.axhline(
        median, color=COLOURS[4], linewidth=1.0, linestyle="--", label=f"median {median:.3g}"
    )
    title = f"{short(result.site)}: {result.verdict['largest_ratio']:.3g}\u00d7 the median"
    dress(top, "channel (sorted)", "largest |activation|", title)
    legend(top)
    kinds = {"dense": "dense input", "conv": "convolution input", "temporal": "time layer input"}
    for k, (kind, label) in enumerate(kinds.items()):
        at = [i for i, found in enumerate(result.kinds) if found == kind]
        if at:
            style = {**line_style(k + 3), "linestyle": "none"}
            bottom.plot(np.array(at) / len(result.kinds), result.ratio[at], label=label, **style)
    places = (np.arange(len(result.stream)) + 0.5) / len(result.stream)
    bottom.plot(
        places, result.stream_ratio, color="#777777", linewidth=0.8, label="residual stream"
    )
    bottom.set_yscale("log")
    bottom.set_ylim(0.9, None)
    dress(bottom, "depth (share of the layers)", "largest / median channel")
    legend(bottom, loc="upper center", ncols=2)
    top_of = max(result.ratio.max(), result.stream_ratio.max())
    if np.isfinite(top_of):
        bottom.set_ylim(0.9, top_of * 4)
    plain_log(bottom)
    return figure


def softmax_figure(result: Softmax) -> Figure:
    """Survival functions of one layer with their fits, and fits and errors of all layers by step."""
    figure, (top, middle, bottom) = column([2.0, 1.5, 1.5])
    steps = [f"{t:g}" for t in result.timesteps]
    layer = result.names.index(result.site)
    for k, (t, (x, share)) in enumerate(result.curves.items()):
        style = {**line_style(k + 3), "markevery": 6}
        fit = result.fits[steps.index(t), layer]
        label = f"t = {t}: \u03b1 {fit[2]:.3g}, R\u00b2 {fit[3]:.2f}"
        top.plot(x, share, label=label, **style)
        tail = share <= 0.5
        if tail.sum() > 1 and np.isfinite(fit[2]):
            line = (x[tail] / x[tail][0]) ** (1.0 - fit[2]) * share[tail][0]
            top.plot(x[tail], line, color="#555555", linewidth=0.7, linestyle=":")
    top.set_xscale("log")
    top.set_yscale("log")
    # The smallest values are many decades below all others.
    ends = [x[np.searchsorted(-share, -0.95)] for x, share in result.curves.values()]
    top.set_xlim(0.5 * min(ends), 1.3)
    dress(
        top,
        "probability p",
        "share of values \u2265 p",
        f"{short(result.site)} (dotted: power law)",
    )
    legend(top, loc="lower left")
    few = len(result.names) <= _NAMED_LAYERS
    styles = [line_style(k) for k in range(len(result.names))] if few else _depth_styles(result)
    for axes, values, label in (
        (middle, result.fits[..., 2], "tail exponent \u03b1"),
        (bottom, result.error_ratio, "log2 error / uniform"),
    ):
        for k, name in enumerate(result.names):
            style = {**styles[k], "linewidth": 0.8, "markersize": 2.2}
            axes.plot(result.timesteps, values[:, k], label=short(name), **style)
        dress(axes, STEPS_LABEL, label)
    bottom.axhline(1.0, color="#555555", linewidth=0.8)
    bottom.set_yscale("log")
    plain_log(bottom)
    title = f"{result.verdict['bits']} bits; below 1: log2 is better"
    dress(bottom, STEPS_LABEL, "log2 error / uniform", title)
    if few:
        low, high = middle.get_ylim()
        middle.set_ylim(low, high + 0.4 * (high - low))
        legend(middle, loc="upper center", ncols=2)
    else:
        depth = ScalarMappable(Normalize(1, len(result.names)), _DEPTHS)
        colour_bar(figure, depth, [middle, bottom], "attention layer (1: first executed)")
    return figure


def _depth_styles(result: Softmax) -> list[dict]:
    shares = np.linspace(0.0, 1.0, len(result.names))
    return [{"color": _DEPTHS(share), "linestyle": "-"} for share in shares]
