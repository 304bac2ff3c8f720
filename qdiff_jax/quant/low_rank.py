"""A matrix as a low-rank part in floating point plus a quantized rest: W = L1 L2 + R, codes for R.

Source: SVDQuant (Li et al. 2024, arXiv:2411.05007), section 4. The best L1 L2 for a given rest is the truncated
singular value decomposition; alternated with quantizing the rest, from Q_0 = 0:

    L1 L2 = SVD_r(W - Q_i),   Q_{i+1} = Q(W - L1 L2)

which the official code repeats until the error stops falling, and the paper does once. A full SVD of every
iterate is what makes the official calibration take hours; here it is randomised (Halko et al. 2011): the
range of W from r + `oversample` random directions and a few power iterations, then an SVD of that many rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_EXACT = lax.Precision.HIGHEST


class Factors(NamedTuple):
    """down: L1 [K, r]. up: L2 [r, N]."""

    down: jax.Array
    up: jax.Array

    @property
    def product(self) -> jax.Array:
        return jnp.matmul(self.down, self.up, precision=_EXACT)


class SVD(NamedTuple):
    """How a decomposition is made; static. exact: a full SVD. oversample: directions beside the rank;
    iterations: of the power method, each two products with the matrix."""

    exact: bool = False
    oversample: int = 16
    iterations: int = 2


class Alternated(NamedTuple):
    """factors: those of least error. error, first: (), theirs and that of the first iteration. iterations: (),
    how many were made."""

    factors: Factors
    error: jax.Array
    first: jax.Array
    iterations: jax.Array


def truncated_svd(matrix: jax.Array, rank: int) -> Factors:
    """L1 = U_r and L2 = S_r V_r' of a matrix [K, N]: the best product of that rank."""
    u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
    return Factors(u[:, :rank], s[:rank, None] * v[:rank])


def randomized_svd(
    key: jax.Array, matrix: jax.Array, rank: int, oversample: int = 16, iterations: int = 2
) -> Factors:
    """`truncated_svd` up to a fraction of a per cent of its error, at the cost of a few products.

    matrix: [K, N]. Where rank + oversample reaches its smaller side, the exact SVD is cheaper and taken.
    """
    width = rank + oversample
    if width >= min(matrix.shape):
        return truncated_svd(matrix, rank)
    start = jax.random.normal(key, (matrix.shape[1], width), matrix.dtype)
    basis = jnp.linalg.qr(jnp.matmul(matrix, start, precision=_EXACT))[0]

    def turn(_, basis):
        # Orthonormal after every product: without it all columns turn into the largest direction.
        back = jnp.linalg.qr(jnp.matmul(matrix.T, basis, precision=_EXACT))[0]
        return jnp.linalg.qr(jnp.matmul(matrix, back, precision=_EXACT))[0]

    basis = lax.fori_loop(0, iterations, turn, basis)
    small = truncated_svd(jnp.matmul(basis.T, matrix, precision=_EXACT), rank)
    return Factors(jnp.matmul(basis, small.down, precision=_EXACT), small.up)


def decompose(key: jax.Array, matrix: jax.Array, rank: int, svd: SVD = SVD()) -> Factors:
    """The best factors of rank `rank` of a matrix [K, N], as `svd` says.

    Raises ValueError for a rank outside 1 .. min(K, N).
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(
            f"a branch of rank {rank} does not fit a matrix of shape {matrix.shape}; choose 1 to "
            f"{min(matrix.shape)}."
        )
    if svd.exact:
        return truncated_svd(matrix, rank)
    return randomized_svd(key, matrix, rank, svd.oversample, svd.iterations)


def alternate(
    key: jax.Array,
    matrix: jax.Array,
    rank: int,
    quantize: Callable[[jax.Array], jax.Array],
    error: Callable[[Factors, jax.Array], jax.Array],
    *,
    most: int = 100,
    svd: SVD = SVD(),
) -> Alternated:
    """The factors of least error over iterations that stop at the first without an improvement.

    matrix: W [K, N]. quantize(R) -> what its codes stand for. error(factors, Q(R)) -> (). An iteration with
    an equal error counts as an improvement, as in the official code. most=1 is the paper's single SVD.
    """
    first = Factors(
        jnp.zeros((matrix.shape[0], rank), matrix.dtype),
        jnp.zeros((rank, matrix.shape[1]), matrix.dtype),
    )
    infinite = jnp.asarray(jnp.inf, matrix.dtype)

    def going(state):
        return state["improved"] & (state["iteration"] < most)

    def step(state):
        i, least = state["iteration"], state["least"]
        factors = decompose(jax.random.fold_in(key, i), matrix - state["rounded"], rank, svd)
        rounded = quantize(matrix - factors.product)
        found = error(factors, rounded).astype(matrix.dtype)
        improved = found <= least
        return {
            "rounded": rounded,
            "best": jax.tree.map(
                lambda new, old: jnp.where(improved, new, old), factors, state["best"]
            ),
            "least": jnp.where(improved, found, least),
            "first": jnp.where(i == 0, found, state["first"]),
            "iteration": i + 1,
            "improved": improved,
        }

    state = {
        "rounded": jnp.zeros_like(matrix),
        "best": first,
        "least": infinite,
        "first": infinite,
        "iteration": jnp.int32(0),
        "improved": jnp.bool_(True),
    }
    end = lax.while_loop(going, step, state)
    return Alternated(end["best"], end["least"], end["first"], end["iteration"])


def balanced(factors: Factors) -> Factors:
    """The same product, each column of L1 and its row of L2 of equal largest magnitude, so that neither
    leaves the range of float16."""
    down = jnp.max(jnp.abs(factors.down), axis=0)
    up = jnp.max(jnp.abs(factors.up), axis=1)
    usable = (down > 0) & (up > 0)
    ratio = jnp.sqrt(jnp.where(usable, up, 1.0) / jnp.where(usable, down, 1.0))
    return Factors(factors.down * ratio[None, :], factors.up / ratio[:, None])
