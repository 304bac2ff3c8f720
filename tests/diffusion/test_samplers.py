import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.diffusion.samplers import ddim, ddim_rows, ddpm, ddpm_rows, dpmpp_2m, make_plan
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.diffusion.timesteps import make_timesteps

LINEAR = make_schedule("linear")
GRID = make_timesteps("uniform", 1000, 20, offset=1)
PLANS = {
    "ddim": ddim(LINEAR, GRID, eta=0.5),
    "ddim_first": ddim(LINEAR, GRID, eta=1.0, final="first"),
    "ddpm_small": ddpm(LINEAR, GRID, variance="fixed_small"),
    "ddpm_large": ddpm(LINEAR, GRID, variance="fixed_large"),
    "dpmpp_2m": dpmpp_2m(LINEAR, GRID),
}


def row_of(plan, j):
    return jax.tree.map(lambda values: values[j], plan.rows)


def roll(plan, predict, x):
    """The sampler over a noiseless network predict(x, j), in visiting order, without sample()."""
    state = plan.sampler.init(x)
    step = jax.jit(plan.sampler.step)
    for j in reversed(range(plan.steps)):
        row = row_of(plan, j)
        state, x = step(row, state, x, predict(x, j), row["sigma"], jnp.zeros_like(x))
    return x


def test_ddim_at_eta_one_has_the_coefficients_of_ddpm():
    every = np.arange(1000)
    ancestral = ddim_rows(LINEAR, every, eta=1.0)
    alpha = 1 - LINEAR.betas
    expected = -LINEAR.betas / (np.sqrt(alpha) * np.sqrt(1 - LINEAR.alpha_bar))
    np.testing.assert_allclose(ancestral["eps_coefficient"], expected, rtol=0, atol=5e-15)
    posterior = ddpm_rows(LINEAR, every, variance="fixed_small")
    np.testing.assert_allclose(posterior["eps_coefficient"], expected, rtol=0, atol=5e-15)
    np.testing.assert_allclose(ancestral["sigma"], posterior["sigma"], rtol=0, atol=5e-15)


def test_ddim_coefficients_of_twenty_steps():
    grid = make_timesteps("linspace", 1000, 20)
    magnitude = {eta: -ddim_rows(LINEAR, grid, eta=eta)["eps_coefficient"] for eta in (0.0, 1.0)}
    # Step 0 starts at t = 0 and so removes almost nothing.
    assert magnitude[0.0][1:].min() == pytest.approx(0.17, abs=0.005)
    assert magnitude[0.0][1:].max() == pytest.approx(0.68, abs=0.005)
    assert magnitude[1.0][1:].min() == pytest.approx(0.19, abs=0.006)
    assert magnitude[1.0][1:].max() == pytest.approx(1.09, abs=0.005)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("j", [0, 1, 10, 19])
def test_eps_coefficient_is_the_sensitivity_of_the_step(name, j):
    plan = PLANS[name]
    row = row_of(plan, j)
    x, noise, memory = jax.random.normal(jax.random.key(j), (3, 1000))
    state = memory if name == "dpmpp_2m" else ()

    def advance(eps):
        return plan.sampler.step(row, state, x, eps, row["sigma"], noise)[1]

    _, change = jax.jvp(advance, (x,), (jnp.ones_like(x),))
    np.testing.assert_allclose(change, row["eps_coefficient"], rtol=1e-4, atol=1e-6)


def test_ddpm_and_ddim_at_eta_one_take_the_same_step():
    x, eps, noise = jax.random.normal(jax.random.key(0), (3, 500))
    small, ancestral = PLANS["ddpm_small"], ddim(LINEAR, GRID, eta=1.0)
    for j in range(small.steps):
        steps = [
            plan.sampler.step(row_of(plan, j), (), x, eps, row_of(plan, j)["sigma"], noise)[1]
            for plan in (small, ancestral)
        ]
        np.testing.assert_allclose(*steps, rtol=1e-4, atol=1e-5)


def test_variances_of_ddpm():
    betas = 1 - LINEAR.alpha_bar[GRID.astype(int)][1:] / LINEAR.alpha_bar[GRID.astype(int)][:-1]
    large, small = PLANS["ddpm_large"].rows["sigma"], PLANS["ddpm_small"].rows["sigma"]
    np.testing.assert_allclose(large[1:] ** 2, betas, rtol=1e-6)
    assert np.all(small[1:] < large[1:])
    assert large[0] == small[0] == 0


