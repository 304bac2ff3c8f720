"""Smoothing, a low-rank branch and codes for every planned weight, layer after layer in full precision.

Source: SVDQuant (Li et al. 2024, arXiv:2411.05007). Layers know nothing of each other: each sees the inputs
that the full-precision network gives it, so that the order does not matter and a killed run goes on with the
first layer that has no result in the store. Layers that depend on the timestep alone (modulation, time
embedding) are left to later stages, as their weights cost storage and no time.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from qdiff_jax.models.program import Unit, subtrees, temporal_nodes, units_with_projections
from qdiff_jax.observe.archive import load_arrays, save_arrays
from qdiff_jax.policy import SitePlan
from qdiff_jax.quant.low_rank import SVD
from qdiff_jax.quant.smoothing import best_candidate, exponents
from qdiff_jax.sites import Site, SiteQuant, flatten_sites, nest_sites
from qdiff_jax.stages.block_errors import block_errors
from qdiff_jax.stages.branch_results import bias_at, figures, with_branch
from qdiff_jax.stages.group_grids import MISFITS
from qdiff_jax.stages.layer_branch import (
    Codes,
    Grids,
    Solved,
    candidate_errors,
    solve,
)
from qdiff_jax.stages.layer_inputs import (
    after_unit,
    check_finite,
    first_values,
    layer_rows,
    spread_rows,
)
from qdiff_jax.stages.stage import Model, QuantState, Stage, kernel_at

JUDGES = ("module", "layer")
# Of attention, in the DDPM U-Net, the transformers (PixArt's cross-attention too) and latent diffusion.
PROJECTIONS = ("*/[qkv]", "*/attn_qkv", "*/cross_attn_*_linear", "*/attn[12]_to_[qkv]")
_OPTIONAL = ("down", "up", "smoothing", "sums")


@dataclasses.dataclass(frozen=True)
class BranchConfig:
    """rank: of the branch, 0 for none. smoothing: the candidates of the search, "full" (39), "fast" (10) or
    "none". alpha, beta: negative, or one pair in place of the search (and of smoothing, which is then left
    alone). iterations: of the alternation at
    most, 1 for the paper's single decomposition; exact, oversample, power: of the decomposition, see
    `quant.low_rank`. samples: of the calibration set; rows: of a layer's input that its error is measured on.
    judge: "module" (smoothing of the layers in `attention` by the output of their block, all others by their
    own) or "layer" (all by their own). shift: of inputs planned unsigned. gptq: codes by GPTQ."""

    rank: int = 32
    smoothing: str = "full"
    alpha: float = -1.0
    beta: float = -1.0
    iterations: int = 100
    exact: bool = False
    oversample: int = 16
    power: int = 2
    samples: int = 128
    rows: int = 4096
    judge: str = "module"
    attention: tuple[str, ...] = PROJECTIONS
    shift: float = 0.171875
    gptq: bool = False

    def __post_init__(self):
        exponents(self.smoothing)
        if self.judge not in JUDGES:
            raise ValueError(f"BranchConfig.judge is {self.judge!r}; use one of {JUDGES}.")
        if self.rank < 0 or self.iterations < 1 or self.samples < 1 or self.rows < 1:
            raise ValueError(
                f"BranchConfig.rank is {self.rank}, iterations {self.iterations}, samples {self.samples}, rows "
                f"{self.rows}; a rank is 0 or more, the others at least 1."
            )
        if self.oversample < 0 or self.power < 0:
            raise ValueError(
                f"BranchConfig.oversample is {self.oversample} and power {self.power}; use 0 or more."
            )
        if not np.all(np.isfinite([self.alpha, self.beta, self.shift])) or self.shift <= 0:
            raise ValueError(
                f"BranchConfig.alpha is {self.alpha}, beta {self.beta}, shift {self.shift}; they are finite "
                "numbers, and the shift is positive."
            )
        if (self.alpha < 0) != (self.beta < 0):
            raise ValueError("BranchConfig: give alpha and beta both, or neither for the search.")
        if self.alpha >= 0 and self.smoothing != "full":
            raise ValueError(
                f"BranchConfig.smoothing={self.smoothing!r} searches the pair that alpha and beta give: leave "
                "one of the two out."
            )


class Carry(NamedTuple):
    """values: of the walk before the unit at `position`. solved: {site: Solved} of the units before."""

    state: QuantState
    position: int
    values: dict[str, Any]
    solved: dict[str, Solved]
    store: pathlib.Path | None


def rank_of(site: Site, rank: int, misfit: str = "error") -> int:
    """The rank of a layer's branch when `rank` is asked for.

    misfit: where it exceeds the smaller side of the layer's matrix, "error" raises ValueError naming the
    site, "adapt" takes half of that side (0: no branch).
    """
    size = min(int(np.prod(site.rhs_shape[:-1])), site.rhs_shape[-1])
    if rank <= size:
        return rank
    if misfit == "adapt":
        return size // 2
    raise ValueError(
        f"{site.name} is a matrix of at most rank {size}, and a branch of rank {rank} was asked for; choose a "
        "smaller rank, keep the site in full precision, or set misfit='adapt' to give it half of its rank."
    )


def branch_sites(plan: SitePlan, skip: Sequence[str]) -> tuple[str, ...]:
    """Sites whose weight is planned, in order, without those of the blocks `skip`."""
    names = (entry.site for entry in plan.quantized("weight"))
    return tuple(name for name in names if name.split("/")[0] not in skip)


def low_rank_branches(
    model: Model,
    sites: Sequence[Site],
    calibration: Any,
    config: BranchConfig = BranchConfig(),
    *,
    misfit: str = "error",
    later_ties: bool = False,
    stored_sums: bool = True,
    on_progress=None,
) -> Stage:
    """The stage that gives every planned weight outside the temporal blocks its codes and its branch.

    sites: of the model. calibration: x, t, index, y. The input of a site is full precision, or on a symmetric
    dynamic grid (`stages.group_grids`); an unsigned one is shifted by config.shift.
    later_ties: among equal candidates of the search the last is taken. stored_sums: see `layer_branch.Grids`.
    `finish` reports, for each
    site, the exponents, the rank, the errors of `Solved` and the bits that the branch adds to each weight.

    Raises ValueError for another activation grid, a rank that does not fit (see `rank_of`), inputs that are
    not finite, or inputs below what the shift makes up for.
    """
    if misfit not in MISFITS:
        raise ValueError(f"misfit {misfit!r} is unknown; use one of {MISFITS}.")
    by_name = {site.name: site for site in sites}
    units = units_with_projections(model.program)
    skip = temporal_nodes(model.program)
    rows = spread_rows(len(calibration.t), config.samples)
    pairs = exponents(config.smoothing)
    if config.alpha >= 0:
        pairs = np.float32([[config.alpha, config.beta]])

    def chosen(state: QuantState, unit: Unit) -> list[str]:
        return [n for n in branch_sites(state.plan, skip) if n.split("/")[0] in unit.nodes]

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        for name in branch_sites(state.plan, skip):
            rank_of(by_name[name], config.rank, misfit)
            entry = state.plan.of(name).get("input")
            if entry is not None and not (entry.spec.dynamic and entry.spec.symmetric):
                raise ValueError(
                    f"{name}: its input is planned as {entry.spec}; a smoothed input needs a symmetric range "
                    "measured at run time: put stages.group_grids first."
                )
        return Carry(state, 0, first_values(calibration, rows), {}, store)

    def run(carry: Carry, n: int) -> Carry:
        # One unit and not n: what it took is on disk before the next one begins.
        return carry if done(carry) else _one_unit(carry)

    def done(carry: Carry) -> bool:
        return carry.position >= len(units)

    def _one_unit(carry: Carry) -> Carry:
        i, unit = carry.position, units[carry.position]
        names, solved = chosen(carry.state, unit), dict(carry.solved)
        inputs = tuple(carry.values[name] for name in unit.inputs)
        paths = {name: _path(carry.store, i, name) for name in names}
        missing = [n for n in names if paths[n] is None or not paths[n].exists()]
        values, read = after_unit(units, i, model.params, carry.values, missing)
        for name in names:
            if name in missing:
                solved[name] = _one_layer(carry.state, unit, name, inputs, np.asarray(read[name]))
                if paths[name] is not None:
                    paths[name].parent.mkdir(parents=True, exist_ok=True)
                    save_arrays(paths[name], solved[name])
            else:
                solved[name] = load_arrays(paths[name], Solved, _OPTIONAL)
        if on_progress is not None:
            shown = {"error": f"{solved[names[-1]].errors[2]:.3g}"} if names else {}
            on_progress(i + 1, len(units), unit=unit.name, **shown)
        return Carry(carry.state, i + 1, values, solved, carry.store)

    def _one_layer(state: QuantState, unit: Unit, name: str, inputs, x) -> Solved:
        check_finite(name, x)
        site, kernel = by_name[name], kernel_at(model.params, name)
        grids, codes = _grids(state.plan, site)
        shift = config.shift if grids.shifted else 0.0
        if grids.shifted and x.min() + shift < -1e-3 * shift:
            raise ValueError(
                f"{name}: inputs reach {x.min():.4g}, below -{shift:g}, and its shifted codes are unsigned; "
                "leave the site out of the shifted ones."
            )
        magnitude = np.abs(x + np.float32(shift)).reshape(-1, x.shape[-1]).max(axis=0)
        key = jax.random.fold_in(state.key, zlib.crc32(name.encode()))
        data = layer_rows(site.operator, x, site.rhs_shape, config.rows)
        shift = jnp.float32(shift)
        picked = pairs[0]
        if len(pairs) > 1:
            node, _, op = name.partition("/")
            if config.judge == "module" and matches(name, config.attention) and not grids.shifted:
                where = (unit.nodes.index(node), op, subtrees(model.params, unit), inputs)
                errors = block_errors(key, unit.signature, grids, codes, *where, magnitude, pairs)
            else:
                taps = np.reshape(kernel, (-1, *kernel.shape[-2:]))
                errors = candidate_errors(key, grids, codes, data, taps, magnitude, shift, pairs)
            picked = pairs[best_candidate(errors, later_ties)]
        made = solve(
            key,
            grids,
            codes,
            data,
            kernel,
            magnitude,
            shift,
            picked,
            most=config.iterations,
            use_gptq=config.gptq,
        )
        logging.debug("%s: exponents %s, errors %s", name, picked, made.errors)
        return made

    def _grids(plan: SitePlan, site: Site) -> tuple[Grids, Codes]:
        entries = plan.of(site.name)
        weight, activation = entries["weight"], entries.get("input")
        grids = Grids(
            weight.spec,
            None if activation is None else activation.spec,
            rank_of(site, config.rank, misfit),
            SVD(config.exact, config.oversample, config.power),
            shifted=activation is not None and not activation.spec.signed,
            stored_sums=stored_sums,
        )
        ends = (tuple(map(jnp.float32, e.codes)) if e else None for e in (weight, activation))
        return grids, Codes(*ends)

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        flat, report = flatten_sites(carry.state.quant), {}
        for name, made in carry.solved.items():
            entry = carry.state.plan.of(name)["weight"]
            held = flat.get(name, SiteQuant())
            bias = None if made.sums is None else bias_at(model.params, name)
            flat[name] = with_branch(held, made, entry, bias, config.shift)
            report[name] = figures(made)
        state = carry.state.replace(quant=nest_sites(flat))
        return state, {"sites": report, "network_passes": len(rows) / len(calibration.t)}

    return Stage("low_rank_branches", init, run, finish, done)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a site's name fits one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _path(store: pathlib.Path | None, position: int, name: str) -> pathlib.Path | None:
    """Names of sites have "_" in them, too: "/" becomes what none of them has, so that no two share a file."""
    return None if store is None else store / f"{position:03d}_{name.replace('/', '+')}.npz"
