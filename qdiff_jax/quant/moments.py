"""Second moments of a layer's inputs and of what its output still lacks, and what follows from them.

Rows X [n, K] are the im2col of a layer's input, R [n, N] what must be added to its output to reach the
target (0 if the layer aims at its own output). With bars for weighted means,

    H = mean (x - x_)(x - x_)'     C = mean (x - x_)(r - r_)'

the best weights before rounding are W + H^-1 C (a ridge towards W keeps them stable), and for any
rounded W_q the best bias is b + r_ + x_'(W - W_q), exactly. Sources: GPTQ's Hessian (Frantar et al.
2023), asymmetric targets of GPTAQ (Li et al. 2025) and Qronos (2025); centring is bias correction
(Nagel et al. 2019) made part of the same least squares.

Where K is large H may be block-diagonal: K in `parts` equal runs, each with its own [K / parts, K / parts]
matrix (for a convolution, parts = the number of taps leaves out what taps have in common). A stack of three
axes in place of a matrix says so, here and in `gptq`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from qdiff_jax.operators import Operator

_EXACT = lax.Precision.HIGHEST


@struct.dataclass
class Moments:
    """weight (): sum of row weights. mean [K], target_mean [N]: weighted means of x and r.
    spread [K, K] (or [parts, K / parts, K / parts]), cross [K, N], energy [N]: weighted sums of centred xx',
    xr', r^2."""

    weight: jax.Array
    mean: jax.Array
    target_mean: jax.Array
    spread: jax.Array
    cross: jax.Array
    energy: jax.Array


