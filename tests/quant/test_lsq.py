"""Learned steps: initial values, gradient scaling, the guard against crossing zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qdiff_jax.quant import lsq
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.quantizer import codes, dequantize, fake_quant
from qdiff_jax.quant.spec import QuantSpec

SIGNED = QuantSpec(symmetric=True, signed=True)


def test_initial_step_per_tensor_channel_and_group():
    x = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    got = lsq.initial_step(jnp.asarray(x), SIGNED, 7)
    np.testing.assert_allclose(got, 2 * np.abs(x).mean() / 7**0.5, rtol=1e-6)
    got = lsq.initial_step(jnp.asarray(x), QuantSpec(granularity="channel"), 15)
    np.testing.assert_allclose(got, 2 * np.abs(x).mean(0) / 15**0.5, rtol=1e-6)
    got = lsq.initial_step(jnp.asarray(x), QuantSpec(granularity="group", group=4, axis=-2), 15)
    np.testing.assert_allclose(got, 2 * np.abs(x).reshape(2, 4, 6).mean(1) / 15**0.5, rtol=1e-6)
    with pytest.raises(ValueError, match="dynamic"):
        lsq.initial_step(jnp.asarray(x), QuantSpec(granularity="token"), 15)


def test_lsq_plus_weight_start():
    w = np.random.default_rng(1).standard_normal(1000).astype(np.float32) + 0.3
    expected = max(abs(w.mean() - 3 * w.std()), abs(w.mean() + 3 * w.std())) / 8
    np.testing.assert_allclose(lsq.lsq_plus_weight_step(jnp.asarray(w), 4), expected, rtol=1e-5)


def gradients(params, x, **options):
    def loss(scale, zero):
        trained = params.replace(scale=scale, zero_point=zero)
        return fake_quant(lsq.learned(trained, **options), x).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(params.scale, params.zero_point)


def test_gradient_factor_multiplies_the_closed_form():
    x = jax.random.normal(jax.random.key(0), (4, 50))
    params = from_range(SIGNED, -1.0, 1.0, -8, 7)
    plain, _ = gradients(params, x)
    factor = lsq.gradient_factor(x.size, 7)
    assert float(factor) == pytest.approx((200 * 7) ** -0.5)
    scaled, _ = gradients(params, x, gradient_factor=factor)
    u = np.asarray(x, np.float64) / float(params.scale)
    q = np.round(u)
    expected = np.where((q >= -8) & (q <= 7), q - u, np.clip(q, -8, 7)).sum()
    assert float(plain) == pytest.approx(expected, rel=1e-4)
    assert float(scaled) == pytest.approx(expected * float(factor), rel=1e-4)
    per_channel = lsq.gradient_factor(x.size, jnp.full(50, 7.0), cells=50)
    np.testing.assert_allclose(per_channel, np.full(50, (4 * 7) ** -0.5), rtol=1e-6)


def test_zero_point_is_learned_only_on_request_and_stays_an_integer():
    x = jnp.linspace(-3.0, 3.0, 61)
    params = from_range(QuantSpec(), -1.0, 1.5, 0, 15)
    assert float(gradients(params, x)[1]) == 0.0
    learned = gradients(params, x, learn_zero_point=True)[1]
    q = np.round(np.asarray(x) / float(params.scale)) + float(params.zero_point)
    outside = ((q < 0) | (q > 15)).sum()
    assert float(learned) == pytest.approx(-float(params.scale) * outside, rel=1e-5)
    drifted = params.replace(zero_point=params.zero_point + 0.4)
    rounded = lsq.learned(drifted, learn_zero_point=True)
    assert float(rounded.zero_point) == float(params.zero_point)
    np.testing.assert_array_equal(dequantize(rounded, codes(rounded, x)), fake_quant(rounded, x))
    free = lsq.learned(drifted, learn_zero_point=True, round_zero_point=False)
    assert float(free.zero_point) == float(drifted.zero_point)


def test_values_are_untouched_while_the_step_is_positive():
    params = from_range(QuantSpec(granularity="channel"), -jnp.ones(5), jnp.ones(5) * 1.7, 0, 15)
    trained = lsq.learned(params, gradient_factor=0.013, learn_zero_point=True)
    np.testing.assert_array_equal(trained.scale, params.scale)
    np.testing.assert_array_equal(trained.zero_point, params.zero_point)


def test_a_step_below_zero_is_floored_but_keeps_its_gradient():
    scale = jnp.array([-1.0, 0.0, 1e-9, 0.5])
    np.testing.assert_array_equal(
        lsq.positive(scale), np.array([1e-8, 1e-8, 1e-8, 0.5], np.float32)
    )
    np.testing.assert_array_equal(jax.grad(lambda s: lsq.positive(s).sum())(scale), np.ones(4))


def test_training_the_step_lowers_the_error_of_a_bad_start():
    x = jax.random.normal(jax.random.key(2), (2000,))
    params = from_range(SIGNED, -8.0, 8.0, -8, 7)
    optimizer = optax.adam(1e-2)

    def error(scale):
        return jnp.mean((fake_quant(lsq.learned(params.replace(scale=scale)), x) - x) ** 2)

    @jax.jit
    def step(scale, state):
        updates, state = optimizer.update(jax.grad(error)(scale), state)
        return optax.apply_updates(scale, updates), state

    scale, state = params.scale, optimizer.init(params.scale)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies by its integer step count
        for _ in range(120):
            scale, state = step(scale, state)
    assert float(error(scale)) < 0.25 * float(error(params.scale))
    # Near the step that is optimal for a unit Gaussian on 16 symmetric levels.
    assert float(scale) == pytest.approx(0.335, abs=0.03)
