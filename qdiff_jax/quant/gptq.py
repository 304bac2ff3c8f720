"""Rounding by second moments: GPTQ, and coordinate descent on the same quadratic.

A layer's inputs X [n, K] have the (centred) second moment H = X'X / n, and codes are chosen to make
tr(D'H D) small, D = W_q - W. GPTQ (Frantar et al. 2023) rounds row after row of W and lets the rows
that are still free make up for each error; all output columns go at once, since they share H.
Coordinate descent improves any codes; its Kronecker form weighs outputs too, tr(G D'H D) with
G [N, N] the second moment of the loss's gradient at the layer's output (K-FAC).

Everything works in the dtype of H: float32, or float64 where JAX has it enabled. Bits, scales and
damping are data. Order of rows for a convolution: (i, j, c), as a kernel HWIO flattens.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qdiff_jax.quant.affine import dequantize, quantize
from qdiff_jax.quant.qparams import QParams, broadcast, grouped
from qdiff_jax.quant.spec import QuantSpec

_TRIES = 10
_EXACT = lax.Precision.HIGHEST


class Rounded(NamedTuple):
    """codes: int32, of the kernel's shape. qparams: their grid. damping: () the share of the mean
    diagonal that the factorisation needed, NaN if none of its attempts succeeded."""

    codes: jax.Array
    qparams: QParams
    damping: jax.Array


class _Rows(NamedTuple):
    """A grid as one row for each row of W: every leaf [K, N]."""

    scale: jax.Array
    zero: jax.Array
    low: jax.Array
    high: jax.Array


def check_grid(spec: QuantSpec, where: str) -> None:
    """Raise ValueError unless the grid of the weight at `where` is affine and static."""
    if spec.grid != "affine" or spec.dynamic:
        raise ValueError(
            f"closed-form rounding needs a static affine grid for {where}, got {spec}; plan the weight on "
            "an affine grid."
        )


def grid_rows(qparams: QParams, shape: tuple[int, ...], dtype=jnp.float32) -> _Rows:
    """The numbers of qparams for each element of a kernel of `shape`, as [K, N] arrays.

    Raises ValueError unless the grid is affine and static.
    """
    check_grid(qparams.spec, f"a kernel {shape}")
    view = jax.eval_shape(
        lambda x: grouped(qparams.spec, x), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    like = jax.ShapeDtypeStruct(shape, jnp.float32)
    leaves = broadcast(qparams, like)
    return _Rows(
        *(
            jnp.broadcast_to(
                leaf.reshape((1,) * (len(view.shape) - leaf.ndim) + leaf.shape), view.shape
            )
            .reshape(-1, shape[-1])
            .astype(dtype)
            for leaf in leaves
        )
    )


def inverse_factor(hessian: jax.Array, damping) -> tuple[jax.Array, jax.Array]:
    """(U, damping used): U upper triangular with U'U = (H + damping * mean(diag H) * I)^-1.

    A Cholesky factorisation that fails (NaN) is tried again with ten times the damping. Rows of H
    that are zero (inputs that never vary) get the mean diagonal, so that they neither fail nor couple.
    U comes from H itself, factored from its last row backwards, so that no inverse is ever factored.
    """
    size = hessian.shape[0]
    diagonal = jnp.diagonal(hessian)
    dead = diagonal <= 0
    alive = jnp.maximum(jnp.sum(jnp.where(dead, 0, 1)), 1).astype(hessian.dtype)
    mean = jnp.sum(jnp.where(dead, jnp.zeros_like(diagonal), diagonal)) / alive
    mean = jnp.where(mean > 0, mean, jnp.ones_like(mean))
    diagonal = jnp.where(dead, mean, jnp.zeros_like(mean))
    base = hessian + jnp.diag(diagonal)
    eye = jnp.eye(size, dtype=hessian.dtype)

    def failed(state):
        factor, _, tries = state
        return jnp.isnan(factor[0, 0]) & (tries < _TRIES)

    def attempt(state):
        _, share, tries = state
        share = jnp.where(tries == 0, share, jnp.maximum(share, 1e-6) * 10.0)
        factor = jnp.linalg.cholesky(jnp.flip(base + share * mean * eye))
        # One entry tells the loop whether any is NaN.
        spoilt = jnp.where(jnp.any(jnp.isnan(factor)), jnp.nan, 0.0).astype(factor.dtype)
        return factor + spoilt, share, tries + 1

    start = (jnp.full_like(hessian, jnp.nan), jnp.asarray(damping, hessian.dtype), jnp.int32(0))
    factor, share, _ = lax.while_loop(failed, attempt, start)
    upper = lax.linalg.triangular_solve(jnp.flip(factor), eye, left_side=True, lower=False)
    return upper, jnp.where(jnp.isnan(factor[0, 0]), jnp.nan, share)


@jax.jit
def ordered_factor(hessian: jax.Array, order: jax.Array, damping) -> tuple[jax.Array, jax.Array]:
    """`inverse_factor` of H with rows and columns taken in `order` [K]."""
    return inverse_factor(hessian[order][:, order], damping)


def rounding_order(hessian: jax.Array, act_order: bool = True) -> jax.Array:
    """[K]: rows by falling H_kk, or as they are."""
    if not act_order:
        return jnp.arange(hessian.shape[0])
    return jnp.argsort(-jnp.diagonal(hessian), stable=True)


def gptq(
    kernel: jax.Array,
    hessian: jax.Array,
    qparams: QParams,
    *,
    act_order: bool = True,
    damping=0.01,
    block: int = 128,
) -> Rounded:
    """Codes of a kernel that make tr(D'H D) small; with H a multiple of I, nearest codes exactly.

    Args:
      kernel: [..., N], flattened to [K, N] (HWIO or [in, out]).
      hessian: [K, K]. Its scale does not matter.
      qparams: affine and static; per tensor, per output channel, or per group of input channels.
      act_order: round rows of large H_kk first. Free here: ranges are fixed beforehand.
      damping: added to the diagonal as a share of its mean; grows by itself where H is singular.
      block: rows between two updates of the whole matrix; changes the result by rounding only.

    Compiled once per [K, K] (the factor, most of the compile) and once per kernel shape and spec.
    """
    order = rounding_order(hessian, act_order)
    upper, used = ordered_factor(hessian, order, damping)
    return Rounded(round_with_factor(kernel, order, upper, qparams, block=block), qparams, used)


@functools.partial(jax.jit, static_argnames="block")
def round_with_factor(kernel, order, upper, qparams: QParams, *, block: int = 128) -> jax.Array:
    """The sweep of `gptq`, given `ordered_factor`: codes of the kernel's shape.

    order [K], upper [K, K]; or [parts, K / parts] and a stack of as many factors, for a block-diagonal H.
    """
    shape = kernel.shape
    weights = kernel.reshape(-1, shape[-1]).astype(upper.dtype)
    rows = grid_rows(qparams, shape, upper.dtype)
    if upper.ndim == 2:
        codes = _round_rows(weights, rows, order, upper, block)
    else:
        parted = jax.tree.map(lambda v: v.reshape(*order.shape, -1), (weights, rows))
        codes = lax.map(lambda part: _round_rows(*part, block), (*parted, order, upper))
    return codes.astype(jnp.int32).reshape(shape)


def _round_rows(weights, rows: _Rows, order, upper, block: int):
    size = weights.shape[0]
    block = min(block, size)
    pad = -size % block
    blocked = jax.tree.map(lambda row: _blocks(row[order], pad, block), rows)
    codes = _sweep(weights[order], upper, block, blocked)
    return jnp.zeros_like(codes).at[order].set(codes)


def _blocks(leaf, pad, block):
    # Padding with ones: a scale of zero would make NaN of rows that are thrown away.
    leaf = jnp.pad(leaf, ((0, pad), (0, 0)), constant_values=1)
    return leaf.reshape(-1, block, leaf.shape[-1])


def _sweep(weights, upper, block, grids):
    """Codes as floats [K, N] of one pass over all rows; grids: `_Rows` of [blocks, block, N]."""
    size, columns = weights.shape
    pad = -size % block
    weights = jnp.pad(weights, ((0, pad), (0, 0)))
    upper = jnp.pad(upper, ((0, pad), (0, pad))) + jnp.diag(
        (jnp.arange(size + pad) >= size).astype(upper.dtype)
    )

    def one_block(weights, inputs):
        start, band, rows = inputs
        current = lax.dynamic_slice(weights, (start, 0), (block, columns))
        square = lax.dynamic_slice(band, (0, start), (block, block))

        def one_row(current, inputs):
            i, factors, row = inputs
            w = current[i]
            code = quantize(w, *row)
            error = (w - dequantize(code, row.scale, row.zero)) / factors[i]
            return current - factors[:, None] * error[None, :], (code, error)

        _, (codes, errors) = lax.scan(one_row, current, (jnp.arange(block), square, rows))
        weights = weights - jnp.matmul(band.T, errors, precision=_EXACT)
        return weights, codes

    starts = jnp.arange(0, size + pad, block)
    bands = upper.reshape(-1, block, size + pad)
    _, codes = lax.scan(one_block, weights, (starts, bands, grids))
    return codes.reshape(-1, columns)[:size]


@functools.partial(jax.jit, static_argnames="sweeps")
def coordinate_descent(codes, kernel, hessian, qparams: QParams, *, sweeps: int = 3) -> jax.Array:
    """Codes of no larger tr(D'H D): each row in turn set to its best values, all columns at once.

    codes, kernel: [..., N]; kernel is what the codes aim at. hessian: [K, K]. A row is rounded about
    its unconstrained minimum, which for one coordinate of a quadratic is the best code.
    """
    shape = kernel.shape
    rows = grid_rows(qparams, shape, hessian.dtype)
    target = kernel.reshape(-1, shape[-1]).astype(hessian.dtype)
    start = codes.reshape(target.shape).astype(hessian.dtype)
    gradient = jnp.matmul(
        hessian, dequantize(start, rows.scale, rows.zero) - target, precision=_EXACT
    )

    def step(i, state):
        codes, gradient = state
        k = i % target.shape[0]
        curvature = jnp.maximum(hessian[k, k], jnp.finfo(hessian.dtype).tiny)
        wanted = jnp.round(codes[k] - gradient[k] / (curvature * rows.scale[k]))
        fresh = jnp.clip(wanted, rows.low[k], rows.high[k])
        fresh = jnp.where(hessian[k, k] > 0, fresh, codes[k])
        change = (fresh - codes[k]) * rows.scale[k]
        gradient = gradient + hessian[:, k][:, None] * change[None, :]
        return codes.at[k].set(fresh), gradient

    codes, _ = lax.fori_loop(0, sweeps * target.shape[0], step, (start, gradient))
    return codes.astype(jnp.int32).reshape(shape)


@functools.partial(jax.jit, static_argnames="sweeps")
def kronecker_descent(
    codes,
    kernel,
    hessian,
    output_factor,
    qparams: QParams,
    *,
    sweeps: int = 2,
    input_damping=0.01,
    output_damping=0.05,
) -> jax.Array:
    """Codes of no larger tr(G D'H D), one coordinate after the other.

    output_factor: G [N, N], second moment of the loss's gradient at the layer's output. Damping is a
    share of the mean diagonal of either factor. Inside a row a change costs O(N); after the row one
    rank-1 update of H D.
    """
    shape = kernel.shape
    dtype = hessian.dtype
    rows = grid_rows(qparams, shape, dtype)
    hessian = _damped(hessian, input_damping)
    factor = _damped(output_factor.astype(dtype), output_damping)
    target = kernel.reshape(-1, shape[-1]).astype(dtype)
    start = codes.reshape(target.shape).astype(dtype)
    moved = jnp.matmul(hessian, dequantize(start, rows.scale, rows.zero) - target, precision=_EXACT)
    columns = target.shape[1]

    def row_step(i, state):
        codes, moved = state
        k = i % target.shape[0]
        curvature = hessian[k, k]
        old, scale = codes[k], rows.scale[k]

        def column_step(n, inner):
            row, gradient = inner
            wanted = jnp.round(row[n] - gradient[n] / (curvature * factor[n, n] * scale[n]))
            fresh = jnp.clip(wanted, rows.low[k, n], rows.high[k, n])
            change = (fresh - row[n]) * scale[n]
            return row.at[n].set(fresh), gradient + curvature * change * factor[n]

        gradient = jnp.matmul(moved[k], factor, precision=_EXACT)
        row, _ = lax.fori_loop(0, columns, column_step, (old, gradient))
        change = (row - old) * scale
        return codes.at[k].set(row), moved + hessian[:, k][:, None] * change[None, :]

    codes, _ = lax.fori_loop(0, sweeps * target.shape[0], row_step, (start, moved))
    return codes.astype(jnp.int32).reshape(shape)


def _damped(matrix, share):
    mean = jnp.mean(jnp.diagonal(matrix))
    mean = jnp.where(mean > 0, mean, jnp.ones_like(mean))
    return matrix + (share * mean) * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
