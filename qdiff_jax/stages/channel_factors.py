"""Timestep-channel reparameterisation as a stage: r for every layer, moved into its weight.

TCAQ-DM (Huang et al. 2024; reconstruction, see `quant.reparameterise`). The largest |x| of each
input channel is read in uniform groups of steps; one r serves all steps. The inverse goes into the affine of
the normalization right before the layer where there is one, shared by all layers that read it; elsewhere (a
SiLU in between, a residual stream) it stays as the layer's `divisor`, one multiply per channel.
A transform is a change of parameters and nothing else: what follows is built from `stage.tuned_params`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from qdiff_jax.models.program import node_at
from qdiff_jax.observe.capture import batch_bounds
from qdiff_jax.policy import Entry, SitePlan
from qdiff_jax.quant.reparameterise import (
    EXPONENTS,
    channel_factors,
    output_errors,
    scale_rows,
    time_weighted_range,
)
from qdiff_jax.stages.channel_tops import channel_tops
from qdiff_jax.stages.layer_inputs import run_tapped, spread_rows, walk_units
from qdiff_jax.stages.stage import Model, QuantState, Stage, kernel_at, tuned_params


@dataclasses.dataclass(frozen=True)
class FactorConfig:
    """groups: uniform groups of steps. exponent: "search" (per layer, over `EXPONENTS` and no factor at
    all) or a number from 0 to 1 for all layers, 1 being the paper's form. search_samples: rows of the
    calibration set on which the layer's output is compared."""

    groups: int = 10
    exponent: float | str = "search"
    search_samples: int = 32

    def __post_init__(self):
        searched = self.exponent == "search"
        if not searched and (isinstance(self.exponent, str) or not 0.0 <= self.exponent <= 1.0):
            raise ValueError(
                f"FactorConfig.exponent is {self.exponent!r}; use 'search' or a number from 0 to 1."
            )


class Group(NamedTuple):
    """Layers that share an input, hence r. norm: path of the affine that takes 1 / r, None for a divisor."""

    sites: tuple[str, ...]
    norm: str | None


class Carry(NamedTuple):
    """ranges: {site: [G, C]} largest |x|. chosen: {site: (exponent or None, errors [J])} of the groups
    done. leaves: the parameters that change, by path."""

    state: QuantState
    position: int
    ranges: dict[str, np.ndarray]
    leaves: dict[str, jax.Array]
    chosen: dict[str, tuple]


