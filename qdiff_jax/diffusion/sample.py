"""One sampler loop for every network: full precision, simulated, packed, corrected.

`sample` is the host function (batches, devices, checks, recording); `sample_scan` is the same loop
as one pure function for jit and export. Both run the step of `make_step`, in which the variables,
the coefficients, the labels and the guidance scale are arguments: weights, bits and schedules of
equal length change without a new compile, as long as the same function objects are passed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qdiff_jax.diffusion.guidance import Guidance, Predict, evaluate
from qdiff_jax.diffusion.hooks import IDENTITY, Hooks
from qdiff_jax.diffusion.noise import initial_noise, normal, sample_keys, step_keys
from qdiff_jax.diffusion.samplers import Sampler, SamplerPlan
from qdiff_jax.quant.timed import StepContext, check_schedule
from qdiff_jax.runtime.loop import run_steps
from qdiff_jax.runtime.mesh import replicate, shard_batch


class Record(NamedTuple):
    """What the network saw and said at the recorded steps, in **ascending** order of step index.

    x: [S, N, ...] its input (after a hook's input correction). eps: [S, N, R, ...] its raw outputs,
    one per branch evaluated (see `guidance.branches`), before guidance and corrections. t: [S]
    float32. index: [S] int32 step indices.
    """

    x: np.ndarray
    eps: np.ndarray
    t: np.ndarray
    index: np.ndarray


class Samples(NamedTuple):
    """x: [N, ...] float32, in the order of the indices. record: None unless asked for."""

    x: np.ndarray
    record: Record | None


class _Visit(NamedTuple):
    t: Any
    index: Any
    rows: dict[str, Any]


class _Fixed(NamedTuple):
    variables: Any
    keys: jax.Array
    y: Any
    guidance: Guidance | None


class _Carry(NamedTuple):
    fixed: _Fixed
    x: jax.Array
    memory: Any
    hook: Any


def _visits(plan: SamplerPlan) -> _Visit:
    """The plan in visiting order, noisiest first."""
    return jax.tree.map(lambda row: row[::-1], _Visit(plan.timesteps, plan.index, plan.rows))


# Bounded: an entry keeps its network function alive, and with it whatever that closes over.
@functools.lru_cache(maxsize=64)
def make_step(
    predict: Predict, sampler: Sampler, before: Callable, after: Callable, record: bool
) -> Callable[[_Carry, _Visit], tuple[_Carry, Any]]:
    """The step for `run_steps` or a scan; equal arguments give the same function object."""

    def step(carry, visit):
        fixed = carry.fixed
        ctx = StepContext(
            t=jnp.asarray(visit.t, jnp.float32),
            index=jnp.asarray(visit.index, jnp.int32),
            branch=jnp.zeros((), jnp.int32),
        )

        def call(x, ctx):
            return evaluate(predict, fixed.guidance, fixed.variables, x, ctx, fixed.y)

        def call_model(x, ctx):
            return sampler.read(visit.rows, call(x, ctx)[0])[0]

        hook, x = before(carry.hook, ctx, carry.x)
        output, raw = call(x, ctx)
        eps, sigma = sampler.read(visit.rows, output)
        hook_keys = step_keys(fixed.keys, visit.index, 1)
        hook, eps, sigma = after(hook, ctx, x, eps, sigma, hook_keys, call_model)
        fresh = normal(step_keys(fixed.keys, visit.index, 0), x)
        memory, x_prev = sampler.step(visit.rows, carry.memory, x, eps, sigma, fresh)
        return _Carry(fixed, x_prev, memory, hook), ((x, raw) if record else None)

    return step


def sample_scan(
    predict: Predict,
    variables: Any,
    plan: SamplerPlan,
    key: jax.Array,
    indices: jax.Array,
    *,
    shape: tuple[int, ...] | None = None,
    noise: jax.Array | None = None,
    y: Any = None,
    guidance: Guidance | None = None,
    hooks: Hooks = IDENTITY,
    hook_state: Any = None,
    record: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """The whole trajectory as one `lax.scan`: pure, to be jitted or exported by the caller.

    Arguments as `sample`; key, indices, noise, y, variables, plan and guidance may be traced. A
    hook's tables belong in `hook_state` (what `hooks.init` would return), where they are arguments
    too; with None `hooks.init` is called in here. Nothing is checked against the calibrated
    timesteps: a step that a table does not cover gives NaN. On CPU, convolutional networks run much
    faster in `sample`.

    Returns (x [B, ...], recorded), recorded None or (x [S, B, ...], eps [S, B, R, ...]) ascending.
    """
    keys = sample_keys(key, indices)
    x = _start(keys, shape, noise, plan.start_scale)
    state = hooks.init(x) if hook_state is None else hook_state
    carry = _Carry(_Fixed(variables, keys, y, guidance), x, plan.sampler.init(x), state)
    step = make_step(predict, plan.sampler, hooks.before, hooks.after, record)
    carry, outputs = jax.lax.scan(step, carry, jax.tree.map(jnp.asarray, _visits(plan)))
    return carry.x, jax.tree.map(lambda rows: rows[::-1], outputs) if record else None


def _start(
    keys: jax.Array, shape: tuple[int, ...] | None, noise: Any, scale: jax.Array
) -> jax.Array:
    if (shape is None) == (noise is None):
        raise ValueError("give either the shape of one sample or the initial noise, and not both.")
    drawn = initial_noise(keys, tuple(shape)) if noise is None else jnp.asarray(noise, jnp.float32)
    return scale * drawn


_sample_keys = jax.jit(sample_keys)
_jitted_start = jax.jit(_start, static_argnums=1)


def sample(
    predict: Predict,
    variables: Any,
    plan: SamplerPlan,
    key: jax.Array,
    indices: Sequence[int] | np.ndarray,
    *,
    shape: tuple[int, ...] | None = None,
    noise: Any = None,
    y: Any = None,
    guidance: Guidance | None = None,
    hooks: Hooks = IDENTITY,
    record: bool | Sequence[int] = False,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    mesh: Mesh | None = None,
    scan: bool | None = None,
) -> Samples:
    """The samples with the given global indices, in batches that do not change the result.

    Args:
      predict: pure function (variables, x [B, ...], ctx, y) -> eps [B, ...]; selects step tables by
        ctx and applies the network. Pass the same function object to reuse the compile.
      variables: mapping, e.g. {"params": ..., "quant": ...}. Its step tables are checked against
        the plan before anything runs.
      plan: from `samplers`. key: one key. indices: [N] integers >= 0; sample i depends on key and
        indices[i] alone (and on its label).
      shape: of one sample, x_T is drawn from the key; or noise: [N, ...] the standard normal in its
        place. Both are multiplied by the plan's start_scale, which is 1 but for Euler.
      y: None or pytree with leaves [N, ...]. guidance: from `guidance.classifier_free`, or None.
      hooks: corrections; `hooks.init` runs once per batch, on the host.
      record: True to return every visited step, or the step indices to keep. One batch with all its
        steps is held on the device, the record of all batches in host memory.
      batch_size: None for one batch. The last batch is filled up by repeating its last sample, so
        that its shape compiles nothing new; the copies are dropped (a hook with statistics over the
        batch sees them).
      on_batch: called with the number of samples done after each batch.
      mesh: None for one device, or a data mesh: variables replicated, batches split.
      scan: as in `run_steps`.

    Raises:
      ValueError: shapes that disagree, a batch that the mesh cannot split, or a step table that was
      not calibrated for a timestep of the plan.
    """
    indices = np.asarray(indices)
    total = len(indices)
    if total == 0 or indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError("indices must be a non-empty vector of integers.")
    if (shape is None) == (noise is None):
        raise ValueError("give either the shape of one sample or the initial noise, and not both.")
    for leaf in jax.tree.leaves((noise, y)):
        if len(leaf) != total:
            raise ValueError(
                f"noise and labels must have {total} rows, one per index, not {len(leaf)}."
            )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    check_schedule(variables.get("quant"), plan.timesteps)
    kept = _kept_steps(record, plan.steps)
    if mesh is not None:
        variables, guidance = replicate((variables, guidance), mesh)
    size = min(batch_size or total, total)
    if mesh is not None and batch_size is None:
        size = -(-size // mesh.size) * mesh.size
    step = make_step(predict, plan.sampler, hooks.before, hooks.after, kept is not None)
    start_scale = np.float32(plan.start_scale)
    images, states, outputs = [], [], []
    for first in range(0, total, size):
        count = min(size, total - first)
        rows = np.minimum(np.arange(first, first + size), total - 1)
        batch = jax.tree.map(lambda leaf: leaf[rows], (indices.astype(np.uint32), noise, y))  # noqa: B023
        batch = jax.tree.map(jnp.asarray, batch) if mesh is None else shard_batch(batch, mesh)
        keys = _sample_keys(key, batch[0])
        x = _jitted_start(keys, None if shape is None else tuple(shape), batch[1], start_scale)
        fixed = _Fixed(variables, keys, batch[2], guidance)
        state = hooks.init(x) if mesh is None else _on_mesh(hooks.init(x), mesh)
        carry = _Carry(fixed, x, plan.sampler.init(x), state)
        carry, seen = run_steps(step, carry, _visits(plan), scan=scan)
        images.append(np.asarray(carry.x)[:count])
        if kept is not None:
            # Back from visiting order to the ascending grid, then the steps asked for.
            states.append(np.asarray(seen[0])[::-1][kept, :count])
            outputs.append(np.asarray(seen[1])[::-1][kept, :count])
        if on_batch is not None:
            on_batch(first + count)
    recorded = None
    if kept is not None:
        recorded = Record(
            x=np.concatenate(states, axis=1),
            eps=np.concatenate(outputs, axis=1),
            t=np.asarray(plan.timesteps)[kept],
            index=np.asarray(plan.index)[kept],
        )
    return Samples(np.concatenate(images), recorded)


def _on_mesh(state: Any, mesh: Mesh) -> Any:
    """Tables replicated; what the hook derived from x_T stays split as x_T is.

    Left on one device, they would come back from the first step with another sharding, and the step
    would be compiled a second time for it.
    """

    def place(leaf):
        leaf = jnp.asarray(leaf)
        return leaf if isinstance(leaf.sharding, NamedSharding) else replicate(leaf, mesh)

    return jax.tree.map(place, state)


def _kept_steps(record: bool | Sequence[int], steps: int) -> np.ndarray | None:
    if record is False:
        return None
    if record is True:
        return np.arange(steps)
    kept = np.unique(np.asarray(record))
    if not len(kept) or kept[0] < 0 or kept[-1] >= steps:
        raise ValueError(f"recorded steps must lie in 0..{steps - 1}, got {list(record)}.")
    return kept
