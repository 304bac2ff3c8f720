"""features: the paired distance against float64 numpy, and what its landmarks 0, 1, 2 mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.eval import features


def drawn(count=24, dim=5, offset=0.0, seed=0):
    rng = np.random.default_rng(seed)
    reference = (offset + rng.normal(size=(count, dim))).astype(np.float32)
    other = (reference + 0.3 * rng.normal(size=reference.shape)).astype(np.float32)
    return reference, other


def numpy_distance(reference, other):
    reference, other = reference.astype(np.float64), other.astype(np.float64)
    gap = np.square(other - reference).sum(axis=1).mean()
    return gap / np.square(reference - reference.mean(axis=0)).sum(axis=1).mean()


def streamed(reference, other, cuts):
    state = features.init(reference.shape[1])
    for a, b in zip(np.split(reference, cuts), np.split(other, cuts)):
        state = jax.jit(features.update)(state, jnp.asarray(a), jnp.asarray(b))
    return state


@pytest.mark.parametrize("cuts", [[], [1], [7, 8, 20]])
def test_matches_float64_numpy_however_the_stream_is_cut(cuts):
    reference, other = drawn()
    result = features.finish(streamed(reference, other, cuts))
    np.testing.assert_allclose(result, numpy_distance(reference, other), rtol=1e-5)


def test_a_large_common_offset_does_not_cancel():
    """Sums of squares about zero would lose every digit of the spread here."""
    reference, other = drawn(offset=3e3)
    result = features.finish(streamed(reference, other, [5, 11]))
    np.testing.assert_allclose(result, numpy_distance(reference, other), rtol=1e-3)


def test_merge_equals_the_whole_and_ignores_the_empty():
    reference, other = drawn()
    a, b = streamed(reference[:9], other[:9], []), streamed(reference[9:], other[9:], [])
    whole = features.finish(streamed(reference, other, []))
    np.testing.assert_allclose(features.finish(features.merge(a, b)), whole, rtol=1e-5)
    empty = features.init(reference.shape[1])
    assert features.finish(features.merge(empty, a)) == features.finish(a)


def test_landmarks():
    rng = np.random.default_rng(0)
    reference, unrelated = rng.normal(size=(2, 4000, 8)).astype(np.float32)
    average = np.broadcast_to(reference.mean(axis=0), reference.shape)
    assert features.finish(streamed(reference, reference, [])) == 0.0
    np.testing.assert_allclose(features.finish(streamed(reference, average, [])), 1.0, rtol=1e-4)
    np.testing.assert_allclose(features.finish(streamed(reference, unrelated, [])), 2.0, rtol=0.03)


def test_feature_distance_applies_the_network_to_both_sides():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 6, 4, 4, 3)).astype(np.float32)
    kernel = rng.normal(size=(48, 5)).astype(np.float32)

    def feature_fn(batch):
        return jnp.reshape(batch, (batch.shape[0], -1)) @ jnp.asarray(kernel)

    batches = [
        (jnp.asarray(images[0, i : i + 2]), jnp.asarray(images[1, i : i + 2])) for i in (0, 2, 4)
    ]
    expected = numpy_distance(*(images.reshape(2, 6, -1) @ kernel))
    np.testing.assert_allclose(features.feature_distance(feature_fn, batches), expected, rtol=1e-4)
    with pytest.raises(ValueError, match="one shape"):
        features.feature_distance(feature_fn, [(images[0], images[1, :3])])
    with pytest.raises(ValueError, match="no images"):
        features.feature_distance(feature_fn, [])


def test_misuse_is_explained():
    state = features.init(3)
    with pytest.raises(ValueError, match=r"two arrays \[B, 3\]"):
        features.update(state, jnp.ones((2, 4)), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="at least two pairs"):
        features.finish(features.update(state, jnp.ones((1, 3)), jnp.ones((1, 3))))
    with pytest.raises(ValueError, match="are the same"):
        features.finish(features.update(state, jnp.ones((2, 3)), jnp.zeros((2, 3))))
    with pytest.raises(ValueError, match="same feature dimension"):
        features.merge(state, features.init(4))
    with pytest.raises(ValueError, match="dim=0"):
        features.init(0)
