"""Observers: what is remembered of a tensor over a calibration set, one row per step.

An observer is four pure functions. Updates are segment reductions over the row of each sample, so a
batch may mix steps and needs one compile; `merge` joins states from several devices, hosts or
interrupted runs. `finish` runs on the host and raises for a row that no sample visited, which would
otherwise become a range of +-inf or, worse, of a neighbour.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qdiff_jax.quant.ranges import least_error, shrink_search
from qdiff_jax.quant.ranges import percentile as percentile_range
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.runtime.finite import NotFiniteError

_EMPTY = np.uint32(0xFFFFFFFF)  # above every priority


class Observer(NamedTuple):
    """A streaming estimate of ranges.

    init(rows, shape=()) -> state. shape: of one range, () per tensor or (C,) per channel.
    update(state, lo, hi, row) -> state. lo, hi [B, *shape] smallest and largest value of each
      sample; row [B] int32. With takes="sample": update(state, lo, hi, row, sample, index), sample
      [B, n] values of each sample, index [B] int32 its global number (unique, so that results do
      not depend on batch size or device count).
    merge(a, b) -> state, of a followed by b.
    finish(state) -> (lo, hi) NumPy float32 [rows, *shape]. Raises ValueError naming rows never
    seen.

    All but finish are jittable.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    merge: Callable[[Any, Any], Any]
    finish: Callable[[Any], tuple[np.ndarray, np.ndarray]]
    takes: str = "range"


@struct.dataclass
class RangeState:
    """lo, hi [rows, *shape]; count [rows] samples; outside () samples whose row does not exist."""

    lo: jax.Array
    hi: jax.Array
    count: jax.Array
    outside: jax.Array


@struct.dataclass
class EmaState:
    """trail: sum of (1 - decay) decay**(n - i) batch_i, i = 1..n; first: batch 1; count [rows]: n.

    The average is trail + decay**n * first. Keeping the two apart is what makes `merge` exact: a
    state that starts in the middle of the stream has given its first batch too large a weight.
    """

    trail_lo: jax.Array
    trail_hi: jax.Array
    first_lo: jax.Array
    first_hi: jax.Array
    count: jax.Array
    outside: jax.Array


@struct.dataclass
class SampleState:
    """extremes: RangeState. values, priority [rows, size]: those of smallest random priority."""

    extremes: RangeState
    values: jax.Array
    priority: jax.Array


def _empty_range(rows, shape=()):
    return RangeState(
        lo=jnp.full((rows, *shape), jnp.inf, jnp.float32),
        hi=jnp.full((rows, *shape), -jnp.inf, jnp.float32),
        count=jnp.zeros((rows,), jnp.int32),
        outside=jnp.zeros((), jnp.int32),
    )


def _batch_range(rows, shape, lo, hi, row) -> RangeState:
    """The extremes of one batch per row; a sample whose row does not exist is only counted."""
    row = jnp.asarray(row, jnp.int32)
    inside = (row >= 0) & (row < rows)
    row = jnp.where(inside, row, rows)  # a spare segment takes what does not fit
    lo, hi = jnp.asarray(lo, jnp.float32), jnp.asarray(hi, jnp.float32)
    if lo.shape != (row.shape[0], *shape):
        raise ValueError(
            f"an observer of ranges of shape {tuple(shape)} got lo of shape {lo.shape} for "
            f"{row.shape[0]} samples; reduce every sample to one range per cell first."
        )
    return RangeState(
        lo=jax.ops.segment_min(lo, row, rows + 1)[:rows],
        hi=jax.ops.segment_max(hi, row, rows + 1)[:rows],
        count=jax.ops.segment_sum(jnp.ones_like(row), row, rows + 1)[:rows],
        outside=jnp.sum(~inside, dtype=jnp.int32),
    )


def _join_ranges(a: RangeState, b: RangeState) -> RangeState:
    return RangeState(
        lo=jnp.minimum(a.lo, b.lo),
        hi=jnp.maximum(a.hi, b.hi),
        count=a.count + b.count,
        outside=a.outside + b.outside,
    )


