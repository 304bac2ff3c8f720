"""moments: np.cov to the last digits, whatever the batches; no cancellation; loud on NaN."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_jax.eval import moments


def drawn(count=97, dim=6, offset=0.0, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim))
    return (offset + rng.normal(size=(count, dim)) @ mix).astype(np.float32)


def assert_is_numpys(found, x):
    x = x.astype(np.float64)
    assert found.n == len(x)
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.cov, np.cov(x, rowvar=False, ddof=1), rtol=1e-9, atol=1e-9)


@given(cuts=st.lists(st.integers(0, 97), max_size=5), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=20, derandomize=True)
def test_equals_numpy_however_the_stream_is_cut_and_ordered(cuts, seed):
    x = drawn(seed=seed)
    parts = np.split(x, sorted(cuts))
    assert_is_numpys(moments.collect(parts, 6), x)
    assert_is_numpys(moments.collect(parts[::-1], 6), x)


def test_a_mean_far_from_zero_costs_no_digits():
    """Sum of outer products minus n m m^T would be wrong in the second digit here."""
    x = drawn(offset=4e6)
    found = moments.collect([x[:50], x[50:]], 6)
    np.testing.assert_allclose(found.cov, np.cov(x.astype(np.float64).T), rtol=1e-8)


def test_merge_joins_and_ignores_the_empty():
    x = drawn()
    a, b = moments.moments_of(x[:40]), moments.moments_of(x[40:], batch=7)
    assert_is_numpys(moments.merge(a, b), x)
    assert moments.merge(moments.init(6), a) is a
    assert moments.merge(a, moments.init(6)) is a


def test_counts_stand_for_repeated_vectors():
    x = drawn(count=20)
    counts = np.random.default_rng(1).multinomial(20, np.full(20, 0.05))
    assert (counts == 0).any()
    assert (counts > 1).any()
    assert_is_numpys(moments.weighted(x, counts), np.repeat(x, counts, axis=0))


def test_takes_device_arrays_of_low_precision():
    x = jnp.asarray(drawn(), jnp.bfloat16)
    assert_is_numpys(moments.update(moments.init(6), x), np.asarray(x).astype(np.float64))


def test_misuse_is_explained():
    with pytest.raises(ValueError, match=r"features \[B, 6\]"):
        moments.update(moments.init(6), np.zeros((3, 5)))
    with pytest.raises(ValueError, match="not finite"):
        moments.update(moments.init(2), np.array([[0.0, np.nan], [1.0, 1.0]]))
    with pytest.raises(ValueError, match="at least two"):
        _ = moments.moments_of(np.zeros((1, 2))).cov
    with pytest.raises(ValueError, match="one feature dimension"):
        moments.merge(moments.init(2), moments.init(3))
    with pytest.raises(ValueError, match="every count is zero"):
        moments.weighted(np.zeros((2, 2)), np.zeros(2))
    with pytest.raises(ValueError, match="dim=0"):
        moments.init(0)
