"""Closed-form rounding: GPTQ against the full-precision output of each block, biases solved exactly.

Not a paper's code but a composition of GPTQ (Frantar et al. 2023), asymmetric targets (GPTAQ, Li et al.
2025) and BRECQ's block target (Li et al. 2021), for exploration: no optimisation steps, so minutes become
seconds. Activation ranges are calibrated first, on the network in full precision, so that the stream in
which weights are rounded already carries the activation quantizers and weights make up for them too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qdiff_jax.models.program import Unit, units_with_projections
from qdiff_jax.stages.calibrate import ActivationConfig, calibrate_activations
from qdiff_jax.stages.closed_form import closed_form as closed_form_stage
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.progressive import reopened, unrounded
from qdiff_jax.stages.reconstruct import ReconstructConfig, reconstruct
from qdiff_jax.stages.row_weights import by_step
from qdiff_jax.stages.stage import Method, Model, QuantState, Stage, tuned_params
from qdiff_jax.stages.tune import TuneConfig, tune
from qdiff_jax.stages.weights import calibrate_weights

ROUNDINGS = ("adaround", "closed_form")


def closed_form(
    model: Model,
    weight_calibration: Any,
    activation_calibration: Any,
    timesteps: Any,
    *,
    weight_method: str = "mse",
    rounding: ClosedFormConfig = ClosedFormConfig(),
    activations: ActivationConfig = ActivationConfig(),
    step_weights: np.ndarray | None = None,
    tuning: TuneConfig | None = None,
    on_progress=None,
) -> Method:
    """Activation ranges, weight ranges, then every block in closed form, then (optionally) tuning end to end.

    step_weights: [S], how much the samples of each step count, see `stages.row_weights`; None for equally.
    """
    units = units_with_projections(model.program)
    stages = closed_form_stages(
        model,
        units,
        weight_calibration,
        activation_calibration,
        timesteps,
        weight_method=weight_method,
        rounding=rounding,
        activations=activations,
        step_weights=step_weights,
        on_progress=on_progress,
    )
    notes = f"target={rounding.target}"
    if tuning is not None:
        stages = (*stages, tune(model, weight_calibration, tuning, on_progress=on_progress))
        notes += f"; tuned {tuning.steps} steps"
    own = dict(step_weights=step_weights, on_progress=on_progress)
    again = decided_again(model, units, "closed_form", (), rounding, **own)
    return Method("closed_form", stages, notes, again)


def closed_form_stages(
    model: Model,
    units: Sequence[Unit],
    weight_calibration: Any,
    activation_calibration: Any,
    timesteps: Any,
    *,
    weight_method: str,
    rounding: ClosedFormConfig,
    activations: ActivationConfig,
    name: str = "closed_form_weights",
    step_weights: np.ndarray | None = None,
    on_progress=None,
) -> tuple[Stage, ...]:
    """The three stages with which a method rounds in closed form, over units of its own grouping."""
    return (
        calibrate_activations(
            model, activation_calibration, timesteps, activations, on_progress=on_progress
        ),
        calibrate_weights(model, method=weight_method),
        round_units(
            model,
            units,
            weight_calibration,
            rounding,
            name=name,
            step_weights=step_weights,
            on_progress=on_progress,
        ),
    )


def round_units(
    model: Model,
    units: Sequence[Unit],
    calibration: Any,
    rounding: ClosedFormConfig,
    *,
    name: str,
    step_weights: np.ndarray | None = None,
    on_progress=None,
) -> Stage:
    """`stages.closed_form` with the weights of steps looked up for the rows of its calibration set."""
    rows = None if step_weights is None else by_step(step_weights, calibration.index)
    return closed_form_stage(
        model, units, calibration, rounding, name=name, row_weights=rows, on_progress=on_progress
    )


def decided_again(
    model: Model,
    units: Sequence[Unit],
    rounding: str,
    configs: Sequence[ReconstructConfig],
    closed_form: ClosedFormConfig,
    *,
    step_weights: np.ndarray | None = None,
    on_progress: Callable | None = None,
) -> Callable[[QuantState, int], tuple[Stage, QuantState]]:
    """`Method.again` of a method that rounds `units` in this way. configs: of all rounds (`round_configs`)."""

    def again(state: QuantState, i: int) -> tuple[Stage, QuantState]:
        own = model._replace(params=tuned_params(model.params, state.aux))
        states, given = (
            state.aux["calibration"],
            dict(name=f"par_round_{i}", on_progress=on_progress),
        )
        if rounding == "closed_form":
            stage = round_units(own, units, states, closed_form, step_weights=step_weights, **given)
            return stage, unrounded(state)
        stage = reconstruct(own, units, states, configs[i], keep_alphas=True, **given)
        return stage, reopened(state, own.params)

    return again


def check_rounding(rounding: str) -> None:
    """Raise ValueError for an unknown way of rounding, with those there are."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding {rounding!r} is unknown; use one of {ROUNDINGS}.")
