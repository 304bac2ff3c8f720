"""Classifier-free guidance: one estimate from the network's conditional and unconditional ones.

`eps = eps_u + scale (eps_c - eps_u)` (Ho and Salimans 2022, in the convention of the latent
diffusion code). So

- scale 1 is the conditional network alone, and costs one evaluation;
- scale 0 is the unconditional network alone (null labels, branch 1), one evaluation;
- any other scale costs two; above 1 it strengthens the condition;
- no guidance (`None`) calls the network once with the labels as they are, branch 0; that is also
  how an unconditional model is sampled (labels None).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qdiff_jax.quant.timed import StepContext

Predict = Callable[[Any, jax.Array, StepContext, Any], jax.Array]

_FORMS = ("batch", "calls", "conditional", "unconditional")
_ORDERS = ("pairs", "conditional_first", "unconditional_first")


@struct.dataclass
class Guidance:
    """What to evaluate and how to combine it. Made by `classifier_free`.

    scale: float32 scalar, an argument of the compiled step. null: pytree like the labels, each leaf
    broadcastable to them (for classes one integer). form: "batch", "calls", "conditional" or
    "unconditional". channels: how many leading channels are combined; None for all. order: of the
    rows of a batch.
    """

    scale: Any
    null: Any
    form: str = struct.field(pytree_node=False)
    channels: int | None = struct.field(pytree_node=False, default=None)
    order: str = struct.field(pytree_node=False, default="pairs")


def classifier_free(
    scale: float | None,
    null: Any,
    *,
    form: str = "batch",
    channels: int | None = None,
    order: str = "pairs",
) -> Guidance | None:
    """Guidance with a scale, or None for scale None.

    null: what the unconditional branch is given in place of y: the null class index; an array such as
    the context [L, D] of an empty prompt, for y [B, L, D]; or a pytree of them with the structure of y
    (context and mask, say). One row of a leaf of y, or [1, ...], and the same for every sample; entries that a
    dict leaves out stay as each sample's y has them.
    form: "batch" evaluates both branches as one batch of 2B rows (half the dispatches), "calls"
    one after the other (half the memory). Scales 1 and 0 need one branch, and get one, in either
    form.
    order: how the rows of the form "batch" lie: "pairs" (the conditional and unconditional rows of a
    sample are neighbours, so that a batch split over devices stays where it is), "conditional_first"
    (DiT's code) or "unconditional_first" (the latent diffusion code). It matters to nothing but
    statistics that a network takes over its batch in the order of its rows.
    channels: combine the first `channels` channels only and take the others from the conditional
    branch; the published DiT sampler does this with 3. A network that also returns a variance
    needs it, so that only the noise estimate is guided.
    ValueError for another form or order, channels < 1, or a scale that needs the unconditional branch
    and null None, as a model without a null class has it.
    """
    if scale is None:
        return None
    if form not in ("batch", "calls"):
        raise ValueError(f"unknown form of guidance '{form}'; the names are 'batch' and 'calls'.")
    if order not in _ORDERS:
        raise ValueError(f"unknown order of guided rows '{order}'; the names are {list(_ORDERS)}.")
    if channels is not None and channels < 1:
        raise ValueError(f"guided channels must be at least 1 or None, got {channels}.")
    # With `channels` the other channels stay conditional, so scale 0 needs both branches.
    if scale == 1.0:
        form = "conditional"
    elif scale == 0.0 and channels is None:
        form = "unconditional"
    if null is None and form != "conditional":
        raise ValueError(
            f"guidance with scale {scale} evaluates an unconditional branch, and this model has no null "
            "class to give it; take scale 1 or no guidance (in a config, a negative scale)."
        )
    null = jax.tree.map(np.asarray, null)
    return Guidance(np.float32(scale), null, form, channels, order)


def branches(guidance: Guidance | None) -> tuple[int, ...]:
    """The branch identifiers one evaluation visits, in the order of its rows."""
    if guidance is None or guidance.form == "conditional":
        return (0,)
    return (1,) if guidance.form == "unconditional" else (0, 1)


def null_labels(guidance: Guidance, y: Any) -> Any:
    """Labels of the unconditional branch, with the shapes and dtypes of y (leaves [B, ...]).

    Raises ValueError for a null of another structure than y, or a leaf that is no row of y's.
    """
    if isinstance(y, Mapping) and isinstance(guidance.null, Mapping):
        same = {name: leaf for name, leaf in y.items() if name not in guidance.null}
        own = {name: leaf for name, leaf in y.items() if name not in same}
        return {**same, **_rows(guidance.null, own)}
    return _rows(guidance.null, y)


def _rows(null: Any, y: Any) -> Any:
    wanted, given = jax.tree.structure(y), jax.tree.structure(null)
    if wanted != given:
        raise ValueError(
            f"the null conditioning has the structure {given} and the conditioning y {wanted}; give "
            "classifier_free one null entry for each leaf of y."
        )

    def row(null, label):
        null = jnp.asarray(null)
        one = null.shape[1:] if null.ndim == label.ndim and null.shape[:1] == (1,) else null.shape
        # A single number is a class; spread over a context it would be noise that nobody sees.
        if one != label.shape[1:]:
            raise ValueError(
                f"a null conditioning of shape {null.shape} is no row of y, whose rows have the shape "
                f"{label.shape[1:]}; pad or cut it to that."
            )
        return jnp.broadcast_to(null.reshape(one).astype(label.dtype), label.shape)

    return jax.tree.map(row, null, y)


def combine(guidance: Guidance, conditional: jax.Array, unconditional: jax.Array) -> jax.Array:
    """`eps_u + scale (eps_c - eps_u)`, arrays [..., C] of one shape, float32."""
    guided = unconditional + guidance.scale * (conditional - unconditional)
    if guidance.channels is None:
        return guided
    kept = conditional[..., guidance.channels :]
    return jnp.concatenate([guided[..., : guidance.channels], kept], axis=-1)


def evaluate(
    predict: Predict,
    guidance: Guidance | None,
    variables: Any,
    x: jax.Array,
    ctx: StepContext,
    y: Any,
) -> tuple[jax.Array, jax.Array]:
    """The guided estimate [B, ...] and the raw ones [B, R, ...], R branches as in `branches`.

    predict(variables, x, ctx, y) -> eps; y None or leaves [B, ...]; ctx scalar. In the form "batch"
    the network sees 2B rows and ctx.branch [2B], in the guidance's order: by default sample 0
    conditional, sample 0 unconditional, sample 1 conditional, ... ValueError when guidance is asked for
    without labels, and as `null_labels`.
    """
    if guidance is None:
        eps = predict(variables, x, ctx, y)
        return eps, eps[:, None]
    if y is None:
        raise ValueError(
            "classifier-free guidance needs labels y; without labels pass guidance=None."
        )
    if guidance.form == "conditional":
        eps = predict(variables, x, ctx.replace(branch=jnp.int32(0)), y)
        return eps, eps[:, None]
    null = null_labels(guidance, y)
    if guidance.form == "unconditional":
        eps = predict(variables, x, ctx.replace(branch=jnp.int32(1)), null)
        return eps, eps[:, None]
    if guidance.form == "calls":
        conditional = predict(variables, x, ctx.replace(branch=jnp.int32(0)), y)
        unconditional = predict(variables, x, ctx.replace(branch=jnp.int32(1)), null)
        raw = jnp.stack([conditional, unconditional], axis=1)
    elif guidance.form == "batch":
        branch = jnp.zeros(x.shape[0], jnp.int32)
        join = functools.partial(_join, guidance.order)
        rows, branch, labels = jax.tree.map(join, (x, branch, y), (x, branch + 1, null))
        raw = _part(guidance.order, predict(variables, rows, ctx.replace(branch=branch), labels))
    else:
        raise ValueError(f"unknown form of guidance '{guidance.form}'; the names are {_FORMS}.")
    return combine(guidance, raw[:, 0], raw[:, 1]), raw


def _join(order: str, conditional: jax.Array, unconditional: jax.Array) -> jax.Array:
    """The rows of both branches, [2 B, ...]."""
    if order == "pairs":
        pairs = jnp.stack([conditional, unconditional], axis=1)
        return pairs.reshape((-1, *pairs.shape[2:]))
    both = (conditional, unconditional)
    return jnp.concatenate(both if order == "conditional_first" else both[::-1])


def _part(order: str, rows: jax.Array) -> jax.Array:
    """The inverse of `_join`: [B, 2, ...], conditional first."""
    if order == "pairs":
        return rows.reshape((-1, 2, *rows.shape[1:]))
    halves = rows.reshape((2, -1, *rows.shape[1:]))
    return jnp.stack(list(halves if order == "conditional_first" else halves[::-1]), axis=1)
