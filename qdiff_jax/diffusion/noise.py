"""Randomness of sampling: a draw depends on the sample's global index and the step alone.

So the same sample comes out whatever the batch size, its place in the batch and the number of
devices, and two networks sampled with one key share their noise, which paired comparisons rely on.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sample_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    """[B] keys for the global sample indices [B] (integers >= 0)."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.asarray(indices))


def step_keys(keys: jax.Array, step: jax.Array, purpose: int) -> jax.Array:
    """[B] keys of one step: purpose 0 for the sampler's fresh noise, 1 for the hook.

    step is the step index j on the ascending grid; the draw of x_T has a number of its own (see
    `initial_noise`).
    """

    def fold(key):
        return jax.random.fold_in(jax.random.fold_in(key, step + 1), purpose)

    return jax.vmap(fold)(keys)


def normal(keys: jax.Array, like: jax.Array) -> jax.Array:
    """Standard normal of the shape and dtype of like [B, ...], row i drawn with keys[i]."""
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:], like.dtype))(keys)


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x_T [B, *shape] float32 of the samples with these keys."""

    def draw(key):
        return jax.random.normal(jax.random.fold_in(key, 0), shape, jnp.float32)

    return jax.vmap(draw)(keys)
