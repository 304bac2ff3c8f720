"""Round to nearest: ranges, then the nearest code of every weight. The floor every method is measured from."""

from __future__ import annotations

from typing import Any

from qdiff_jax.stages.calibrate import ActivationConfig, calibrate_activations
from qdiff_jax.stages.stage import Method, Model
from qdiff_jax.stages.weights import calibrate_weights, round_to_nearest


def rtn(
    model: Model,
    calibration: Any,
    timesteps: Any,
    *,
    weight_method: str = "mse",
    activations: ActivationConfig = ActivationConfig(),
    on_progress=None,
) -> Method:
    """Weights: per-channel range search and nearest codes; activations: one range for all steps.

    calibration: the activation calibration set. timesteps: [S], the sampler's schedule by step index.
    """
    return Method(
        "rtn",
        (
            calibrate_weights(model, method=weight_method),
            round_to_nearest(model),
            calibrate_activations(
                model, calibration, timesteps, activations, on_progress=on_progress
            ),
        ),
    )
