"""Recomputing in the backward pass what the forward pass would have to keep.

`jax.checkpoint` asks the compiler not to merge the second computation with the first by a barrier. XLA's CPU
backend removes the barrier before it looks for common subexpressions, merges them and keeps everything
(measured: no byte less). Here the second computation depends on the cotangent, which does not exist before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def after(tree: Any, array: jax.Array) -> Any:
    """tree, but so that nothing can be computed from it before `array` exists; NaN if array begins with NaN.

    Ordering for the compiler, which otherwise starts early what is wanted late and holds it until then.
    """
    first = array[(0,) * array.ndim]
    exists = first == first

    def wait(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return jnp.where(exists, leaf, jnp.asarray(jnp.nan, leaf.dtype))

    return jax.tree.map(wait, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recomputed(
    f: Callable[[Any, Any], Any], tied: Any, rest: Any, begin: jax.Array | None = None
) -> Any:
    """f(tied, rest), of which nothing but the arguments is kept for its gradient.

    f: pure and hashable, without tracers in its closure. tied: pytree that all of the computation depends on,
    small if possible: it is copied in the backward pass. begin: an array that the computation must come after
    (see `after`; no gradient), None for at any time. A NaN at the head of `begin` or of the cotangent of the
    first output makes the result or the whole gradient NaN; nothing else changes any value.
    """
    return f(tied if begin is None else after(tied, begin), rest)


def _forward(f, tied, rest, begin):
    # The arguments as they came: kept in waiting form, they would keep what they wait for.
    return recomputed(f, tied, rest, begin), (tied, rest)


def _backward(f, held, cotangent):
    tied, rest = held
    _, pull = jax.vjp(f, after(tied, jax.tree.leaves(cotangent)[0]), rest)
    return *pull(cotangent), None


recomputed.defvjp(_forward, _backward)


@functools.cache
def _block(module):
    def apply(tied, params):
        values, quant = tied
        return module.apply({"params": params, "quant": quant}, *values)

    return apply


def recomputed_block(module, params: Any, quant: Any, values: tuple) -> Any:
    """A block of a network applied to what it reads, with nothing of its inside kept for the gradient."""
    return recomputed(_block(module), (values, quant), params)


def recomputed_unit(signature, params, quant, inputs) -> tuple:
    """`models.program.apply_unit` (same arguments but `mutable`) that keeps what blocks read alone."""
    held = list(inputs)
    blocks = zip(signature.modules, signature.reads, params, quant, strict=True)
    for module, reads, weights, quantizers in blocks:
        values = tuple(held[i] for i in reads)
        held.append(recomputed_block(module, weights, quantizers, values))
    return tuple(held[i] for i in signature.outputs)
