"""Low-rank representation mimicking: a student follows its teacher's features where they vary most.

For every tapped block i, with full-precision features F [B, .., C] and student features G of the same shape,
L_LRM = 1/M sum_i mean(((F - G) E_i)^2), where E_i [C, ceil(C / K)] are the leading eigenvectors of
F^T F over all samples and positions: the channel axis is the last here. (The official code works on NCHW
tensors and projects their last axis, which is the width; the paper's projection is over channels.)

Source: Zheng et al. 2025, "BinaryDM", section 3.3, equations 11-14; K = 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.models.program import Unit, subtrees
from qdiff_jax.observe.capture import batch_bounds, run_unit, slice_rows


def leading_directions(covariance: np.ndarray, divisor: int) -> np.ndarray:
    """The eigenvectors [C, ceil(C / divisor)] of the largest eigenvalues of covariance [C, C], descending."""
    _, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    rank = math.ceil(len(vectors) / divisor)
    return np.ascontiguousarray(vectors[:, ::-1][:, :rank]).astype(np.float32)


@jax.jit
def _second_moments(features):
    def moment(value):
        rows = value.reshape(-1, value.shape[-1])
        return jnp.matmul(rows.T, rows, precision="highest")

    return [moment(value) for value in features]


def projections(
    unit: Unit, params: Mapping, inputs: Mapping, divisor: int, batch_size: int
) -> list[jax.Array]:
    """E_i of every tapped value of the teacher, in the order of the unit's outputs; frozen afterwards.

    unit: of `block_groups.tapped_program`, whose last output, the prediction, is left out. inputs:
    {"x", "t", "y"} of the calibration samples; what does not fill a batch is left out. The official code
    takes its first training batch.
    """
    totals: list[np.ndarray] | None = None
    batch_size = min(batch_size, len(inputs["x"]))
    size = len(inputs["x"]) // batch_size * batch_size
    given = tuple(inputs[name] for name in unit.inputs)
    weights, empty = subtrees(params, unit), tuple({} for _ in unit.nodes)
    for start, stop in batch_bounds(size, batch_size):
        outputs = run_unit(unit.signature, weights, empty, slice_rows(given, start, stop), None)
        moments = [np.asarray(m, np.float64) for m in _second_moments(outputs[:-1])]
        totals = moments if totals is None else [a + b for a, b in zip(totals, moments)]
    return [jnp.asarray(leading_directions(total, divisor)) for total in totals]


def mimicking_loss(
    student: Sequence[jax.Array], teacher: Sequence[jax.Array], directions: Sequence[jax.Array]
) -> jax.Array:
    """L_LRM, (): the mean over blocks of the mean squared difference along each block's directions."""
    terms = [
        jnp.mean(jnp.square((made - jax.lax.stop_gradient(full)).astype(jnp.float32) @ axes))
        for made, full, axes in zip(student, teacher, directions, strict=True)
    ]
    return sum(terms) / len(terms)