def rows_of(
    operator: Operator, x: jax.Array, kernel_shape: tuple[int, ...], picks: jax.Array | None = None
) -> jax.Array:
    """The rows [B, P, K] that a layer multiplies with its kernel [K, N].

    x: [B, H, W, C] (conv) or [B, ..., C] (dense). picks: [B, p] output positions to keep, counted
    row by row; None keeps all. The order of K is that of the flattened kernel, (i, j, c) for HWIO.
    Raises ValueError for an operator without a weight.
    """
    if operator.kind == "dense":
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        return rows if picks is None else take_rows(rows, picks)
    if operator.kind != "conv":
        raise ValueError(f"operator {operator.kind!r} has no weight; rows are for conv and dense.")
    (height, width), (down, across) = kernel_shape[:2], operator.strides
    x = jnp.pad(x, ((0, 0), *operator.padding, (0, 0)))
    out_rows = (x.shape[1] - height) // down + 1
    out_columns = (x.shape[2] - width) // across + 1
    taps = [(i, j) for i in range(height) for j in range(width)]
    if picks is None:
        parts = [
            x[
                :,
                i : i + (out_rows - 1) * down + 1 : down,
                j : j + (out_columns - 1) * across + 1 : across,
            ]
            for i, j in taps
        ]
        return jnp.stack(parts, axis=-2).reshape(x.shape[0], out_rows * out_columns, -1)
    corner = (picks // out_columns) * down * x.shape[2] + (picks % out_columns) * across
    offsets = np.array([i * x.shape[2] + j for i, j in taps], np.int32)
    where = corner[:, :, None] + offsets[None, None, :]
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    return take_rows(flat, where.reshape(x.shape[0], -1)).reshape(*picks.shape, -1)


def take_rows(x: jax.Array, picks: jax.Array) -> jax.Array:
    """x [B, P, C] at picks [B, p]: [B, p, C]."""
    return jax.vmap(lambda rows, at: rows[at])(x, picks)


def positions(size: int, count: int, samples: np.ndarray) -> np.ndarray:
    """[len(samples), count] int32: for each sample number `count` different positions of 0..size-1.

    Pseudo-random and fixed: they depend on the number of the sample and on size alone.
    """
    if count >= size:
        return np.tile(np.arange(size, dtype=np.int32), (len(samples), 1))
    stride = max(1, round(size * 0.6180339887))
    while np.gcd(stride, size) > 1:
        stride += 1
    start = np.asarray(samples, np.int64) * 7919
    return ((start[:, None] + np.arange(count) * stride) % size).astype(np.int32)


def chunk_moments(x: jax.Array, r: jax.Array, weights: jax.Array, parts: int = 1) -> Moments:
    """Moments of rows x [n, K], r [n, N] with non-negative weights [n], about the chunk's own means.

    parts: divides K; more than 1 for a block-diagonal spread.
    """
    total = jnp.sum(weights)
    safe = jnp.where(total > 0, total, jnp.ones_like(total))
    mean = jnp.matmul(weights, x, precision=_EXACT) / safe
    target_mean = jnp.matmul(weights, r, precision=_EXACT) / safe
    x, r = x - mean[None], r - target_mean[None]
    weighted = x * weights[:, None]
    if parts == 1:
        spread = jnp.matmul(weighted.T, x, precision=_EXACT)
    else:
        a, b = (v.reshape(len(v), parts, -1).swapaxes(0, 1) for v in (weighted, x))
        spread = jnp.matmul(a.swapaxes(1, 2), b, precision=_EXACT)
    return Moments(
        total,
        mean,
        target_mean,
        spread,
        jnp.matmul(weighted.T, r, precision=_EXACT),
        jnp.sum(r * r * weights[:, None], axis=0),
    )


@jax.jit
def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets of rows (Chan et al. 1979): nothing large is ever subtracted."""
    total = a.weight + b.weight
    share = b.weight / jnp.where(total > 0, total, jnp.ones_like(total))
    dx, dr = b.mean - a.mean, b.target_mean - a.target_mean
    between = a.weight * share
    return Moments(
        total,
        a.mean + share * dx,
        a.target_mean + share * dr,
        a.spread + b.spread + between * _square(dx, a.spread),
        a.cross + b.cross + between * dx[:, None] * dr[None, :],
        a.energy + b.energy + between * dr * dr,
    )


def hessian(moments: Moments, centred: bool = True) -> jax.Array:
    """H [K, K]: of centred rows, or of the rows as they are (for a layer without a bias)."""
    h = moments.spread / moments.weight
    return h if centred else h + _square(moments.mean, h)


def _square(v: jax.Array, like: jax.Array) -> jax.Array:
    """vv' [K, K] of v [K], or its diagonal blocks where `like` is a stack of them."""
    v = v.reshape(like.shape[:-1])
    return v[..., :, None] * v[..., None, :]


def in_parts(v: jax.Array, like: jax.Array) -> jax.Array:
    """v [K, N] as the rows that a matrix [K, K], or each of a stack, multiplies."""
    return v.reshape(*like.shape[:-1], v.shape[-1])


def cross_moment(moments: Moments, centred: bool = True) -> jax.Array:
    """C [K, N], as `hessian`."""
    c = moments.cross / moments.weight
    return c if centred else c + moments.mean[:, None] * moments.target_mean[None, :]


@jax.jit
def toward_target(kernel: jax.Array, upper: jax.Array, c: jax.Array) -> jax.Array:
    """W + U'U C of the kernel's shape, float32, with U'U = (H + ridge * mean(diag H) * I)^-1.

    With ridge 0 (and an H of full rank) this is the least-squares solution of X W + 1 b' = target. Of an H in p
    parts it is a p-th of the way that all parts would go, each as if it were alone: since H <= p diag(H_11,
    ..., H_pp), so much never raises the loss, and of parts that are alike (the taps of a smooth map) it is all
    there is to go. All of the way overshoots by up to p times.
    """
    inner = jnp.matmul(upper, in_parts(c, upper), precision=_EXACT)
    step = jnp.matmul(jnp.swapaxes(upper, -1, -2), inner, precision=_EXACT)
    if upper.ndim == 3:
        step = step / upper.shape[0]
    return kernel + step.reshape(kernel.shape).astype(kernel.dtype)


@jax.jit
def refit_bias(bias, kernel, rounded, moments: Moments) -> jax.Array:
    """The bias [N] that minimises the error of `rounded` in place of `kernel`, exactly."""
    change = (kernel - rounded).reshape(-1, kernel.shape[-1]).astype(moments.mean.dtype)
    step = moments.target_mean + jnp.matmul(moments.mean, change, precision=_EXACT)
    return bias + step.astype(bias.dtype)


@functools.partial(jax.jit, static_argnames="centred")
def layer_loss(kernel, rounded, moments: Moments, *, centred: bool = True) -> jax.Array:
    """Mean over rows of |target - output|^2 with `rounded` in place of `kernel`, ().

    With centred moments the bias is taken to be refitted. A block-diagonal H leaves out what parts have in
    common.
    """
    change = (rounded - kernel).reshape(-1, kernel.shape[-1]).astype(moments.mean.dtype)
    h, c = hessian(moments, centred), cross_moment(moments, centred)
    parted = in_parts(change, h)
    quadratic = jnp.sum(parted * jnp.matmul(h, parted, precision=_EXACT))
    energy = jnp.sum(moments.energy) / moments.weight
    if not centred:
        energy = energy + jnp.sum(moments.target_mean**2)
    return energy - 2.0 * jnp.sum(change * c) + quadratic
