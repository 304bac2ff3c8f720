"""Walking a block program with two streams: full precision beside quantized, one pass each.

Each stream is an environment of values, one array per value over the whole calibration set. A unit's
inputs come from a stream as it stands when the walk reaches the unit; then the unit is run once over the
set and its outputs join the stream, and values nobody reads any more are freed. So the inputs and targets
of *all* units cost one pass of each stream, where re-running the network up to every unit costs tens.

Memory is estimated first; values that do not fit are kept in files and read in chunks.
"""

from __future__ import annotations

import functools
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from qdiff_jax.models.program import Unit, apply_unit, last_reads, subtrees
from qdiff_jax.quant.timed import StepContext, select


class Pool(NamedTuple):
    """Where stream values live: in memory up to `limit_bytes`, beyond it in files under `spill`."""

    limit_bytes: int
    spill: pathlib.Path | None


class Stream(NamedTuple):
    """values: {name: array [N, ...]}, None for an absent optional input. ctx: step of each sample.

    Each sample carries its own step, so that step tables select their rows per sample. `passes` counts
    the units run so far in units of the whole program, a figure for the cost report.
    """

    values: dict[str, Any]
    ctx: StepContext
    passes: float = 0.0

    @property
    def size(self) -> int:
        return int(np.shape(self.ctx.t)[0])


def start_stream(x, t, index, branch, y) -> Stream:
    """The stream before the first unit: the network's inputs over the calibration set (host arrays).

    y: None, labels [N] of integers, or a context [N, L, D] of floats."""
    ctx = StepContext(
        t=np.asarray(t, np.float32),
        index=np.asarray(index, np.int32),
        branch=np.asarray(branch, np.int32),
    )
    if y is not None:
        floating = np.issubdtype(np.asarray(y).dtype, np.floating)
        y = np.asarray(y, np.float32 if floating else np.int32)
    return Stream({"x": np.asarray(x, np.float32), "t": ctx.t, "y": y}, ctx)


@functools.partial(jax.jit, static_argnames="signature")
def run_unit(signature, params, quant, inputs, ctx):
    """`apply_unit`, compiled once per signature, with step tables selected by each sample's step."""
    return apply_unit(signature, params, select(quant, ctx), inputs)


def batch_bounds(size: int, batch_size: int) -> list[tuple[int, int]]:
    """[(start, stop)] covering 0..size in equal batches.

    Raises ValueError if batch_size does not divide size: a last, smaller batch would compile again.
    """
    if size % batch_size:
        raise ValueError(
            f"The batch size {batch_size} must divide the {size} samples of the calibration set; "
            "choose another batch size or number of samples."
        )
    return [(start, start + batch_size) for start in range(0, size, batch_size)]


def slice_rows(tree: Any, start: int, stop: int) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf[start:stop]), tree)


def advance(
    stream: Stream,
    unit: Unit,
    params: Mapping,
    quant: Mapping,
    *,
    batch_size: int,
    pool: Pool,
    keep: Sequence[str] | None = None,
    unit_count: int = 1,
) -> Stream:
    """Run `unit` over the whole set and add its outputs to the stream.

    params, quant: {block: ...} trees of the whole model; quant may hold step tables, which each sample
    selects by its own step. keep: names still needed afterwards; every other value is freed.
    """
    weights, quantizers = subtrees(params, unit), subtrees(quant, unit)
    inputs = tuple(stream.values[name] for name in unit.inputs)
    written: dict[str, Any] = {}
    for start, stop in batch_bounds(stream.size, batch_size):
        part = slice_rows(inputs, start, stop)
        outputs = run_unit(
            unit.signature, weights, quantizers, part, slice_rows(stream.ctx, start, stop)
        )
        for name, value in zip(unit.outputs, outputs, strict=True):
            if name not in written:
                shape = (stream.size, *value.shape[1:])
                written[name] = allocate(pool, shape, value.dtype, name)
            written[name][start:stop] = np.asarray(value)
    values = {**stream.values, **written}
    if keep is not None:
        values = {name: v for name, v in values.items() if name in keep or name in ("x", "t", "y")}
    return stream._replace(values=values, passes=stream.passes + 1.0 / unit_count)


def allocate(pool: Pool, shape: Sequence[int], dtype, name: str) -> np.ndarray:
    """An array in memory, or a file-backed one once the pool's limit is passed.

    Raises OSError, with what to do, if the file cannot be made (disk full).
    """
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if pool.spill is None or nbytes <= pool.limit_bytes:
        return np.empty(shape, dtype)
    pool.spill.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(pool.spill).free
    if free < nbytes:
        raise OSError(
            f"Streaming the value {name!r} needs {nbytes / 2**20:.0f} MiB under {pool.spill}, where "
            f"{free / 2**20:.0f} MiB are free; free some space or use fewer calibration samples."
        )
    path = pool.spill / f"{name}.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=tuple(shape))
    path.unlink()  # The space is given back when the last reader of the array lets go of it.
    return array


def needed_after(units: Sequence[Unit], position: int, keep: Sequence[str] = ()) -> set[str]:
    """Names that some unit after `position` still reads."""
    return {name for name, last in last_reads(units).items() if last > position} | set(keep)


def estimate_bytes(units: Sequence[Unit], params: Mapping, stream: Stream, streams: int = 2) -> int:
    """The largest number of bytes that `streams` streams hold at once during a walk, from shapes.

    The network's inputs count once: all streams start from the same arrays and never write them.
    """
    size = stream.size
    shapes: dict[str, Any] = {
        name: None if v is None else jax.ShapeDtypeStruct((1, *v.shape[1:]), v.dtype)
        for name, v in stream.values.items()
    }
    ctx = jax.tree.map(lambda v: jax.ShapeDtypeStruct((1,), v.dtype), stream.ctx)
    peak = 0
    for i, unit in enumerate(units):
        inputs = tuple(shapes[name] for name in unit.inputs)
        empty = tuple({} for _ in unit.nodes)
        outputs = jax.eval_shape(
            functools.partial(run_unit, unit.signature), subtrees(params, unit), empty, inputs, ctx
        )
        shapes.update(zip(unit.outputs, outputs, strict=True))
        held = {
            name: int(np.prod(s.shape)) * s.dtype.itemsize * size
            for name, s in shapes.items()
            if s is not None
        }
        once = sum(nbytes for name, nbytes in held.items() if name in stream.values)
        peak = max(peak, once + streams * (sum(held.values()) - once))
        alive = needed_after(units, i) | {"x", "t", "y"}
        shapes = {name: s for name, s in shapes.items() if name in alive}
    return peak


def plan_pool(
    units: Sequence[Unit],
    params: Mapping,
    stream: Stream,
    *,
    limit_bytes: int,
    spill: pathlib.Path | None,
    streams: int = 2,
) -> Pool:
    """Estimate first, then decide: all in memory, or every value above its share in files.

    Raises MemoryError if the streams do not fit and there is no folder to spill to.
    """
    need = estimate_bytes(units, params, stream, streams)
    logging.info(
        "block walk: %d samples, at most %.0f MiB of block values held at once (limit %.0f MiB)",
        stream.size,
        need / 2**20,
        limit_bytes / 2**20,
    )
    if need <= limit_bytes:
        return Pool(limit_bytes, None)
    if spill is None:
        raise MemoryError(
            f"The block walk needs {need / 2**20:.0f} MiB for {stream.size} samples, more than the "
            f"limit of {limit_bytes / 2**20:.0f} MiB; use fewer samples or give a folder to stream to."
        )
    logging.info("block walk: streaming block values through files under %s", spill)
    return Pool(0, spill)
