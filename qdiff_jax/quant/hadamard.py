"""Randomised Hadamard rotations of the channels of a tensor, for any order that a network has.

An orthogonal R spreads a few large channels over all of them: X W = (X R)(R'W), and both factors are
easier to round (QuaRot, Ashkboos et al. 2024; ViDiT-Q, HQ-DiT for diffusion transformers). With a
Hadamard matrix H of order n and random signs, R = diag(+-1) H / sqrt(n).

Orders are n = 2^k m: Sylvester's doubling of a base of order m, which is 1 or of Paley's first or
second construction (Paley 1933). H is kept as the Kronecker product of the two, so that a rotation of
1152 channels is two products of 32 and 36 and not one of 1152: 68 multiplications per channel.

A rotation is its signs, [blocks, n]: with one block R mixes all channels; with several it is
block-diagonal and mixes n neighbours at a time, which is cheaper (ConvRot). H follows from n.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_EXACT = lax.Precision.HIGHEST


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _residues(q: int) -> np.ndarray:
    """Q [q, q] of a prime q: Q_ij = 1 if j - i is a square modulo q, -1 if it is none, 0 on the diagonal."""
    character = np.full(q, -1, np.int8)
    character[[i * i % q for i in range(1, q)]] = 1
    character[0] = 0
    i = np.arange(q)
    return character[(i[None, :] - i[:, None]) % q]


@functools.cache
def paley(order: int) -> np.ndarray | None:
    """A Hadamard matrix [order, order] of +-1 by one of Paley's constructions, int8; None if neither fits.

    First: order - 1 a prime of remainder 3 modulo 4. Second: order / 2 - 1 a prime of remainder 1.
    """
    if order % 4:
        return None
    q = order - 1
    if _is_prime(q) and q % 4 == 3:
        matrix = np.ones((order, order), np.int8)
        matrix[1:, 0] = -1
        matrix[1:, 1:] = _residues(q)
        matrix[np.arange(1, order), np.arange(1, order)] = 1
        return matrix
    q = order // 2 - 1
    if _is_prime(q) and q % 4 == 1:
        conference = np.ones((q + 1, q + 1), np.int8)
        conference[0, 0] = 0
        conference[1:, 1:] = _residues(q)
        plus, minus = np.int8([[1, 1], [1, -1]]), np.int8([[1, -1], [-1, -1]])
        return np.kron(conference, plus) + np.kron(np.eye(q + 1, dtype=np.int8), minus)
    return None


@functools.cache
def hadamard_factors(order: int) -> tuple[np.ndarray, np.ndarray]:
    """(A, B) of +-1, int8, with H = A (x) B of `order`, A of a power of two and B the smallest base.

    Raises ValueError for an order that these constructions do not reach.
    """
    if int(order) != order or order < 1:
        raise ValueError(f"the order of a Hadamard matrix is a positive integer, got {order!r}.")
    powers = (order & -order).bit_length()
    for k in reversed(range(powers)):
        base = np.ones((1, 1), np.int8) if order == 1 << k else paley(order >> k)
        if base is not None:
            return _sylvester(k), base
    raise ValueError(
        f"no Hadamard matrix of order {order} = 2^k m with m = 1 or one of Paley's is known here; rotate "
        "blocks of a power of two of channels instead (block=)."
    )


def _sylvester(k: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.int8)
    for _ in range(k):
        matrix = np.kron(np.int8([[1, 1], [1, -1]]), matrix)
    return matrix


def hadamard(order: int) -> np.ndarray:
    """H [order, order] of +-1, int8, H H' = order I: the product of `hadamard_factors`, for inspection."""
    return np.kron(*hadamard_factors(order))


def random_rotation(key: jax.Array, channels: int, block: int | None = None) -> jax.Array:
    """Signs [channels / block, block] of a random rotation of `channels`, float32.

    block: channels that are mixed with each other; None mixes all. Raises ValueError if block does not
    divide the channels, or has no Hadamard matrix.
    """
    block = channels if block is None else block
    if block < 1 or channels % block:
        raise ValueError(f"blocks of {block} do not divide {channels} channels.")
    hadamard_factors(block)
    return jax.random.rademacher(key, (channels // block, block), jnp.float32)


def rotate(x: jax.Array, signs: jax.Array) -> jax.Array:
    """x R on the last axis, in x's dtype. signs [blocks, n] of `random_rotation`; blocks * n channels."""
    _check(x, signs, -1)
    return _transform(x * _along_channels(signs, x), signs, transposed=False)


def unrotate(x: jax.Array, signs: jax.Array) -> jax.Array:
    """x R', the inverse of `rotate`."""
    _check(x, signs, -1)
    return _transform(x, signs, transposed=True) * _along_channels(signs, x)


def rotate_rows(kernel: jax.Array, signs: jax.Array) -> jax.Array:
    """R'W: the kernel (HWIO, or [in, out]) that takes `rotate(x)` where W took x."""
    _check(kernel, signs, -2)
    return rotate(kernel.swapaxes(-1, -2), signs).swapaxes(-1, -2)


def _along_channels(signs, x):
    return signs.reshape((1,) * (x.ndim - 1) + (signs.size,)).astype(x.dtype)


def _check(x, signs, axis):
    if signs.ndim != 2 or x.shape[axis] != signs.size:
        raise ValueError(
            f"a rotation of signs {signs.shape} does not fit axis {axis} of a tensor {x.shape}: signs "
            "are [blocks, n] with blocks * n channels."
        )


def _transform(x, signs, transposed):
    """x H / sqrt(n), or x H' / sqrt(n), on blocks of the last axis: one small product per factor."""
    left, right = (jnp.asarray(v, x.dtype) for v in hadamard_factors(signs.shape[1]))
    if transposed:
        left, right = left.T, right.T
    y = x.reshape(-1, len(left), len(right))
    if len(right) > 1:
        y = jnp.einsum("nij,jl->nil", y, right, precision=_EXACT)
    if len(left) > 1:
        y = jnp.einsum("nij,ik->nkj", y, left, precision=_EXACT)
    return (y * (1.0 / math.sqrt(signs.shape[1]))).reshape(x.shape)
