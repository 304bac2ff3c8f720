"""Paired distance between images in the features of a classifier.

The images of a pair come from the same noise, one from the full-precision model and one from the
quantized one, so the distance needs far fewer images than a comparison of distributions does:

    distance = mean_i |f(y_i) - f(x_i)|^2 / mean_i |f(x_i) - mean_j f(x_j)|^2

with x the reference images, y the others and f the features. It reads:

- 0: the pairs have identical features;
- 1: the features are as far from their partner as the reference's are from their own mean, which
  is what a model that drew one average image every time would get;
- 2: y is unrelated to x but distributed like it (the expectation for independent pairs).

The normalisation makes the number independent of the scale of the features, and comparable between
variants measured on the same images; it is not comparable between feature networks.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class FeatureState:
    """Running statistics. The reference's spread is kept about its running mean, since the
    difference of two large sums of squares would cancel in float32."""

    gap: jax.Array  # float32: mean over pairs of |f(y) - f(x)|^2
    mean: jax.Array  # [D] float32: mean of f(x)
    spread: jax.Array  # float32: mean over x of |f(x) - mean|^2
    count: jax.Array  # int32: pairs seen


def init(dim: int) -> FeatureState:
    """An empty accumulator for features of `dim` entries.

    Raises ValueError when `dim` is not positive.
    """
    if dim < 1:
        raise ValueError(f"features.init needs a positive feature dimension, got dim={dim}.")
    return FeatureState(
        gap=jnp.zeros((), jnp.float32),
        mean=jnp.zeros((dim,), jnp.float32),
        spread=jnp.zeros((), jnp.float32),
        count=jnp.zeros((), jnp.int32),
    )


def update(state: FeatureState, reference: jax.Array, other: jax.Array) -> FeatureState:
    """Adds a batch of pairs of feature vectors. Pure; may be jitted.

    Args:
      state: from `init`.
      reference: [B, D] floating; features of the full-precision model's images.
      other: [B, D] floating; features of the quantized model's images from the same noise.

    Raises ValueError when the shapes do not fit.
    """
    dim = state.mean.shape[0]
    if reference.shape != other.shape or reference.ndim != 2 or reference.shape[1] != dim:
        raise ValueError(
            f"features.update takes two arrays [B, {dim}]: the reference has {reference.shape} "
            f"and the other {other.shape}."
        )
    reference = reference.astype(jnp.float32)
    gap = jnp.mean(jnp.sum(jnp.square(other.astype(jnp.float32) - reference), axis=1))
    mean = jnp.mean(reference, axis=0)
    spread = jnp.mean(jnp.sum(jnp.square(reference - mean[None, :]), axis=1))
    batch = FeatureState(gap, mean, spread, jnp.asarray(reference.shape[0], jnp.int32))
    return merge(state, batch)


def merge(a: FeatureState, b: FeatureState) -> FeatureState:
    """The statistics of both streams together (Chan, Golub and LeVeque 1979, pairwise update)."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features.merge needs the same feature dimension: {a.mean.shape[0]} and "
            f"{b.mean.shape[0]}."
        )
    count = a.count + b.count
    # Two empty accumulators merge into an empty one.
    share = b.count.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32)
    shift = b.mean - a.mean
    between = share * (1.0 - share) * jnp.sum(jnp.square(shift))
    return FeatureState(
        gap=a.gap + share * (b.gap - a.gap),
        mean=a.mean + share * shift,
        spread=a.spread + share * (b.spread - a.spread) + between,
        count=count,
    )


def finish(state: FeatureState) -> float:
    """The distance, on the host; nan or inf when a model diverged.

    Raises ValueError when fewer than two pairs were seen, or when the reference's features do not
    vary, so that there is nothing to measure against.
    """
    gap, spread, count = (np.asarray(v) for v in (state.gap, state.spread, state.count))
    if count < 2:
        raise ValueError(
            f"features.finish: a spread needs at least two pairs of images, got {int(count)}."
        )
    if spread == 0:
        raise ValueError(
            f"features.finish: the features of all {int(count)} reference images are the same; "
            f"check the images and the feature network."
        )
    return float(np.float64(gap) / np.float64(spread))


def feature_distance(
    feature_fn: Callable[[jax.Array], jax.Array],
    pairs: Iterable[tuple[jax.Array, jax.Array]],
) -> float:
    """Streams batches of image pairs through the feature network and returns the distance.

    Args:
      feature_fn: images [B, H, W, C] -> features [B, D], as the shipped classifier gives them;
        jit it once outside.
      pairs: batches (reference images, other images) of one shape, full precision first.

    Raises ValueError when `pairs` is empty, when shapes differ, and for the reasons of `finish`.
    """
    state = None
    for reference, other in pairs:
        if reference.shape != other.shape:
            raise ValueError(
                f"feature_distance compares images of one shape: the reference has "
                f"{reference.shape} and the other {other.shape}."
            )
        reference, other = feature_fn(reference), feature_fn(other)
        if state is None:
            state = init(reference.shape[-1])
        state = update(state, reference, other)
    if state is None:
        raise ValueError("feature_distance was given no images; pass at least two pairs.")
    return finish(state)
