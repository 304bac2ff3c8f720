"""Observers that keep a sample of a tensor's values for each step: percentiles and searches for least error.

`observers` has the four functions that an observer is; these take whole samples, where those of ranges take the
smallest and largest value of each.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qdiff_jax.observe.observers import (
    Observer,
    RangeState,
    batch_range,
    checked_ranges,
    empty_range,
    join_ranges,
)
from qdiff_jax.quant.ranges import least_error, shrink_search
from qdiff_jax.quant.ranges import percentile as percentile_range
from qdiff_jax.quant.spec import QuantSpec

_EMPTY = np.uint32(0xFFFFFFFF)  # above every priority


@struct.dataclass
class SampleState:
    """extremes: RangeState. values, priority [rows, size]: those of smallest random priority."""

    extremes: RangeState
    values: jax.Array
    priority: jax.Array


def _reservoir(size: int, seed: int, choose: Callable) -> Observer:
    """Keep per row the `size` values of smallest random priority, beside the exact extremes.

    The priority of a value is a hash of its sample's global number and its place, so the kept set
    is a uniform sample that depends neither on order nor on how the stream was split: `merge` is
    exact, associative and order-free. `choose(columns, extremes) -> (lo, hi)` runs per row at
      finish.
    """

    def init(rows, shape=()):
        if shape:
            raise ValueError(
                "sample observers hold one range per tensor; use minmax or ema per channel."
            )
        return SampleState(
            extremes=empty_range(rows),
            values=jnp.zeros((rows, size), jnp.float32),
            priority=jnp.full((rows, size), _EMPTY, jnp.uint32),
        )

    def keep(rows, row, priority, values):
        """The first `size` of every row by (priority, value); entries of row `rows` fall off."""
        row, priority, values = jax.lax.sort((row, priority, values), num_keys=3)
        start = jnp.searchsorted(row, jnp.arange(rows + 1, dtype=row.dtype))
        place = jnp.arange(row.shape[0], dtype=jnp.int32) - start[row].astype(jnp.int32)
        table = (jnp.zeros((rows, size), jnp.float32), jnp.full((rows, size), _EMPTY, jnp.uint32))
        return tuple(
            blank.at[row, place].set(v, mode="drop")
            for blank, v in zip(table, (values, priority), strict=True)
        )

    def flat(state):
        rows = state.values.shape[0]
        row = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], state.values.shape)
        return row.ravel(), state.priority.ravel(), state.values.ravel()

    def join(state, extremes, row, priority, values):
        mine = flat(state)
        both = [jnp.concatenate(pair) for pair in zip(mine, (row, priority, values), strict=True)]
        values, priority = keep(state.values.shape[0], *both)
        return SampleState(join_ranges(state.extremes, extremes), values, priority)

    def update(state, lo, hi, row, sample, index):
        rows = state.values.shape[0]
        batch = batch_range(rows, (), lo, hi, row)
        row = jnp.asarray(row, jnp.int32)
        row = jnp.where((row >= 0) & (row < rows), row, rows)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(index)
        count = sample.shape[1]
        priority = jax.vmap(lambda key: jax.random.bits(key, (count,), jnp.uint32))(keys) >> 1
        place = jnp.broadcast_to(row[:, None], sample.shape)
        return join(
            state, batch, place.ravel(), priority.ravel(), sample.astype(jnp.float32).ravel()
        )

    def merge(a, b):
        return join(a, b.extremes, *flat(b))

    def finish(state):
        extremes = state.extremes
        lo, hi = checked_ranges(extremes.lo, extremes.hi, extremes.count, extremes.outside)
        filled = np.asarray(state.priority) != _EMPTY
        return choose(np.asarray(state.values), filled, lo, hi)

    return Observer(init, update, merge, finish, takes="sample")


def percentile(
    lower: float = 0.0004, upper: float = 0.9996, size: int = 8192, seed: int = 0
) -> Observer:
    """Quantiles of a uniform sample of at most `size` values per row.

    A sample rather than a histogram: no bin edges to guess before the data are seen. With `size` or
    fewer values in a row the result is exact; beyond, a quantile p carries a standard error in rank
    of sqrt(p (1 - p) / size), 2.2e-4 for the defaults.
    """

    def choose(values, filled, lo, hi):
        del lo, hi
        spec = QuantSpec()
        pairs = [
            percentile_range(v[f], spec, lower=lower, upper=upper) for v, f in zip(values, filled)
        ]
        return tuple(np.asarray(side, np.float32) for side in zip(*pairs))

    return _reservoir(size, seed, choose)


def percentile_search(
    spec: QuantSpec,
    qmin,
    qmax,
    *,
    percentiles: tuple[float, ...] = (0.999, 0.9999, 0.99999),
    size: int = 32_768,
    seed: int = 0,
) -> Observer:
    """Per row, of the ranges [quantile(1 - p), quantile(p)] the one of least squared error (PTQ4DiT, QuEST).

    Quantiles and errors are those of a uniform sample of at most `size` values. A p that leaves less than one
    of them outside is taken as the exact extremes of everything seen: no sample knows such a quantile.
    spec, qmin, qmax: the per-tensor quantizer that will be used.
    """
    rule = QuantSpec(symmetric=spec.symmetric, signed=spec.signed, grid=spec.grid)
    top = np.asarray(percentiles)

    def choose(values, filled, lo, hi):
        pairs = []
        for v, f, smallest, largest in zip(values, filled, lo, hi, strict=True):
            v = v[f]
            known = (1.0 - top) * v.size >= 1.0
            lower = np.where(known, np.quantile(v, 1.0 - top), smallest)
            upper = np.where(known, np.quantile(v, top), largest)
            pairs.append(least_error(v, rule, qmin, qmax, lower, upper))
        return tuple(np.asarray(side, np.float32) for side in zip(*pairs))

    return _reservoir(size, seed, choose)


def mse(
    spec: QuantSpec, qmin, qmax, *, size: int = 16_384, power: float = 2.4, seed: int = 0
) -> Observer:
    """Per row the shrink search (`ranges.shrink_search`) on a uniform sample of at most `size`
    values.

    The search starts from the exact extremes of everything seen, so that the sample decides only
    how far to shrink. It must know the tails: at 8 bits 2,048 values of a Gaussian shrink too far and
    end above min-max's error, the default well below it. spec, qmin, qmax: the per-tensor quantizer
    that will be used.
    """
    rule = QuantSpec(
        granularity="channel", axis=-1, symmetric=spec.symmetric, signed=spec.signed, grid=spec.grid
    )

    def choose(values, filled, lo, hi):
        # Rows become channels; empty places are zeros, which lie on every affine grid.
        columns = np.where(filled, values, 0.0).T
        return shrink_search(columns, rule, qmin, qmax, power=power, start=(lo, hi))

    return _reservoir(size, seed, choose)
