"""AdaRound: which way every weight is rounded, as a trainable relaxation.

Nagel et al. 2020, "Up or Down?", equations 22-25, as used in BRECQ and its diffusion descendants.
With no optimisation step the decided codes are those of nearest rounding, bit for bit.
"""

import jax
import jax.numpy as jnp
from flax import struct

from qdiff_jax.quant.affine import dequantize as affine_dequantize
from qdiff_jax.quant.affine import hard_clip, reciprocal
from qdiff_jax.quant.qparams import QParams, broadcast, grouped
from qdiff_jax.quant.quantizer import dequantize

ZETA, GAMMA = 1.1, -0.1  # the stretched sigmoid reaches 0 and 1 at finite alpha
_TIE = 1e-6


@struct.dataclass
class SoftRounding:
    """A kernel whose rounding is being learned.

    Attributes:
      base: floor(w / scale) + zero_point, float32, shape of w; computed once, constant afterwards.
      alpha: shape of w; the trainable. h(alpha) in [0, 1] is how far each weight is rounded up.
      qparams: fixed scale, zero point, codes (static affine grid).
    """

    base: jax.Array
    alpha: jax.Array
    qparams: QParams


def rectified_sigmoid(alpha: jax.Array) -> jax.Array:
    """h(alpha) = clip(1.2 * sigmoid(alpha) - 0.1, 0, 1); its gradient is 0 where it is clipped."""
    return hard_clip(jax.nn.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


@jax.jit
def soft_rounding(weight: jax.Array, qparams: QParams) -> SoftRounding:
    """The relaxation at its start: h(alpha) is the fractional part, so the soft weight is the
    clipped weight.

    Raises:
      ValueError: the grid is not affine, or the quantizer is dynamic.
    """
    if qparams.spec.grid != "affine":
        raise ValueError(f"AdaRound needs an affine grid, not {qparams.spec.grid!r}.")
    scale, zero_point, _, _ = broadcast(qparams, weight)
    ratio = grouped(qparams.spec, weight).astype(jnp.float32) * reciprocal(scale)
    floor = jnp.floor(ratio)
    alpha = -jnp.log((ZETA - GAMMA) / (ratio - floor - GAMMA) - 1.0)
    # Nearest rounding takes ties to even, and the logarithm is inexact next to a tie: the sign of
    # alpha, which decides the code, is therefore set from the nearest code itself.
    up = jnp.round(ratio) > floor
    alpha = jnp.where(up, jnp.maximum(alpha, _TIE), jnp.minimum(alpha, -_TIE))
    shape = weight.shape
    return SoftRounding((floor + zero_point).reshape(shape), alpha.reshape(shape), qparams)


def soft_weight(soft: SoftRounding) -> jax.Array:
    """scale * (clip(base + h(alpha), qmin, qmax) - zero_point), float32."""
    q = soft.base + rectified_sigmoid(soft.alpha)
    scale, zero_point, qmin, qmax = broadcast(soft.qparams, q)
    q = hard_clip(grouped(soft.qparams.spec, q), qmin, qmax)
    return affine_dequantize(q, scale, zero_point).reshape(soft.base.shape)


@jax.jit
def hard_codes(soft: SoftRounding) -> jax.Array:
    """The decided codes, int32: clip(base + [alpha >= 0], qmin, qmax)."""
    q = soft.base + (soft.alpha >= 0).astype(jnp.float32)
    _, _, qmin, qmax = broadcast(soft.qparams, q)
    q = jnp.clip(grouped(soft.qparams.spec, q), qmin, qmax)
    return q.astype(jnp.int32).reshape(soft.base.shape)


@jax.jit
def hard_weight(soft: SoftRounding) -> jax.Array:
    """The weight of the decided codes, float32."""
    return dequantize(soft.qparams, hard_codes(soft))


def is_soft(node) -> bool:
    """For `jax.tree.map(..., is_leaf=is_soft)`."""
    return isinstance(node, SoftRounding)


def regulariser(alpha: jax.Array, beta) -> jax.Array:
    """sum(1 - |2 h(alpha) - 1|**beta), (): pushes every h to 0 or 1 as beta falls."""
    distance = jnp.abs(2.0 * rectified_sigmoid(alpha) - 1.0)
    # exp(beta log d): a traced power costs four times as much on CPU. Below the floor the term is
    # 1.
    return jnp.sum(1.0 - jnp.exp(beta * jnp.log(jnp.maximum(distance, 1e-6))))


def beta_schedule(step, steps, start=20.0, end=2.0, warmup=0.2) -> jax.Array:
    """beta of step 0..steps-1: `start` through the warm-up, then LINEAR to `end`.

    (BRECQ's docstring says cosine; its code, and all that derive from it, decay linearly.)
    step and steps may be traced.
    """
    step, steps = jnp.asarray(step, jnp.float32), jnp.asarray(steps, jnp.float32)
    progress = (step - warmup * steps) / ((1.0 - warmup) * steps)
    return end + (start - end) * jnp.clip(1.0 - progress, 0.0, 1.0)


def rounding_penalty(
    alphas, step, steps, *, weight=0.01, start=20.0, end=2.0, warmup=0.2
) -> jax.Array:
    """weight * regulariser, summed over the leaves of `alphas`; 0 while step < warmup * steps."""
    beta = beta_schedule(step, steps, start, end, warmup)
    total = sum((regulariser(leaf, beta) for leaf in jax.tree.leaves(alphas)), jnp.float32(0.0))
    active = jnp.asarray(step, jnp.float32) >= warmup * jnp.asarray(steps, jnp.float32)
    return jnp.where(active, weight * total, 0.0)


def binarised_fraction(alphas, tolerance: float = 0.05) -> jax.Array:
    """Share of all h(alpha) within `tolerance` of 0 or 1, (); the rest changes when hardened."""
    leaves = jax.tree.leaves(alphas)
    decided = sum(
        jnp.sum(jnp.abs(rectified_sigmoid(leaf) - 0.5) >= 0.5 - tolerance) for leaf in leaves
    )
    return decided / max(1, sum(leaf.size for leaf in leaves))
