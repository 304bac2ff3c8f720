"""AdaRound: its start, its schedule, what it decides, and how much it gains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qdiff_jax.quant import rounding
from qdiff_jax.quant.quantizer import codes, fake_quant
from qdiff_jax.quant.ranges import weight_qparams
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.runtime.loop import run_steps

CHANNEL = QuantSpec(granularity="channel")
jitted_codes, jitted_fake_quant = jax.jit(codes), jax.jit(fake_quant)
jitted_soft_weight = jax.jit(rounding.soft_weight)
SPECS = [
    CHANNEL,
    QuantSpec(granularity="channel", symmetric=True, signed=True),
    QuantSpec(granularity="group", group=4, axis=-2),
    QuantSpec(),
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_step_at_all_is_nearest_rounding_and_the_soft_weight_the_clipped_one(spec, bits):
    w = np.random.default_rng(0).standard_normal((3, 3, 8, 6)).astype(np.float32)
    params = weight_qparams(w, spec, bits)
    soft = rounding.soft_rounding(w, params)
    np.testing.assert_array_equal(rounding.hard_codes(soft), jitted_codes(params, w))
    np.testing.assert_array_equal(rounding.hard_weight(soft), jitted_fake_quant(params, w))
    # So wide that not even a rounded zero point clips anything.
    wide = weight_qparams(w, spec, bits, method="minmax", margin=2.0)
    start = jitted_soft_weight(rounding.soft_rounding(w, wide))
    np.testing.assert_allclose(start, w, atol=3e-6)


def test_ties_go_where_nearest_rounding_sends_them():
    ratio = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, 0.50000006, 3.0, 0.0], np.float32)
    params = weight_qparams(np.array([-4.0, 11.0]), QuantSpec(), 4, method="minmax")
    assert float(params.scale) == 1.0
    soft = rounding.soft_rounding(jnp.asarray(ratio), params)
    np.testing.assert_array_equal(rounding.hard_codes(soft) - 4, np.round(ratio))


def test_h_and_its_gradient():
    alpha = jnp.array([-9.0, -2.0, 0.0, 2.0, 9.0])
    h = rounding.rectified_sigmoid(alpha)
    expected = np.clip(1.2 / (1 + np.exp(-np.asarray(alpha))) - 0.1, 0, 1)
    np.testing.assert_allclose(h, expected, rtol=1e-6)
    slope = jax.grad(lambda a: rounding.rectified_sigmoid(a).sum())(alpha)
    s = 1 / (1 + np.exp(-np.asarray(alpha)))
    np.testing.assert_allclose(slope, [0, *(1.2 * s * (1 - s))[1:-1], 0], rtol=1e-5)


def test_the_soft_weight_takes_no_gradient_where_the_code_is_clipped():
    w = jnp.array([-9.0, 0.3, 9.0])
    params = weight_qparams(np.array([-1.0, 1.0]), QuantSpec(), 4, method="minmax")
    soft = rounding.soft_rounding(w, params)
    slope = jax.grad(lambda a: rounding.soft_weight(soft.replace(alpha=a)).sum())(soft.alpha)
    assert slope[0] == 0
    assert slope[1] > 0
    assert slope[2] == 0


def test_schedule_is_linear_after_a_warm_up_at_its_start():
    steps = 1000
    beta = [float(rounding.beta_schedule(i, steps)) for i in (0, 199, 200, 600, 1000)]
    np.testing.assert_allclose(beta, [20, 20, 20, 11, 2], atol=1e-5)
    half = rounding.beta_schedule(350, 1000, start=10.0, end=4.0, warmup=0.1)
    np.testing.assert_allclose(half, 10 - 6 * 250 / 900, rtol=1e-6)


def test_penalty_is_off_in_the_warm_up_then_the_weighted_sum():
    alphas = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([[9.0]])}
    penalty = jax.jit(rounding.rounding_penalty)
    assert float(penalty(alphas, 199, 1000)) == 0.0
    h = np.asarray(rounding.rectified_sigmoid(jnp.array([0.0, 1.0, 9.0])))
    for step, beta in ((200, 20.0), (600, 11.0)):
        expected = 0.01 * (1 - np.abs(2 * h - 1) ** beta).sum()
        got = float(penalty(alphas, step, 1000))
        assert got == pytest.approx(expected, rel=1e-5)
    gradient = jax.jit(jax.grad(lambda a: rounding.rounding_penalty(a, 900, 1000)))(alphas)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_binarised_fraction_counts_what_hardening_leaves_alone():
    alpha = jnp.array([-9.0, 9.0, 0.0, 0.1])
    assert float(rounding.binarised_fraction({"w": alpha})) == 0.5


def test_log_grids_cannot_be_rounded_this_way():
    params = weight_qparams(np.ones(4), QuantSpec(grid="log2"), 4, method="minmax")
    with pytest.raises(ValueError, match="affine"):
        rounding.soft_rounding(jnp.ones(4), params)


STEPS = 1500
OPTIMIZER = optax.adam(1e-2)


@functools.cache
def dense(correlated):
    """A 64 -> 32 layer; 2048 inputs whose spectrum falls fast or not at all, and held-out ones."""
    r = np.random.default_rng(0)
    basis = np.linalg.qr(r.standard_normal((64, 64)))[0]
    spread = np.exp(-np.arange(64) / 8.0) if correlated else np.ones(64)
    x = (r.standard_normal((4096, 64)) * spread) @ basis.T
    return x[:2048].astype(np.float32), x[2048:].astype(np.float32), r.standard_normal((64, 32))


def _step(carry, step):
    soft, state, x, y = carry

    def loss(alpha):
        y_hat = x @ rounding.soft_weight(soft.replace(alpha=alpha))
        fit = jnp.mean(jnp.sum((y_hat - y) ** 2, axis=-1))
        return fit + rounding.rounding_penalty(alpha, step, STEPS)

    updates, state = OPTIMIZER.update(jax.grad(loss)(soft.alpha), state)
    soft = soft.replace(alpha=optax.apply_updates(soft.alpha, updates))
    return (soft, state, x, y), None


@functools.cache
def learned(correlated, bits):
    x, held_out, w = dense(correlated)
    w = jnp.asarray(w, jnp.float32)
    params = weight_qparams(w, CHANNEL, bits)
    soft = rounding.soft_rounding(w, params)
    # The output error depends on the inputs through x^T x alone: its root has 64 rows, not 2048.
    root = jnp.asarray(np.linalg.cholesky(x.T.astype(np.float64) @ x / len(x)).T, jnp.float32)
    root = root * np.sqrt(64.0)
    carry = (soft, OPTIMIZER.init(soft.alpha), root, root @ w)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies by its integer step count
        (soft, *_), _ = run_steps(_step, carry, jnp.arange(STEPS), scan=True)
    target = held_out @ np.asarray(w)

    def error(weight):
        return float(np.mean((held_out @ np.asarray(weight) - target) ** 2))

    return soft, error(fake_quant(params, w)), error(rounding.hard_weight(soft)), params, w


def test_learned_rounding_beats_nearest_at_least_threefold_on_correlated_inputs():
    soft, nearest, ours, *_ = learned(True, 4)
    assert nearest >= 3 * ours
    assert float(rounding.binarised_fraction(soft.alpha)) >= 0.95


def test_learned_rounding_gains_nothing_on_white_inputs():
    """Nearest rounding is optimal when the input covariance is a multiple of the identity."""
    _, nearest, ours, *_ = learned(False, 4)
    assert ours == pytest.approx(nearest, rel=0.05)


def test_a_decided_weight_is_within_one_step_of_the_original_inside_the_range():
    soft, _, _, params, w = learned(True, 4)
    inside = (w >= (params.qmin - params.zero_point)[None] * params.scale[None]) & (
        w <= (params.qmax - params.zero_point)[None] * params.scale[None]
    )
    moved = jnp.abs(rounding.hard_weight(soft) - w)
    assert bool(jnp.all(~inside | (moved <= params.scale[None] * 1.00001)))
    assert not np.array_equal(rounding.hard_codes(soft), codes(params, w))
