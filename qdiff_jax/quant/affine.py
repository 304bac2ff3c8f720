"""Straight-through primitives and the uniform affine grid."""

import jax
import jax.numpy as jnp


@jax.custom_jvp
def round_ste(x):
    """Round half to even; the gradient passes as if it were the identity.

    A custom rule rather than x + stop_gradient(round(x) - x), which is NaN at infinity.
    """
    return jnp.round(x)


round_ste.defjvp(lambda primals, tangents: (jnp.round(primals[0]), tangents[0]))


@jax.custom_jvp
def floor_ste(x):
    """Floor; the gradient passes as if it were the identity."""
    return jnp.floor(x)


floor_ste.defjvp(lambda primals, tangents: (jnp.floor(primals[0]), tangents[0]))


def hard_clip(x, lo, hi):
    """Clip with gradient 1 inside and AT the bounds, 0 outside; the bounds take no gradient.

    `jnp.clip` has gradient 0.5 at a bound and `lax.clamp` 0. In `clip(round(x / s) + z, qmin,
    qmax)` every value of the two outermost bins sits exactly on a bound, so the difference is large
    at low bits; the published codes run with gradient 1.
    """
    inside = (x >= lo) & (x <= hi)
    return jnp.where(inside, x, jax.lax.stop_gradient(jnp.clip(x, lo, hi)))


def grad_scale(x, factor):
    """x in the forward pass, its gradient multiplied by `factor` (Esser et al. 2020, LSQ)."""
    scaled = x * factor
    # x first, so that the forward value is x to the last bit.
    return jax.lax.stop_gradient(x) + (scaled - jax.lax.stop_gradient(scaled))


def reciprocal(scale):
    """1 / scale, to multiply with instead of dividing by scale.

    XLA turns a division by a scalar into this product but divides by anything else, so x / scale
    would round some ties one way under a per-tensor scale and the other way under the same scale
    held per channel or per sample. The explicit product is the same everywhere.
    """
    return 1.0 / scale


def quantize(x, scale, zero_point, qmin, qmax):
    """Codes as floats: clip(round(x / scale) + zero_point, qmin, qmax), differentiable (straight
    through).

    All arguments broadcast against x. With `dequantize` the gradients are: to x 1 inside and 0
    outside; to scale (q - z) - x / scale inside and q - z outside (the closed form of LSQ); to
    zero_point 0 inside and -scale outside.
    """
    return hard_clip(round_ste(x * reciprocal(scale)) + zero_point, qmin, qmax)


def dequantize(q, scale, zero_point):
    """(q - zero_point) * scale."""
    return (q - zero_point) * scale
