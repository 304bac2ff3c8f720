"""Quantization noise of the noise estimate, measured on pairs: both networks on the same states.

The states are those of full-precision trajectories, whose own estimates are recorded; so a pair costs one
evaluation of the quantized network. With guidance everything is said of the guided estimate, because that
is what the sampler consumes. Statistics per step: He et al. 2023 (PTQD), section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.analysis.noise import regress
from qdiff_jax.diffusion.corrections import affine_table
from qdiff_jax.diffusion.guidance import Guidance, branches, combine, evaluate
from qdiff_jax.diffusion.samplers import SamplerPlan
from qdiff_jax.diffusion.schedule import NoiseSchedule, alpha_bar_at
from qdiff_jax.observe.trajectory import Trajectory
from qdiff_jax.quant.timed import StepContext, TimeIndexed, step_context

VARIANTS = ("fixed", "faithful")


class Paired(NamedTuple):
    """Where pairs come from. trajectory: full precision, every step of the plan. guidance: as it was
    sampled with. plan: the sampler. alpha_bar: [S] float64 at its timesteps, None for a flow model, whose
    plan has the rows "signal" and "noise". key: the trajectory's noise was drawn from, None if unknown."""

    trajectory: Trajectory
    guidance: Guidance | None
    plan: SamplerPlan
    alpha_bar: np.ndarray | None
    key: jax.Array | None = None


def paired(
    trajectory: Trajectory,
    guidance: Guidance | None,
    plan: SamplerPlan,
    schedule: NoiseSchedule | None,
    key: jax.Array | None = None,
) -> Paired:
    """schedule: None for a flow model. key: of `record_trajectories`.

    Raises ValueError if the trajectory does not hold every step."""
    if not np.array_equal(trajectory.t, np.asarray(plan.timesteps)):
        raise ValueError(
            f"a trajectory of {len(trajectory.t)} recorded steps does not hold the {plan.steps} steps "
            "of the sampler; record every step."
        )
    alpha_bar = None if schedule is None else alpha_bar_at(schedule, plan.timesteps)
    return Paired(trajectory, guidance, plan, alpha_bar, key)


@functools.partial(jax.jit, static_argnames="predict")
def _guided(predict, guidance, variables, x, ctx, y):
    return evaluate(predict, guidance, variables, x, ctx, y)[0]


def reference_at(source: Paired, position: int) -> np.ndarray:
    """[N, ...] float32: the guided full-precision estimates of one step, from the recorded outputs."""
    raw = source.trajectory.eps[position]
    visited = branches(source.guidance)
    raw = raw.reshape((-1, len(visited), *raw.shape[1:]))
    if len(visited) == 1:
        return raw[:, 0]
    # As the sampler combines them: conditional first.
    return np.asarray(combine(source.guidance, jnp.asarray(raw[:, 0]), jnp.asarray(raw[:, 1])))


def quantized_at(
    predict: Callable, variables: Any, source: Paired, position: int, batch_size: int = 64
) -> np.ndarray:
    """[N, ...] float32: the guided estimates of another network on the same states.

    predict(variables, x, ctx, y) -> eps. The last batch is filled up by repeating its last state.
    """
    trajectory, every = source.trajectory, len(branches(source.guidance))
    x = trajectory.x[position, ::every]
    # The conditional row carries the labels; the unconditional ones follow from the guidance.
    y = jax.tree.map(lambda leaf: leaf[::every], trajectory.y)
    ctx: StepContext = step_context(trajectory.t[position], trajectory.index[position])
    total, size = len(x), min(batch_size, len(x))
    estimates = []
    for first in range(0, total, size):
        rows = np.minimum(np.arange(first, first + size), total - 1)
        part = jax.tree.map(lambda leaf: leaf[rows], (x, y))  # noqa: B023
        eps = _guided(predict, source.guidance, variables, part[0], ctx, part[1])
        estimates.append(np.asarray(eps)[: total - first])
    return np.concatenate(estimates)


def pairs(
    predict: Callable, variables: Any, source: Paired, batch_size: int = 64
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(full precision, quantized) for every step, ascending."""
    for position in range(source.plan.steps):
        yield (
            reference_at(source, position),
            quantized_at(predict, variables, source, position, batch_size),
        )


class StepNoise(NamedTuple):
    """The error e = eps_q - eps of one step: slope k >= 0 of its correlated part, bias [C] to subtract from
    eps_q, variance of the residual e - k eps - bias, and the signal-to-noise ratio |eps|^2 / |e|^2
    (inf without any error). raw_bias [C], raw_variance: of e itself, as if k were 0."""

    slope: float
    bias: np.ndarray
    variance: float
    snr: float
    raw_bias: np.ndarray
    raw_variance: float


def step_noise(eps: np.ndarray, quantized: np.ndarray, variant: str = "fixed") -> StepNoise:
    """The statistics of one step from paired estimates [N, ..., C] of one shape.

    k = max(Cov(e, eps) / Var(eps), 0) over all elements. A negative slope is not divided out: it mostly
    comes from clipping, and 1 / (1 + k) would then enlarge the residual.

    variant: "faithful" to the official code takes the bias of the raw error, and the residual's standard
    deviation by sample, averaged; "fixed" takes the bias of e - k eps (which makes the corrected
    estimate unbiased when eps has a mean, too) and the variance over all elements.

    Raises ValueError for another variant, shapes that differ, or a single element.
    """
    if variant not in VARIANTS:
        raise ValueError(
            f"variant {variant!r} of the statistics is unknown; use one of {VARIANTS}."
        )
    eps, quantized = np.asarray(eps, np.float64), np.asarray(quantized, np.float64)
    if eps.shape != quantized.shape or eps.ndim < 2 or eps.size < 2:
        raise ValueError(
            f"paired estimates are two arrays [N, ..., C] of one shape; got {eps.shape} and "
            f"{quantized.shape}."
        )
    error = quantized - eps
    slope = max(regress(eps, error).slope, 0.0)
    axes = tuple(range(eps.ndim - 1))
    left = error - slope * eps
    raw_bias = error.mean(axis=axes)
    bias = raw_bias if variant == "faithful" else left.mean(axis=axes)

    def spread(residual):
        if variant == "faithful":
            return float(residual.reshape(len(residual), -1).std(axis=1).mean() ** 2)
        return float(residual.var())

    power = np.square(error).sum()
    snr = np.square(eps).sum() / power if power else np.inf
    return StepNoise(
        slope, bias, spread(left - bias), float(snr), raw_bias, spread(error - raw_bias)
    )


def ptqd_correction(
    steps: list[StepNoise],
    timesteps: Any,
    *,
    slope: bool = True,
    bias: bool = True,
    calibrate_variance: bool = True,
) -> TimeIndexed:
    """PTQD's correction: eps' = (eps_q - bias) / (1 + k), residual variance divided by (1 + k)^2.

    steps, timesteps: [S] ascending. slope, bias: False leaves that term out (k = 0, bias = 0), and the others
    are then those of the whole error. Without calibrate_variance the sampler keeps its nominal noise.
    Source: He et al. 2023, section 3.2 and 3.3.
    """
    gain = 1.0 / (1.0 + slope * np.array([step.slope for step in steps]))
    shift = bias * np.stack([step.bias if slope else step.raw_bias for step in steps])
    scale = np.broadcast_to(gain[:, None], shift.shape)
    left = np.array([step.variance if slope else step.raw_variance for step in steps])
    variance = left * np.square(gain)
    return affine_table(scale, -shift * scale, variance * float(calibrate_variance), timesteps)
