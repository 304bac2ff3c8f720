"""Moving a factor of every input channel from an activation into the weight behind it.

x / r and W r give the layer's output unchanged; what changes is how evenly the channels fill the range of
one quantizer. Timestep-channel reparameterisation (TCR), TCAQ-DM (Huang et al. 2024). The
formula of the paper was not available in full: the aggregation over time and the form of r below are a
reconstruction, and so is the choice of the exponent by the error of the layer's output. A common factor of
r is immaterial, because quantizers per tensor and per output channel scale with it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qdiff_jax.operators import Operator, plain
from qdiff_jax.policy import Entry
from qdiff_jax.quant.qparams import dynamic_qparams, from_range
from qdiff_jax.quant.quantizer import fake_quant

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_FLOOR = 1e-5


def time_weighted_range(ranges: jax.Array) -> jax.Array:
    """[C] from max|x| by step group and channel [G, C]: the mean over groups weighted by itself.

    At least the plain mean and at most the maximum. A channel that is always zero gives zero.
    """
    total = jnp.sum(ranges, axis=0)
    return jnp.sum(ranges**2, axis=0) / jnp.where(total > 0, total, 1.0)


def channel_factors(ranges: jax.Array, kernel: jax.Array, exponent: float) -> jax.Array:
    """r [C] = ranges^a max_o|W|^(a - 1), divided by its geometric mean.

    ranges: [C], of the input's channels. kernel: [..., C, N]. exponent: a; 1 is the paper's form (the
    activation loses all its unevenness to the weight), 0.5 that of SmoothQuant, 0 evens out the weight.
    """
    largest = jnp.max(jnp.abs(kernel), axis=(*range(kernel.ndim - 2), kernel.ndim - 1))
    logs = exponent * jnp.log(jnp.maximum(ranges, _FLOOR))
    logs = logs + (exponent - 1.0) * jnp.log(jnp.maximum(largest, _FLOOR))
    return jnp.exp(logs - jnp.mean(logs))


def scale_rows(kernel: jax.Array, factors: jax.Array) -> jax.Array:
    """W r: every input channel of a kernel [..., C, N] times its factor."""
    return kernel * factors.reshape((1,) * (kernel.ndim - 2) + (-1, 1))


def scale_channels(x: jax.Array, factors: jax.Array) -> jax.Array:
    """x [..., C] times a factor for each channel."""
    return x * factors.reshape((1,) * (x.ndim - 1) + (-1,)).astype(x.dtype)


def output_errors(
    operator: Operator,
    x: jax.Array,
    kernel: jax.Array,
    factors: jax.Array,
    activation: Entry | None,
    weight: Entry | None,
) -> jax.Array:
    """[J]: mean squared output error of the quantized layer under each candidate r, factors [J, C].

    activation, weight: entries of the plan, None for full precision; both by their min-max ranges.
    """
    left, right = (None if e is None else (e.spec, *e.codes) for e in (activation, weight))
    return _output_errors(operator, x, kernel, factors, left, right)


@functools.partial(jax.jit, static_argnames=("operator", "activation", "weight"))
def _output_errors(operator, x, kernel, factors, activation, weight):
    full = plain(operator, x, kernel, None)

    def one(r):
        moved, rows = scale_channels(x, 1.0 / r), scale_rows(kernel, r)
        if activation is not None:
            spec, *ends = activation
            if spec.dynamic:
                grid = dynamic_qparams(spec, *ends)
            else:
                grid = from_range(spec, moved.min(), moved.max(), *ends)
            moved = fake_quant(grid, moved)
        if weight is not None:
            spec, qmin, qmax = weight
            axes = range(rows.ndim - (spec.granularity == "channel"))
            lo, hi = rows.min(axis=tuple(axes)), rows.max(axis=tuple(axes))
            rows = fake_quant(from_range(spec, lo, hi, qmin, qmax), rows)
        return jnp.mean((plain(operator, moved, rows, None) - full) ** 2)

    return jax.lax.map(one, factors)
