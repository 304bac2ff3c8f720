"""Floating-point grids of 4 bits: a sign, E exponent and M = 3 - E mantissa bits, no infinity, no NaN.

With bias 2^(E-1) - 1 the non-negative values are

    E1M2  0  0.5   1    1.5  2  2.5  3  3.5      uniform
    E2M1  0  0.5   1    1.5  2  3    4  6        float4_e2m1fn of the hardware
    E3M0  0  0.25  0.5  1    2  4    8  16

Codes number the values: -7..7, negative ones for negative values, so that qmin = -7, qmax = 7 and 0 is 0.
They are not proportional to the values, hence no operands of an integer product. Rounding is to nearest, ties
to the even mantissa, as hardware does; its straight-through gradient is that of the affine grid: to x 1 inside
and 0 outside, to the scale q - x / scale inside and q outside, q the rounded x / scale.

The number of exponent bits is data (`QParams.zero_point`, which a symmetric grid does not need): the grids
"e1m2", "e2m1" and "e3m0" have it fixed, "fp4" may have another for every scale. Source: OCP Microscaling 1.0
(E2M1); format by layer or output channel: HQ-DiT (Liu and Zhang 2024), whose rule is given in words.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.quant.affine import hard_clip, reciprocal, round_ste
from qdiff_jax.quant.cells import cells, scale_shape
from qdiff_jax.quant.qparams import SCALE_FLOOR, QParams, scale_and_zero_point
from qdiff_jax.quant.spec import FLOATS, QuantSpec

# Between the ranges max / least value of the three formats, 7, 12 and 64: their geometric means.
SPREADS = (9.2, 27.7)
_QUANTILE = 0.25
_LEAST_TENSOR_SCALE = 1e-30


def grid_values(exponent_bits: int) -> np.ndarray:
    """The 8 non-negative values of a format, ascending, float32."""
    return np.asarray(_magnitude(jnp.arange(8.0), jnp.float32(exponent_bits)))


def quantize(x: jax.Array, scale, exponent_bits, qmin, qmax) -> jax.Array:
    """Codes as floats, in qmin..qmax; all arguments broadcast against x."""
    lowest = -_magnitude(-qmin, exponent_bits)
    a = hard_clip(x * reciprocal(scale), lowest, _magnitude(qmax, exponent_bits))
    unit = _power(_exponent(jax.lax.stop_gradient(a), exponent_bits) - (3.0 - exponent_bits))
    value = round_ste(a / unit) * unit
    code = _code(jax.lax.stop_gradient(value), exponent_bits)
    # The code's own steps differ in value: its gradient is that of the value, see `dequantize`.
    return code + (value - jax.lax.stop_gradient(value))


def dequantize(q: jax.Array, scale, exponent_bits) -> jax.Array:
    """The value of every code times scale."""
    code = jax.lax.stop_gradient(q)
    return scale * (jnp.sign(code) * _magnitude(jnp.abs(code), exponent_bits) + (q - code))


def _power(exponent):
    """2 to a whole number, exact (exp2 is not)."""
    return jnp.ldexp(jnp.ones_like(exponent), exponent.astype(jnp.int32))


def _least_exponent(exponent_bits):
    """Of a normal number: 1 - bias."""
    return 2.0 - _power(exponent_bits - 1.0)


def _exponent(value, exponent_bits):
    """Of a finite value as the format writes it: that of the least normal number, or larger."""
    least = _least_exponent(exponent_bits)
    exponent = jnp.frexp(value)[1].astype(value.dtype) - 1.0
    return jnp.where(value == 0, least, jnp.maximum(exponent, least))


def _code(value, exponent_bits):
    """The signed number of a value that lies on the grid: 2^M per binade, and the place in it."""
    mantissa_bits = 3.0 - exponent_bits
    exponent = _exponent(value, exponent_bits)
    binade = exponent - _least_exponent(exponent_bits)
    place = jnp.abs(value) * _power(mantissa_bits - exponent)
    return jnp.sign(value) * (binade * _power(mantissa_bits) + place)


def _magnitude(code, exponent_bits):
    """The value of a non-negative code; below the first binade there is no leading bit."""
    mantissa_bits = 3.0 - exponent_bits
    per_binade = _power(mantissa_bits)
    binade = jnp.floor(code / per_binade)
    mantissa = code - binade * per_binade + jnp.where(binade > 0, per_binade, 0.0)
    exponent = _least_exponent(exponent_bits) + jnp.maximum(binade - 1.0, 0.0) - mantissa_bits
    return mantissa * _power(exponent)


def spread(x, spec: QuantSpec) -> np.ndarray:
    """max|x| / (lower quartile of |x|) of every cell, shaped like `QParams.scale`; infinite where a
    quarter of a cell is zero.

    The quartile stands for the "minimum" of HQ-DiT's ratio, which is near 0 for any real tensor. About 4
    for uniform values, 11 for Gaussian, 26 for Laplace, 42 for Student's t with 3 degrees of freedom.
    """
    magnitudes = np.abs(cells(_plain(spec), x))
    low = np.quantile(magnitudes, _QUANTILE, axis=0)
    high = magnitudes.max(axis=0)
    ratio = np.full(high.shape, np.inf)
    return np.divide(high, low, out=ratio, where=low > 0).reshape(scale_shape(spec, np.shape(x)))


def format_of_spread(ratio) -> np.ndarray:
    """Exponent bits 1, 2 or 3 by the spread of the values: the wider, the more."""
    return 1.0 + sum((np.asarray(ratio) >= bound).astype(np.float32) for bound in SPREADS)


def format_of_least_error(x, spec: QuantSpec) -> np.ndarray:
    """Exponent bits 1, 2 or 3 of least squared error in every cell, range max|x|."""
    columns = cells(_plain(spec), x)
    errors = [_error(columns, *_scale(columns, bits)) for bits in (1.0, 2.0, 3.0)]
    return (
        (1.0 + np.argmin(errors, axis=0)).reshape(scale_shape(spec, np.shape(x))).astype(np.float32)
    )


def fp4_qparams(x, spec: QuantSpec, select: str = "spread") -> QParams:
    """QParams of the grid "fp4": a format and a scale for every cell of x. Host side, once per site.

    spec: static, grid "fp4". select: "spread" (the rule of HQ-DiT), "error" (the least squared error, which
    the rule approaches) or the name of one format for all. Raises ValueError for another grid or name, or a
    spec with a scale format: scales are float32 here.
    """
    if spec.scale_format is not None:
        raise ValueError(
            f"fp4_qparams got scale_format {spec.scale_format!r}, and it makes float32 scales; leave it "
            "out, or take one of the grids e1m2, e2m1 and e3m0."
        )
    if spec.grid != "fp4":
        raise ValueError(
            f"fp4_qparams got the grid {spec.grid!r}; a format of its own per scale is grid 'fp4'."
        )
    if select == "spread":
        bits = format_of_spread(spread(x, spec))
    elif select == "error":
        bits = format_of_least_error(x, spec)
    elif select in FLOATS:
        bits = np.full(scale_shape(spec, np.shape(x)), FLOATS[select][0], np.float32)
    else:
        raise ValueError(
            f"select is {select!r}; use 'spread', 'error' or one of {', '.join(FLOATS)}."
        )
    scale, bits = _scale(cells(_plain(spec), x), np.ravel(bits))
    scale, bits = (
        jnp.asarray(v, jnp.float32).reshape(scale_shape(spec, np.shape(x))) for v in (scale, bits)
    )
    return QParams(scale, bits, jnp.float32(-7.0), jnp.float32(7.0), spec)


def nvfp4_qparams(kernel, group: int = 16) -> QParams:
    """NVFP4 of a kernel [.., K, N]: E2M1 in groups along K, block scales in e4m3, one tensor scale.

    x_hat = q s_block s_tensor with s_tensor = max|w| / (6 * 448), so that the largest block scale is 448;
    the leaf `scale` holds their product. Raises ValueError unless the groups divide K.
    """
    spec = QuantSpec(grid="e2m1", granularity="group", axis=-2, group=group, scale_format="e4m3")
    columns = cells(spec, kernel)
    # A block scale may be 2^-9 of it, and that must not be a subnormal number, which is flushed to 0.
    whole = np.float32(max(np.abs(columns).max() / (6.0 * 448.0), _LEAST_TENSOR_SCALE))
    lo, hi = (
        v.reshape(scale_shape(spec, np.shape(kernel))) / whole
        for v in (columns.min(0), columns.max(0))
    )
    qmin, qmax = jnp.float32(-7.0), jnp.float32(7.0)
    scale, bits = scale_and_zero_point(spec, jnp.asarray(lo), jnp.asarray(hi), qmin, qmax)
    return QParams(scale * whole, bits, qmin, qmax, spec)


def _plain(spec: QuantSpec) -> QuantSpec:
    return dataclasses.replace(spec, grid="affine", scale_format=None)


@jax.jit
def _scale(columns, exponent_bits):
    """(scale, exponent bits) [C] of columns [K, C] whose largest value takes the largest code."""
    bits = jnp.broadcast_to(jnp.asarray(exponent_bits, jnp.float32), columns.shape[1:])
    top = jnp.abs(columns).max(axis=0)
    return jnp.maximum(top * reciprocal(_magnitude(jnp.float32(7.0), bits)), SCALE_FLOOR), bits


@jax.jit
def _error(columns, scale, bits):
    q = quantize(columns, scale[None], bits[None], jnp.float32(-7.0), jnp.float32(7.0))
    return jnp.square(dequantize(q, scale[None], bits[None]) - columns).sum(axis=0)
