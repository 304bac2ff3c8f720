"""BRECQ on diffusion models: block-wise AdaRound, then learned activation steps.

Source: Li et al. 2021 (BRECQ), Nagel et al. 2020 (AdaRound), as run by Q-Diffusion (Li et al. 2023).
Departures from the official code, all deliberate (`fixed`; there is no `faithful` variant of a bug):
dropout is off during reconstruction; units run in order of execution, so that a unit's quantized
inputs come from units already decided; a residual block is one unit with its time projection, and the
two time-embedding layers are one unit instead of two; activation ranges are read from shuffled
batches over all steps, never from one step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qdiff_jax.methods.closed_form import check_rounding, closed_form_stages, decided_again
from qdiff_jax.models.program import units_with_projections
from qdiff_jax.stages.calibrate import ActivationConfig, calibrate_activations
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.progressive import round_configs
from qdiff_jax.stages.reconstruct import ReconstructConfig, reconstruct
from qdiff_jax.stages.stage import Method, Model
from qdiff_jax.stages.weights import calibrate_weights


def brecq(
    model: Model,
    weight_calibration: Any,
    activation_calibration: Any,
    timesteps: Any,
    *,
    weight_method: str = "mse",
    weights: ReconstructConfig = ReconstructConfig(),
    activations: ActivationConfig = ActivationConfig(),
    activation_steps: ReconstructConfig | None = None,
    rounding: str = "adaround",
    closed_form: ClosedFormConfig = ClosedFormConfig(),
    step_weights: np.ndarray | None = None,
    rounds: int = 0,
    round_share: float = 0.25,
    on_progress=None,
) -> Method:
    """Ranges, block reconstruction of weights, activation ranges, (optional) learned activation steps.

    rounding: "adaround" (the paper), or "closed_form", which solves the same blocks by `closed_form`
    instead of `weights` and calibrates activations first, with the steps weighted by `step_weights`.

    weights: defaults are the papers' (20,000 steps at 1e-3, batch 32, lambda 0.01).
    activation_steps: None skips the phase; the papers' is `paper_activation_steps()`. rounds, round_share: of
    `methods.par` after it, whose steps are planned with those of the first reconstruction.
    """
    check_rounding(rounding)
    units = units_with_projections(model.program)
    configs = round_configs(weights, rounds, round_share)
    again = decided_again(
        model,
        units,
        rounding,
        configs,
        closed_form,
        step_weights=step_weights,
        on_progress=on_progress,
    )
    if rounding == "closed_form":
        stages = [
            *closed_form_stages(
                model,
                units,
                weight_calibration,
                activation_calibration,
                timesteps,
                weight_method=weight_method,
                rounding=closed_form,
                activations=activations,
                name="brecq_weights",
                step_weights=step_weights,
                on_progress=on_progress,
            )
        ]
    else:
        stages = [
            calibrate_weights(model, method=weight_method),
            reconstruct(
                model,
                units,
                weight_calibration,
                configs[0],
                name="brecq_weights",
                keep_alphas=rounds > 0,
                on_progress=on_progress,
            ),
            calibrate_activations(
                model, activation_calibration, timesteps, activations, on_progress=on_progress
            ),
        ]
    if activation_steps is not None:
        stages.append(
            reconstruct(
                model,
                units,
                weight_calibration,
                activation_steps,
                name="brecq_activation_steps",
                on_progress=on_progress,
            )
        )
    notes = "" if rounding == "adaround" else f"rounding={rounding}"
    return Method("brecq", tuple(stages), notes, again)


def paper_activation_steps(**overrides) -> ReconstructConfig:
    """Q-Diffusion's second phase: 5,000 steps at 4e-4 with cosine decay, p 2.4, full-precision inputs."""
    config = ReconstructConfig(
        steps=5_000, scale_lr=4e-4, trains="scales", inputs="full_precision", p=2.4
    )
    return dataclasses.replace(config, **overrides)
