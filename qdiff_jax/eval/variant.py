"""What quantization did to one model: teacher-forced error, shared-noise rollout, temporal features.

Teacher-forced: both networks see the states of a held-out full-precision trajectory. Rollout: both
start from the same noise and go their own way. The two can disagree (a per-step range that clips
unseen values lowers the first and ruins the second), so both are reported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.diffusion.hooks import IDENTITY, Hooks
from qdiff_jax.diffusion.noise import sample_keys, step_keys
from qdiff_jax.eval import agreement, features
from qdiff_jax.eval.temporal import TemporalAgreement, temporal_agreement
from qdiff_jax.models.program import Unit, subtrees, units_with_time_block
from qdiff_jax.observe.capture import run_unit
from qdiff_jax.observe.trajectory import Trajectory
from qdiff_jax.quant.timed import StepContext, step_context
from qdiff_jax.stages.stage import Model


@functools.partial(jax.jit, static_argnames=("predict", "before", "after"))
def _forced_step(predict, before, after, variables, x, ctx, y, reference, row, state, hook):
    def call_model(x, ctx):
        return predict(variables, x, ctx, y)

    keys = step_keys(sample_keys(jax.random.key(0), jnp.arange(len(x))), ctx.index, 1)
    hook, x = before(hook, ctx, x)
    eps = call_model(x, ctx)
    _, eps, _ = after(hook, ctx, x, eps, jnp.zeros(()), keys, call_model)
    return agreement.update(state, reference, eps, row)


def teacher_forced(
    predict: Callable,
    variables: Any,
    held_out: Trajectory,
    on_step: Callable | None = None,
    hooks: Hooks = IDENTITY,
) -> agreement.Agreement:
    """eps error on the states of held-out full-precision trajectories, overall and by step.

    predict(variables, x, ctx, y) -> eps. held_out: x and eps [S, N, ...]. Rows of the result are step
    positions. One compile for all steps and all variants. hooks: a correction, applied to each branch
    of guidance on its own, which for affine ones is the same as to the guided estimate; each step starts
    from a new hook state.
    """
    count = len(held_out.t)
    state = agreement.init(count)
    for i in range(count):
        ctx = StepContext(
            t=jnp.asarray(held_out.t[i], jnp.float32),
            index=jnp.asarray(held_out.index[i], jnp.int32),
            branch=jnp.asarray(held_out.branch, jnp.int32),
        )
        row = jnp.asarray(i, jnp.int32)
        state = _forced_step(
            predict,
            hooks.before,
            hooks.after,
            variables,
            held_out.x[i],
            ctx,
            held_out.y,
            held_out.eps[i],
            row,
            state,
            hooks.init(held_out.x[i]),
        )
        if on_step is not None:
            on_step(i + 1, count)
    return agreement.finish(state)


def rollout(
    reference: np.ndarray, samples: np.ndarray, feature_fn: Callable | None, batch: int = 64
) -> dict:
    """x_0 of a quantized model against full precision from the same noise, both [N, H, W, C].

    Returns {"rollout_mse", "psnr_db", "feature_distance"}; the last is None without a feature_fn.
    """
    state = agreement.update(agreement.init(1), jnp.asarray(reference), jnp.asarray(samples))
    mse = float(agreement.finish(state).mse)
    distance = None
    if feature_fn is not None:
        pairs = (
            (reference[i : i + batch], samples[i : i + batch])
            for i in range(0, len(reference), batch)
        )
        distance = features.feature_distance(feature_fn, pairs)
    return {
        "rollout_mse": mse,
        "psnr_db": agreement.psnr_db(mse),
        "feature_distance": distance,
    }


def temporal_features(
    model: Model, params: Mapping, quant: Mapping, timesteps: np.ndarray, label: Any
) -> dict[str, np.ndarray]:
    """{projection: [S, C]}: every temporal feature of the network at every step of the schedule.

    label: the class they are taken for (the null class, usually), one row of y for a model conditioned on
    something else (leaves [1, ...]), None for an unconditional model.
    """
    time: Unit = units_with_time_block(model.program)[0]
    count = len(timesteps)
    ctx = step_context(timesteps, np.arange(count), np.zeros(count))

    def rows(leaf):
        if np.ndim(leaf) == 0:
            return jnp.full((count,), leaf, jnp.int32)
        return jnp.broadcast_to(leaf, (count, *leaf.shape[1:]))

    given = {
        "t": jnp.asarray(timesteps, jnp.float32),
        "y": jax.tree.map(rows, label),
    }
    outputs = run_unit(
        time.signature,
        subtrees(params, time),
        subtrees(quant, time),
        tuple(given[name] for name in time.inputs),
        ctx,
    )
    return {name: np.asarray(value) for name, value in zip(time.outputs, outputs, strict=True)}


def temporal(
    model: Model, params: Mapping, quant: Mapping, timesteps: np.ndarray, label: Any
) -> TemporalAgreement:
    """Temporal features of (folded) quantized parameters against the model's own."""
    return temporal_agreement(
        temporal_features(model, model.params, {}, timesteps, label),
        temporal_features(model, params, quant, timesteps, label),
    )
