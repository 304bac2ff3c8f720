"""Smoothing factors: the family, its ends, and the candidates of the search."""

import numpy as np
import pytest

from qdiff_jax.quant.smoothing import (
    GELU_SHIFT,
    best_candidate,
    exponents,
    smoothing_factors,
    weight_magnitude,
)

RNG = np.random.default_rng(0)
X = np.float32(RNG.standard_normal((50, 6)) * [1, 30, 0.1, 2, 1, 5])
W = np.float32(RNG.standard_normal((6, 4)) * [[1], [1], [7], [0.2], [1], [1]])
A, B = np.abs(X).max(0), np.abs(W).max(1)


def test_the_candidates_of_the_search():
    full, fast, none = (exponents(name) for name in ("full", "fast", "none"))
    assert (len(full), len(fast), len(none)) == (39, 10, 1)
    for pairs in (full, fast, none):
        assert pairs[0].tolist() == [0.0, 0.0]
        assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)
    np.testing.assert_allclose(full[1:20, 1], 0)
    np.testing.assert_allclose(full[20:].sum(1), 1)
    assert {tuple(p) for p in fast.tolist()} <= {tuple(p) for p in full.tolist()}
    with pytest.raises(ValueError, match="'ful' is unknown; use one of"):
        exponents("ful")


def test_the_ends_of_the_family():
    np.testing.assert_array_equal(smoothing_factors(A, B, 0.0, 0.0), np.ones(6))
    np.testing.assert_allclose(
        np.abs(X / np.asarray(smoothing_factors(A, B, 1.0, 0.0))).max(0), 1, rtol=1e-5
    )
    flat = W * np.asarray(smoothing_factors(A, B, 0.0, 1.0))[:, None]
    np.testing.assert_allclose(np.abs(flat).max(1), 1, rtol=1e-5)


def test_halves_make_both_sides_equal():
    """Channel-wise salience balancing: max|x / s| = max|s W| = sqrt(a w)."""
    s = np.asarray(smoothing_factors(A, B, 0.5, 0.5))
    np.testing.assert_allclose(np.abs(X / s).max(0), np.sqrt(A * B), rtol=1e-5)
    np.testing.assert_allclose(np.abs(W * s[:, None]).max(1), np.sqrt(A * B), rtol=1e-5)


def test_channels_without_values_do_no_harm():
    s = np.asarray(smoothing_factors(np.float32([0, 1, np.inf]), np.float32([1, 0, 1]), 1.0, 1.0))
    np.testing.assert_allclose(s, [1e-5, 1e5, 1.0], rtol=1e-4)


def test_the_magnitude_of_a_convolution_is_over_its_taps():
    kernel = RNG.standard_normal((3, 3, 5, 4)).astype(np.float32)
    np.testing.assert_array_equal(weight_magnitude(kernel), np.abs(kernel).max((0, 1, 3)))
    np.testing.assert_array_equal(weight_magnitude(W), B)


def test_ties_go_to_the_later_candidate_of_the_official_code_or_the_first():
    errors = np.float32([3, 1, 2, 1, np.nan])
    assert best_candidate(errors, later=True) == 3
    assert best_candidate(errors, later=False) == 1


def test_gelu_is_not_negative_once_shifted():
    x = np.linspace(-4, 1, 200_001)
    gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(gelu.min(), -0.17004, atol=5e-6)
    assert gelu.min() + GELU_SHIFT >= 0
