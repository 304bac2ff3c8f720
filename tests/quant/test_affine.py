"""Straight-through primitives: exact values, and the gradients the published codes train with."""

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.quant import affine
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.spec import QuantSpec


def test_hard_clip_has_gradient_one_at_the_bounds_where_jnp_clip_has_a_half():
    x = jnp.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    ours = jax.grad(lambda x: affine.hard_clip(x, -1.0, 1.0).sum())(x)
    theirs = jax.grad(lambda x: jnp.clip(x, -1.0, 1.0).sum())(x)
    np.testing.assert_array_equal(ours, [0, 1, 1, 1, 0])
    np.testing.assert_array_equal(theirs, [0, 0.5, 1, 0.5, 0])
    np.testing.assert_array_equal(affine.hard_clip(x, -1.0, 1.0), jnp.clip(x, -1.0, 1.0))


def test_rounding_is_exact_half_to_even_and_survives_infinity():
    x = jnp.array([0.5, 1.5, 2.5, -0.5, 0.49999997, 8388607.0, jnp.inf, -jnp.inf])
    np.testing.assert_array_equal(affine.round_ste(x), np.round(np.asarray(x)))
    np.testing.assert_array_equal(affine.floor_ste(x), np.floor(np.asarray(x)))
    for ste in (affine.round_ste, affine.floor_ste):
        np.testing.assert_array_equal(jax.grad(lambda v, f=ste: f(v).sum())(x), np.ones(8))


def test_grad_scale_keeps_the_value_to_the_last_bit():
    x = jax.random.normal(jax.random.key(0), (1000,))
    np.testing.assert_array_equal(affine.grad_scale(x, 0.037), x)
    np.testing.assert_allclose(
        jax.grad(lambda v: affine.grad_scale(v, 0.037).sum())(x), np.full(1000, 0.037), rtol=1e-6
    )


def test_gradients_are_the_closed_form_of_lsq_for_x_scale_and_zero_point():
    # Values inside, exactly on both outermost codes, and beyond both ends.
    scale, zero, qmin, qmax = 0.25, 3.0, 0.0, 15.0
    x = jnp.linspace(-2.0, 4.0, 97)
    cotangent = jnp.cos(jnp.arange(97.0))

    def loss(x, scale, zero):
        params = QParams(scale, zero, jnp.float32(qmin), jnp.float32(qmax), QuantSpec())
        return (fake_quant(params, x) * cotangent).sum()

    got = jax.grad(loss, argnums=(0, 1, 2))(x, jnp.float32(scale), jnp.float32(zero))
    u = np.asarray(x, np.float64) / scale
    q = np.round(u) + zero
    inside = (q >= qmin) & (q <= qmax)
    assert inside.any()
    assert (~inside).any()
    q = np.clip(q, qmin, qmax)
    g = np.asarray(cotangent, np.float64)
    np.testing.assert_array_equal(got[0], np.where(inside, cotangent, 0))
    np.testing.assert_allclose(got[1], (g * np.where(inside, q - zero - u, q - zero)).sum(), 1e-5)
    np.testing.assert_allclose(got[2], (g * np.where(inside, 0, -scale)).sum(), rtol=1e-5)
