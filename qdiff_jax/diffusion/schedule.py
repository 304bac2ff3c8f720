"""Noise schedules of the forward process and the algebra of its marginals.

A schedule is data: `betas` and their cumulative products, computed and held in float64 on the host.
What enters a jitted function is always derived in float64 first and rounded to float32 once,
because `1 - alpha_bar` taken in float32 has lost three digits at t = 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The forward process `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps`, t in 0..T-1.

    name: how the betas were made. betas: [T] float64 in (0, 1). alpha_bar: [T] float64, strictly
    decreasing, `alpha_bar[t] = prod_{s <= t} (1 - betas[s])`. Compared and hashed by identity.
    """

    name: str
    betas: np.ndarray
    alpha_bar: np.ndarray

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)


def from_betas(name: str, betas: np.ndarray) -> NoiseSchedule:
    """A schedule from explicit betas [T], each in (0, 1); ValueError otherwise."""
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not len(betas):
        raise ValueError(f"betas must be a non-empty vector, got shape {betas.shape}.")
    if not (np.all(betas > 0) and np.all(betas < 1)):
        raise ValueError(
            f"betas of schedule '{name}' must lie in (0, 1); got {betas.min()}..{betas.max()}."
        )
    return NoiseSchedule(name, betas, np.cumprod(1.0 - betas))


def _linear(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    return np.linspace(beta_start, beta_end, num_timesteps)


def _scaled_linear(
    num_timesteps: int, beta_start: float = 0.00085, beta_end: float = 0.012
) -> np.ndarray:
    return np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps) ** 2


def _cosine(num_timesteps: int, shift: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
    grid = np.arange(num_timesteps + 1) / num_timesteps
    signal = np.cos((grid + shift) / (1 + shift) * math.pi / 2) ** 2
    return np.minimum(1.0 - signal[1:] / signal[:-1], max_beta)


_SCHEDULES = {"linear": _linear, "scaled_linear": _scaled_linear, "cosine": _cosine}


def make_schedule(name: str, num_timesteps: int = 1000, **options: float) -> NoiseSchedule:
    """The schedule `name` with `num_timesteps` steps.

    - "linear": betas evenly spaced from `beta_start` (1e-4) to `beta_end` (0.02); Ho et al. 2020,
      section 4. The end points are used as given for every T (nothing is rescaled by 1000 / T).
    - "scaled_linear": square roots of betas evenly spaced; `beta_start` 0.00085 and `beta_end`
      0.012 are Stable Diffusion's, 0.0015 and 0.0195 those of the unconditional and ImageNet latent
      models (Rombach et al. 2022).
    - "cosine": `alpha_bar(t) = cos^2` with `shift` 0.008 and betas at most `max_beta` 0.999; Nichol
      and Dhariwal 2021, equation 17.

    Raises ValueError for an unknown name (the message lists the names), an option the schedule does
    not have, T < 1, or betas outside (0, 1).
    """
    if name not in _SCHEDULES:
        raise ValueError(f"unknown noise schedule '{name}'; the names are {sorted(_SCHEDULES)}.")
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}.")
    make = _SCHEDULES[name]
    known = make.__code__.co_varnames[1 : make.__code__.co_argcount]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"noise schedule '{name}' has no option {unknown}; its options are {list(known)}."
        )
    return from_betas(name, make(num_timesteps, **options))


def schedule_of(config: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule of a model's JSON config: {"schedule": name, "timesteps": T[, "options": {...}]}.

    Other keys say how the model was trained and are left alone. Raises ValueError as `make_schedule`.
    """
    return make_schedule(config["schedule"], config["timesteps"], **config.get("options", {}))


def alpha_bar_at(schedule: NoiseSchedule, timesteps: np.ndarray) -> np.ndarray:
    """alpha_bar at host timesteps of any shape, float64; log-linear between integer timesteps.

    Integer timesteps return the table's entries unchanged. Fractional ones (solvers with a time
    grid of their own) interpolate `log alpha_bar`. Raises ValueError outside 0..T-1: nothing is
    extrapolated.
    """
    timesteps = np.asarray(timesteps, np.float64)
    last = schedule.num_timesteps - 1
    if timesteps.size and not (timesteps.min() >= 0 and timesteps.max() <= last):
        raise ValueError(
            f"timesteps {timesteps.min()}..{timesteps.max()} leave the range 0..{last} of the "
            "noise schedule; use fewer steps, a smaller offset or a schedule with more timesteps."
        )
    low = np.floor(timesteps).astype(np.int64)
    high = np.minimum(low + 1, last)
    fraction = timesteps - low
    between = schedule.alpha_bar[low] ** (1 - fraction) * schedule.alpha_bar[high] ** fraction
    return np.where(fraction == 0, schedule.alpha_bar[low], between)


def marginals(schedule: NoiseSchedule, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t))`, float32, of the shape of the integer array t.

    t may be traced and must lie in 0..T-1; outside, both are NaN (an index is never clamped).
    """
    signal = jnp.asarray(np.sqrt(schedule.alpha_bar).astype(np.float32))
    noise = jnp.asarray(np.sqrt(1.0 - schedule.alpha_bar).astype(np.float32))
    t = jnp.where(t < 0, schedule.num_timesteps, t)
    take = {"mode": "fill", "fill_value": jnp.nan}
    return signal.at[t].get(**take), noise.at[t].get(**take)


def _rows(values: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.reshape(values, values.shape + (1,) * (like.ndim - values.ndim))


def q_sample(schedule: NoiseSchedule, x0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """x_t of the forward process: x0 and eps [B, ...] float32, t integer [B] or scalar.

    Source: Ho et al. 2020, equation 4.
    """
    signal, noise = marginals(schedule, t)
    return _rows(signal, x0) * x0 + _rows(noise, x0) * eps


def predict_x0(schedule: NoiseSchedule, x: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """The x0 that x at timestep t and the noise eps imply; shapes as `q_sample`."""
    signal, noise = marginals(schedule, t)
    return (x - _rows(noise, x) * eps) / _rows(signal, x)


def predict_eps(schedule: NoiseSchedule, x: jax.Array, t: jax.Array, x0: jax.Array) -> jax.Array:
    """The noise that x at timestep t and the image x0 imply; shapes as `q_sample`."""
    signal, noise = marginals(schedule, t)
    return (x - _rows(signal, x) * x0) / _rows(noise, x)