def move_channel_factors(
    model: Model,
    calibration: Any,
    steps: int,
    config: FactorConfig = FactorConfig(),
    *,
    operators: Mapping[str, Any],
    shared: Mapping[str, tuple[str, ...]] | None = None,
    skip: tuple[str, ...] = (),
    batch_size: int = 64,
    on_progress=None,
) -> Stage:
    """The stage that reparameterises every planned layer; parameters go to `aux["params"]`.

    calibration: x, t, index, y over the steps 0..steps-1. operators: {site: Operator} of the layers.
    shared: {path of a normalization with "scale" and "bias": the layers that alone read it}. skip: names
    of blocks that are left alone (those that see the timestep only). `finish` reports the exponent of
    each layer (None: left alone) and the layers whose output would be worse with the paper's exponent 1
    than without r.
    """
    size = int(np.shape(calibration.t)[0])
    bounds = batch_bounds(size, min(batch_size, size))

    def groups(state: QuantState) -> list[Group]:
        return _groups(state.plan, shared or {}, skip)

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        del store  # Two passes of the network: cheaper made again than read back.
        return Carry(state, 0 if groups(state) else len(bounds) + 1, {}, {}, {})

    def run(carry: Carry, n: int) -> Carry:
        if carry.position < len(bounds):
            return _observe(carry, n)
        return _search(carry)

    def _observe(carry: Carry, n: int) -> Carry:
        names = [site for group in groups(carry.state) for site in group.sites]
        params = tuned_params(model.params, carry.state.aux)
        ranges = dict(carry.ranges)
        for start, stop in bounds[carry.position : carry.position + n]:
            rows = calibration.index[start:stop] * config.groups // steps
            for name, top in channel_tops(model, params, names, calibration, start, stop).items():
                if name not in ranges:
                    ranges[name] = np.zeros((config.groups, top.shape[-1]), np.float32)
                np.maximum.at(ranges[name], rows, top)
            if on_progress is not None:
                on_progress(stop, size)
        return carry._replace(ranges=ranges, position=min(carry.position + n, len(bounds)))

    def _search(carry: Carry) -> Carry:
        """All layers, on one walk of a few samples through the blocks."""
        params = tuned_params(model.params, carry.state.aux)
        by_site = {group.sites[0]: group for group in groups(carry.state)}
        leaves, chosen = {}, {}
        rows = spread_rows(len(calibration.t), config.search_samples)
        for unit, inputs in walk_units(model, params, calibration, rows):
            if len(chosen) == len(by_site):
                break  # the blocks that remain hold no planned layer
            own = [name for name in by_site if name.split("/")[0] in unit.nodes]
            if not own:
                continue
            _, values = run_tapped(unit, params, inputs, own)
            for name in own:
                more, picked = _decide(
                    by_site[name], carry, params, values[name], operators[name], config
                )
                leaves.update(more)
                chosen[name] = picked
        return carry._replace(leaves=leaves, chosen=chosen, position=len(bounds) + 1)

    def done(carry: Carry) -> bool:
        return carry.position > len(bounds)

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        # The plain network is the first candidate, the paper's exponent the last.
        worse = sorted(n for n, (_, errors) in carry.chosen.items() if errors[-1] > errors[0])
        if config.exponent == 1.0 and worse:
            logging.warning(
                "channel factors: %d of %d layers are further from full precision with exponent 1 than "
                "without factors (their weights are the bottleneck), the first %s; use 'search'.",
                len(worse),
                len(carry.chosen),
                worse[0],
            )
        params = {**carry.state.aux.get("params", {}), **carry.leaves}
        state = carry.state.replace(aux={**carry.state.aux, "params": params})
        exponents = {name: exponent for name, (exponent, _) in carry.chosen.items()}
        searched = config.exponent == "search"
        errors = {
            name: {"without": float(e[0]), "taken": float(e.min() if searched else e[1])}
            for name, (_, e) in carry.chosen.items()
        }
        return state, {
            "exponents": exponents,
            "errors": errors,
            "worse_at_one": worse,
            "network_passes": 1.0,
        }

    return Stage("calibrate_channel_factors", init, run, finish, done, "transform")


def _groups(plan: SitePlan, shared: Mapping[str, tuple[str, ...]], skip) -> list[Group]:
    """Layers of which something is quantized; those that share a normalization together."""
    names = {e.site: None for e in plan.quantized("input", "weight")}
    names = [name for name in names if name.split("/")[0] not in skip]
    grouped = [Group(sites, norm) for norm, sites in shared.items() if set(sites) <= set(names)]
    taken = {site for group in grouped for site in group.sites}
    return [*grouped, *(Group((name,), None) for name in names if name not in taken)]


def _decide(group, carry: Carry, params, x, operator, config) -> tuple[dict, tuple]:
    """(new parameter leaves, (exponent or None, errors of every candidate))."""
    kernels = [kernel_at(params, site) for site in group.sites]
    kernel = kernels[0] if len(kernels) == 1 else jnp.concatenate(kernels, axis=-1)
    plan = carry.state.plan.of(group.sites[0])
    ranges = time_weighted_range(jnp.asarray(carry.ranges[group.sites[0]]))
    exponents = EXPONENTS if config.exponent == "search" else (config.exponent, 1.0)
    candidates = [jnp.ones_like(ranges)]
    candidates += [channel_factors(ranges, kernel, a) for a in exponents]
    weight = _comparable(plan.get("weight"))
    errors = np.asarray(
        output_errors(operator, x, kernel, jnp.stack(candidates), plan.get("input"), weight)
    )
    best = int(errors.argmin()) if config.exponent == "search" else 1
    if best == 0:
        return {}, (None, errors)
    factors = candidates[best]
    leaves = {f"{site}/kernel": scale_rows(own, factors) for site, own in zip(group.sites, kernels)}
    if group.norm is None:
        (site,) = group.sites
        before = node_at(params, site).get("divisor")
        leaves[f"{site}/divisor"] = factors if before is None else before * factors
    else:
        node = node_at(params, group.norm)
        leaves |= {f"{group.norm}/{k}": node[k] / factors for k in ("scale", "bias")}
    return leaves, (exponents[best - 1], errors)


def _comparable(entry: Entry | None) -> Entry | None:
    if entry is not None and entry.spec.granularity not in ("tensor", "channel"):
        raise ValueError(
            f"{entry.site}: channel factors are chosen for weights per tensor or per output channel, "
            f"not {entry.spec.granularity!r}; leave the site out, or change the plan."
        )
    return entry
