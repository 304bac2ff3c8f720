"""Everything that depends on the step is a table with a leading axis, selected outside the model.

`select` replaces each `TimeIndexed` of a tree by the row for the present step; models and
quantizers never see time. A step that the table was not calibrated for is an error:
`check_schedule` raises before a run, and inside a compiled function the selected row is NaN.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from qdiff_jax.quant.qparams import QParams, from_range, refuse_stored_format
from qdiff_jax.quant.spec import QuantSpec

RULES = ("step", "exact", "nearest", "bin")


@struct.dataclass
class StepContext:
    """Where the sampler stands; each field is a scalar or has one entry per sample, [B].

    Attributes:
      t: the timestep, float32.
      index: the sampler's step index, int32; -1 when unknown. Needed because a schedule may repeat
        a t.
      branch: int32; 0 conditional, 1 unconditional half of classifier-free guidance.
    """

    t: jax.Array
    index: jax.Array
    branch: jax.Array


def step_context(t, index=-1, branch=0) -> StepContext:
    """A `StepContext` of arrays with the right dtypes."""
    return StepContext(
        t=jnp.asarray(t, jnp.float32),
        index=jnp.asarray(index, jnp.int32),
        branch=jnp.asarray(branch, jnp.int32),
    )


@struct.dataclass
class TimeIndexed:
    """A table of parameters with one row per calibrated timestep.

    Attributes:
      table: pytree (a QParams, an array, ...) whose leaves lead with R, or with [2, R] when
        `branched`.
      timesteps: [R] float32, what the rows were calibrated for; left bin edges for the rule "bin".
      rule: static.
        "step": row ctx.index, valid only if timesteps[index] == t.
        "exact": the first row whose timestep equals t.
        "nearest": the nearest row, valid between the smallest and the largest calibrated timestep.
        "bin": uniform bins, `timesteps` their ascending left edges; the last bin is as wide as the
        one before and closed on the right (a single bin is unbounded on the right).
      branched: static; a second table for the unconditional branch.
    """

    table: Any
    timesteps: jax.Array
    rule: str = struct.field(pytree_node=False, default="exact")
    branched: bool = struct.field(pytree_node=False, default=False)


def _is_timed(node) -> bool:
    return isinstance(node, TimeIndexed)


def _locate(timesteps, rule, t, index):
    """Row of every entry of t (any shape) and whether the rule allows it."""
    count = timesteps.shape[0]
    if rule == "step":
        row = jnp.clip(index, 0, count - 1)
        return row, (index >= 0) & (index < count) & (timesteps[row] == t)
    steps = timesteps.reshape((1,) * t.ndim + (count,))
    if rule == "exact":
        match = steps == t[..., None]
        return jnp.argmax(match, axis=-1).astype(jnp.int32), match.any(axis=-1)
    if rule == "nearest":
        row = jnp.argmin(jnp.abs(steps - t[..., None]), axis=-1).astype(jnp.int32)
        return row, (t >= timesteps.min()) & (t <= timesteps.max())
    if rule == "bin":
        row = (steps <= t[..., None]).sum(axis=-1, dtype=jnp.int32) - 1
        top = 2.0 * timesteps[-1] - timesteps[-2] if count > 1 else jnp.inf
        return jnp.clip(row, 0, count - 1), (row >= 0) & (t <= top)
    raise ValueError(f"TimeIndexed.rule is {rule!r}; choose one of {', '.join(RULES)}.")


def locate(indexed: TimeIndexed, ctx: StepContext) -> tuple[jax.Array, jax.Array]:
    """The row that ctx selects (into [R], or [2 * R] when branched) and whether the rule allows it.

    Scalars for a scalar ctx, [B] as soon as a field of ctx that matters to this table has a batch
    axis: t always, index under the rule "step", branch when branched.
    """
    t, index = jnp.asarray(ctx.t, jnp.float32), jnp.asarray(ctx.index, jnp.int32)
    branch = jnp.asarray(ctx.branch if indexed.branched else 0, jnp.int32)
    if indexed.rule != "step":
        index = jnp.int32(-1)
    shape = jnp.broadcast_shapes(t.shape, index.shape, branch.shape)
    t, index, branch = (jnp.broadcast_to(field, shape) for field in (t, index, branch))
    row, valid = _locate(indexed.timesteps, indexed.rule, t, index)
    valid &= (branch >= 0) & (branch <= 1)
    return row + jnp.clip(branch, 0, 1) * indexed.timesteps.shape[0], valid


def _take(indexed: TimeIndexed, ctx: StepContext):
    row, valid = locate(indexed, ctx)

    def pick(leaf):
        if indexed.branched:
            leaf = leaf.reshape((-1, *leaf.shape[2:]))
        chosen = leaf[row]
        if not jnp.issubdtype(chosen.dtype, jnp.inexact):
            return chosen
        allowed = valid.reshape(valid.shape + (1,) * (chosen.ndim - valid.ndim))
        return jnp.where(allowed, chosen, jnp.nan)

    picked = jax.tree.map(pick, indexed.table)
    if row.ndim == 0:
        return picked

    def mark(node):
        return node.replace(rows=True) if isinstance(node, QParams) else node

    return jax.tree.map(mark, picked, is_leaf=lambda node: isinstance(node, QParams))


def select(tree, ctx: StepContext):
    """tree with every `TimeIndexed` replaced by the row for ctx.

    For a scalar ctx the leaves lose their leading axis. For a batch of mixed steps (a field of ctx
    of shape [B]) the rows are gathered, leaves lead with B, and each `QParams` says so by
    rows=True, which broadcasts them over the batch of x: no weight is mapped and no convolution
    becomes grouped. A step outside the rule gives NaN in every float leaf of its row.
    """

    def replace(node):
        return _take(node, ctx) if _is_timed(node) else node

    return jax.tree.map(replace, tree, is_leaf=_is_timed)


def check_schedule(tree, timesteps) -> None:
    """Raise unless every table of the tree covers every step of the schedule. On the host, before a
    run.

    Args:
      tree: any pytree with `TimeIndexed` nodes.
      timesteps: [S]; timesteps[i] is the timestep at the sampler's step index i.

    Raises:
      ValueError: names the first site whose table lacks a timestep, that timestep, and what to do.
    """
    schedule = np.asarray(timesteps, np.float32).reshape(-1)
    index = np.arange(schedule.size, dtype=np.int32)
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_timed)
    for path, node in nodes:
        if not _is_timed(node):
            continue
        _, valid = _locate(jnp.asarray(node.timesteps), node.rule, jnp.asarray(schedule), index)
        missing = np.flatnonzero(~np.asarray(valid))
        if missing.size:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            first = int(missing[0])
            raise ValueError(
                f"{where}: timestep {schedule[first]:g} (step {first} of {schedule.size}) was "
                f"never calibrated; the table has {node.timesteps.shape[0]} rows from "
                f"{float(np.min(node.timesteps)):g} to {float(np.max(node.timesteps)):g} under "
                f"the rule {node.rule!r}, and {missing.size} steps of this schedule are missing. "
                "Calibrate on this schedule, or rebuild the table with rule='nearest'."
            )


def from_rows(
    rows: Sequence[Any], timesteps, rule: str = "exact", branched: bool = False
) -> TimeIndexed:
    """Stack one pytree per timestep into a table.

    Args:
      rows: R trees of one structure (equal specs); with `branched` two such sequences, the
        conditional and the unconditional one.
      timesteps: [R].

    Raises:
      ValueError: the number of rows is not that of the timesteps, structures differ, or the rule is
        unknown.
    """
    timesteps = _checked_timesteps(timesteps, rule)
    sequences = list(rows) if branched else [rows]
    if branched and len(sequences) != 2:
        raise ValueError(
            "a branched table needs two sequences of rows: conditional, unconditional."
        )
    for sequence in sequences:
        if len(sequence) != timesteps.shape[0]:
            raise ValueError(f"{len(sequence)} rows were given for {timesteps.shape[0]} timesteps.")
        kinds = {jax.tree.structure(row) for row in sequence}
        if len(kinds) > 1:
            raise ValueError(
                "the rows of a step table must have one structure and equal QuantSpecs."
            )
    tables = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *sequence) for sequence in sequences]
    table = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tables) if branched else tables[0]
    return TimeIndexed(table=table, timesteps=timesteps, rule=rule, branched=branched)


def _checked_timesteps(timesteps, rule):
    if rule not in RULES:
        raise ValueError(f"TimeIndexed.rule is {rule!r}; choose one of {', '.join(RULES)}.")
    if rule == "bin" and np.any(np.diff(np.asarray(timesteps)) <= 0):
        raise ValueError("the rule 'bin' needs the left bin edges in ascending order.")
    return jnp.asarray(timesteps, jnp.float32)


def from_ranges(spec: QuantSpec, lo, hi, qmin, qmax, timesteps, rule: str = "exact") -> TimeIndexed:
    """A table of affine or log quantizers from per-step ranges.

    Args:
      lo, hi: [R, ...], each row shaped like `QParams.scale` for this spec.
      qmin, qmax: numbers, or [R] for bits that vary with the step.
      timesteps: [R].
    """
    lo, hi = jnp.asarray(lo, jnp.float32), jnp.asarray(hi, jnp.float32)
    count = lo.shape[0]
    low, high = (jnp.broadcast_to(jnp.asarray(v, jnp.float32), (count,)) for v in (qmin, qmax))
    column = (count,) + (1,) * (lo.ndim - 1)
    table = from_range(spec, lo, hi, low.reshape(column), high.reshape(column))
    table = table.replace(qmin=low, qmax=high)
    if count != np.size(timesteps):
        raise ValueError(f"{count} ranges were given for {np.size(timesteps)} timesteps.")
    return TimeIndexed(table, _checked_timesteps(timesteps, rule), rule)


def widen(range_or_qparams, margin: float = 1.1):
    """Stretch a range about zero, so that values never seen in calibration are not clipped.

    Per-step ranges of data-dependent sites need about 10 % (a min-max taken from few samples clips
    unseen values and the sampler amplifies the loss); sites that depend on the step alone need none
    (1.0).

    Args:
      range_or_qparams: (lo, hi), or a static QParams, or any tree of QParams such as a TimeIndexed.
      margin: factor on both ends.

    Raises ValueError for a scale that is stored in a format of 8 bits: widen its range before it is made.
    """
    if isinstance(range_or_qparams, tuple) and len(range_or_qparams) == 2:
        lo, hi = range_or_qparams
        return jnp.minimum(lo, 0.0) * margin, jnp.maximum(hi, 0.0) * margin

    def stretch(node):
        if not isinstance(node, QParams):
            return node
        if margin != 1.0:
            refuse_stored_format(node.spec, "widened")
        return node.replace(scale=node.scale * margin)

    return jax.tree.map(stretch, range_or_qparams, is_leaf=lambda node: isinstance(node, QParams))


def rowwise(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keep the optimizer's state per row of a table, and move only the rows that were visited.

    Plain Adam on a table moves rows whose gradient is zero, by momentum, for as long as the
    momentum lasts. Here the state is initialised per row; an update gathers the visited rows,
    updates them, scatters them back. Unvisited rows, and their state (step count included), stay as
    they were to the last bit.

    The result is an optax transformation: `init(table)`, and `update(grads, state, table,
    rows=rows)` with `rows` [n] int32 the flat rows (see `locate`), repeats allowed. Leaves of the
    table lead with [R].
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(table):
        return jax.vmap(optimizer.init)(table)

    def update(grads, state, params=None, *, rows, **extra_args):
        rows = jnp.atleast_1d(rows)

        def gather(tree):
            return jax.tree.map(lambda leaf: leaf[rows], tree)

        def step(g, s, p):
            return optimizer.update(g, s, p, **extra_args)

        if params is None:
            moved, fresh = jax.vmap(lambda g, s: step(g, s, None))(gather(grads), gather(state))
        else:
            moved, fresh = jax.vmap(step)(gather(grads), gather(state), gather(params))
        updates = jax.tree.map(lambda g, m: jnp.zeros_like(g).at[rows].set(m), grads, moved)
        state = jax.tree.map(lambda old, new: old.at[rows].set(new), state, fresh)
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)
