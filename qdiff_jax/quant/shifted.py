"""The affine grid with a real zero point: codes value (q - z) * scale with z any real number.

For an activation whose lower bound is known exactly, such as SiLU's -0.2785: with z = 0.2785 / scale the
lowest code is that number, whatever the scale (TDQ, So et al. 2023, code). Zero itself has no code, so
zero padding cannot be written in codes and integer execution refuses this grid.
"""

import jax

from qdiff_jax.quant.affine import hard_clip, reciprocal, round_ste


def quantize(x: jax.Array, scale, zero_point, qmin, qmax) -> jax.Array:
    """Codes as floats: clip(round(x / scale + zero_point), qmin, qmax), straight through."""
    return hard_clip(round_ste(x * reciprocal(scale) + zero_point), qmin, qmax)


def dequantize(q: jax.Array, scale, zero_point) -> jax.Array:
    """(q - zero_point) * scale."""
    return (q - zero_point) * scale
