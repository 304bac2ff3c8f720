"""One entry for every grid: `fake_quant`, `codes`, `dequantize`, and the registry behind them.

For every grid and granularity `dequantize(freeze(q, x), codes(q, x)) == fake_quant(q, x)` bit for
bit (`freeze` is the identity for a static quantizer).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qdiff_jax.quant import affine, binary, either, floating, log2, shifted
from qdiff_jax.quant.qparams import QParams, broadcast, freeze, from_range, grouped
from qdiff_jax.quant.spec import FLOATS, QuantSpec


class Quantizer(NamedTuple):
    """The four functions of a grid.

    init(spec, lo, hi, qmin, qmax) -> QParams; apply(qparams, x) -> x_hat, differentiable (straight
    through); codes(qparams, x) -> int32; dequantize(qparams, codes) -> float32.
    """

    init: Callable[..., QParams]
    apply: Callable[[QParams, jax.Array], jax.Array]
    codes: Callable[[QParams, jax.Array], jax.Array]
    dequantize: Callable[[QParams, jax.Array], jax.Array]


class _Grid(NamedTuple):
    """On broadcast arrays: encode(x, scale, zero_point, qmin, qmax), decode(q, the same)."""

    encode: Callable[..., jax.Array]
    decode: Callable[..., jax.Array]


def _affine_grid(spec: QuantSpec) -> _Grid:
    del spec
    return _Grid(
        affine.quantize, lambda q, scale, zero, qmin, qmax: affine.dequantize(q, scale, zero)
    )


def _log_grid(spec: QuantSpec) -> _Grid:
    half = spec.grid == "log_sqrt2"

    def encode(x, scale, zero_point, qmin, qmax):
        return log2.quantize(x, scale, qmin, qmax, half_steps=half)

    def decode(q, scale, zero_point, qmin, qmax):
        return log2.dequantize(q, scale, qmax, half_steps=half, zero_code=spec.zero_code)

    return _Grid(encode, decode)


def _shifted_grid(spec: QuantSpec) -> _Grid:
    del spec
    return _Grid(
        shifted.quantize, lambda q, scale, zero, qmin, qmax: shifted.dequantize(q, scale, zero)
    )


def _union_grid(spec: QuantSpec) -> _Grid:
    del spec
    return _Grid(
        either.quantize, lambda q, scale, kind, qmin, qmax: either.dequantize(q, scale, kind, qmax)
    )


def _float_grid(spec: QuantSpec) -> _Grid:
    del spec
    return _Grid(
        floating.quantize, lambda q, scale, bits, qmin, qmax: floating.dequantize(q, scale, bits)
    )


def _binary_grid(spec: QuantSpec) -> _Grid:
    del spec
    return _Grid(
        lambda x, scale, zero, qmin, qmax: binary.quantize(x),
        lambda q, scale, zero, qmin, qmax: binary.dequantize(q, scale),
    )


_GRIDS = {
    "affine": _affine_grid,
    "log2": _log_grid,
    "log_sqrt2": _log_grid,
    "shifted": _shifted_grid,
    "affine_or_log2": _union_grid,
    **dict.fromkeys((*FLOATS, "fp4"), _float_grid),
    "binary": _binary_grid,
}


@functools.cache
def quantizer(spec: QuantSpec) -> Quantizer:
    """The functions of the grid of `spec`, closed over nothing but the spec."""
    grid = _GRIDS[spec.grid](spec)

    def encode(qparams, x):
        params = broadcast(qparams, x)
        return grid.encode(grouped(qparams.spec, x).astype(jnp.float32), *params), params

    def apply(qparams, x):
        qparams = freeze(qparams, x)
        q, params = encode(qparams, x)
        return grid.decode(q, *params).reshape(x.shape).astype(x.dtype)

    def codes(qparams, x):
        q, params = encode(freeze(qparams, x), x)
        # NaN has no code; it takes that of zero, while `apply` keeps it NaN.
        zero = grid.encode(jnp.zeros((1,) * q.ndim, jnp.float32), *params)
        q = jnp.where(jnp.isnan(q), zero, q)
        return q.astype(jnp.int32).reshape(x.shape)

    def dequantize(qparams, codes):
        params = broadcast(qparams, codes)
        q = grouped(qparams.spec, codes).astype(jnp.float32)
        return grid.decode(q, *params).reshape(codes.shape)

    return Quantizer(from_range, apply, codes, dequantize)


def fake_quant(qparams: QParams, x: jax.Array) -> jax.Array:
    """x rounded to the grid of qparams, in x's shape and dtype (arithmetic in float32).

    Infinite inputs clip to the end of the range; NaN stays NaN. Gradients are straight through, see
    `affine.quantize` and `log2.quantize`.

    Raises:
      ValueError: the shapes of qparams do not fit x.
    """
    return quantizer(qparams.spec).apply(qparams, x)


def codes(qparams: QParams, x: jax.Array) -> jax.Array:
    """The integer code of every element of x, int32, in [qmin, qmax]."""
    return quantizer(qparams.spec).codes(qparams, x)


def dequantize(qparams: QParams, codes: jax.Array) -> jax.Array:
    """The float32 value of every code.

    Raises:
      ValueError: qparams is dynamic, whose scale is not known without x; pass `freeze(qparams, x)`.
    """
    return quantizer(qparams.spec).dequantize(qparams, codes)
