"""Weights by step, against what a linear sampler does to an error by hand."""

import jax
import numpy as np
import pytest

from qdiff_jax.diffusion.samplers import ddim
from qdiff_jax.diffusion.schedule import alpha_bar_at, make_schedule
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.stages.row_weights import by_eps_coefficient, by_step, rollout_sensitivity, uniform

SCHEDULE = make_schedule("linear")
GRID = make_timesteps("uniform", 1000, 4)
PLAN = ddim(SCHEDULE, GRID)
INDEX = np.int32([0, 3, 3, 1])


def constant(variables, x, ctx, y):
    """An estimate that the state does not enter: errors are carried on by the sampler alone."""
    return 0.0 * x + variables["eps"]


def test_uniform_and_by_coefficient():
    np.testing.assert_array_equal(uniform(INDEX), np.ones(4))
    weights = by_eps_coefficient(PLAN, INDEX)
    c = np.asarray(PLAN.rows["eps_coefficient"], np.float64)[INDEX] ** 2
    np.testing.assert_allclose(weights, c / c.mean(), rtol=1e-5)


def test_sensitivity_of_a_linear_rollout():
    measured = rollout_sensitivity(
        constant,
        {"eps": np.float32(0.3)},
        PLAN,
        jax.random.key(0),
        np.arange(64),
        shape=(8, 8, 1),
    )
    alpha = alpha_bar_at(SCHEDULE, np.asarray(GRID, np.float64))
    carried = np.sqrt(np.concatenate([[1.0], alpha[:-1]]) / alpha)
    later = np.concatenate([[1.0], np.cumprod(carried)[:-1]])  # steps after j have smaller indices
    wanted = (np.asarray(PLAN.rows["eps_coefficient"], np.float64) * later) ** 2
    np.testing.assert_allclose(measured, wanted, rtol=0.1)


def test_what_cannot_be_weighed_is_refused():
    with pytest.raises(ValueError, match=r"step indices 0\.\.3, the schedule 3 steps"):
        by_step(np.ones(3), INDEX)
    with pytest.raises(ValueError, match="weigh nothing"):
        by_step(np.zeros(4), INDEX)
