"""Channel-wise salience balancing as a stage: s for qkv, proj and fc1, folded into what comes before them.

PTQ4DiT (Wu et al. 2024): the salience max|x_k| of every input channel is read step by step on full-precision
states, steps are weighed by Spearman's rho with the salience of the weight (SSC), and s = sqrt(a / w) makes
both alike (CSB). The folded network is the same function in full precision and has the same layers: no
operator is added, no divisor is left. Layers are taken from the last to the first, because the division of
proj's input changes the V columns of qkv, and so the largest |W| that qkv's own factors are made of.
A transform is a change of parameters and nothing else: what follows is built from `stage.tuned_params`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.models.folds import Fold, fold_leaves
from qdiff_jax.observe.capture import batch_bounds
from qdiff_jax.policy import SitePlan
from qdiff_jax.quant.salience import csb_factors, ssc_weights, weighted_salience
from qdiff_jax.quant.smoothing import weight_magnitude
from qdiff_jax.stages.channel_tops import channel_tops
from qdiff_jax.stages.layer_inputs import check_finite
from qdiff_jax.stages.stage import (
    Model,
    QuantState,
    Stage,
    kernel_at,
    replace_leaves,
    tuned_params,
)

ROWS = ("step", "sample")
# In QuantState.aux, where the modulation took the division of smoothed inputs: temporal features are no longer
# those of full precision, by design. Other stages change the same parameters and leave their meaning.
FOLDED = "modulation_folded"


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """layers: which layers, by the last part of their names. ssc: weigh by Spearman's rho, or (False) all
    alike. rows: what is weighed, whole steps ("step", the paper) or single samples of the set ("sample")."""

    layers: tuple[str, ...] = ("attn_qkv", "attn_proj", "mlp_fc1")
    ssc: bool = True
    rows: str = "step"

    def __post_init__(self):
        if self.rows not in ROWS:
            raise ValueError(f"BalanceConfig.rows {self.rows!r} is unknown; use one of {ROWS}.")


class Carry(NamedTuple):
    """saliences: {site: [R, C]} largest |x| by row. leaves: the parameters that change, by path."""

    state: QuantState
    position: int
    saliences: dict[str, np.ndarray]
    leaves: dict[str, jax.Array]
    layers: dict[str, dict]


def balance_channels(
    model: Model,
    calibration: Any,
    folds: Sequence[Fold],
    config: BalanceConfig = BalanceConfig(),
    *,
    batch_size: int = 64,
    on_progress=None,
) -> Stage:
    """The stage that balances the planned layers among `folds`; parameters go to `aux["params"]`, and
    `aux[FOLDED]` is set where one of them is of a modulation.

    calibration: x, t, index, y. A layer is balanced if its input or its weight is quantized. `finish` reports
    of each: the smallest and largest factor, rho and eta of the rows (steps in ascending order of index).
    """
    size = int(np.shape(calibration.t)[0])
    bounds = batch_bounds(size, min(batch_size, size))
    steps, row_of = np.unique(np.asarray(calibration.index), return_inverse=True)
    if config.rows == "sample":
        steps, row_of = np.arange(size), np.arange(size)

    modulated = [fold.site for fold in folds if fold.scale is not None]

    def chosen(plan: SitePlan) -> list[Fold]:
        planned = {entry.site for entry in plan.quantized("input", "weight")}
        named = [f for f in folds if f.site.rsplit("/", 1)[-1] in config.layers]
        return [fold for fold in named if fold.site in planned]

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        del store  # One pass of the network: cheaper made again than read back.
        return Carry(state, 0 if chosen(state.plan) else len(bounds) + 1, {}, {}, {})

    def run(carry: Carry, n: int) -> Carry:
        if carry.position < len(bounds):
            return _observe(carry, n)
        return _balance(carry)

    def _observe(carry: Carry, n: int) -> Carry:
        names = [fold.site for fold in chosen(carry.state.plan)]
        params = tuned_params(model.params, carry.state.aux)
        saliences = dict(carry.saliences)
        for start, stop in bounds[carry.position : carry.position + n]:
            for name, top in channel_tops(model, params, names, calibration, start, stop).items():
                if name not in saliences:
                    saliences[name] = np.zeros((len(steps), top.shape[-1]), np.float32)
                np.maximum.at(saliences[name], row_of[start:stop], top)
            if on_progress is not None:
                on_progress(stop, size)
        position = min(carry.position + n, len(bounds))
        return carry._replace(saliences=saliences, position=position)

    def _balance(carry: Carry) -> Carry:
        params = tuned_params(model.params, carry.state.aux)
        leaves, layers = {}, {}
        for fold in reversed(chosen(carry.state.plan)):
            check_finite(fold.site, carry.saliences[fold.site])
            kernel = kernel_at(params, fold.site)
            factors, eta, rho = _factors(carry.saliences[fold.site], kernel, config.ssc)
            changed = fold_leaves(params, fold, factors)
            leaves |= changed
            params = replace_leaves(params, changed)
            layers[fold.site] = {
                "smallest": float(factors.min()),
                "largest": float(factors.max()),
                "rho": np.asarray(rho).tolist(),
                "eta": np.asarray(eta).tolist(),
            }
        return carry._replace(leaves=leaves, layers=layers, position=len(bounds) + 1)

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        params = {**carry.state.aux.get("params", {}), **carry.leaves}
        marks = {FOLDED: np.True_} if set(modulated) & set(carry.layers) else {}
        state = carry.state.replace(aux={**carry.state.aux, "params": params, **marks})
        passes = 1.0 if carry.layers else 0.0
        return state, {"layers": carry.layers, "network_passes": passes}

    return Stage(
        "calibrate_channel_balance",
        init,
        run,
        finish,
        lambda carry: carry.position > len(bounds),
        "transform",
    )


@functools.partial(jax.jit, static_argnames="ssc")
def _factors(saliences, kernel, ssc):
    """(s [C], eta [R], rho [R]) of saliences [R, C] and the kernel behind them."""
    weight = weight_magnitude(kernel)
    eta, rho = ssc_weights(saliences, weight)
    if not ssc:
        eta = jnp.full_like(eta, 1.0 / eta.shape[0])
    return csb_factors(weighted_salience(saliences, eta), weight), eta, rho
