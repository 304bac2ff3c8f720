"""Which layers suffer: one layer at a time goes to a few bits, all others stay in full precision.

The measure behind mixed precision and behind tables of who keeps 8 bits. Error of the noise estimate on
states of full-precision trajectories, spread over all timesteps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.analysis.grids import (
    activation_bounds,
    bit_tree,
    operand_grids,
    operands_of,
    spread_evaluations,
)
from qdiff_jax.analysis.subject import Subject


class Sensitivity(NamedTuple):
    """Lw weights and La activations in order of execution, B widths.

    verdict: for weights and activations the most sensitive operand at the fewest bits, its error, and
    "<which>/share_of_top_5": the share of the summed error that the five worst operands cause.
    weights, activations: names. weight_error [B, Lw], activation_error [B, La]: relative MSE of the
    estimate when this operand alone is quantized.
    """

    verdict: dict
    bits: tuple[int, ...]
    weights: tuple[str, ...]
    activations: tuple[str, ...]
    weight_error: np.ndarray
    activation_error: np.ndarray


@functools.partial(jax.jit, static_argnames="module")
def _estimate(module, params, quant, x, t, y):
    return module.apply({"params": params, "quant": quant}, x, t, y)


def layer_sensitivity(
    subject: Subject,
    *,
    bits: tuple[int, ...] = (2, 4, 8),
    evaluations: int = 16,
    on_step: Callable | None = None,
) -> Sensitivity:
    """Quantizes one operand after the other, by itself; one compile for all of them."""
    grid = operand_grids(subject, activation_bounds(subject))
    x, t, y = spread_evaluations(subject, evaluations)
    module, params = subject.model.module, subject.model.params

    def estimate(assigned):
        return _estimate(module, params, bit_tree(subject, grid, assigned), x, t, y)

    reference = estimate({})
    energy = float(jnp.mean(jnp.square(reference)))
    names = {
        which: operands_of(subject, which == "weights") for which in ("weights", "activations")
    }
    total, done = len(bits) * sum(map(len, names.values())), 0
    errors: dict[str, np.ndarray] = {}
    verdict: dict = {}
    for which, operands in names.items():
        rows = np.zeros((len(bits), len(operands)))
        for b, width in enumerate(bits):
            for i, operand in enumerate(operands):
                gap = estimate({operand: width}) - reference
                rows[b, i] = float(jnp.mean(jnp.square(gap))) / energy
                done += 1
                if on_step is not None:
                    on_step(done, total)
        errors[which] = rows
        coarse = rows[int(np.argmin(bits))]
        verdict[f"{which}/most_sensitive"] = operands[int(coarse.argmax())]
        verdict[f"{which}/largest_error"] = float(coarse.max())
        verdict[f"{which}/share_of_top_5"] = float(np.sort(coarse)[-5:].sum() / coarse.sum())
    return Sensitivity(
        verdict,
        tuple(bits),
        names["weights"],
        names["activations"],
        errors["weights"],
        errors["activations"],
    )
