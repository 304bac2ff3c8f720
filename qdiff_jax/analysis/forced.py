"""Noise estimates of a variant on the states of full-precision trajectories (teacher-forced)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.analysis.subject import Subject
from qdiff_jax.diffusion.hooks import IDENTITY, Hooks
from qdiff_jax.diffusion.noise import sample_keys, step_keys
from qdiff_jax.models.registry import predictor
from qdiff_jax.quant.timed import step_context


@functools.partial(jax.jit, static_argnames=("predict", "before", "after"))
def _estimate(predict, before, after, variables, x, ctx, y, state):
    def call_model(x, ctx):
        return predict(variables, x, ctx, y)

    keys = step_keys(sample_keys(jax.random.key(0), jnp.arange(len(x))), ctx.index, 1)
    state, x = before(state, ctx, x)
    return after(state, ctx, x, call_model(x, ctx), jnp.zeros(()), keys, call_model)[1]


def forced_eps(
    subject: Subject,
    variables: Any,
    on_step: Callable | None = None,
    hooks: Hooks = IDENTITY,
) -> np.ndarray:
    """[S, N, ...] float32, steps ascending. hooks: the correction of the variant's sampling, whose state is new
    at each step."""
    predict, trajectory = predictor(subject.model.module), subject.trajectory
    estimates = []
    for i, t in enumerate(trajectory.t):
        ctx, x = step_context(t, trajectory.index[i]), jnp.asarray(trajectory.x[i])
        call = functools.partial(_estimate, predict, hooks.before, hooks.after)
        estimates.append(call(variables, x, ctx, trajectory.y, hooks.init(x)))
        if on_step is not None:
            on_step(i + 1, len(trajectory.t))
    return np.stack([np.asarray(eps) for eps in estimates])
