"""Saliences of channels: equal once balanced, Spearman's rho, and the weights of steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_jax.quant.salience import (
    csb_factors,
    ranks,
    spearman,
    ssc_weights,
    weighted_salience,
)
from qdiff_jax.quant.smoothing import smoothing_factors, weight_magnitude


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


weights_of = jax.jit(ssc_weights)
correlation = jax.jit(spearman)


def saliences(seed=0, channels=144):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.lognormal(0, 1, channels)), jnp.asarray(rng.lognormal(-2, 1, channels))


def test_balanced_saliences_are_equal_and_their_geometric_mean():
    a, w = saliences()
    s = csb_factors(a, w)
    np.testing.assert_allclose((a / s) / (w * s), 1.0, rtol=0, atol=2e-15)
    np.testing.assert_allclose((a / s) / np.sqrt(a * w), 1.0, rtol=0, atol=2e-15)
    np.testing.assert_array_equal(s, smoothing_factors(a, w, 0.5, 0.5))


def test_dead_channels_are_bounded_and_broken_ones_left_alone():
    a, w = jnp.asarray([0.0, 1.0, jnp.nan, jnp.inf]), jnp.asarray([1.0, 0.0, 1.0, 1.0])
    wanted = [1e-5**0.5, 1e-5**-0.5, 1.0, 1.0]
    np.testing.assert_allclose(csb_factors(a, w), wanted, rtol=1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), levels=st.sampled_from([3, 1000]))
def test_rho_is_that_of_scipy_with_ties_and_without(seed, levels):
    x, y = np.random.default_rng(seed).integers(0, levels, (2, 12)).astype(np.float64)
    np.testing.assert_array_equal(ranks(jnp.asarray(x)), scipy.stats.rankdata(x))
    if np.ptp(x) and np.ptp(y):
        wanted = scipy.stats.spearmanr(x, y).statistic
        np.testing.assert_allclose(correlation(x, y), wanted, atol=1e-12)


def test_rho_of_a_constant_is_zero():
    assert correlation(np.ones(12), np.arange(12.0)) == 0.0


def test_steps_that_are_salient_elsewhere_than_the_weight_count_more():
    rng = np.random.default_rng(0)
    _, w = saliences()
    # From the weight's own order to its reverse.
    noise = rng.standard_normal((7, 144))
    steps = np.exp(np.linspace(1, -1, 7)[:, None] * np.log(w) + 0.1 * noise)
    eta, rho = (np.asarray(v) for v in weights_of(steps, w))
    assert rho[0] > 0.9
    assert rho[-1] < -0.9
    order = np.argsort(rho)
    assert (np.diff(eta[order]) < 0).all()
    np.testing.assert_allclose(eta.sum(), 1.0, rtol=1e-14)
    np.testing.assert_allclose(eta / eta[0], np.exp(rho[0] - rho), rtol=1e-12)
    a = weighted_salience(jnp.asarray(steps), jnp.asarray(eta))
    np.testing.assert_allclose(a, eta @ steps, rtol=1e-13)
    assert (a <= steps.max(0) * (1 + 1e-12)).all()


def test_equal_rho_is_the_plain_mean_and_one_step_is_csb_alone():
    a, w = saliences()
    steps = a[None] * jnp.asarray([[1.0], [2.0], [9.0]])  # the same ranks at every step
    eta, _ = weights_of(steps, w)
    np.testing.assert_allclose(weighted_salience(steps, eta), steps.mean(0), rtol=1e-14)
    alone = weighted_salience(a[None], weights_of(a[None], w)[0])
    np.testing.assert_array_equal(csb_factors(alone, w), csb_factors(a, w))


def symmetric(x, bits):
    """Nearest of +-(2^(bits-1) - 1) steps, a scale for every row, in NumPy."""
    scale = np.abs(x).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.round(x / scale) * scale


def test_a_layer_with_outlier_channels_at_four_bits():
    """The specification's fixture: W4A8, a scale for every token and every output channel."""
    rng = np.random.default_rng(0)
    rng.standard_normal((64, 1152))
    rng.random((1, 128))
    x = rng.standard_normal((2048, 1152)) * np.exp(0.4 * rng.standard_normal(1152))
    x[:, rng.choice(1152, 12, replace=False)] *= 40
    w = rng.standard_normal((1152, 1152)) * 0.02 * np.exp(0.2 * rng.standard_normal(1152))
    w[:, rng.choice(1152, 6, replace=False)] *= 8
    y = x @ w.T

    def error(s):
        made = symmetric(x / s, 8) @ symmetric(w * s, 4).T
        return np.linalg.norm(made - y) / np.linalg.norm(y)

    s = csb_factors(jnp.asarray(abs(x).max(0)), weight_magnitude(jnp.asarray(w.T)))
    np.testing.assert_allclose([error(1.0), error(np.asarray(s))], [0.5787, 0.1411], atol=5e-4)
