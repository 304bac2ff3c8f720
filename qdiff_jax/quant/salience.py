"""Saliences of channels: balanced between an activation and a weight (CSB), weighed over steps (SSC).

PTQ4DiT (Wu et al. 2024): the saliences of a layer's input channel are a = max|x_k| and w = max|W_k|. CSB
(section 3.2) is the smoothing factor with alpha = beta = 0.5 of `quant.smoothing`, after which both are
sqrt(a w); `quant.folding` says where the division of the activation goes. SSC (section 3.3) makes a of the
saliences of all steps, by a mean in which a step counts more, the less its activation is salient in the same
channels as the weight.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qdiff_jax.quant.smoothing import smoothing_factors


def csb_factors(activation: jax.Array, weight: jax.Array) -> jax.Array:
    """s [C] = sqrt(a / w), neither below `smoothing.FLOOR`; 1 where that is not finite. PTQ4DiT's B^X is 1 / s,
    its B^W is s."""
    return smoothing_factors(activation, weight, 0.5, 0.5)


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
