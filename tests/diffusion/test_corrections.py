"""The affine correction: exact identities of the estimate and of the variance a step adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.diffusion.corrections import (
    absorbed_variance,
    affine_hooks,
    affine_table,
    correct,
    hooks_of,
    reduced_sigma,
)
from qdiff_jax.diffusion.guidance import classifier_free, combine
from qdiff_jax.diffusion.hooks import IDENTITY
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.diffusion.samplers import ddim, ddpm, dpmpp_2m
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.export.encode import decode_tree, encode_tree
from qdiff_jax.quant.timed import select, step_context

SCHEDULE = make_schedule("linear")
GRID = make_timesteps("uniform", 1000, 5)
PLANS = {
    "ddpm": ddpm(SCHEDULE, GRID),
    "ddim eta 1": ddim(SCHEDULE, GRID, eta=1.0),
    "ddim eta 0": ddim(SCHEDULE, GRID),
    "dpmpp_2m": dpmpp_2m(SCHEDULE, GRID + 1),
}
STOCHASTIC = ("ddpm", "ddim eta 1")


def table(plan, scale=1.0, shift=0.0, variance=0.0, channels=2):
    rows = np.ones((plan.steps, channels))
    return affine_table(scale * rows, shift * rows, variance * rows[:, 0], plan.timesteps)


def predict(variables, x, ctx, y):
    return 0.9 * jnp.tanh(x + 0.001 * ctx.t)


def drawn(plan, hooks):
    return sample(predict, {}, plan, jax.random.key(7), range(4), shape=(4, 4, 2), hooks=hooks).x


def sigma_after(plan, hooks, j):
    x = jnp.zeros((1, 2))
    ctx = step_context(plan.timesteps[j], plan.index[j])
    return hooks.after(hooks.init(x), ctx, x, x, plan.rows["sigma"][j], None, None)[2]


@pytest.mark.parametrize("name", PLANS)
def test_a_correction_without_error_changes_no_bit_of_estimate_and_noise_level(name):
    plan = PLANS[name]
    hooks = affine_hooks(table(plan), plan)
    eps = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
    for j in range(5):
        sigma = jnp.asarray(plan.rows["sigma"][j])
        ctx = step_context(plan.timesteps[j], j)
        _, after, left = hooks.after(hooks.init(eps), ctx, eps, eps, sigma, None, None)
        np.testing.assert_array_equal(after, eps)
        np.testing.assert_array_equal(left, sigma)


def test_a_correction_without_error_leaves_the_samples_as_they_are():
    plan = PLANS["ddim eta 1"]
    # Not to the last bit: another program rounds its sums differently.
    corrected = drawn(plan, affine_hooks(table(plan), plan))
    np.testing.assert_allclose(corrected, drawn(plan, IDENTITY), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PLANS)
def test_every_row_is_applied_at_its_own_step_and_channel(name):
    plan = PLANS[name]
    rng = np.random.default_rng(0)
    scale, shift = rng.uniform(0.5, 2.0, (2, 5, 2))
    hooks = affine_hooks(affine_table(scale, shift, np.zeros(5), plan.timesteps), plan)
    eps = rng.standard_normal((3, 4, 4, 2)).astype(np.float32)
    for j in range(5):
        ctx = step_context(plan.timesteps[j], j)
        found = hooks.after(hooks.init(eps), ctx, eps, jnp.asarray(eps), jnp.zeros(()), None, None)
        np.testing.assert_allclose(found[1], scale[j] * eps + shift[j], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_residual_variance_is_taken_out_of_the_noise_up_to_all_of_it(name):
    plan = PLANS[name]
    for variance in (0.01, 100.0):
        hooks = affine_hooks(table(plan, variance=variance), plan)
        taken = absorbed_variance(plan, np.full(5, variance))
        for j in range(5):
            nominal = float(plan.rows["sigma"][j]) ** 2
            left = float(sigma_after(plan, hooks, j)) ** 2
            np.testing.assert_allclose(left + taken[j], nominal, rtol=1e-4, atol=1e-7)
            assert left <= nominal
        assert (taken[1:] > 0).all()


@pytest.mark.parametrize("name", ["ddim eta 0", "dpmpp_2m"])
def test_deterministic_samplers_have_no_noise_to_lower(name):
    plan = PLANS[name]
    assert (absorbed_variance(plan, np.full(5, 0.3)) == 0).all()
    with_variance, without = (
        drawn(plan, affine_hooks(table(plan, 1.01, 0.02, v), plan)) for v in (0.3, 0.0)
    )
    np.testing.assert_array_equal(with_variance, without)


def test_variance_of_a_ddpm_step_is_nominal_when_the_estimate_carries_the_residual():
    """Var(c n) + sigma'^2 = sigma^2, by drawing the residual n and taking the sampler's own step."""
    plan, variance, count = PLANS["ddpm"], 0.02, 200_000
    hooks = affine_hooks(table(plan, variance=variance, channels=1), plan)
    residual, fresh = jax.random.normal(jax.random.key(0), (2, count, 1))
    x = jnp.full((count, 1), 0.3)
    for j in range(1, 5):
        row = {name: values[j] for name, values in plan.rows.items()}
        sigma = sigma_after(plan, hooks, j)
        eps = 0.1 + variance**0.5 * residual
        stepped = plan.sampler.step(row, (), x, eps, sigma, fresh)[1]
        nominal = float(row["sigma"]) ** 2
        assert 0 < float(sigma) ** 2 < 0.999 * nominal
        np.testing.assert_allclose(float(stepped.var()), nominal, rtol=0.015)


def test_ddpm_formula_of_the_paper_is_the_same_as_with_the_coefficient_of_the_plan():
    """sigma^2 - beta^2 v / (alpha (1 - alpha_bar) (1 + k)^2) on consecutive timesteps."""
    every = np.arange(1000.0)
    beta, alpha_bar = SCHEDULE.betas, SCHEDULE.alpha_bar
    variance, slope = 1e-3, 0.2
    for plan in (ddpm(SCHEDULE, every, variance="fixed_small"), ddim(SCHEDULE, every, eta=1.0)):
        sigma, c = (np.float64(plan.rows[name]) for name in ("sigma", "eps_coefficient"))
        wanted = sigma**2 - beta**2 * variance / ((1 - beta) * (1 - alpha_bar) * (1 + slope) ** 2)
        found = reduced_sigma(
            jnp.float32(sigma), jnp.float32(c), jnp.float32(variance / (1 + slope) ** 2)
        )
        # Not the first two: there 1 - alpha_bar_prev of a float32 plan leaves next to nothing.
        np.testing.assert_allclose(
            np.float64(found[2:]) ** 2, np.maximum(wanted, 0)[2:], rtol=1e-3, atol=1e-9
        )


def test_correcting_each_branch_is_correcting_the_guided_estimate():
    plan = PLANS["ddim eta 0"]
    row = select(table(plan, 0.9, 0.05), step_context(plan.timesteps[2], 2))
    guidance = classifier_free(3.0, 0)
    c, u = jax.random.normal(jax.random.key(1), (2, 3, 4, 2))
    np.testing.assert_allclose(
        combine(guidance, correct(row, c), correct(row, u)),
        correct(row, combine(guidance, c, u)),
        atol=1e-5,
    )


def test_tables_are_refused_where_they_say_nothing():
    plan = PLANS["ddim eta 1"]
    other = ddim(SCHEDULE, GRID + 5, eta=1.0)
    with pytest.raises(ValueError, match="correction.*timestep 5 .*never calibrated"):
        affine_hooks(table(plan), other)
    good = np.ones((5, 2))
    with pytest.raises(ValueError, match="scale of the correction at timestep 400 is not finite"):
        affine_table(np.where(np.arange(5)[:, None] == 2, np.nan, good), good, np.ones(5), GRID)
    with pytest.raises(ValueError, match="negative"):
        affine_table(good, good, -np.ones(5), GRID)
    with pytest.raises(ValueError, match="scale and shift"):
        affine_table(good, good[:4], np.ones(5), GRID)
    with pytest.raises(ValueError, match="dict is no correction"):
        hooks_of({}, plan)
    assert hooks_of(None, plan) is IDENTITY


def test_a_table_is_described_and_rebuilt_bit_for_bit():
    plan = PLANS["ddim eta 1"]
    stored = table(plan, 0.9, 0.1, 0.2)
    described, arrays, kinds = encode_tree(stored, "correction", "correction")
    rebuilt = decode_tree(described, arrays.__getitem__)
    assert set(kinds.values()) == {"correction"}
    assert jax.tree.structure(rebuilt) == jax.tree.structure(stored)
    for leaf, wanted in zip(jax.tree.leaves(rebuilt), jax.tree.leaves(stored)):
        np.testing.assert_array_equal(leaf, wanted)
