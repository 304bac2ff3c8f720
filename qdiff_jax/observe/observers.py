"""Observers: what is remembered of a tensor over a calibration set, one row per step.

An observer is four pure functions. Updates are segment reductions over the row of each sample, so a
batch may mix steps and needs one compile; `merge` joins states from several devices, hosts or
interrupted runs. `finish` runs on the host and raises for a row that no sample visited, which would
otherwise become a range of +-inf or, worse, of a neighbour. Here are those that need the smallest
and largest value of each sample; `reservoirs` has those that keep values.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qdiff_jax.runtime.finite import NotFiniteError


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


def empty_range(rows, shape=()) -> RangeState:
    """Of nothing seen yet."""
    return RangeState(
        lo=jnp.full((rows, *shape), jnp.inf, jnp.float32),
        hi=jnp.full((rows, *shape), -jnp.inf, jnp.float32),
        count=jnp.zeros((rows,), jnp.int32),
        outside=jnp.zeros((), jnp.int32),
    )


def batch_range(rows, shape, lo, hi, row) -> RangeState:
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


def join_ranges(a: RangeState, b: RangeState) -> RangeState:
    """Of everything that either has seen."""
    return RangeState(
        lo=jnp.minimum(a.lo, b.lo),
        hi=jnp.maximum(a.hi, b.hi),
        count=a.count + b.count,
        outside=a.outside + b.outside,
    )


def checked_ranges(lo, hi, count, outside) -> tuple[np.ndarray, np.ndarray]:
    """(lo, hi) float32 [rows, *shape]. Raises ValueError for samples outside the rows and for rows without
    samples, NotFiniteError for NaN or infinity."""
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
        batch = batch_range(state.lo.shape[0], state.lo.shape[1:], lo, hi, row)
        return join_ranges(state, batch)

    def finish(state):
        return checked_ranges(state.lo, state.hi, state.count, state.outside)

    return Observer(empty_range, update, join_ranges, finish)


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
        batch = batch_range(rows, tuple(shape), lo, hi, row)
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
        return checked_ranges(lo, hi, state.count, state.outside)

    return Observer(init, update, merge, finish)
