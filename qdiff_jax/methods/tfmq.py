"""TFMQ-DM: temporal features reconstructed as one block (TIB, TIAR), calibrated per step (FSC).

Source: Huang et al. 2024, sections 4.2 (temporal information block and its reconstruction) and 4.3
(finite-set calibration); acceptance figures in the method's specification.

`variant="fixed"` (default) is the paper: step tables on the temporal block alone, one range for every
other site. `variant="faithful"` is the official code: step tables at *every* site, with min-max ranges
taken as they are. The latter clips values unseen in calibration, which the sampler amplifies; `margin`
widens those ranges (1.1 is enough on small models, 1.0 is the code's and the default).

Departures: the paper splits shortcuts as Q-Diffusion does, here `split` asks for it (its code leaves 1x1
shortcuts in full precision: policy "official:tfmq"). Where the temporal block reads labels and the calibration
set lacks classes, its tables are no finite set any more and get the margin of other step tables
(`ActivationConfig.margin`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qdiff_jax.methods.closed_form import check_rounding, closed_form_stages, decided_again
from qdiff_jax.models.program import (
    temporal_nodes,
    units_with_projections,
    units_with_time_block,
)
from qdiff_jax.stages.calibrate import ActivationConfig, calibrate_activations
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.progressive import round_configs
from qdiff_jax.stages.reconstruct import ReconstructConfig, reconstruct
from qdiff_jax.stages.skip_split import split_skips
from qdiff_jax.stages.stage import Method, Model
from qdiff_jax.stages.weights import calibrate_weights, freeze_weights

VARIANTS = ("fixed", "faithful")


def tfmq(
    model: Model,
    weight_calibration: Any,
    activation_calibration: Any,
    timesteps: Any,
    *,
    variant: str = "fixed",
    tiar: bool = True,
    fsc: bool = True,
    freeze: bool = False,
    split: str = "none",
    margin: float = 1.0,
    weight_method: str = "mse",
    weights: ReconstructConfig = ReconstructConfig(),
    activations: ActivationConfig = ActivationConfig(),
    rounding: str = "adaround",
    closed_form: ClosedFormConfig = ClosedFormConfig(),
    step_weights: np.ndarray | None = None,
    rounds: int = 0,
    round_share: float = 0.25,
    on_progress=None,
) -> Method:
    """Ranges, TIAR and then block reconstruction with the temporal block frozen, step tables by FSC.

    tiar, fsc: False for the ablations: without TIAR every block owns its projection of the time embedding, as
    in BRECQ; without FSC the temporal sites have one range for all steps. freeze: the paper's "Freeze", the
    temporal block at the nearest codes of min-max ranges in place of TIAR. split: as in `qdiffusion`. margin:
    of the tables of "faithful". activation_calibration must visit every step of `timesteps` (selector
    `every_step`). rounding: "adaround" (the paper), or "closed_form", which solves the same blocks by
    `closed_form` instead of `weights` and calibrates activations first, with the steps weighted by
    `step_weights`. rounds, round_share: of `methods.par` after it, whose steps are planned with those of the
    first reconstruction. Raises ValueError for an unknown variant or split, and for parts that exclude each
    other.
    """
    if variant not in VARIANTS:
        raise ValueError(f"tfmq variant {variant!r} is unknown; use one of {VARIANTS}.")
    if variant == "faithful" and not fsc:
        raise ValueError(
            "tfmq variant='faithful' is step tables at every site, which fsc=False switches off: choose one."
        )
    if freeze and not (tiar and rounding == "adaround"):
        raise ValueError(
            "tfmq freeze=True leaves the temporal block at its nearest codes, and tiar=False or "
            f"rounding={rounding!r} decides them otherwise: choose one."
        )
    nodes = temporal_nodes(model.program)
    temporal = tuple(f"{name}/*" for name in nodes)
    if fsc:
        activations = dataclasses.replace(
            activations,
            per_step=temporal if variant == "fixed" else ("*",),
            exact=temporal,
            margin=activations.margin if variant == "fixed" else margin,
        )
    units = (units_with_time_block if tiar else units_with_projections)(model.program)
    parts = {
        "no TIAR": not tiar,
        "no FSC": not fsc,
        "freeze": freeze,
        f"split={split}": split != "none",
    }
    notes = ", ".join([f"variant={variant}", *(word for word, used in parts.items() if used)])
    check_rounding(rounding)
    configs = round_configs(weights, rounds, round_share)
    own = dict(step_weights=step_weights, on_progress=on_progress)
    again = decided_again(model, units, rounding, configs, closed_form, **own)
    grids = (split_skips(model, split),) if split != "none" else ()
    if rounding == "closed_form":
        stages = closed_form_stages(
            model,
            units,
            weight_calibration,
            activation_calibration,
            timesteps,
            weight_method=weight_method,
            rounding=closed_form,
            activations=activations,
            name="tfmq_weights",
            **own,
        )
        return Method("tfmq", (*grids, *stages), f"{notes}, rounding={rounding}", again)
    frozen = (freeze_weights(model, nodes),) if freeze else ()
    return Method(
        "tfmq",
        (
            *grids,
            calibrate_weights(model, method=weight_method),
            *frozen,
            # With TIAR the "time" unit comes first and is hardened before any other: later units read its
            # quantized temporal features and never change it.
            reconstruct(
                model,
                units,
                weight_calibration,
                configs[0],
                name="tfmq_weights",
                frozen_units=("time",) if freeze else (),
                keep_alphas=rounds > 0,
                on_progress=on_progress,
            ),
            calibrate_activations(
                model, activation_calibration, timesteps, activations, on_progress=on_progress
            ),
        ),
        notes,
        again,
    )
