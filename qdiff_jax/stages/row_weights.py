"""How much each calibration sample counts in a weighted least squares: by what its step does to the
rollout.

An error in the noise estimate of step j enters the next state multiplied by the sampler's coefficient
c_j, and what becomes of it until the end is up to the network. Weights are squared, since losses are, and
scaled to mean 1 over the set. With any of them the moments of closed-form rounding are sums over the same
rows, so they cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.diffusion.guidance import Guidance, Predict
from qdiff_jax.diffusion.hooks import Hooks, keep_input
from qdiff_jax.diffusion.noise import normal
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.diffusion.samplers import SamplerPlan

RULES = ("uniform", "eps_coefficient", "sensitivity")


def uniform(index: np.ndarray) -> np.ndarray:
    """[N] ones."""
    return np.ones(len(index), np.float32)


def eps_importance(plan: SamplerPlan) -> np.ndarray:
    """[S] float64: c_j^2 of every step."""
    return np.asarray(plan.rows["eps_coefficient"], np.float64) ** 2


def by_eps_coefficient(plan: SamplerPlan, index: np.ndarray) -> np.ndarray:
    """[N] float32: c_j^2 of each sample's step index j. Raises ValueError for an unknown index."""
    return by_step(eps_importance(plan), index)


def by_step(importance: np.ndarray, index: np.ndarray) -> np.ndarray:
    """[N] float32: importance [S] (non-negative) of each sample's step index, scaled to mean 1.

    Raises ValueError for an index outside the schedule, or if all weights are zero.
    """
    importance, index = np.asarray(importance, np.float64), np.asarray(index)
    if index.size and (index.min() < 0 or index.max() >= len(importance)):
        raise ValueError(
            f"The samples have step indices {index.min()}..{index.max()}, the schedule "
            f"{len(importance)} steps; calibrate on the sampler's own steps, or weigh uniformly."
        )
    weights = importance[index]
    if not weights.sum() > 0:
        raise ValueError("Every sample would weigh nothing; give steps a positive importance.")
    return np.asarray(weights / weights.mean(), np.float32)


def rollout_sensitivity(
    predict: Predict,
    variables: Any,
    plan: SamplerPlan,
    key: jax.Array,
    indices: Sequence[int] | np.ndarray,
    *,
    shape: tuple[int, ...],
    y: Any = None,
    guidance: Guidance | None = None,
    amplitude: float = 0.02,
    batch_size: int | None = None,
) -> np.ndarray:
    """[S] float64: how much the mean square of the final sample changes for noise of unit variance in
    the noise estimate of one step; S + 1 rollouts from the same noise.

    The other arguments are those of `diffusion.sample.sample`; amplitude: standard deviation of the
    noise that is really added, small enough for the answer to be linear in its variance.
    """

    def rollout(step: int) -> np.ndarray:
        # State and not closure: one compile serves every step.
        hooks = Hooks(
            init=lambda x: (jnp.int32(step), jnp.float32(amplitude)),
            before=keep_input,
            after=_disturb,
        )
        return sample(
            predict,
            variables,
            plan,
            key,
            indices,
            shape=shape,
            y=y,
            guidance=guidance,
            hooks=hooks,
            batch_size=batch_size,
        ).x.astype(np.float64)

    still = rollout(-1)
    moved = [np.mean((rollout(step) - still) ** 2) for step in range(plan.steps)]
    return np.asarray(moved) / amplitude**2


def _disturb(state, ctx, x, eps, sigma, keys, call_model):
    step, amplitude = state
    size = jnp.where(ctx.index == step, amplitude, 0.0)
    return state, eps + size * normal(keys, eps), sigma
