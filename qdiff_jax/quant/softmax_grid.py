"""Log2 or uniform for a softmax output: which of two distributions its values look like.

Distribution-aware quantization, TCAQ-DM (Huang et al. 2024): where a power law explains the
values better than an exponential, the many small ones among them deserve the log2 grid. The log-normal
alternative of the paper is left out: a softmax of Gaussian logits is log-normal, so it wins everywhere and
log2 is never chosen.

The rule does not minimise an error, and where codes are many it is far from doing so: at 8 bits the
uniform grid resolves the small values too, and on peaked attention log2 has hundreds of times its error.
`criterion="mse"` takes the grid of less error of the values, "attn_out_mse" that of less error of what
attention makes of them (`stages.softmax_grids`), "uniform" none but the uniform one.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from qdiff_jax.quant.either import LOG2, UNIFORM
from qdiff_jax.quant.qparams import SCALE_FLOOR, QParams
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.spec import QuantSpec

CRITERIA = ("mle", "mse", "attn_out_mse", "uniform")
_UNION = QuantSpec(grid="affine_or_log2", symmetric=True)


class Evidence(NamedTuple):
    """exponent: of the power law, 1 + n / sum ln(x / x_min). rate: of the exponential above x_min.
    ratio: (log-likelihood of the power law - that of the exponential) / n; positive speaks for log2."""

    exponent: float
    rate: float
    ratio: float


def evidence(x: np.ndarray) -> Evidence:
    """Maximum likelihood of both distributions for the positive values of x (any shape).

    Values of one kind only, which both explain perfectly, speak for neither: ratio 0.
    """
    x = np.asarray(x, np.float64).reshape(-1)
    x = x[x > 0]
    lowest = x.min() if x.size else 1.0
    logs = np.log(x / lowest).mean() if x.size else 0.0
    above = x.mean() - lowest if x.size else 0.0
    if logs <= 0 or above <= 0:
        return Evidence(np.inf, np.inf, 0.0)
    exponent, rate = 1.0 + 1.0 / logs, 1.0 / above
    power = np.log(exponent - 1.0) - np.log(lowest) - exponent * logs
    return Evidence(exponent, rate, float(power - (np.log(rate) - 1.0)))


def kind_of(x: np.ndarray, hi: float, qmax: float, criterion: str = "mle") -> float:
    """LOG2 or UNIFORM for values x whose largest may be hi.

    Raises ValueError for an unknown criterion, or one that values alone do not answer ("attn_out_mse")."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r} is unknown; use one of {CRITERIA}.")
    if criterion == "attn_out_mse":
        raise ValueError(
            "criterion 'attn_out_mse' compares outputs of attention, which the values alone do not give; call "
            "`stages.softmax_grids.choose_softmax_grids`, or use 'mse'."
        )
    if criterion == "uniform":
        return UNIFORM
    if criterion == "mle":
        return LOG2 if evidence(x).ratio > 0 else UNIFORM
    table = grid_rows(np.float32([UNIFORM, LOG2]), np.full(2, hi), qmax)
    pair = jnp.broadcast_to(jnp.asarray(x, jnp.float32).reshape(1, -1), (2, np.size(x)))
    error = jnp.mean((fake_quant(table.replace(rows=True), pair) - pair) ** 2, axis=1)
    return LOG2 if error[1] < error[0] else UNIFORM


def grid_rows(kinds: np.ndarray, hi: np.ndarray, qmax: float) -> QParams:
    """The rows of a step table: kinds and largest values hi [R], codes 0..qmax; leaves [R].

    Of the union grid where the steps disagree; where all agree, of that grid itself, so that a table
    without log2 rows is an ordinary always-zero one.
    """
    kinds = np.asarray(kinds, np.float32)
    hi = np.maximum(np.asarray(hi, np.float32), SCALE_FLOOR)
    scale = np.where(kinds == LOG2, hi, np.maximum(hi / np.float32(qmax), SCALE_FLOOR))
    low, high = np.zeros_like(hi), np.full_like(hi, qmax)
    leaves = tuple(jnp.asarray(v, jnp.float32) for v in (scale, kinds, low, high))
    if (kinds == UNIFORM).all():
        return QParams(*leaves, dataclasses.replace(_UNION, grid="affine"))
    if (kinds == LOG2).all():
        return QParams(leaves[0], jnp.zeros_like(leaves[1]), *leaves[2:], QuantSpec(grid="log2"))
    return QParams(*leaves, _UNION)
