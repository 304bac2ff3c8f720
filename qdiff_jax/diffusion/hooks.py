"""Corrections at sampling time: of the state before the network, of its estimate after it.

One hook type serves the methods that repair a quantized network inside the sampler: an affine map
of the noise estimate whose residual variance the sampler's own noise absorbs (PTQD, D2-DPM), a
shift of the input (TaC), an online bias measured with an extra evaluation (QNCD), running averages
of estimates (MPQ). Tables with one row per step live in the hook's state and are indexed by
`ctx.index`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from qdiff_jax.quant.timed import StepContext

CallModel = Callable[[jax.Array, StepContext], jax.Array]


class Hooks(NamedTuple):
    """Three pure functions; `IDENTITY` changes nothing, to the last bit.

    init(x) -> state: called once per batch with x_T, outside the compiled step. Put tables,
        counters and arrays here, and let `before` and `after` be module-level functions: they are
        part of the compiled step's identity, the state is an argument, so new tables compile
        nothing.
    before(state, ctx, x) -> (state, x): the new x goes into the network *and* into the update.
    after(state, ctx, x, eps, sigma, key, call_model) -> (state, eps, sigma):
        x: [B, ...], as `before` left it.
        eps: the guided estimate, which is what the sampler consumes.
        sigma: this step's noise level, scalar or of the shape of x; the sampler uses the returned
        one in every place, the direction term of DDIM included.
        key: [B] keys, one per sample and different at every step; draw with `noise.normal(key, x)`
        and the result does not depend on how the samples were batched.
        call_model(x, ctx) -> eps: one more guided evaluation, at any state and step, same labels.

    ctx is scalar: t, index (position on the ascending grid), branch 0. States must keep their
    structure, shapes and dtypes from step to step.
    """

    init: Callable[[jax.Array], Any]
    before: Callable[[Any, StepContext, jax.Array], tuple[Any, jax.Array]]
    after: Callable[..., tuple[Any, jax.Array, jax.Array]]


def no_state(x: jax.Array) -> tuple:
    return ()


def keep_input(state: Any, ctx: StepContext, x: jax.Array) -> tuple[Any, jax.Array]:
    """The `before` of a hook that leaves the network's input alone."""
    return state, x


def keep_estimate(
    state: Any,
    ctx: StepContext,
    x: jax.Array,
    eps: jax.Array,
    sigma: jax.Array,
    key: jax.Array,
    call_model: CallModel,
) -> tuple[Any, jax.Array, jax.Array]:
    """The `after` of a hook that leaves the estimate and the noise level alone."""
    return state, eps, sigma


IDENTITY = Hooks(no_state, keep_input, keep_estimate)
