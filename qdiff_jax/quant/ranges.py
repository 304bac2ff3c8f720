"""Range estimators: a tensor or a set of samples -> the range that its codes should cover.

They run once per site, between compiled computations, on host arrays: all shapes are cut into
columns of one width and a few heights, so that every layer of a network shares the compiled search
(and no shape compiles its own handful of small operations). `candidate_losses` is the jittable
core.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.quant.affine import reciprocal
from qdiff_jax.quant.binary import single_basis
from qdiff_jax.quant.cells import cells, scale_shape
from qdiff_jax.quant.qparams import QParams, from_range, scale_and_zero_point
from qdiff_jax.quant.spec import QuantSpec, code_range

WIDTH = 64  # columns per compiled call: wide enough to vectorise, narrow enough to waste little
METHODS = ("minmax", "mse", "mse2d", "percentile", "percentile_search")


@functools.partial(jax.jit, static_argnames="spec")
def candidate_losses(x, lo, hi, qmin, qmax, power, *, spec: QuantSpec) -> jax.Array:
    """sum over K of |x - x_hat|**power for every candidate range: [J, C].

    x [K, C]; lo, hi [J, C] candidate ranges; qmin, qmax [C]; power (). One candidate at a time, so
    memory does not grow with J. Zeros may be appended to x: 0 lies on every affine grid and adds no
    loss.
    """

    def one(bounds):
        scale, zero = scale_and_zero_point(spec, *bounds, qmin, qmax)
        scale, zero, low, high = (v[None] for v in (scale, zero, qmin, qmax))
        q = jnp.clip(jnp.round(x * reciprocal(scale)) + zero, low, high)
        error = jnp.abs((q - zero) * scale - x)
        # exp(p log e): four times faster than a power on CPU, and e = 0 gives exactly 0.
        return jnp.exp(power * jnp.log(error)).sum(axis=0)

    return jax.lax.map(one, (lo, hi))


def _height(rows: int) -> int:
    """The next of 8, 12, 16, 24, 32, ...: few compiled heights, at most a third of padding."""
    height = 8
    while height < rows:
        height = height * 3 // 2 if height & (height - 1) == 0 else height * 4 // 3
    return height


def _search(columns, lo, hi, qmin, qmax, power, spec) -> tuple[np.ndarray, np.ndarray]:
    """Per cell (columns [K, C]) the first candidate (lo, hi [J, C]) of least loss."""
    if spec.grid != "affine":
        raise ValueError(f"range search works on the affine grid; {spec.grid!r} takes 'minmax'.")
    count, cell_count = columns.shape
    # A few cells with many values each: spread every cell over several columns and add their
    # losses.
    width = (
        1 << (cell_count - 1).bit_length()
        if cell_count < WIDTH
        else -(-cell_count // WIDTH) * WIDTH
    )
    lanes = max(1, WIDTH // width)
    height = _height(-(-count // lanes))
    x = np.zeros((height * lanes, width), np.float32)
    x[:count, :cell_count] = columns
    x = x.reshape(height, lanes * width)

    def spread(v):
        v = np.broadcast_to(np.asarray(v, np.float32), (*np.shape(v)[:-1], cell_count))
        padded = np.zeros((*v.shape[:-1], width), np.float32)
        padded[..., :cell_count] = v
        return np.tile(padded, lanes)

    lo_all, hi_all, low, high = (spread(np.atleast_1d(v)) for v in (lo, hi, qmin, qmax))
    high = np.where(high > low, high, low + 1.0).astype(np.float32)  # for the columns of padding
    grid = QuantSpec(symmetric=spec.symmetric, signed=spec.signed, scale_format=spec.scale_format)
    parts = []
    for start in range(0, lanes * width, WIDTH):
        cut = slice(start, start + WIDTH)
        parts.append(
            candidate_losses(
                x[:, cut], lo_all[:, cut], hi_all[:, cut], low[cut], high[cut], power, spec=grid
            )
        )
    losses = np.concatenate([np.asarray(p, np.float64) for p in parts], axis=1)
    losses = losses.reshape(len(losses), lanes, width).sum(axis=1)[:, :cell_count]
    best = losses.argmin(axis=0)
    pick = np.arange(cell_count)
    return np.asarray(lo, np.float32)[best, pick], np.asarray(hi, np.float32)[best, pick]


def min_max(x, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and largest value of every cell, each shaped like `QParams.scale`."""
    columns = cells(spec, x)
    shape = scale_shape(spec, np.shape(x))
    return columns.min(axis=0).reshape(shape), columns.max(axis=0).reshape(shape)


