"""PTQ4DiT: saliences of activation and weight balanced over channels and steps, then block reconstruction.

Source: Wu et al. 2024 ("PTQ4DiT: Post-training Quantization for Diffusion Transformers", NeurIPS) and its
official code. CSB gives qkv, proj and fc1 the factors sqrt(a / w) (`stages.balance`), SSC weighs the steps
that a is made of, and both are folded into the modulation and into V, so that nothing is left at run time. Then
ranges (best of three percentiles), and rounding learned together with the activation steps, block by block.
Use it with the policy "official:ptq4dit". Departures:

- `variant="fixed"` (default) is the paper: rho of whole steps. `variant="faithful"` is the code: rho and its
  softmax over the single samples of the set (there four of a step).
- the code divides activations at run time; folded, activations see the same numbers, and the codes of a
  modulation or of V, each with a scale for every output channel, are the same too when rounded to nearest.
- units run in order of execution, a block with its modulation; the code takes single layers first. Minibatches
  come from the whole set, where the code goes through it in ten chunks, once.
- `cali_lr`, `cali_p` and `always_zero` of the code reach nothing there, and are not here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qdiff_jax.methods.closed_form import check_rounding, round_units
from qdiff_jax.models.folds import folds_of
from qdiff_jax.models.program import units_with_projections
from qdiff_jax.stages.balance import BalanceConfig, balance_channels
from qdiff_jax.stages.calibrate import ActivationConfig, calibrate_activations
from qdiff_jax.stages.deferred import on_left_parameters
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.reconstruct import ReconstructConfig, reconstruct
from qdiff_jax.stages.stage import Method, Model, Stage
from qdiff_jax.stages.weights import calibrate_weights, round_to_nearest

VARIANTS = {"fixed": "step", "faithful": "sample"}


@dataclasses.dataclass(frozen=True)
class PTQ4DiTConfig:
    """variant: "fixed" (the paper) or "faithful" (the official code). csb, ssc, reconstruction: whether that
    part is used; without ssc all steps weigh alike, without reconstruction weights get their nearest codes
    and activation steps stay as calibrated. weight_method: of the ranges of weights."""

    variant: str = "fixed"
    csb: bool = True
    ssc: bool = True
    reconstruction: bool = True
    weight_method: str = "percentile_search"

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(
                f"PTQ4DiTConfig.variant {self.variant!r} is unknown; use one of {tuple(VARIANTS)}."
            )
        if not self.csb and (self.variant != "fixed" or not self.ssc):
            idle = "ssc=False" if self.variant == "fixed" else f"variant={self.variant!r}"
            raise ValueError(
                f"PTQ4DiTConfig: {idle} says what the factors of CSB are made of, and csb=False makes none; "
                "leave it out."
            )


def check_transformer(model: Model) -> None:
    """Raise ValueError for a network without DiT blocks."""
    if not folds_of(model.program):
        raise ValueError(
            "ptq4dit folds the factors of qkv, proj and fc1 into the modulation of DiT blocks (adaLN), and "
            "this network has none of them; the transformer blocks of PixArt and of latent diffusion are not "
            "supported: take a DiT, or tcaq, whose channel factors serve any layer."
        )


def check_reconstruction(config: PTQ4DiTConfig, rounding: str) -> None:
    """Raise ValueError for rounding in closed form where nothing is reconstructed, or for unknown rounding."""
    check_rounding(rounding)
    if rounding == "closed_form" and not config.reconstruction:
        raise ValueError(
            "ptq4dit without reconstruction rounds to the nearest code: leave out rounding='closed_form'."
        )


def ptq4dit(
    model: Model,
    calibration: Any,
    timesteps: Any,
    *,
    config: PTQ4DiTConfig = PTQ4DiTConfig(),
    weights: ReconstructConfig = ReconstructConfig(scale_lr=4e-5),
    activations: ActivationConfig = ActivationConfig(observer="percentile_search"),
    rounding: str = "adaround",
    closed_form: ClosedFormConfig = ClosedFormConfig(),
    step_weights: np.ndarray | None = None,
    on_progress=None,
) -> Method:
    """Factors and folding, ranges, then rounding and activation steps of every block learned together.

    calibration: one set for everything, from the selector `uniform` (the paper: 25 steps x 64 samples,
    conditional and unconditional). timesteps: [S], the sampler's schedule by step index. rounding: "adaround"
    (the paper), or "closed_form", which solves the same blocks, with the steps weighted by `step_weights` [S],
    and learns the activation steps after them. Raises ValueError for a network without DiT blocks, an
    unknown rounding, or "closed_form" without reconstruction.
    """
    check_reconstruction(config, rounding)
    check_transformer(model)
    solved = rounding == "closed_form"
    units = units_with_projections(model.program)
    weights = dataclasses.replace(weights, trains="scales" if solved else "both")

    learned = "ptq4dit_activation_steps" if solved else "ptq4dit_blocks"
    own = dict(on_progress=on_progress)

    def on(model: Model) -> tuple[Stage, ...]:
        ranges = calibrate_weights(model, method=config.weight_method)
        observed = calibrate_activations(model, calibration, timesteps, activations, **own)
        if not config.reconstruction:
            return ranges, round_to_nearest(model), observed
        learn = reconstruct(model, units, calibration, weights, name=learned, **own)
        if not solved:
            return ranges, observed, learn
        given = dict(name="ptq4dit_weights", step_weights=step_weights, **own)
        return observed, ranges, round_units(model, units, calibration, closed_form, **given), learn

    stages = on_left_parameters(model, on)
    if config.csb:
        balance = balance_channels(
            model,
            calibration,
            folds_of(model.program),
            BalanceConfig(ssc=config.ssc, rows=VARIANTS[config.variant]),
            batch_size=activations.batch_size,
            on_progress=on_progress,
        )
        stages = (balance, *stages)
    switches = ("csb", "ssc", "reconstruction")
    off = [f"no {word}" for word in switches if not getattr(config, word)]
    notes = ", ".join([f"variant={config.variant}", *off, f"rounding={rounding}"])
    return Method("ptq4dit", stages, notes=notes)
