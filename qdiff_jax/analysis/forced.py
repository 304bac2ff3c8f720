"""Noise estimates of a variant on the states of full-precision trajectories (teacher-forced)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from qdiff_jax.analysis.subject import Subject
from qdiff_jax.models.registry import predictor
from qdiff_jax.quant.timed import step_context


@functools.partial(jax.jit, static_argnames="predict")
def _estimate(predict, variables, x, ctx, y):
    return predict(variables, x, ctx, y)


def forced_eps(subject: Subject, variables: Any, on_step: Callable | None = None) -> np.ndarray:
    """[S, N, ...] float32, steps ascending."""
    predict, trajectory = predictor(subject.model.module), subject.trajectory
    estimates = []
    for i, t in enumerate(trajectory.t):
        ctx = step_context(t, trajectory.index[i])
        estimates.append(_estimate(predict, variables, trajectory.x[i], ctx, trajectory.y))
        if on_step is not None:
            on_step(i + 1, len(trajectory.t))
    return np.stack([np.asarray(eps) for eps in estimates])
