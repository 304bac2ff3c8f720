"""Weights without any optimization: a range for each from its values, then the nearest codes.

Ranges are searched per channel (MSE shrink search over 80 candidates, LAPQ's p = 2.4, as in the
Q-Diffusion family; the best of three percentiles, PTQ4DiT) or are min-max. Nothing is read but the parameters.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from qdiff_jax.quant.ranges import weight_qparams
from qdiff_jax.sites import SiteQuant, flatten_sites, nest_sites
from qdiff_jax.stages.stage import Model, QuantState, Stage, decide_codes, kernel_at


class Carry(NamedTuple):
    """position: how many planned weights are done."""

    state: QuantState
    position: int


def calibrate_weights(model: Model, *, method: str = "mse") -> Stage:
    """The stage that gives every planned weight its range; nothing is rounded yet.

    method: of `quant.ranges.estimate_qparams`: "mse" (80 candidates, p 2.4, per channel), "minmax",
    "percentile_search" (the best of three). One site per step of the stage.
    """

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        del store  # A second or two for a whole network: cheaper done again than read back.
        return Carry(state, 0)

    def run(carry: Carry, n: int) -> Carry:
        entries = carry.state.plan.quantized("weight")
        flat = flatten_sites(carry.state.quant)
        for entry in entries[carry.position : carry.position + n]:
            kernel = kernel_at(model.params, entry.site)
            qparams = weight_qparams(kernel, entry.spec, entry.bits, method=method)
            flat[entry.site] = flat.get(entry.site, SiteQuant()).replace(rhs=qparams)
        state = carry.state.replace(quant=nest_sites(flat))
        return Carry(state, min(carry.position + n, len(entries)))

    def done(carry: Carry) -> bool:
        return carry.position >= len(carry.state.plan.quantized("weight"))

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        return carry.state, {"weights": carry.position}

    return Stage("calibrate_weights", init, run, finish, done, "ranges")


def round_to_nearest(model: Model) -> Stage:
    """The stage that decides the nearest code of every weight that has a range and no codes yet."""

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        del store
        return Carry(state, 0)

    def run(carry: Carry, n: int) -> Carry:
        del n
        quant = decide_codes(carry.state.quant, model.params)
        return Carry(carry.state.replace(quant=quant), 1)

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        return carry.state, {}

    return Stage("round_to_nearest", init, run, finish, lambda carry: carry.position >= 1)


def freeze_weights(model: Model, nodes: Sequence[str]) -> Stage:
    """The stage that gives the planned weights of these blocks min-max ranges and their nearest codes."""
    own = tuple(f"{name}/" for name in nodes)

    def run(carry: Carry, n: int) -> Carry:
        del n
        flat, frozen = flatten_sites(carry.state.quant), {}
        for entry in carry.state.plan.quantized("weight"):
            if entry.site.startswith(own):
                kernel = kernel_at(model.params, entry.site)
                qparams = weight_qparams(kernel, entry.spec, entry.bits, method="minmax")
                frozen[entry.site] = flat.get(entry.site, SiteQuant()).replace(rhs=qparams)
        decided = flatten_sites(decide_codes(nest_sites(frozen), model.params))
        return Carry(carry.state.replace(quant=nest_sites({**flat, **decided})), len(frozen))

    return Stage(
        "round_frozen",
        lambda state, store: Carry(state, -1),
        run,
        lambda carry: (carry.state, {"weights": carry.position}),
        lambda carry: carry.position >= 0,
        "ranges",
    )
