"""SVDQuant: outliers smoothed into the weights, a 16-bit low-rank branch takes them up, the rest in 4 bits.

Source: Li et al. 2024 ("SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models",
arXiv:2411.05007) and the official code (deepcompressor, nunchaku), in its INT4 form: groups of 64 input
channels, symmetric codes, scales of the weights in float16, activations measured at run time, inputs behind a
GELU shifted by 0.171875 onto unsigned codes. Groups must divide the channels of every layer: `misfit` says what
happens where they do not.

`variant`:
- "faithful" (the official code): among equal candidates of the smoothing search the later one; the bias makes
  up for the shift with the sum of R before it is rounded (not of W: the branch here reads the input as it is).
- "fixed": the earlier one; the sum of the weights as they are stored, so that the shift itself adds no
  error.

Departures in both: the decomposition is randomised (`branch.exact` for the full one) and the search makes one
for each candidate; the branch is balanced and rounded to float16 before the rest is taken, which then makes up
for the rounding; smoothing is applied at run time at every site (folded into the branch and the activation
quantizer), never into the layers before; layers see full-precision inputs; in a U-Net q, k and v have branches
of their own, and convolutions, of which the paper has none, share a group's scale over their taps. Scales of
activations are float32. The smoothing of q, k and v is judged by the output of the whole block, not of its
attention; errors of all other layers are measured on at most `branch.rows` rows of their input. GPTQ leaves
rows of R whose input is always 0 at their nearest codes, where the code sets them to 0. The NVFP4 form (E2M1 in
groups of 16 with e4m3 scales, no shift) is not offered. The paper's text decomposes once
(`branch.iterations=1`); code and default go on until the error stops falling.

`rounding="closed_form"` is ours: the branches, the smoothing and the grids stay, and the codes of what the
branches leave (and of the layers that have none) are decided anew, block by block in the quantized network, as
`methods.closed_form` decides them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qdiff_jax.methods.closed_form import decided_again, round_units
from qdiff_jax.models.families import example_inputs
from qdiff_jax.models.program import temporal_nodes, units_with_projections
from qdiff_jax.policy import SitePlan
from qdiff_jax.sites import Site, list_sites
from qdiff_jax.stages.calibrate import ActivationConfig, calibrate_activations
from qdiff_jax.stages.deferred import deferred
from qdiff_jax.stages.group_grids import MISFITS, group_grids, group_plan
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.low_rank_branches import (
    PROJECTIONS,
    BranchConfig,
    branch_sites,
    low_rank_branches,
    matches,
    rank_of,
)
from qdiff_jax.stages.progressive import unrounded
from qdiff_jax.stages.stage import Method, Model
from qdiff_jax.stages.weights import calibrate_weights, round_to_nearest

VARIANTS = ("fixed", "faithful")
ROUNDINGS = ("layer", "closed_form")
UNSIGNED = ("*/mlp_fc2",)


@dataclasses.dataclass(frozen=True)
class SvdQuantConfig:
    """group: input channels that share a scale, 0 for one scale per output channel and per token. misfit: where
    a group or the rank does not fit a layer, "error" or "adapt" (the largest divisor; half of the layer's
    rank). unsigned: patterns of sites whose input a GELU wrote, none to leave them signed. branch: rank,
    smoothing and the rest."""

    group: int = 64
    misfit: str = "error"
    variant: str = "fixed"
    unsigned: tuple[str, ...] = UNSIGNED
    branch: BranchConfig = BranchConfig()

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(
                f"svdquant variant {self.variant!r} is unknown; use one of {VARIANTS}."
            )
        if self.misfit not in MISFITS:
            raise ValueError(f"svdquant misfit {self.misfit!r} is unknown; use one of {MISFITS}.")
        if self.group < 0:
            raise ValueError(f"svdquant group is {self.group}; use 1 or more channels, or 0.")


def check_plan(
    model: Model, sites: Sequence[Site], plan: SitePlan, config: SvdQuantConfig = SvdQuantConfig()
) -> None:
    """Raise ValueError for what its stages would refuse of a plan, without data.

    Groups and ranks that do not fit a layer (see `misfit`), shifted inputs that are padded, and patterns of
    sites that match none, other than the defaults, which name the layers of several networks.
    """
    made, _ = group_plan(plan, sites, config.group, misfit=config.misfit, unsigned=config.unsigned)
    by_name = {site.name: site for site in sites}
    for name in branch_sites(made, temporal_nodes(model.program)):
        rank_of(by_name[name], config.branch.rank, config.misfit)
    layers = [site.name for site in sites if site.has_weight]
    for field, given, default in (
        ("unsigned", config.unsigned, UNSIGNED),
        ("branch.attention", config.branch.attention, PROJECTIONS),
    ):
        for pattern in given if tuple(given) != default else ():
            if not any(matches(name, (pattern,)) for name in layers):
                raise ValueError(
                    f"svdquant.{field}: no layer of this network matches {pattern!r}; leave it out, or take "
                    f"the name of one, such as {layers[0]!r}."
                )


def svdquant(
    model: Model,
    weight_calibration: Any,
    activation_calibration: Any,
    timesteps: Any,
    *,
    config: SvdQuantConfig = SvdQuantConfig(),
    activations: ActivationConfig = ActivationConfig(),
    rounding: str = "layer",
    closed_form: ClosedFormConfig = ClosedFormConfig(),
    step_weights: np.ndarray | None = None,
    on_progress=None,
) -> Method:
    """Grids of groups, then a branch and codes for every layer, nearest codes for what is weight-only.

    weight_calibration: whose inputs the layers are judged on. activation_calibration, timesteps: for products
    of two activations, where the policy quantizes those; all else is measured at run time. rounding: "layer"
    (the official code: nearest codes, or GPTQ with `branch.gptq`, from the layer's full-precision inputs), or
    "closed_form", by that config on the whole of weight_calibration, with the steps weighted by
    `step_weights` [S]; only so can `methods.par` repeat it. Raises ValueError for an unknown rounding and for
    GPTQ together with the closed form, and while it runs for a group or rank that does not fit (see `misfit`).
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"svdquant rounding {rounding!r} is unknown; use one of {ROUNDINGS}.")
    solved = rounding == "closed_form"
    if solved and config.branch.gptq:
        raise ValueError(
            "svdquant: branch.gptq rounds layer by layer, and rounding='closed_form' decides the same codes; "
            "leave one of them out."
        )
    sites = list_sites(model.module, *example_inputs(model.module.config))
    faithful = config.variant == "faithful"
    stages = (
        group_grids(sites, config.group, misfit=config.misfit, unsigned=config.unsigned),
        # Before there are codes: ranges of products come from the network in full precision.
        calibrate_activations(
            model, activation_calibration, timesteps, activations, on_progress=on_progress
        ),
        calibrate_weights(model, method="minmax"),
        low_rank_branches(
            model,
            sites,
            weight_calibration,
            config.branch,
            misfit=config.misfit,
            later_ties=faithful,
            stored_sums=not faithful,
            on_progress=on_progress,
        ),
        round_to_nearest(model),
    )
    notes = f"variant={config.variant}, group={config.group}, rank={config.branch.rank}"
    branch = config.branch
    pair = f"alpha={branch.alpha:g}, beta={branch.beta:g}"
    notes += ", " + (pair if branch.alpha >= 0 else f"smoothing={branch.smoothing}")
    notes += ", gptq" if branch.gptq else ""
    if not solved:
        return Method("svdquant", stages, notes=notes)
    units = units_with_projections(model.program)
    own = dict(step_weights=step_weights, on_progress=on_progress)
    name = "svdquant_weights"
    solve = round_units(model, units, weight_calibration, closed_form, name=name, **own)
    # The grids that the branches have left, without the codes.
    stages = (*stages[:-1], deferred(name, lambda state: (solve, unrounded(state))))
    again = decided_again(model, units, rounding, (), closed_form, **own)
    return Method("svdquant", stages, f"{notes}, rounding={rounding}", again)
