"""Improved precision and recall: which images lie in the other set's manifold of features.

The manifold of a set is the union of balls around its vectors, each reaching the k-th nearest other
vector of the set, borders included:

    precision = share of generated vectors inside a ball of the real set,
    recall    = share of real vectors inside a ball of the generated set

(Kynkaanniemi et al. 2019, arXiv:1904.06991, eqs. 1-3, k = 3). Squared distances decide as distances do.
Both values depend on the sizes of the sets; only equal sizes compare.

Distances are made in blocks from |u|^2 - 2 u.v + |v|^2, of which three arithmetics are offered:

- "float32": exact products after both sets are shifted by one common mean. The shift changes no
  distance and keeps the three terms small, so that their difference keeps its digits;
- "float64": for reference;
- "float16": what ADM's evaluator does: everything rounded to half precision, and a whole block again in
  float32 if any of its values overflowed. It moves both values by up to half a point, so a table that
  was made with it is matched only by it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qdiff_jax.runtime.mesh import replicate, shard_batch

DTYPES = ("float16", "float32", "float64")


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float
    generated_inside: np.ndarray  # [N] bool: inside the real manifold; its mean is precision
    real_inside: np.ndarray  # [M] bool: inside the generated manifold; its mean is recall


def precision_recall(
    generated,
    real,
    *,
    k: int = 3,
    dtype: str = "float32",
    block: int = 4096,
    mesh: Mesh | None = None,
) -> PrecisionRecall:
    """Precision and recall of generated features against real ones.

    Args:
      generated: [N, D] floating.
      real: [M, D] floating.
      k: which neighbour the radius reaches, the vector itself not counted.
      dtype: of the distances, "float32", "float64" or "float16" (see the module).
      block: distances are held [block, block] at a time. With "float16" it is also the unit of the
        fallback to float32: 10000 as in ADM's evaluator.
      mesh: split the rows of a block over its devices; `block` must be a multiple of their number.

    Raises ValueError when shapes differ, a set has no more than k vectors, a feature is not finite or
    the dtype is unknown.
    """
    generated, real = np.asarray(generated), np.asarray(real)
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"precision and recall take features [N, D] and [M, D], got {generated.shape} and "
            f"{real.shape}."
        )
    if dtype not in DTYPES:
        raise ValueError(f"distances in {dtype!r} are not known; use one of {DTYPES}.")
    if min(len(generated), len(real)) <= k or k < 1:
        raise ValueError(
            f"precision and recall with k={k} need more than {k} vectors in each set: there are "
            f"{len(generated)} and {len(real)}."
        )
    if not (np.isfinite(generated).all() and np.isfinite(real).all()):
        raise ValueError("precision and recall: a feature is not finite; look at the images first.")
    if dtype != "float16":
        shift = real.mean(axis=0, dtype=np.float64)
        generated, real = ((x.astype(np.float64) - shift).astype(dtype) for x in (generated, real))
    with jax.enable_x64(dtype == "float64"):
        sides = [_blocks(x, block, mesh) for x in (generated, real)]
        own = [_radii(side, k, dtype) for side in sides]
        # The real set comes first in every product, as in ADM's evaluator, whose rounding depends on it.
        inside = [
            _inside(sides[0], sides[1], own[1], dtype, centres_first=True),
            _inside(sides[1], sides[0], own[0], dtype, centres_first=False),
        ]
    inside = [flags[: len(x)] for flags, x in zip(inside, (generated, real))]
    return PrecisionRecall(float(inside[0].mean()), float(inside[1].mean()), *inside)


class _Blocks(NamedTuple):
    """A set cut into blocks of one size, so that one compiled program serves them all."""

    rows: list  # of [B, D], split over the devices if there is a mesh
    columns: list  # the same, whole on every device
    valid: list  # of [B] bool: False for the padding of the last block


def _blocks(x: np.ndarray, block: int, mesh: Mesh | None) -> _Blocks:
    block = min(block, len(x))
    if mesh is not None:
        block = -(-block // mesh.size) * mesh.size
    starts = range(0, len(x), block)
    padded = np.pad(x, ((0, -len(x) % block), (0, 0)))
    valid = np.arange(len(padded)) < len(x)
    hosts = [padded[i : i + block] for i in starts]
    masks = [jnp.asarray(valid[i : i + block]) for i in starts]
    if mesh is None:
        hosts = [jnp.asarray(host) for host in hosts]
        return _Blocks(hosts, hosts, masks)
    return _Blocks(
        [shard_batch(h, mesh) for h in hosts], [replicate(h, mesh) for h in hosts], masks
    )


def _radii(side: _Blocks, k: int, dtype: str) -> list:
    """For each block of the set, [B]: squared distance to the k-th nearest other vector."""
    radii = []
    for rows in side.rows:
        # k + 1, since a vector's nearest one is itself; where duplicates make it another one, at
        # distance 0 as well, the sorted values are the same.
        nearest = jnp.full((rows.shape[0], k + 1), jnp.inf, _wide(dtype))
        for columns, valid in zip(side.columns, side.valid):
            nearest = _merge_nearest(nearest, rows, columns, valid, dtype)
        radii.append(nearest[:, k])
    return radii


def _inside(
    points: _Blocks, centres: _Blocks, radii: list, dtype: str, centres_first: bool
) -> np.ndarray:
    """Which points lie in a ball: bool, one for each point and each padding row."""
    flags = []
    for rows in points.rows:
        inside = jnp.zeros((rows.shape[0],), bool)
        for columns, valid, radius in zip(centres.columns, centres.valid, radii):
            inside = _merge_inside(inside, rows, columns, valid, radius, dtype, centres_first)
        flags.append(np.asarray(inside))
    return np.concatenate(flags)


@partial(jax.jit, static_argnames="dtype")
def _merge_nearest(nearest, rows, columns, valid, dtype: str):
    squared = jnp.where(valid[None, :], _squared(rows, columns, dtype), jnp.inf)
    both = jnp.concatenate([nearest, squared], axis=1)
    return -jax.lax.top_k(-both, nearest.shape[1])[0]


@partial(jax.jit, static_argnames=("dtype", "centres_first"))
def _merge_inside(inside, rows, columns, valid, radius, dtype: str, centres_first: bool):
    if centres_first:
        squared = _squared(columns, rows, dtype).T
    else:
        squared = _squared(rows, columns, dtype)
    return inside | jnp.any((squared <= radius[None, :]) & valid[None, :], axis=1)


def _wide(dtype: str):
    return jnp.float64 if dtype == "float64" else jnp.float32


def _squared(u, v, dtype: str):
    """[B, C] squared distances of u [B, D] and v [C, D] in the arithmetic asked for."""
    if dtype != "float16":
        return _expanded(u, v)
    half = _half(u, v)
    # Padding is zero, and overflows nowhere that a vector does not.
    finite = jnp.all(jnp.isfinite(half))
    u, v = u.astype(jnp.float32), v.astype(jnp.float32)
    return jax.lax.cond(finite, lambda: half.astype(jnp.float32), lambda: _expanded(u, v))


def _expanded(u, v):
    product = jnp.matmul(u, v.T, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sum(jnp.square(u), axis=1)[:, None] + jnp.sum(jnp.square(v), axis=1)[None, :]
    return jnp.maximum(norms - 2.0 * product, 0.0)


def _half(u, v):
    """Every operation rounded to float16; sums inside a reduction are carried in float32."""

    def norm(x):
        return jnp.sum(jnp.square(x).astype(jnp.float32), axis=1).astype(jnp.float16)

    u, v = u.astype(jnp.float16), v.astype(jnp.float16)
    product = jnp.matmul(
        u.astype(jnp.float32), v.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST
    ).astype(jnp.float16)
    return jnp.maximum(norm(u)[:, None] - 2.0 * product + norm(v)[None, :], 0.0)