def test_clipping_bounds_the_predicted_image_only_when_asked():
    far = jnp.full((4,), 50.0)
    plans = {clip: ddpm(LINEAR, GRID, clip_x0=clip) for clip in (None, 1.0)}
    last = {
        clip: plan.sampler.step(row_of(plan, 0), (), far, 0.0 * far, 0.0, far)[1]
        for clip, plan in plans.items()
    }
    np.testing.assert_allclose(last[1.0], 1.0, rtol=1e-6)
    assert np.all(last[None] > 49)


@pytest.mark.parametrize("name", PLANS)
def test_a_point_is_reached_exactly(name):
    """With a single training image the true noise is known and every solver is exact."""
    plan, x0 = PLANS[name], jax.random.normal(jax.random.key(1), (50,))

    def true_noise(x, j):
        return (x - plan.rows["signal"][j] * x0) / plan.rows["noise"][j]

    x = roll(plan, true_noise, jax.random.normal(jax.random.key(2), (50,)))
    if name == "ddim_first":  # stops at alpha_bar of timestep 0, one percent of noise away
        assert 1e-4 < np.abs(x - x0).max() < 0.1
    else:
        np.testing.assert_allclose(x, x0, atol=2e-5)


def test_second_order_solver_converges_faster():
    """For Gaussian data the ODE has the solution x ~ sqrt(alpha_bar v + 1 - alpha_bar)."""
    v, last = 0.25, 900.0

    def error(make, steps):
        grid = np.linspace(0, last, steps + 1)[1:]
        plan = make(LINEAR, grid, final="first")
        spread = plan.rows["signal"] ** 2 * v + plan.rows["noise"] ** 2
        x = roll(plan, lambda x, j: plan.rows["noise"][j] / spread[j] * x, jnp.ones((1,)))
        first = LINEAR.alpha_bar[0]
        return abs(float(x[0]) - np.sqrt((first * v + 1 - first) / spread[-1]))

    euler, second = ([error(make, steps) for steps in (40, 80)] for make in (ddim, dpmpp_2m))
    assert euler[0] / euler[1] == pytest.approx(2, abs=0.5)
    assert second[0] / second[1] > 2.7
    assert second[1] < euler[1]


def test_a_changed_noise_level_enters_the_direction_term():
    """Whatever sigma a correction leaves, a unit-variance input keeps the marginal's variance."""
    plan = ddim(LINEAR, GRID, eta=1.0)
    j, (eps, noise) = 10, jax.random.normal(jax.random.key(3), (2, 200_000))
    row = row_of(plan, j)
    for share in (1.0, 0.5, 0.0):
        x = row["noise"] * eps  # the image is zero, so x_prev is pure noise
        x_prev = plan.sampler.step(row, (), x, eps, share * row["sigma"], noise)[1]
        assert float(jnp.var(x_prev)) == pytest.approx(float(row["variance_prev"]), rel=0.02)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown sampler 'heun'.*ddim.*ddpm.*dpmpp_2m"):
        make_plan("heun", LINEAR, GRID)
    with pytest.raises(ValueError, match="ascending order"):
        ddim(LINEAR, GRID[::-1])
    with pytest.raises(ValueError, match="eta must not be negative"):
        ddim(LINEAR, GRID, eta=-1.0)
    with pytest.raises(ValueError, match="final must be"):
        ddim(LINEAR, GRID, final="zero")
    with pytest.raises(ValueError, match="unknown variance 'learned'.*learned_range"):
        ddpm(LINEAR, GRID, variance="learned")
    with pytest.raises(ValueError, match="clip_x0 must be positive"):
        ddpm(LINEAR, GRID, clip_x0=0.0)
    with pytest.raises(ValueError, match="0..999"):
        ddim(LINEAR, GRID + 49)
    quad = make_timesteps("quad", 1000, 100)
    with pytest.raises(ValueError, match="dpmpp_2m cannot visit a timestep twice"):
        dpmpp_2m(LINEAR, quad)
    with pytest.raises(ValueError, match="learned variance cannot visit a timestep twice"):
        ddpm(LINEAR, quad, variance="learned_range")
    with pytest.raises(ValueError, match="grid that starts there"):
        dpmpp_2m(LINEAR, np.arange(20), final="first")
