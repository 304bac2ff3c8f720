"""What a site reports of its operands while a model runs: one small statistic per sample.

Taps know nothing of timesteps: each statistic keeps the batch axis, and the observers reduce it by
step outside the model, so that batches of mixed timesteps need one compile and no branch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

STATISTICS = ("range", "channel_range", "sample", "histogram", "value")


@struct.dataclass
class Tap:
    """statistic: "range" (min and max per sample), "channel_range" (per sample and channel),
    "sample" (a fixed pseudo-random subset of `size` elements per sample, beside the range),
    "histogram" (counts of all elements in `size` bins, beside the range), "value" (the operand itself).
    boundary: report "range", "sample" and "histogram" of the channels before it and from it on apart, as
    {"part_0": ..., "part_1": ...}."""

    statistic: str = struct.field(pytree_node=False, default="range")
    size: int = struct.field(pytree_node=False, default=256)
    boundary: int | None = struct.field(pytree_node=False, default=None)


def measure(tap: Tap, x: jax.Array) -> dict[str, jax.Array]:
    """The statistic of x [B, ...] as a dict of arrays with leading axis B, float32."""
    if tap.statistic not in STATISTICS:
        raise ValueError(f"Tap statistic {tap.statistic!r} is unknown; use one of {STATISTICS}.")
    x = x.astype(jnp.float32)
    if tap.boundary is not None:
        whole = tap.replace(boundary=None)
        parts = jnp.split(x, [tap.boundary], axis=-1)
        return {f"part_{i}": measure(whole, part) for i, part in enumerate(parts)}
    if tap.statistic == "value":
        return {"value": x}
    axes = tuple(range(1, x.ndim if tap.statistic != "channel_range" else x.ndim - 1))
    report = {"lo": jnp.min(x, axes), "hi": jnp.max(x, axes)}
    if tap.statistic == "sample":
        flat = x.reshape(x.shape[0], -1)
        if flat.shape[1] > tap.size:
            flat = jnp.take(flat, sample_positions(flat.shape[1], tap.size), axis=1)
        report["sample"] = flat
    if tap.statistic == "histogram":
        report["counts"] = histogram(x, tap.size)
    return report


def histogram(x: jax.Array, bins: int) -> jax.Array:
    """[B, bins] float32: how many elements of each sample lie in each of `bins` equal bins.

    They cover the range of all samples together, made to contain zero. Elements that are exactly 0 are not
    counted: every grid holds them."""
    lo, hi = jnp.minimum(x.min(), 0.0), jnp.maximum(x.max(), 0.0)
    flat = x.reshape(x.shape[0], -1)
    place = jnp.floor((flat - lo) * (bins / jnp.maximum(hi - lo, 1e-30))).astype(jnp.int32)
    place = jnp.clip(place, 0, bins - 1) + bins * jnp.arange(len(flat))[:, None]
    counts = (
        jnp.zeros((len(flat) * bins,), jnp.int32)
        .at[place.ravel()]
        .add((flat != 0.0).astype(jnp.int32).ravel())
    )
    return counts.reshape(len(flat), bins).astype(jnp.float32)


def sample_positions(count: int, size: int = 256) -> jax.Array:
    """[min(count, size)] int: which of the `count` elements of a sample, channels last, "sample" reports.

    The same for every sample and call: a permutation fixed by the tensor's size."""
    if count <= size:
        return jnp.arange(count)
    return jax.random.choice(jax.random.key(count), count, (size,), replace=False)
