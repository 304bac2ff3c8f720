"""Factors of input channels that even out an activation and the weight behind it, and how steps are weighed.

x / s and diag(s) W give a layer's output unchanged (`quant.folding` says where 1 / s goes). One family,
s = a^alpha / w^beta of the saliences a = max|x_k| and w = max|W_k|:

    SmoothQuant (Xiao et al. 2023, eq. 4)          beta = 1 - alpha, alpha = 0.5
    CSB, PTQ4DiT (Wu et al. 2024, section 3.2)     alpha = beta = 0.5: both saliences become sqrt(a w)
    SVDQuant (Li et al. 2025), DiTAS (2024)        pairs (alpha, beta) from a grid

SSC, PTQ4DiT (section 3.3) replaces a by a mean over steps in which a step counts more, the less its
activation is salient in the same channels as the weight.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_FLOOR = 1e-5


def row_salience(kernel: jax.Array) -> jax.Array:
    """w [C]: the largest |W| of each input channel of a kernel [..., C, N]."""
    return jnp.max(jnp.abs(kernel), axis=(*range(kernel.ndim - 2), kernel.ndim - 1))


def smoothing_factors(
    activation: jax.Array,
    weight: jax.Array,
    alpha: float,
    beta: float,
    *,
    normalise: bool = False,
    floor: float = _FLOOR,
) -> jax.Array:
    """s [C] = a^alpha / w^beta, positive and finite; a factor that would not be is 1.

    activation, weight: saliences a and w [C], not below `floor`. normalise: divide by the geometric mean,
    which quantizers per tensor and per output channel do not notice.
    """
    logs = alpha * jnp.log(jnp.maximum(activation, floor))
    logs = logs - beta * jnp.log(jnp.maximum(weight, floor))
    if normalise:
        logs = logs - jnp.mean(logs)
    return _usable(jnp.exp(logs))


def csb_factors(activation: jax.Array, weight: jax.Array, *, floor: float = _FLOOR) -> jax.Array:
    """s [C] = sqrt(a / w): after it both saliences are sqrt(a w). PTQ4DiT's B^X is 1 / s, its B^W is s."""
    return _usable(jnp.sqrt(jnp.maximum(activation, floor) / jnp.maximum(weight, floor)))


def _usable(factors: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(factors) & (factors > 0), factors, 1.0)


def ranks(x: jax.Array) -> jax.Array:
    """1 for the smallest value of x [C] to C for the largest; values that are equal share their mean rank."""
    ordered = jnp.sort(x)
    below = jnp.searchsorted(ordered, x, side="left")
    upto = jnp.searchsorted(ordered, x, side="right")
    return 0.5 * (below + upto + 1).astype(x.dtype)


def spearman(x: jax.Array, y: jax.Array) -> jax.Array:
    """rho, scalar in [-1, 1]: the correlation of the ranks of x and y [C]; 0 if either is constant."""
    x, y = (r - jnp.mean(r) for r in (ranks(x), ranks(y)))
    scale = jnp.sqrt(jnp.sum(x * x) * jnp.sum(y * y))
    return jnp.sum(x * y) / jnp.where(scale > 0, scale, 1.0)


def ssc_weights(activations: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(eta [T], rho [T]) of saliences activations [T, C] and weight [C].

    rho_t = spearman(a_t, w), eta_t = exp(-rho_t) / sum_i exp(-rho_i): sums to 1, falls with rho.
    """
    rho = jax.vmap(lambda row: spearman(row, weight))(activations)
    return jax.nn.softmax(-rho), rho


def weighted_salience(activations: jax.Array, eta: jax.Array) -> jax.Array:
    """a [C] = sum_t eta_t a_t of saliences [T, C]."""
    return jnp.sum(eta[:, None] * activations, axis=0)
