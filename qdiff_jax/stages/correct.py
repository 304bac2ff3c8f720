"""The stage that measures what sampling shall correct, and leaves the table for the bundle.

It runs last: the statistics are those of the network as it will be sampled, with the weights and activation
quantizers it ends up with. Source: He et al. 2023 (PTQD), section 3.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from qdiff_jax.diffusion.corrections import absorbed_variance
from qdiff_jax.models.registry import predictor
from qdiff_jax.observe.archive import load_arrays, save_arrays
from qdiff_jax.observe.quantization_noise import (
    Paired,
    StepNoise,
    ptqd_correction,
    quantized_at,
    reference_at,
    step_noise,
)
from qdiff_jax.stages.stage import Model, QuantState, Stage, fold_weights, tuned_params

CORRECTION = "correction"  # its place in QuantState.aux


@dataclasses.dataclass(frozen=True)
class _Measured:
    """`StepNoise` of the first S' steps. raw_bias, bias: [S', C]; the others: [S']; float64."""

    slope: np.ndarray
    bias: np.ndarray
    variance: np.ndarray
    snr: np.ndarray
    raw_bias: np.ndarray
    raw_variance: np.ndarray


class Carry(NamedTuple):
    state: QuantState
    variables: dict
    steps: tuple[StepNoise, ...]
    store: pathlib.Path | None


def correct_estimates(
    model: Model,
    source: Paired,
    *,
    variant: str = "fixed",
    slope: bool = True,
    bias: bool = True,
    calibrate_variance: bool = True,
    batch_size: int = 64,
    on_progress: Callable | None = None,
) -> Stage:
    """PTQD's statistics, one step of the sampler per step of the stage, kept in `aux["correction"]`.

    variant: see `observe.quantization_noise.step_noise`. slope, bias: whether that term is corrected.
    calibrate_variance: whether the residual variance is taken out of the sampler's noise; where the sampler
    has none, the report says so.
    """

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        params, quant = fold_weights(tuned_params(model.params, state.aux), state.quant)
        path = None if store is None else store / "statistics.npz"
        steps: tuple[StepNoise, ...] = ()
        if path is not None and path.exists():
            held = load_arrays(path, _Measured)
            columns = (getattr(held, name) for name in StepNoise._fields)
            steps = tuple(StepNoise(*row) for row in zip(*columns, strict=True))
        return Carry(state, {"params": params, "quant": quant}, steps, path)

    def run(carry: Carry, n: int) -> Carry:
        predict = predictor(model.module)
        for position in range(len(carry.steps), min(len(carry.steps) + n, source.plan.steps)):
            quantized = quantized_at(predict, carry.variables, source, position, batch_size)
            found = step_noise(reference_at(source, position), quantized, variant)
            carry = carry._replace(steps=(*carry.steps, found))
            if carry.store is not None:
                columns = (np.asarray(column, np.float64) for column in zip(*carry.steps))
                save_arrays(carry.store, _Measured(*columns))
            if on_progress is not None:
                on_progress(position + 1, source.plan.steps)
        return carry

    def done(carry: Carry) -> bool:
        return len(carry.steps) >= source.plan.steps

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        table = ptqd_correction(
            list(carry.steps),
            source.plan.timesteps,
            slope=slope,
            bias=bias,
            calibrate_variance=calibrate_variance,
        )
        absorbed = absorbed_variance(source.plan, table.table.variance)
        state = carry.state.replace(aux={**carry.state.aux, CORRECTION: table})
        return state, {
            "slope": [float(step.slope) for step in carry.steps],
            "bias": [step.bias.tolist() for step in carry.steps],
            "residual_variance": [float(step.variance) for step in carry.steps],
            "absorbed_variance": absorbed.tolist(),
            "variance": variance_says(source, table.table.variance, calibrate_variance),
        }

    return Stage("calibrate_correction", init, run, finish, done, "correction")


def variance_says(source: Paired, variance: Any, calibrated: bool) -> str:
    """One sentence on what becomes of the residual variance under this sampler."""
    sigma, c = (
        np.asarray(source.plan.rows[name], np.float64) for name in ("sigma", "eps_coefficient")
    )
    noisy = sigma > 0
    if not calibrated:
        return "The sampler keeps its nominal noise: the variance schedule is not calibrated."
    if not noisy.any():
        return (
            f"The sampler {source.plan.sampler.name} is deterministic: it has no noise that could take "
            "over the residual variance, so only slope and bias are corrected."
        )
    whole = noisy & (np.square(c) * np.asarray(variance, np.float64) <= np.square(sigma))
    return (
        f"The noise of the sampler takes over the whole residual variance at {whole.sum()} of "
        f"{noisy.sum()} steps that add noise; at the others it is lowered to 0."
    )
