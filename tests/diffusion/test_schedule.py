import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_jax.diffusion.schedule import (
    alpha_bar_at,
    from_betas,
    make_schedule,
    marginals,
    predict_eps,
    predict_x0,
    q_sample,
)


def test_linear_is_that_of_ddpm():
    schedule = make_schedule("linear")
    assert schedule.num_timesteps == 1000
    assert (schedule.betas[0], schedule.betas[-1]) == (1e-4, 0.02)
    assert schedule.alpha_bar.dtype == np.float64
    # Log of the product, summed independently of the cumulative product.
    np.testing.assert_allclose(
        np.log(schedule.alpha_bar[-1]), np.sum(np.log1p(-schedule.betas)), rtol=1e-12
    )
    short = make_schedule("linear", 200, beta_start=5e-4, beta_end=0.1)
    assert (short.num_timesteps, short.betas[-1]) == (200, 0.1)


def test_scaled_linear_is_linear_in_the_square_root():
    betas = make_schedule("scaled_linear").betas
    np.testing.assert_allclose(betas[[0, -1]], [0.00085, 0.012], rtol=1e-12)
    np.testing.assert_allclose(np.diff(np.sqrt(betas), 2), 0, atol=1e-12)


def test_cosine_follows_the_squared_cosine_until_betas_are_clipped():
    schedule = make_schedule("cosine", 4000)
    grid = (np.arange(1, 4001) / 4000 + 0.008) / 1.008 * np.pi / 2
    expected = np.cos(grid) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedule.alpha_bar[:3990], expected[:3990], rtol=1e-9)
    assert schedule.betas.max() == 0.999


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown noise schedule 'sqrt'.*cosine.*linear"):
        make_schedule("sqrt")
    with pytest.raises(ValueError, match=r"'cosine' has no option \['beta_start'\].*shift"):
        make_schedule("cosine", beta_start=0.1)
    with pytest.raises(ValueError, match="at least 1"):
        make_schedule("linear", 0)
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\)"):
        from_betas("mine", np.array([0.1, 1.0]))


def test_alpha_bar_at_fractional_timesteps():
    schedule = make_schedule("linear")
    np.testing.assert_array_equal(
        alpha_bar_at(schedule, [0, 7, 999]), schedule.alpha_bar[[0, 7, 999]]
    )
    between = alpha_bar_at(schedule, 7.5)
    np.testing.assert_allclose(
        between**2, schedule.alpha_bar[7] * schedule.alpha_bar[8], rtol=1e-12
    )
    for outside in (-0.1, 999.1, np.nan):
        with pytest.raises(ValueError, match="0..999"):
            alpha_bar_at(schedule, outside)


def test_marginals_keep_their_digits_and_refuse_other_timesteps():
    schedule = make_schedule("linear")
    signal, noise = jax.jit(lambda t: marginals(schedule, t))(jnp.array([0, -1, 999, 1000]))
    # 1 - alpha_bar in float32 would be off by 5e-4 of itself here.
    np.testing.assert_allclose(noise[0], 0.01, rtol=2e-7)
    np.testing.assert_array_equal(np.isnan(signal), [False, True, False, True])
    np.testing.assert_array_equal(np.isnan(noise), [False, True, False, True])


@jax.jit
def _round_trip(x0, t, eps):
    schedule = make_schedule("linear")
    x = q_sample(schedule, x0, t, eps)
    return x, predict_x0(schedule, x, t, eps), predict_eps(schedule, x, t, x0)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(t=st.integers(0, 700), seed=st.integers(0, 100))
def test_the_three_quantities_imply_each_other(t, seed):
    schedule = make_schedule("linear")
    x0, eps = jax.random.normal(jax.random.key(seed), (2, 3, 4, 4, 2))
    steps = jnp.array([t, t // 2, 0])
    x, back, noise = _round_trip(x0, steps, eps)
    expected = np.sqrt(schedule.alpha_bar[t]) * x0[0] + np.sqrt(1 - schedule.alpha_bar[t]) * eps[0]
    np.testing.assert_allclose(x[0], expected, atol=1e-6)
    np.testing.assert_allclose(back, x0, atol=2e-5)
    # At t = 0 a rounding error of x is divided by 0.01.
    np.testing.assert_allclose(noise, eps, atol=1e-4)
