"""Log grids: which values the codes stand for, and the gradient that is claimed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.quantizer import codes, fake_quant
from qdiff_jax.quant.spec import QuantSpec


def params(grid="log2", zero_code=False, hi=1.0, qmax=7):
    return from_range(QuantSpec(grid=grid, zero_code=zero_code), 0.0, hi, 0, qmax)


def test_codes_are_rounded_negative_logarithms_and_decode_to_powers():
    x = jnp.array([1.0, 0.75, 0.7, 0.5, 0.3, 2.0**-6.4, 2.0**-6.6, 2.0**-7.4])
    np.testing.assert_array_equal(codes(params(), x), [0, 0, 1, 1, 2, 6, 7, 7])
    np.testing.assert_array_equal(
        fake_quant(params(), x), [1, 1, 0.5, 0.5, 0.25, 2.0**-6, 2.0**-7, 2.0**-7]
    )


def test_the_scale_multiplies_exactly():
    x = jax.random.uniform(jax.random.key(0), (100,))
    np.testing.assert_array_equal(
        fake_quant(params(hi=0.3), x * jnp.float32(0.3)) / np.float32(0.3),
        fake_quant(params(), (x * jnp.float32(0.3)) / np.float32(0.3)),
    )


def test_zero_negatives_and_the_deep_tail_take_the_last_code():
    x = jnp.array([0.0, -0.5, 2.0**-7.6, 2.0**-30, 1e-45])
    np.testing.assert_array_equal(codes(params(), x), [7] * 5)
    np.testing.assert_array_equal(fake_quant(params(), x), [2.0**-7] * 5)
    np.testing.assert_array_equal(fake_quant(params(zero_code=True), x), [0.0] * 5)


def test_half_steps_are_powers_of_the_root_of_two():
    q = np.arange(8)
    values = 2.0 ** (-q / 2)
    grid = params("log_sqrt2")
    np.testing.assert_array_equal(codes(grid, jnp.asarray(values, jnp.float32)), q)
    np.testing.assert_allclose(fake_quant(grid, jnp.asarray(values, jnp.float32)), values, 1e-7)
    # The published closed form: 2**-ceil(q/2) * (1 + (sqrt(2) - 1) * [q odd]).
    np.testing.assert_allclose(values, 2.0 ** -np.ceil(q / 2) * (1 + (2**0.5 - 1) * (q % 2)))


@pytest.mark.parametrize("grid", ["log2", "log_sqrt2"])
def test_relative_error_is_at_most_half_a_step_of_the_logarithm(grid):
    x = jnp.exp2(-jnp.linspace(0.0, 3.0, 999))
    ratio = np.log2(np.asarray(fake_quant(params(grid), x)) / np.asarray(x))
    assert np.abs(ratio).max() <= (0.5 if grid == "log2" else 0.25) + 1e-6


@pytest.mark.parametrize("grid", ["log2", "log_sqrt2"])
def test_gradients(grid):
    x = jnp.array([0.9, 0.3, 0.11, 0.0, -1.0, 1e-5, 3.0])
    hi = jnp.float32(0.8)

    def loss(x, hi):
        return fake_quant(params(grid).replace(scale=hi), x)

    _, to_x = jax.jit(lambda x: jax.jvp(lambda x: loss(x, hi), (x,), (jnp.ones_like(x),)))(x)
    x_hat, to_scale = jax.jit(lambda h: jax.jvp(lambda h: loss(x, h), (h,), (jnp.ones_like(h),)))(
        hi
    )
    x_hat = np.asarray(x_hat)
    inside = np.array([True, True, True, False, False, False, False])
    ratio = x_hat[:3] / np.asarray(x[:3])
    np.testing.assert_allclose(to_x[:3], ratio, rtol=1e-5)
    np.testing.assert_array_equal(to_x[3:], np.zeros(4))
    np.testing.assert_allclose(to_scale, np.where(inside, 0.0, x_hat / 0.8), rtol=1e-5, atol=1e-6)


def test_nan_stays():
    assert np.isnan(np.asarray(fake_quant(params(), jnp.array([jnp.nan])))).all()
