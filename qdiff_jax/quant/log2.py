"""Logarithmic grids for non-negative tensors such as softmax outputs."""

import math

import jax
import jax.numpy as jnp

from qdiff_jax.quant.affine import hard_clip, reciprocal, round_ste

# Ratios below this read as zero: it lies under the last code of any 6-bit grid, and log2 stays
# finite.
_TINY = 2.0**-126


@jax.custom_jvp
def _negative_power(q):
    """2**-q for whole q, exact (exp2 is not), with the derivative of the real power."""
    power = jnp.ldexp(jnp.ones_like(q), -q.astype(jnp.int32))
    return jnp.where(jnp.isnan(q), q, power)


@_negative_power.defjvp
def _negative_power_jvp(primals, tangents):
    power = _negative_power(primals[0])
    return power, -math.log(2.0) * power * tangents[0]


def quantize(x, scale, qmin, qmax, *, half_steps: bool):
    """Codes as floats: clip(round(-m * log2(x / scale)), qmin, qmax), m = 2 with half_steps, else
    1.

    Zeros and negative values take the last code. The straight-through gradient of
    `dequantize(quantize(x))` to x is x_hat / x inside the range and 0 outside; to scale 0 inside
    and x_hat / scale outside.
    """
    ratio = x * reciprocal(scale)
    positive = ratio >= _TINY
    # The inner where keeps log2 away from 0, whose infinite derivative would turn into NaN.
    exponent = -jnp.log2(jnp.where(positive, ratio, 1.0))
    q = hard_clip(round_ste(exponent * (2.0 if half_steps else 1.0)), qmin, qmax)
    q = jnp.where(positive, q, jnp.broadcast_to(qmax, q.shape))
    return jnp.where(jnp.isnan(x), x, q)


def dequantize(q, scale, qmax, *, half_steps: bool, zero_code: bool):
    """scale * 2**(-q / m); the last code gives exactly 0 with `zero_code`."""
    if half_steps:
        whole = jnp.ceil(jax.lax.stop_gradient(q) / 2.0)
        odd = 2.0 * whole - jax.lax.stop_gradient(q)
        exact = _negative_power(whole) * jnp.where(odd > 0.5, math.sqrt(2.0), 1.0)
        # The value is exact; the derivative is that of 2**(-q / 2).
        slope = -0.5 * math.log(2.0) * exact
        power = exact + slope * (q - jax.lax.stop_gradient(q))
    else:
        power = _negative_power(q)
    x_hat = scale * power
    return jnp.where(q >= qmax, jnp.zeros_like(x_hat), x_hat) if zero_code else x_hat