def _checked(lo, hi, count, outside) -> tuple[np.ndarray, np.ndarray]:
    lo, hi, count = (np.asarray(v) for v in (lo, hi, count))
    if int(outside):
        raise ValueError(
            f"{int(outside)} samples named a row outside 0..{count.size - 1}; the observer was "
            "made for another number of steps than the samples come from."
        )
    unseen = np.flatnonzero(count == 0)
    if unseen.size:
        raise ValueError(
            f"rows {unseen.tolist()} of {count.size} were never seen by the observer; give it "
            "samples of every step, or calibrate fewer rows."
        )
    finite = (np.isfinite(lo) & np.isfinite(hi)).reshape(count.size, -1).all(axis=1)
    if not finite.all():
        raise NotFiniteError(
            f"rows {np.flatnonzero(~finite).tolist()} saw NaN or infinity; look for the layer that "
            "produced it before calibrating."
        )
    return lo.astype(np.float32), hi.astype(np.float32)


def minmax() -> Observer:
    """Smallest and largest value ever seen. `merge` is exact, associative and order-free."""

    def update(state, lo, hi, row):
        batch = _batch_range(state.lo.shape[0], state.lo.shape[1:], lo, hi, row)
        return _join_ranges(state, batch)

    def finish(state):
        return _checked(state.lo, state.hi, state.count, state.outside)

    return Observer(_empty_range, update, _join_ranges, finish)


def ema(decay: float = 0.95) -> Observer:
    """Exponential average of each batch's smallest and largest value; the first batch initialises.

    Every `update` is one batch for each row it visits: m <- decay * m + (1 - decay) * batch. Decay
    0.95 in Q-Diffusion, TFMQ-DM and QuEST; 0.9 in QDrop, PTQ4DM and EDA-DM. Order matters, so
    shuffle the samples over steps when a row holds more than one. `merge(a, b)` is a followed by b:
    associative up to rounding, not commutative.
    """

    def init(rows, shape=()):
        # Four buffers, not one: a donated state may not hold the same buffer twice.
        zeros = [jnp.zeros((rows, *shape), jnp.float32) for _ in range(4)]
        return EmaState(*zeros, jnp.zeros((rows,), jnp.int32), jnp.zeros((), jnp.int32))

    def column(per_row, like):
        return per_row.reshape(per_row.shape + (1,) * (like.ndim - 1))

    def update(state, lo, hi, row):
        rows, *shape = state.trail_lo.shape
        batch = _batch_range(rows, tuple(shape), lo, hi, row)
        present = column(batch.count > 0, batch.lo)
        fresh = present & column(state.count == 0, batch.lo)

        def step(trail, value):
            return jnp.where(present, decay * trail + (1.0 - decay) * value, trail)

        return EmaState(
            trail_lo=step(state.trail_lo, batch.lo),
            trail_hi=step(state.trail_hi, batch.hi),
            first_lo=jnp.where(fresh, batch.lo, state.first_lo),
            first_hi=jnp.where(fresh, batch.hi, state.first_hi),
            count=state.count + (batch.count > 0).astype(jnp.int32),
            outside=state.outside + batch.outside,
        )

    def weight(count, like):
        return column(jnp.asarray(decay, jnp.float32) ** count.astype(jnp.float32), like)

    def merge(a, b):
        faded = weight(b.count, a.trail_lo)
        started = column(a.count > 0, a.trail_lo)
        return EmaState(
            trail_lo=faded * a.trail_lo + b.trail_lo,
            trail_hi=faded * a.trail_hi + b.trail_hi,
            first_lo=jnp.where(started, a.first_lo, b.first_lo),
            first_hi=jnp.where(started, a.first_hi, b.first_hi),
            count=a.count + b.count,
            outside=a.outside + b.outside,
        )

    def finish(state):
        faded = weight(state.count, state.trail_lo)
        lo = state.trail_lo + faded * state.first_lo
        hi = state.trail_hi + faded * state.first_hi
        return _checked(lo, hi, state.count, state.outside)

    return Observer(init, update, merge, finish)


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
            extremes=_empty_range(rows),
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
        return SampleState(_join_ranges(state.extremes, extremes), values, priority)

    def update(state, lo, hi, row, sample, index):
        rows = state.values.shape[0]
        batch = _batch_range(rows, (), lo, hi, row)
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
        lo, hi = _checked(extremes.lo, extremes.hi, extremes.count, extremes.outside)
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
