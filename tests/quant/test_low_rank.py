"""Low-rank parts: the best product, the randomised one beside it, and when the alternation stops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.quant.low_rank import (
    SVD,
    Factors,
    alternate,
    balanced,
    decompose,
    randomized_svd,
    truncated_svd,
)

KEY = jax.random.key(0)


def matrix(rows=60, columns=40, decay=0.9, seed=0):
    """Of known singular values, decay^i."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((rows, columns)))[0]
    v = np.linalg.qr(rng.standard_normal((columns, columns)))[0]
    return np.float32((u * decay ** np.arange(columns)) @ v.T)


def residual(found: Factors, whole):
    return np.linalg.norm(whole - np.asarray(found.down, np.float64) @ np.asarray(found.up))


def test_the_truncated_decomposition_is_the_best_product():
    whole = matrix()
    least = np.sqrt((0.9 ** (2 * np.arange(5, 40))).sum())
    found = truncated_svd(whole, 5)
    assert (found.down.shape, found.up.shape) == ((60, 5), (5, 40))
    np.testing.assert_allclose(residual(found, whole), least, rtol=1e-5)
    # The split of the official code: the output side carries the singular values.
    np.testing.assert_allclose(found.down.T @ found.down, np.eye(5), atol=1e-5)


def test_a_randomised_one_comes_within_a_per_cent_and_its_seed_is_explicit():
    whole = matrix()
    make = jax.jit(lambda key, iterations: randomized_svd(key, whole, 5, 4, iterations))
    least = residual(truncated_svd(whole, 5), whole)
    rough, fine = (residual(make(KEY, n), whole) / least for n in (0, 4))
    assert 1.0 - 1e-5 <= fine <= 1.002
    assert fine < rough
    again, other = make(KEY, 4), make(jax.random.key(1), 4)
    np.testing.assert_array_equal(make(KEY, 4).down, again.down)
    assert np.any(np.asarray(other.down) != np.asarray(again.down))


def test_the_default_of_two_iterations_and_16_directions_is_within_a_per_cent_of_the_best():
    """Of a matrix 8 times the rank whose singular values fall as slowly as those of a layer."""
    rng = np.random.default_rng(3)
    whole = np.float32(rng.standard_normal((288, 256)) * np.exp(0.5 * rng.standard_normal(256)))
    make = jax.jit(lambda key: decompose(key, whole, 32))
    least = residual(truncated_svd(whole, 32), whole)
    for seed in range(3):
        found = residual(make(jax.random.key(seed)), whole) / least
        assert 1.0 - 1e-5 <= found <= 1.01


def test_the_exact_one_is_taken_where_it_is_cheaper_or_asked_for():
    whole = matrix(12, 10)
    exact = truncated_svd(whole, 3)
    for found in (
        randomized_svd(KEY, whole, 3, oversample=7),
        decompose(KEY, whole, 3, SVD(exact=True)),
    ):
        np.testing.assert_array_equal(found.up, exact.up)


def test_full_rank_leaves_nothing_and_more_is_refused():
    whole = matrix(12, 10)
    assert residual(decompose(KEY, whole, 10), whole) < 1e-5
    for rank in (0, 11):
        with pytest.raises(ValueError, match=rf"rank {rank} does not fit .*\(12, 10\); choose 1"):
            decompose(KEY, whole, rank)


def run(errors, most=6):
    """The alternation with made-up errors by iteration: (iteration kept, iterations, error, first error).

    Of W = 0 and a quantizer that adds 1 to everything, iteration i makes L1 L2 = -i and Q(R) = i + 1.
    """
    errors = jnp.float32(errors)

    def error(factors, rounded):
        return errors[jnp.round(rounded[0, 0]).astype(jnp.int32) - 1]

    whole = jnp.zeros((4, 3))
    found = jax.jit(lambda: alternate(KEY, whole, 2, lambda rest: rest + 1.0, error, most=most))()
    kept = -float(found.factors.product[0, 0])
    return round(kept, 3), int(found.iterations), float(found.error), float(found.first)


def test_the_alternation_stops_at_the_first_iteration_that_does_not_improve():
    assert run([5, 4, 3, 3.5, 1, 1]) == (2, 4, 3.0, 5.0)
    assert run([5, 6, 1, 1, 1, 1]) == (0, 2, 5.0, 5.0)


def test_an_equal_error_goes_on_and_the_later_factors_are_kept():
    assert run([5, 4, 4, 4, 4, 4]) == (5, 6, 4.0, 5.0)
    assert run([5, 4, 3, 2, 1, 0], most=1) == (0, 1, 5.0, 5.0)


def test_balanced_factors_have_the_same_product_and_fit_float16():
    down = np.float32([[1e-6, 3.0, 0.0], [2e-6, -1.0, 0.0]])
    up = np.float32([[5e5, -1e5], [0.5, 0.25], [0.0, 0.0]])
    made = balanced(Factors(down, up))
    np.testing.assert_allclose(made.product, down @ up, rtol=1e-6)
    np.testing.assert_allclose(np.abs(made.down).max(0)[:2], np.abs(made.up).max(1)[:2], rtol=1e-6)
    assert np.isfinite(np.asarray(jax.tree.leaves(made)[0], np.float16)).all()
    assert np.abs(np.asarray(made.up)).max() < 1e3
