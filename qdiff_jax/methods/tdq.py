"""TDQ: activation step sizes that a small network predicts from the timestep, folded to tables.

Source: So et al. 2023 ("Temporal Dynamic Quantization for Diffusion Models"); a re-hosted copy of the
official code. `mode="ptq"`: weights by block reconstruction, then the step-size networks of each block
against its full-precision output. `mode="qat"`: weights, their steps and the networks together on the
diffusion loss. Departures:

- SiLU outputs take the nearest integer zero point to the paper's shift of 0.2785, so that the folded table
  is an ordinary one and integers can be multiplied; `exact_shift` restores the shift.
- An activation counts as a SiLU output by what is seen of it (never below the floor of SiLU), so that the
  GELU of a transformer is covered; one that is never negative starts from its range.
- Sites follow the plan, softmax outputs included, where the paper keeps softmax in full precision.
- In the job the quantization-aware form has no images: its target is the full-precision prediction on
  sampling states. By hand, `stages.noising.noised_set` gives the paper's loss.
- Lengths and rate of the post-training form are not published; the rate is that of the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qdiff_jax.methods.closed_form import check_rounding, round_units
from qdiff_jax.models.program import units_with_projections
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.reconstruct import ReconstructConfig, reconstruct
from qdiff_jax.stages.reconstruct_time_scales import reconstruct_time_scales
from qdiff_jax.stages.replan import per_tensor_weights, replan
from qdiff_jax.stages.stage import Method, Model
from qdiff_jax.stages.time_scales import TimeScaleConfig, calibrate_time_scales
from qdiff_jax.stages.train_time_scales import TrainConfig, train_time_scales
from qdiff_jax.stages.weights import calibrate_weights

MODES = ("ptq", "qat")


@dataclasses.dataclass(frozen=True)
class TdqConfig:
    """mode: "ptq" or "qat". scales: the networks, and how "ptq" trains them. train: of "qat"."""

    mode: str = "ptq"
    scales: TimeScaleConfig = TimeScaleConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"TdqConfig.mode {self.mode!r} is unknown; use one of {MODES}.")


def tdq(
    model: Model,
    weight_calibration: Any,
    activation_calibration: Any,
    timesteps: Any,
    *,
    weight_method: str = "mse",
    weights: ReconstructConfig = ReconstructConfig(),
    config: TdqConfig = TdqConfig(),
    batch_size: int = 64,
    rounding: str = "adaround",
    closed_form: ClosedFormConfig = ClosedFormConfig(),
    step_weights: np.ndarray | None = None,
    on_progress=None,
) -> Method:
    """Post-training: ranges, block reconstruction, starts, networks. Aware: ranges, starts, training.

    activation_calibration visits every step of `timesteps`, in batches of `batch_size`. rounding: "adaround"
    (the paper's), or "closed_form", which starts the networks first, so that weights make up for the
    activations as they are then, with the steps weighted by `step_weights` [S]. Raises ValueError for
    another, or for "closed_form" with training, which decides the weights itself.
    """
    check_rounding(rounding)
    if rounding != "adaround" and config.mode == "qat":
        raise ValueError(
            f"tdq with mode='qat' trains its weights: rounding={rounding!r} has no meaning there."
        )
    start = calibrate_time_scales(
        model,
        activation_calibration,
        timesteps,
        config.scales,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    ranges = calibrate_weights(model, method=weight_method)
    if config.mode == "qat":
        train = train_time_scales(
            model, weight_calibration, timesteps, config.train, on_progress=on_progress
        )
        stages = (ranges, start, train)
        if config.train.per_tensor:
            one_grid = replan("per_tensor_weights", lambda plan: (per_tensor_weights(plan), {}))
            stages = (one_grid, *stages)
        return Method("tdq", stages, notes="mode=qat")
    units = units_with_projections(model.program)
    networks = reconstruct_time_scales(
        model,
        units,
        weight_calibration,
        timesteps,
        config.scales,
        walk_batch=weights.walk_batch,
        memory_mib=weights.memory_mib,
        save_seconds=weights.save_seconds,
        on_progress=on_progress,
    )
    own = dict(name="tdq_weights", on_progress=on_progress)
    if rounding == "closed_form":
        solve = round_units(
            model, units, weight_calibration, closed_form, step_weights=step_weights, **own
        )
        stages = (start, ranges, solve, networks)
    else:
        stages = (
            ranges,
            reconstruct(model, units, weight_calibration, weights, **own),
            start,
            networks,
        )
    return Method("tdq", stages, notes=f"mode=ptq, rounding={rounding}")
