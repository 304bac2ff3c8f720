"""Paired error between a quantized model and the full-precision model it came from.

One streaming accumulator serves both uses:

- *teacher-forced*: both networks see the same states of a full-precision trajectory, the rows are
  the sampler's steps, and the error is that of eps (TFMQ-DM, arXiv:2311.16503, and Q-Diffusion,
  arXiv:2302.04304, argue from this per-step error);
- *rollout*: both models sample from the same noise on their own, there is one row, and the error is
  that of the final x_0.

The two can disagree (a per-step range table may lower the first and raise the second), so a report
gives both. Sums are carried as a float32 value and its rounding error, so that a long stream ends
at the same number as one large batch; the last division is done on the host in float64.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class ErrorState:
    """Running sums, one entry per row. `*_low` holds what float32 addition rounded away."""

    error: jax.Array  # [R] float32: sum over samples of mean |other - reference|^2
    error_low: jax.Array  # [R] float32
    energy: jax.Array  # [R] float32: sum over samples of mean |reference|^2
    energy_low: jax.Array  # [R] float32
    count: jax.Array  # [R] int32: samples seen
    stray: jax.Array  # int32: samples whose row was outside 0..R-1


class Agreement(NamedTuple):
    """What `finish` returns: host float64, 0 meaning that both models agree exactly.

    A model that diverged gives nan or inf here, which is a result and not an exception.
    """

    rel_mse: float  # sum |d|^2 / sum |reference|^2 over everything
    mse: float  # mean |d|^2 over everything
    sqnr_db: float  # 10 log10(1 / rel_mse); inf when equal
    rel_mse_rows: np.ndarray  # [R]
    mse_rows: np.ndarray  # [R]
    samples: np.ndarray  # [R] int64


def init(rows: int = 1) -> ErrorState:
    """An empty accumulator with `rows` rows (the sampler's steps, or 1 for a rollout).

    Raises ValueError when `rows` is not positive.
    """
    if rows < 1:
        raise ValueError(f"agreement.init needs at least one row, got rows={rows}.")
    zero = jnp.zeros((rows,), jnp.float32)
    return ErrorState(
        error=zero,
        error_low=zero,
        energy=zero,
        energy_low=zero,
        count=jnp.zeros((rows,), jnp.int32),
        stray=jnp.zeros((), jnp.int32),
    )


def _add(high: jax.Array, low: jax.Array, term: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Knuth's TwoSum: the float32 sum and exactly what it lost, kept beside it."""
    total = high + term
    back = total - high
    lost = (high - (total - back)) + (term - back)
    return total, low + lost


def update(
    state: ErrorState, reference: jax.Array, other: jax.Array, row: jax.Array | int = 0
) -> ErrorState:
    """Adds a batch of pairs. Pure; may be jitted.

    Args:
      state: from `init`.
      reference: [B, ...] floating; the full-precision model's output.
      other: [B, ...] floating, same shape; the quantized model's output.
      row: int scalar, or [B] integers: the row of each pair. A row outside 0..R-1 is counted and
        makes `finish` raise, since nothing can be raised under jit.

    Raises ValueError when the shapes do not fit together.
    """
    if reference.shape != other.shape or reference.ndim < 1:
        raise ValueError(
            f"agreement.update compares arrays of one shape [B, ...]: the reference has "
            f"{reference.shape} and the other {other.shape}."
        )
    row = jnp.asarray(row, jnp.int32)
    if row.shape not in ((), reference.shape[:1]):
        raise ValueError(
            f"agreement.update takes one row for the batch or one for each of its "
            f"{reference.shape[0]} samples: row has shape {row.shape}."
        )
    row = jnp.broadcast_to(row, reference.shape[:1])
    axes = tuple(range(1, reference.ndim))
    reference = reference.astype(jnp.float32)
    error = jnp.mean(jnp.square(other.astype(jnp.float32) - reference), axis=axes)
    energy = jnp.mean(jnp.square(reference), axis=axes)

    rows = state.count.shape[0]
    known = (row >= 0) & (row < rows)
    # An index of `rows` is dropped by the scatter; a negative one would have wrapped around.
    index = jnp.where(known, row, rows)

    def by_row(values: jax.Array) -> jax.Array:
        return jnp.zeros((rows,), values.dtype).at[index].add(values, mode="drop")

    error, error_low = _add(state.error, state.error_low, by_row(error))
    energy, energy_low = _add(state.energy, state.energy_low, by_row(energy))
    return ErrorState(
        error=error,
        error_low=error_low,
        energy=energy,
        energy_low=energy_low,
        count=state.count + by_row(jnp.ones_like(row)),
        stray=state.stray + jnp.sum(~known, dtype=jnp.int32),
    )


def merge(a: ErrorState, b: ErrorState) -> ErrorState:
    """The accumulator of both streams together (two devices, or before and after a restart)."""
    if a.count.shape != b.count.shape:
        raise ValueError(
            f"agreement.merge needs accumulators with the same rows: "
            f"{a.count.shape[0]} and {b.count.shape[0]}."
        )
    error, error_low = _add(a.error, a.error_low, b.error)
    energy, energy_low = _add(a.energy, a.energy_low, b.energy)
    return ErrorState(
        error=error,
        error_low=error_low + b.error_low,
        energy=energy,
        energy_low=energy_low + b.energy_low,
        count=a.count + b.count,
        stray=a.stray + b.stray,
    )


def _ratio(error: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """error / energy, with 0 for a zero error even where the reference itself is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0.0, 0.0, error / energy)


def finish(state: ErrorState) -> Agreement:
    """The metrics, on the host in float64.

    Raises ValueError when a row was never seen or a sample named a row that does not exist.
    """
    state = jax.device_get(state)
    count = np.asarray(state.count, np.int64)
    if state.stray:
        raise ValueError(
            f"agreement.finish: {int(state.stray)} samples named a row outside "
            f"0..{len(count) - 1}; init the accumulator with one row per step of the sampler."
        )
    if (count == 0).any():
        missing = np.flatnonzero(count == 0).tolist()
        raise ValueError(
            f"agreement.finish: rows {missing} of {len(count)} were never updated; "
            f"evaluate every step of the sampler."
        )
    error = np.asarray(state.error, np.float64) + np.asarray(state.error_low, np.float64)
    energy = np.asarray(state.energy, np.float64) + np.asarray(state.energy_low, np.float64)
    rel_mse = float(_ratio(error.sum(), energy.sum()))
    return Agreement(
        rel_mse=rel_mse,
        mse=float(error.sum() / count.sum()),
        sqnr_db=sqnr_db(rel_mse),
        rel_mse_rows=_ratio(error, energy),
        mse_rows=error / count,
        samples=count,
    )


def thirds(per_step: np.ndarray, timesteps: np.ndarray) -> dict[str, float]:
    """Means of a per-step metric over the thirds of the sampler's grid.

    Args:
      per_step: [S], a metric per step of the sampler, e.g. `Agreement.rel_mse_rows`.
      timesteps: [S], the timestep of each of them, in any order.

    Returns {"low", "mid", "high"}, by timestep: "low" is the end of sampling, near the data. When S
    is not a multiple of 3 the lower thirds take the steps left over.

    Raises ValueError when the shapes differ or there are fewer than three steps.
    """
    per_step = np.asarray(per_step, np.float64)
    timesteps = np.asarray(timesteps)
    if per_step.ndim != 1 or per_step.shape != timesteps.shape or per_step.size < 3:
        raise ValueError(
            f"agreement.thirds needs [S] values and [S] timesteps with S >= 3: got shapes "
            f"{per_step.shape} and {timesteps.shape}."
        )
    ordered = per_step[np.argsort(timesteps, kind="stable")]
    parts = np.array_split(ordered, 3)
    return {name: float(part.mean()) for name, part in zip(("low", "mid", "high"), parts)}


def psnr_db(mse: float, data_range: float = 2.0) -> float:
    """10 log10(data_range^2 / mse) in dB, of the mean squared error over all images.

    It is taken of the pooled error, because a mean of per-image values is infinite as soon as one
    image is reproduced exactly. `data_range` is 2 for images in [-1, 1]. Equal images give inf,
    which report.json stores as null and the tables show as "exact"; a diverged model gives nan.
    """
    if mse == 0.0:
        return math.inf
    if not math.isfinite(mse):
        return math.nan
    return 10.0 * math.log10(data_range**2 / mse)


def sqnr_db(rel_mse: float) -> float:
    """Signal to quantization noise ratio, -10 log10(rel_mse), in dB; inf when equal."""
    if rel_mse == 0.0:
        return math.inf
    if not math.isfinite(rel_mse):
        return math.nan
    return -10.0 * math.log10(rel_mse)