def shrink_search(
    x,
    spec: QuantSpec,
    qmin,
    qmax,
    *,
    candidates: int = 80,
    step: float = 0.01,
    power: float = 2.4,
    range_gain: float = 1.0,
    start: tuple | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Shrink both ends by 1 - step * i, i = 0..candidates-1, and keep the least sum |x -
    x_hat|**power.

    The rule shared by BRECQ, Q-Diffusion, PTQD, TFMQ-DM and EfficientDM (80 candidates, power 2.4
    after LAPQ). APQ-DM: 9 candidates, power 0.5.

    Args:
      x: weights or samples, any shape that the spec fits.
      qmin, qmax: codes, numbers or one per cell (shaped like `QParams.scale`).
      range_gain: multiplies the range from which shrinking starts.
      start: (lo, hi) per cell to shrink from; by default those of x. Give it when x is a sample of
        a larger set whose extremes are known.
    """
    columns = cells(spec, x)
    lo, hi = (columns.min(axis=0), columns.max(axis=0)) if start is None else start
    factors = (1.0 - step * np.arange(candidates, dtype=np.float32))[:, None] * np.float32(
        range_gain
    )
    lo = np.minimum(np.ravel(lo), 0.0)[None].astype(np.float32) * factors
    hi = np.maximum(np.ravel(hi), 0.0)[None].astype(np.float32) * factors
    lo, hi = _search(columns, lo, hi, np.ravel(qmin), np.ravel(qmax), power, spec)
    shape = scale_shape(spec, np.shape(x))
    return lo.reshape(shape), hi.reshape(shape)


def mse_search(
    x, spec: QuantSpec, qmin, qmax, *, candidates=100, power=2.4, range_gain=1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The search of QDrop's MSE observer, also in PTQ4DM and EDA-DM: over widths and zero points.

    Widths are i / candidates of the full one, i = 1..candidates. For each, every integer zero point
    is a candidate, [-z * s, (qmax - qmin - z) * s]; cells whose values have one sign, and symmetric
    grids, are searched over the width alone. A cell with both signs costs candidates * 2**bits
    evaluations per value: subsample before asking 8 bits of a large tensor.

    Args:
      qmin, qmax: codes as numbers, equal for all cells (the number of zero points follows from
        them).
    """
    columns = cells(spec, x)
    gain = np.float32(range_gain)
    lo = np.minimum(columns.min(axis=0), 0.0) * gain
    hi = np.maximum(columns.max(axis=0), 0.0) * gain
    share = (np.arange(1, candidates + 1, dtype=np.float32) / candidates)[:, None]
    if spec.symmetric:
        top = np.maximum(-lo, hi)[None] if spec.signed else hi[None]
        lo_all, hi_all = -share * top, share * top
    else:
        lo_all, hi_all = share * lo[None], share * hi[None]
        two_sided = (lo < 0) & (hi > 0)
        if two_sided.any():
            levels = int(qmax) - int(qmin)
            zero = np.arange(levels + 1, dtype=np.float32)[None, :, None]
            unit = (share * (hi - lo)[None] / levels)[:, None]
            count = candidates * (levels + 1)
            mask = two_sided[None]
            lo_all = np.where(
                mask, (-zero * unit).reshape(count, -1), np.repeat(lo_all, levels + 1, axis=0)
            )
            hi_all = np.where(
                mask, ((levels - zero) * unit).reshape(count, -1), np.repeat(hi_all, levels + 1, 0)
            )
    lo, hi = _search(columns, lo_all, hi_all, qmin, qmax, power, spec)
    shape = scale_shape(spec, np.shape(x))
    return lo.reshape(shape), hi.reshape(shape)


def _no_split(spec: QuantSpec) -> None:
    if spec.granularity == "split":
        raise ValueError(
            "quantiles are not taken of a split tensor; use 'minmax', 'mse' or 'mse2d', or split the "
            "values first."
        )


def percentile(x, spec: QuantSpec, *, lower=0.0004, upper=0.9996) -> tuple[np.ndarray, np.ndarray]:
    """The `lower` and `upper` quantile of every cell (TFMQ-DM's option), linear between samples."""
    _no_split(spec)
    low, high = np.quantile(cells(spec, x), [lower, upper], axis=0).astype(np.float32)
    shape = scale_shape(spec, np.shape(x))
    return low.reshape(shape), high.reshape(shape)


def percentile_search(
    x, spec: QuantSpec, qmin, qmax, *, percentiles=(0.999, 0.9999, 0.99999), power=2.0
) -> tuple[np.ndarray, np.ndarray]:
    """Of the ranges [quantile(1 - p), quantile(p)] the one of least error (PTQ4DiT, QuEST)."""
    _no_split(spec)
    columns, top = cells(spec, x), np.asarray(percentiles)
    lo, hi = (np.quantile(columns, q, axis=0) for q in (1.0 - top, top))
    return least_error(x, spec, qmin, qmax, lo, hi, power=power)


def least_error(
    x, spec: QuantSpec, qmin, qmax, lo, hi, *, power=2.0
) -> tuple[np.ndarray, np.ndarray]:
    """Of J ranges for every cell the one of least sum |x - x_hat|**power, each shaped like
    `QParams.scale`. lo, hi: [J, C], or [J] for a spec with one cell; ranges are made to contain 0."""
    columns = cells(spec, x)
    lo, hi = (np.float32(v).reshape(len(v), -1) for v in (lo, hi))
    lo, hi = np.minimum(lo, 0.0), np.maximum(hi, 0.0)
    lo, hi = _search(columns, lo, hi, np.ravel(qmin), np.ravel(qmax), power, spec)
    shape = scale_shape(spec, np.shape(x))
    return lo.reshape(shape), hi.reshape(shape)


def estimate_qparams(
    x,
    spec: QuantSpec,
    bits: int | None = None,
    *,
    qmin=None,
    qmax=None,
    method: str = "mse",
    range_gain: float = 1.0,
    margin: float = 1.0,
    narrow: bool = False,
) -> QParams:
    """QParams for a tensor or a set of samples. Host side, once per site.

    Args:
      x: weights or samples, any shape that the spec fits.
      spec: static spec; one scale per tensor, channel or group.
      bits: number of bits, or None when qmin and qmax are given (numbers, or one per cell).
      method: "minmax"; "mse" (`shrink_search`); "mse2d" (`mse_search`); "percentile";
        "percentile_search".
      range_gain: factor on both ends before the search ((bits + 2) / 8 in the `max_scale`
        variants).
      margin: factor on both ends of the result.
      narrow: signed codes +-(2**(bits-1) - 1).

    A binary grid has no range: its scale is mean|x|, the one of least squared error, by any method.

    Raises:
      ValueError: unknown method, neither bits nor codes, a dynamic spec, or values that are not
        finite.
    """
    qmin, qmax = _codes(spec, bits, qmin, qmax, narrow)
    if method not in METHODS:
        raise ValueError(f"range method {method!r} is unknown; use one of {METHODS}.")
    if spec.grid == "binary":
        return single_basis(x, spec)
    if method == "minmax":
        lo, hi = min_max(x, spec)
    elif method == "mse":
        lo, hi = shrink_search(x, spec, qmin, qmax, range_gain=range_gain)
    elif method == "mse2d":
        lo, hi = mse_search(x, spec, qmin, qmax, range_gain=range_gain)
    elif method == "percentile":
        lo, hi = percentile(x, spec)
    else:
        lo, hi = percentile_search(x, spec, qmin, qmax)
    stretch = np.float32(margin if method in ("mse", "mse2d") else margin * range_gain)
    lo, hi = np.minimum(lo, 0.0) * stretch, np.maximum(hi, 0.0) * stretch
    return from_range(spec, lo, hi, qmin, qmax)


def weight_qparams(kernel, spec: QuantSpec, bits: int | None = None, **options) -> QParams:
    """`estimate_qparams` of a kernel (conv HWIO, dense [in, out]); by default the MSE shrink
    search.

    The output channel is the last axis: granularity "channel" with axis -1; "group" with axis -2
    cuts the contraction axis.
    """
    return estimate_qparams(kernel, spec, bits, **options)


def _codes(spec, bits, qmin, qmax, narrow):
    if bits is not None:
        if qmin is not None or qmax is not None:
            raise ValueError("give either bits or qmin and qmax, not both.")
        return code_range(spec, bits, narrow)
    if qmin is None or qmax is None:
        raise ValueError("give either bits or both qmin and qmax.")
    return qmin, qmax
