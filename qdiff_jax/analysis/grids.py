"""One quantizer at every operand of a model, whose bits are data: no setting compiles anything new.

"Off" is a grid of 2^24 levels, which float32 cannot tell from the values themselves. So one compiled
network serves every assignment of bits to layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.analysis.observed import step_reports
from qdiff_jax.analysis.subject import Subject
from qdiff_jax.observe.taps import Tap
from qdiff_jax.policy import ACTIVATION, ALWAYS_ZERO, WEIGHT
from qdiff_jax.quant.qparams import QParams, from_range
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.ranges import weight_qparams
from qdiff_jax.quant.spec import code_range
from qdiff_jax.sites import SiteQuant, nest_sites
from qdiff_jax.stages.stage import kernel_at

OFF = 24  # bits

# One program for each shape, where eager rounding would compile one for each operation.
rounded = jax.jit(fake_quant)


def activation_bounds(
    subject: Subject, on_step: Callable | None = None
) -> dict[str, tuple[float, float]]:
    """{"site:operand": (lo, hi)}: min-max over all steps and samples of the trajectories."""
    bounds: dict[str, tuple[float, float]] = {}
    for reports in step_reports(subject, subject.sites, Tap("range"), on_step):
        for name, report in reports.items():
            lo, hi = bounds.get(name, (np.inf, -np.inf))
            bounds[name] = (min(lo, float(report["lo"].min())), max(hi, float(report["hi"].max())))
    return bounds


def operand_grids(subject: Subject, bounds: Mapping[str, tuple[float, float]]) -> Callable:
    """Returns grid(operand name, bits) -> QParams; operands are "site:weight", "site:input", ...

    Weights: per channel, MSE search. Activations: one range, that of `bounds`. Every grid is made once.
    """

    @functools.cache
    def grid(name: str, bits: int) -> QParams:
        site, operand = name.split(":")
        if operand == "weight":
            kernel = kernel_at(subject.model.params, site)
            method = "minmax" if bits == OFF else "mse"
            return weight_qparams(kernel, WEIGHT, bits, method=method)
        spec = ALWAYS_ZERO if operand == "softmax" else ACTIVATION
        return from_range(spec, *bounds[name], *code_range(spec, bits))

    return grid


def bit_tree(subject: Subject, grid: Callable, bits: Mapping[str, int], **fields) -> dict:
    """The `quant` tree in which every operand has a grid: `bits` of it where named, OFF elsewhere.

    fields: of every SiteQuant, such as `substitute`. All trees have one structure.
    """
    flat = {}
    for site in subject.sites:
        lhs, rhs = (f"{site.name}:{operand}" for operand in site.operands)
        flat[site.name] = SiteQuant(
            lhs=grid(lhs, bits.get(lhs, OFF)),
            rhs=grid(rhs, bits.get(rhs, OFF)),
            product=not site.has_weight,
            **fields,
        )
    return nest_sites(flat)


def operands_of(subject: Subject, weights: bool) -> tuple[str, ...]:
    """Names of all weight operands, or of all activation operands, in order of execution."""
    return tuple(
        f"{site.name}:{operand}"
        for site in subject.sites
        for operand in site.operands
        if (operand == "weight") == weights
    )


def spread_evaluations(
    subject: Subject, count: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(x, t, y) of `count` evaluations of the trajectories, spread over steps and samples."""
    trajectory = subject.trajectory
    steps, samples = trajectory.x.shape[:2]
    count = min(count, steps * samples)
    step = np.round(np.linspace(0, steps - 1, count)).astype(int)
    # A stride of one through the samples while the steps go by visits all of both.
    sample = np.arange(count) % samples
    y = None if trajectory.y is None else jnp.asarray(trajectory.y[sample])
    return jnp.asarray(trajectory.x[step, sample]), jnp.asarray(trajectory.t[step]), y
