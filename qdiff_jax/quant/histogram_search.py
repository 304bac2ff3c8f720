"""The range of least error of a tensor that is known by its histogram: all widths, all zero points.

The search of QDrop's MSE observer (Wei et al. 2022; PTQ4DM, EDA-DM) costs 100 x 2^bits evaluations of every
value, and a sample of the values does not know the tails, which decide the range at 8 bits. A histogram knows
them, and over its bins the loss of every candidate has a closed form: rounding error depends on the width alone
and adds up along the axis, clipping error on the clipping point alone.
"""

from __future__ import annotations

import numpy as np


def search_histogram(
    counts,
    lo: float,
    hi: float,
    levels: int,
    *,
    power: float = 2.4,
    candidates: int = 100,
    zero_fixed: bool = False,
) -> tuple[float, float]:
    """(lo, hi) of least sum |x - x_hat|**power, of all `[-z * s, (levels - z) * s]`.

    counts: [N] values in N equal bins over [lo, hi], which contains zero; values that are exactly 0 may be left
    out, as every grid holds them. Inside a bin values count as spread evenly, so that a step as long as a bin
    has no false optimum. levels: 2^bits - 1. s: i / candidates of (hi - lo) / levels, i = 1..candidates; z:
    0..levels. A tensor of one sign is searched over the width alone; so is one with zero_fixed (the always-zero
    grid), whose negative values are clipped. Ties go to the narrowest width, then the smallest zero point.

    Raises ValueError for ends that are not finite or do not contain zero.
    """
    if not (np.isfinite([lo, hi]).all() and lo <= 0.0 <= hi):
        raise ValueError(f"a histogram over [{lo}, {hi}] is no finite range that contains zero.")
    counts = np.asarray(counts, np.float64)
    bins = len(counts)
    width = max(hi - lo, 1e-30) / bins
    edges = lo + width * np.arange(bins + 1)
    density = counts / width
    span = hi if zero_fixed else hi - lo
    units = np.maximum(span * np.arange(1, candidates + 1) / candidates / levels, 1e-8)
    zeros = np.arange(levels + 1)
    if zero_fixed or lo == 0.0:
        zeros = zeros[:1]
    elif hi == 0.0:
        zeros = zeros[-1:]
    rounding = _rounding(density, edges, units, levels, power)
    below, above = _clipping(density, width, power)
    bottom, top = -zeros * units[:, None], (levels - zeros) * units[:, None]
    loss = rounding[:, 2 * levels - zeros] - rounding[:, levels - zeros]
    # The root is what is nearly straight between edges.
    for points, table in ((bottom, below), (top, above)):
        root = table ** (1.0 / (power + 1.0))
        loss = loss + np.interp(points, edges, root) ** (power + 1.0)
    best, at = np.unravel_index(loss.argmin(), loss.shape)
    return float(bottom[best, at]), float(top[best, at])


def _rounding(density, edges, units, levels, power) -> np.ndarray:
    """[units, 2 levels + 1]: the rounding error of all values below m * unit, m = -levels..levels."""
    cell = 2.0 * 0.5 ** (power + 1.0) / (power + 1.0)  # of one step, of unit density and length

    def primitive(u):
        nearest = np.rint(u)
        rest = u - nearest
        return nearest * cell + np.sign(rest) * np.abs(rest) ** (power + 1.0) / (power + 1.0)

    at_edges = primitive(edges / units[:, None])
    scale = units[:, None] ** (power + 1.0)
    per_bin = density * np.diff(at_edges, axis=1) * scale
    total = np.concatenate([np.zeros((len(units), 1)), np.cumsum(per_bin, axis=1)], axis=1)
    steps = np.arange(-levels, levels + 1)
    points = np.clip(steps * units[:, None], edges[0], edges[-1])
    # Where the grid leaves the histogram nothing is left to add up.
    inner = primitive(points / units[:, None])
    at = np.clip(np.searchsorted(edges, points, side="right") - 1, 0, len(density) - 1)
    rows = np.arange(len(units))[:, None]
    return total[rows, at] + density[at] * (inner - at_edges[rows, at]) * scale


def _clipping(density, width, power) -> tuple[np.ndarray, np.ndarray]:
    """What clipping at each edge costs the values below it, and those above it, each [bins + 1]."""
    bins = len(density)
    powers = np.arange(bins + 1) ** (power + 1.0)
    kernel = np.diff(powers) * width ** (power + 1.0) / (power + 1.0)
    below = np.convolve(density, kernel)[:bins]
    above = np.convolve(density[::-1], kernel)[:bins]
    return np.concatenate([[0.0], below]), np.concatenate([[0.0], above])[::-1]
