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

from qdiff_jax.eval.intervals import Interval, halves_interval, mean_interval
from qdiff_jax.runtime.mesh import replicate, shard_batch

# Neighbours beyond the k-th that are remembered, so that radii within halves need no second search.
_SPARE = 24
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
    uncut = [np.zeros((len(x), 0), np.int8) for x in (generated, real)]
    inside = _flags(generated, real, uncut, k, dtype, block, mesh)
    return _result([flags[:, 0] for flags in inside])


def recall_alone(generated, real, *, k: int = 3, block: int = 4096) -> float:
    """The recall of `precision_recall` in float32, without the real set's own neighbours, which no recall needs
    and which are most of the work where it is the larger set. Raises ValueError as `precision_recall`."""
    generated, real = _prepared(generated, real, k, "float32")
    uncut = [np.zeros((len(x), 0), np.int8) for x in (generated, real)]
    sides = [_blocks(x, half, block, None) for x, half in zip((generated, real), uncut)]
    own = _radii(sides[0], k, "float32")
    inside = _inside(sides[1], sides[0], own, "float32", centres_first=False)
    return float(inside[: len(real), 0].mean())


def precision_recall_intervals(
    generated,
    real,
    *,
    k: int = 3,
    dtype: str = "float32",
    block: int = 4096,
    mesh: Mesh | None = None,
    cuts: int = 10,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[PrecisionRecall, Interval, Interval]:
    """`precision_recall` with an interval for each, over the samples of both sets.

    The vectors that are counted give the error of a mean. The vectors that make the manifold give that of
    `intervals.halves_interval`: every radius and every ball anew within random halves of them, from one pass
    over the distances. Both sets were drawn independently, so the squares add up.

    Args:
      generated, real, k, dtype, block, mesh: as in `precision_recall`.
      cuts: how many times each set is cut in two.
      level: the coverage aimed at. seed: of the cuts.

    Returns (values, interval of the precision, interval of the recall). Raises ValueError as
    `precision_recall` does, and when half of a set has no more than k vectors.
    """
    if cuts < 1 or min(len(generated), len(real)) // 2 <= k:
        raise ValueError(
            f"intervals of precision and recall with k={k} need a cut, and more than {k} vectors in half "
            f"of each set: there are {len(generated)} and {len(real)}; use more samples."
        )
    sides = [_sides(len(x), cuts, (seed, place)) for place, x in enumerate((generated, real))]
    inside = _flags(generated, real, sides, k, dtype, block, mesh)
    values = _result([flags[:, 0] for flags in inside])
    intervals = []
    for flags in inside:
        counted = mean_interval(flags[:, 0].astype(np.float64), level=level)
        halves = flags[:, 1:].mean(axis=0).reshape(cuts, 2)
        around = halves_interval(
            counted.estimate, halves, level=level, error=counted.standard_error
        )
        # A share: where it is near to nothing, half of a symmetric interval would be below.
        intervals.append(around._replace(low=max(around.low, 0.0), high=min(around.high, 1.0)))
    return values, *intervals


def _result(inside: list[np.ndarray]) -> PrecisionRecall:
    return PrecisionRecall(float(inside[0].mean()), float(inside[1].mean()), *inside)


def _sides(count: int, cuts: int, seed) -> np.ndarray:
    """[count, cuts] int8: the half, 0 or 1, that each vector is in."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(count) % 2 for _ in range(cuts)], axis=1).astype(np.int8)


def _flags(generated, real, cut, k, dtype, block, mesh) -> list[np.ndarray]:
    """[N, 1 + 2 cuts] bool of the generated vectors and [M, 1 + 2 cuts] of the real ones: inside the other
    set's manifold, and inside that of each half of that set. cut: from `_sides`, of both sets."""
    generated, real = _prepared(generated, real, k, dtype)
    with jax.enable_x64(dtype == "float64"):
        sides = [_blocks(x, half, block, mesh) for x, half in zip((generated, real), cut)]
        own = [_radii(side, k, dtype) for side in sides]
        # The real set comes first in every product, as in ADM's evaluator, whose rounding depends on it.
        inside = [
            _inside(sides[0], sides[1], own[1], dtype, centres_first=True),
            _inside(sides[1], sides[0], own[0], dtype, centres_first=False),
        ]
    return [flags[: len(x)] for flags, x in zip(inside, (generated, real))]


def _prepared(generated, real, k: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Both sets checked and, but for "float16", about the real mean in the dtype of the distances."""
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
    if dtype == "float16":
        return generated, real
    shift = real.mean(axis=0, dtype=np.float64)
    return tuple((x.astype(np.float64) - shift).astype(dtype) for x in (generated, real))


class _Blocks(NamedTuple):
    """A set cut into blocks of one size, so that one compiled program serves them all."""

    rows: list  # of [B, D], split over the devices if there is a mesh
    columns: list  # the same, whole on every device
    valid: list  # of [B] bool: False for the padding of the last block
    halves: jax.Array  # [all blocks, cuts] int8


def _blocks(x: np.ndarray, halves: np.ndarray, block: int, mesh: Mesh | None) -> _Blocks:
    block = min(block, len(x))
    if mesh is not None:
        block = -(-block // mesh.size) * mesh.size
    starts = range(0, len(x), block)
    padded = np.pad(x, ((0, -len(x) % block), (0, 0)))
    valid = np.arange(len(padded)) < len(x)
    hosts = [padded[i : i + block] for i in starts]
    masks = [jnp.asarray(valid[i : i + block]) for i in starts]
    halves = jnp.asarray(np.pad(halves, ((0, len(padded) - len(x)), (0, 0))))
    if mesh is None:
        hosts = [jnp.asarray(host) for host in hosts]
        return _Blocks(hosts, hosts, masks, halves)
    rows, columns = [shard_batch(h, mesh) for h in hosts], [replicate(h, mesh) for h in hosts]
    return _Blocks(rows, columns, masks, halves)


def _radii(side: _Blocks, k: int, dtype: str) -> list:
    """For each block of the set, [B, 1 + 2 cuts]: squared distance to the k-th nearest other vector, and to
    that within each half; -1, a ball that holds nothing, for the vectors of the other half."""
    radii, start = [], 0
    # k + 1, since a vector's nearest one is itself; where duplicates make it another one, at
    # distance 0 as well, the sorted values are the same.
    held = k + 1 + (_SPARE if side.halves.shape[1] else 0)
    for rows in side.rows:
        nearest = jnp.full((rows.shape[0], held), jnp.inf, _wide(dtype))
        around = jnp.zeros((rows.shape[0], held), jnp.int32)
        first = 0
        for columns, valid in zip(side.columns, side.valid):
            nearest, around = _merge_nearest(nearest, around, rows, columns, first, valid, dtype)
            first += columns.shape[0]
        own = side.halves[start : start + rows.shape[0]]
        radii.append(_reach(nearest, around, own, side.halves, k))
        start += rows.shape[0]
    return radii


@partial(jax.jit, static_argnames="k")
def _reach(nearest, around, own, halves, k: int):
    whole = nearest[:, k : k + 1]
    if not halves.shape[1]:
        return whole
    together = halves[around] == own[:, None, :]
    stays = jnp.where(together, nearest[:, :, None], jnp.inf)
    # The vector itself is in its own half. If too many of the neighbours that are held are in the other
    # (three in a million), the farthest of them stands in.
    reach = jnp.minimum(jnp.sort(stays, axis=1)[:, k], nearest[:, -1:])
    sides = [jnp.where(own == side, reach, -1.0) for side in (0, 1)]
    return jnp.concatenate([whole, jnp.stack(sides, axis=2).reshape(len(own), -1)], axis=1)


def _inside(
    points: _Blocks, centres: _Blocks, radii: list, dtype: str, centres_first: bool
) -> np.ndarray:
    """Which points lie in a ball: [points and padding, 1 + 2 cuts] bool."""
    flags = []
    for rows in points.rows:
        inside = jnp.zeros((rows.shape[0], radii[0].shape[1]), bool)
        for columns, valid, radius in zip(centres.columns, centres.valid, radii):
            inside = _merge_inside(inside, rows, columns, valid, radius, dtype, centres_first)
        flags.append(np.asarray(inside))
    return np.concatenate(flags)


@partial(jax.jit, static_argnames="dtype")
def _merge_nearest(nearest, around, rows, columns, first, valid, dtype: str):
    squared = jnp.where(valid[None, :], _squared(rows, columns, dtype), jnp.inf)
    both = jnp.concatenate([nearest, squared], axis=1)
    places = jnp.broadcast_to(
        (first + jnp.arange(len(columns), dtype=jnp.int32))[None, :], squared.shape
    )
    least, index = jax.lax.top_k(-both, nearest.shape[1])
    return -least, jnp.take_along_axis(jnp.concatenate([around, places], axis=1), index, axis=1)


@partial(jax.jit, static_argnames=("dtype", "centres_first"))
def _merge_inside(inside, rows, columns, valid, radius, dtype: str, centres_first: bool):
    if centres_first:
        squared = _squared(columns, rows, dtype).T
    else:
        squared = _squared(rows, columns, dtype)

    def reached(one):
        return jnp.any((squared <= one[None, :]) & valid[None, :], axis=1)

    # One radius at a time: all at once would hold the block as often.
    return inside | jax.lax.map(reached, radius.T).T


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
