"""Factors of input channels: aggregation over time, exactness, and what they do to quantized layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_jax.operators import DENSE, plain, same_conv
from qdiff_jax.policy import ACTIVATION, WEIGHT, Entry
from qdiff_jax.quant.reparameterise import (
    EXPONENTS,
    channel_factors,
    output_errors,
    scale_channels,
    scale_rows,
    time_weighted_range,
)


def entry(operand, bits):
    if bits == 32:
        return None
    return Entry("site", operand, bits, WEIGHT if operand == "weight" else ACTIVATION, "test")


def uneven(seed=0):
    """64 channels with log-normal gains that grow by up to 3 over 8 steps; a dense layer behind."""
    rng = np.random.default_rng(seed)
    gains = rng.lognormal(0.0, 1.0, 64)
    growth = 1.0 + np.linspace(0, 1, 8)[:, None] * rng.uniform(0.0, 2.0, 64)
    x = rng.standard_normal((8, 64, 64)) * (growth * gains)[:, None, :]
    kernel = rng.standard_normal((64, 64)) / 8.0
    return jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)


def errors(w_bits, a_bits):
    """Output errors without factors and for every exponent."""
    x, kernel = uneven()
    ranges = time_weighted_range(jnp.max(jnp.abs(x), axis=1))
    factors = [jnp.ones(64), *(channel_factors(ranges, kernel, a) for a in EXPONENTS)]
    found = output_errors(
        DENSE, x, kernel, jnp.stack(factors), entry("input", a_bits), entry("weight", w_bits)
    )
    return dict(zip(("none", *EXPONENTS), np.asarray(found)))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_aggregate_lies_between_mean_and_maximum(seed):
    ranges = np.random.default_rng(seed).exponential(1.0, (6, 5)).astype(np.float32)
    ranges[:, 0] = 0.0
    found = np.asarray(time_weighted_range(jnp.asarray(ranges)))
    assert (found >= ranges.mean(axis=0) * (1 - 1e-6)).all()
    assert (found <= ranges.max(axis=0) * (1 + 1e-6)).all()


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_the_layer_is_unchanged_in_full_precision(exponent):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 5, 5, 6)) * np.arange(1, 7), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 6, 4)), jnp.float32)
    r = channel_factors(jnp.max(jnp.abs(x), axis=(0, 1, 2)), kernel, exponent)
    np.testing.assert_allclose(jnp.prod(r), 1.0, rtol=1e-4)
    before = plain(same_conv(3), x, kernel, None)
    after = plain(same_conv(3), scale_channels(x, 1.0 / r), scale_rows(kernel, r), None)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5 * float(jnp.abs(before).max()))


def test_exponent_one_evens_out_the_activation_and_zero_the_weight():
    x, kernel = uneven()
    ranges = jnp.max(jnp.abs(x), axis=(0, 1))
    moved = ranges / channel_factors(ranges, kernel, 1.0)
    np.testing.assert_allclose(moved, jnp.broadcast_to(moved[0], (64,)), rtol=1e-4)
    rows = jnp.max(jnp.abs(scale_rows(kernel, channel_factors(ranges, kernel, 0.0))), axis=1)
    np.testing.assert_allclose(rows, jnp.broadcast_to(rows[0], (64,)), rtol=1e-4)


def test_a_common_factor_is_immaterial():
    x, kernel = uneven()
    r = channel_factors(time_weighted_range(jnp.max(jnp.abs(x), axis=1)), kernel, 0.5)
    found = output_errors(
        DENSE, x, kernel, jnp.stack([r, 4.0 * r]), entry("input", 6), entry("weight", 6)
    )
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


def test_the_papers_exponent_helps_at_six_bits_and_hurts_where_weights_are_the_bottleneck():
    six = errors(6, 6)
    assert six[1.0] * 3 <= six["none"]
    four_eight = errors(4, 8)
    assert four_eight[1.0] > four_eight["none"]
    assert min(four_eight.values()) < four_eight["none"]


def test_weights_in_full_precision_leave_the_activation_to_gain():
    found = errors(32, 4)
    assert found[1.0] * 2 <= found["none"]
    assert found[1.0] == min(found.values())


def test_nothing_quantized_costs_nothing():
    x, kernel = uneven()
    r = jax.random.uniform(jax.random.key(0), (1, 64), minval=0.5, maxval=2.0)
    found = output_errors(DENSE, x, kernel, r, None, None)
    assert found[0] < 1e-8 * float(jnp.mean(plain(DENSE, x, kernel, None) ** 2))
