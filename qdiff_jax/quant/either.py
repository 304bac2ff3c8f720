"""One grid out of two, chosen by a number: uniform from zero, or log2. The type is data.

A quantizer whose type changes with the step cannot say it in its static spec, or the rows of a step table
would be of two structures. Both grids have the zero point 0, so in this union the leaf `zero_point` says
which one a row is: 0 uniform (`scale` its step), 1 log2 (`scale` its largest value). Both are computed and
one is taken, element by element: no branch, so that the step may be traced and a batch may mix steps.
Source of the need: distribution-aware quantization of softmax outputs, TCAQ-DM (Huang et al. 2024).
"""

import jax
import jax.numpy as jnp

from qdiff_jax.quant import affine, log2

UNIFORM, LOG2 = 0.0, 1.0


def quantize(x: jax.Array, scale, kind, qmin, qmax) -> jax.Array:
    """Codes as floats, on the grid that `kind` (UNIFORM or LOG2) says; straight through."""
    uniform = affine.hard_clip(affine.round_ste(x * affine.reciprocal(scale)), qmin, qmax)
    logarithmic = log2.quantize(x, scale, qmin, qmax, half_steps=False)
    return jnp.where(kind > 0.5, logarithmic, uniform)


def dequantize(q: jax.Array, scale, kind, qmax) -> jax.Array:
    """q * scale, or scale * 2^-q."""
    logarithmic = log2.dequantize(q, scale, qmax, half_steps=False, zero_code=False)
    return jnp.where(kind > 0.5, logarithmic, q * scale)
