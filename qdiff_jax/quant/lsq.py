"""Learned step sizes: LSQ (Esser et al. 2020) and LSQ+ (Bhalgat et al. 2020).

The quantizer is the affine one; what makes it learned is which leaves of `QParams` are trained and
how their gradient is scaled. `learned` is put between the trainable and `fake_quant`.
"""

import math

import jax
import jax.numpy as jnp

from qdiff_jax.quant.affine import grad_scale, round_ste
from qdiff_jax.quant.qparams import SCALE_FLOOR, QParams, grouped, refuse_stored_format
from qdiff_jax.quant.spec import QuantSpec


def positive(scale: jax.Array, floor: float = SCALE_FLOOR) -> jax.Array:
    """scale, or `floor` where it has fallen below; the gradient passes either way, so it can
      recover.

    The official codes have no guard: a step that crosses zero flips the sign of its tensor.
    """
    return jnp.where(scale > floor, scale, floor + (scale - jax.lax.stop_gradient(scale)))


def learned(
    qparams: QParams,
    *,
    gradient_factor=None,
    learn_zero_point: bool = False,
    round_zero_point: bool = True,
) -> QParams:
    """The qparams to hand to `fake_quant` in a training step; values are unchanged while scale > 0.

    Args:
      qparams: with the trainable leaves in place.
      gradient_factor: multiplies the gradient of the scale (and of a learned zero point), see
        `gradient_factor`; None for BRECQ's activation phase and PTQ4DiT, which use none.
      learn_zero_point: LSQ+. Otherwise the zero point takes no gradient.
      round_zero_point: round a learned zero point, straight through, so that integer execution
        remains possible. False trains a free float (EfficientDM, MPQ-DM); `codes` then needs it
        rounded first.

    Raises:
      ValueError: the spec stores the scale in a format of 8 bits.
    """
    refuse_stored_format(qparams.spec, "trained")
    scale = positive(qparams.scale)
    zero_point = qparams.zero_point
    if gradient_factor is not None:
        scale = grad_scale(scale, gradient_factor)
        zero_point = grad_scale(zero_point, gradient_factor)
    if not learn_zero_point:
        zero_point = jax.lax.stop_gradient(zero_point)
    elif round_zero_point:
        zero_point = round_ste(zero_point)
    return qparams.replace(scale=scale, zero_point=zero_point)


def gradient_factor(size: int, qmax, cells: int = 1) -> jax.Array:
    """LSQ's 1 / sqrt(size * qmax), shaped like qmax.

    Args:
      size: number of elements of the quantized tensor (for an activation, of one sample's tensor or
        of the
        batch: the paper counts features).
      qmax: largest code, a number or an array.
      cells: how many scales share the tensor. The official codes divide by the whole tensor even
        when each channel has its own scale (1); the number of channels counts each scale's own
        elements.
    """
    return 1.0 / jnp.sqrt(jnp.asarray(qmax, jnp.float32) * (size / cells))


def initial_step(x: jax.Array, spec: QuantSpec, qmax) -> jax.Array:
    """LSQ's start, 2 * mean|x| / sqrt(qmax) per cell, shaped like `QParams.scale`.

    A qmax of 0 (a signed grid of 1 bit) gives an infinite step: take a binary quantizer there.

    Raises:
      ValueError: the spec has no static scale.
    """
    if spec.dynamic or spec.granularity == "cell":
        raise ValueError("a dynamic quantizer has no step of its own to initialise.")
    view = jnp.abs(grouped(spec, x).astype(jnp.float32))
    axis = x.ndim + spec.axis
    kept = {"tensor": (), "channel": (axis,), "group": (axis, view.ndim - 1)}[spec.granularity]
    if spec.granularity == "group" and spec.axis == -1:
        kept = (axis,)
    mean = view.mean(axis=tuple(a for a in range(view.ndim) if a not in kept))
    return jnp.maximum(2.0 * mean / jnp.sqrt(jnp.asarray(qmax, jnp.float32)), SCALE_FLOOR)


def lsq_plus_weight_step(w: jax.Array, bits: int) -> jax.Array:
    """LSQ+'s start for weights, (): max(|mean - 3 std|, |mean + 3 std|) / 2**(bits - 1)."""
    mean, spread = w.mean(), 3.0 * w.std()
    top = jnp.maximum(jnp.abs(mean - spread), jnp.abs(mean + spread))
    return jnp.maximum(top * math.ldexp(1.0, 1 - bits), SCALE_FLOOR)
