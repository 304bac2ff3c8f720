"""Where the Taylor argument of reconstruction stops holding.

BRECQ (Li et al. 2021) reconstructs blocks because, for a small perturbation of a converged network, the
loss grows like a quadratic form of the perturbation. Here is how small "small" has to be. With the squared
distance to full precision as the loss, its gradient at full precision is zero and its Hessian is
2 J^T J exactly, so the quadratic prediction costs one forward-mode derivative, for the perturbation
that quantization makes at every weight and every activation at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.analysis.grids import (
    OFF,
    activation_bounds,
    bit_tree,
    operand_grids,
    operands_of,
    spread_evaluations,
)
from qdiff_jax.analysis.subject import Subject, parse_bits
from qdiff_jax.operators import plain
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.sites import Replacement, flatten_sites, nest_sites

SETTINGS = ("w8a32", "w6a32", "w4a32", "w3a32", "w2a32", "w8a8", "w6a6", "w4a8", "w4a4")
_SCALES = np.linspace(0.1, 1.0, 10)


class Taylor(NamedTuple):
    """K settings of bits, F fractions of the perturbation.

    verdict: breaks_at, the setting of smallest predicted loss from which the true loss is off the
    prediction by more than half ("none" if it never is), ratio_<setting> (true / predicted), and
    largest_ratio, smallest_ratio. loss, predicted: [K], relative to the mean square of the estimate.
    cosine: [K], between the linear response and the true change of the estimate.
    fractions: [F]; along: [K, F], true loss when only that fraction of the perturbation is made
    (predicted * fraction^2 where the argument holds).
    """

    verdict: dict
    settings: tuple[str, ...]
    loss: np.ndarray
    predicted: np.ndarray
    cosine: np.ndarray
    fractions: np.ndarray
    along: np.ndarray


def _part_way(arrays, operator, lhs, kernel, bias, site):
    """The operator with a fraction of the rounding error added to each operand.

    The error is held fixed, so that the derivative to the fraction is the response to this perturbation.
    """

    def moved(grid, x):
        return x + arrays * jax.lax.stop_gradient(fake_quant(grid, x) - x)

    return plain(operator, moved(site.lhs, lhs), moved(site.rhs, kernel()), bias)


@functools.partial(jax.jit, static_argnames="module")
def _response(module, params, quant, fraction, x, t, y):
    """(estimate, its derivative to the fraction) at a fraction of the perturbation."""

    def estimate(fraction):
        sites = {
            name: site.replace(substitute=Replacement(fraction, _part_way))
            for name, site in flatten_sites(quant).items()
        }
        return module.apply({"params": params, "quant": nest_sites(sites)}, x, t, y)

    return jax.jvp(estimate, (fraction,), (jnp.ones_like(fraction),))


def taylor_argument(
    subject: Subject,
    *,
    settings: tuple[str, ...] = SETTINGS,
    evaluations: int = 16,
    on_step: Callable | None = None,
) -> Taylor:
    """True loss against the second-order prediction for each setting; one compile for all."""
    grid = operand_grids(subject, activation_bounds(subject))
    x, t, y = spread_evaluations(subject, evaluations)
    rows: list[tuple] = []
    along = np.zeros((len(settings), len(_SCALES)))
    for k, setting in enumerate(settings):
        quant = bit_tree(subject, grid, _assigned(subject, setting))

        def at(fraction, quant=quant):
            given = (subject.model.params, quant, jnp.float32(fraction), x, t, y)
            return [np.asarray(v, np.float64) for v in _response(subject.model.module, *given)]

        reference, slope = at(0.0)
        energy = np.mean(reference**2)
        for f, fraction in enumerate(_SCALES):
            change = at(fraction)[0] - reference
            along[k, f] = np.mean(change**2) / energy
        size = np.linalg.norm(slope) * np.linalg.norm(change)
        cosine = float(np.sum(slope * change) / size) if size else 1.0
        rows.append((along[k, -1], np.mean(slope**2) / energy, cosine))
        if on_step is not None:
            on_step(k + 1, len(settings))
    loss, predicted, cosine = np.array(rows).T
    ratio = loss / predicted
    order = np.argsort(predicted)
    off = [settings[k] for k in order if not 0.5 <= ratio[k] <= 1.5]
    return Taylor(
        {
            "breaks_at": off[0] if off else "none",
            "largest_ratio": float(ratio.max()),
            "smallest_ratio": float(ratio.min()),
            **{f"ratio_{name}": float(r) for name, r in zip(settings, ratio)},
        },
        tuple(settings),
        loss,
        predicted,
        cosine,
        _SCALES,
        along,
    )


def _assigned(subject: Subject, setting: str) -> dict[str, int]:
    w_bits, a_bits = parse_bits(setting)
    return {
        **dict.fromkeys(operands_of(subject, weights=True), w_bits or OFF),
        **dict.fromkeys(operands_of(subject, weights=False), a_bits or OFF),
    }
