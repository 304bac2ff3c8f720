"""The two passes that closed-form rounding makes over a unit: what its layers should put out, and the
moments of what they meet.

A pass cuts the calibration set into chunks of equal size; each device computes the moments of whole
chunks, and chunks are merged one after the other in their own order. The sums therefore do not depend
on the number of devices, to the last bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from qdiff_jax.models.program import Signature, apply_unit
from qdiff_jax.observe.taps import Tap
from qdiff_jax.quant.hessian_size import Limit, hessian_parts
from qdiff_jax.quant.moments import Moments, chunk_moments, merge, positions, rows_of, take_rows
from qdiff_jax.quant.timed import select
from qdiff_jax.runtime.mesh import AXIS, replicate, shard_batch
from qdiff_jax.sites import SiteQuant, flatten_sites, nest_sites
from qdiff_jax.stages.site_products import product_input
from qdiff_jax.stages.unit_residuals import (
    BLOCK,
    LAYER_TARGETS,
    aims_at_block,
    block_residual,
    closed_output,
    gated,
    layer_output,
    layer_residual,
    reads_targets,
    site_of,
)
from qdiff_jax.stages.unit_structure import Layer, UnitPlan, tapped_inputs


class Sampling(NamedTuple):
    """Which rows count. rows: at most so many a layer (0: all). chunk: samples a chunk. weights: [N]
    non-negative, one for each sample."""

    rows: int
    chunk: int
    weights: np.ndarray


def layer_picks(layer: Layer, sampling: Sampling) -> np.ndarray:
    """[N, p] int32: the output positions whose rows are used, different ones in each sample."""
    samples = len(sampling.weights)
    count = layer.rows
    if sampling.rows:
        count = min(count, max(1, -(-sampling.rows // samples)))
    return positions(layer.rows, count, np.arange(samples))


def groups(samples: int, chunk: int, devices: int) -> Iterator[tuple[np.ndarray, int]]:
    """(rows of the set [devices * chunk], how many of the chunks are real), over the whole set."""
    chunks = [np.arange(start, start + chunk) for start in range(0, samples, chunk)]
    for first in range(0, len(chunks), devices):
        real = chunks[first : first + devices]
        padded = real + [chunks[0]] * (devices - len(real))
        yield np.concatenate(padded), len(real)


def full_pass(
    signature: Signature,
    plan: UnitPlan,
    params: Sequence[Mapping],
    inputs: Sequence[Any],
    sampling: Sampling,
    mesh: Mesh,
    allocate: Callable[[int, tuple[int, ...], Any], np.ndarray],
    target: str = BLOCK,
) -> tuple[list[np.ndarray], list[dict]]:
    """The unit in full precision: its outputs over the set, and for each layer of the plan what its target
    is made from; host arrays. That is {"rows" [N, p, N_out], "mean" [N, N_out] over positions} of what it
    puts out, or for one that closes an output: "closed" [N, p, N_out], the output if other layers have to
    be silent for it, and "gain" [N, N_out], the mean square over positions of a gain that varies.

    allocate(index of the output, shape, dtype): where an output is written. target: see
    `ClosedFormConfig`.
    """
    run = _full_function(signature, plan.layers, target, mesh)
    picks = [layer_picks(layer, sampling) for layer in plan.layers]
    params = replicate(tuple(params), mesh)
    size = len(sampling.weights)
    outputs: list[np.ndarray] = []
    targets: list = []
    for rows, real in groups(size, sampling.chunk, mesh.size):
        batch = _rows((tuple(inputs), picks), rows)
        fresh, lines = jax.device_get(run(params, *shard_batch(batch, mesh)))
        if not outputs:
            outputs = [allocate(i, (size, *v.shape[1:]), v.dtype) for i, v in enumerate(fresh)]
        kept = real * sampling.chunk
        for whole, part in zip(outputs, fresh, strict=True):
            whole[rows[:kept]] = part[:kept]
        targets.append(_rows(lines, slice(0, kept)))
    return outputs, jax.tree.map(lambda *leaves: np.concatenate(leaves), *targets)


def level_pass(
    signature: Signature,
    plan: UnitPlan,
    level: int,
    params: Sequence[Mapping],
    quant: Sequence[Mapping],
    inputs: Sequence[Any],
    full_inputs: Sequence[Any],
    full_outputs: Sequence[Any],
    targets: Sequence[dict],
    ctx: Any,
    sampling: Sampling,
    mesh: Mesh,
    target: str,
    limit: Limit = Limit(),
) -> list[Moments]:
    """Moments of the layers of one level, in the unit as it is quantized so far.

    params: folded where codes are decided, full precision elsewhere. quant: activation quantizers.
    inputs, full_inputs: the unit's inputs in either stream. full_outputs, targets: of `full_pass`.
    target: what R reaches for, see `ClosedFormConfig`. limit: of one layer's Hessian.
    """
    run = _level_function(signature, plan, level, target, limit, mesh)
    members = [plan.layers[i] for i in plan.levels[level]]
    picks = [layer_picks(layer, sampling) for layer in members]
    powers = {
        str(i): np.average(targets[i]["gain"], axis=0, weights=sampling.weights).astype(np.float32)
        for i in plan.levels[level]
        if gated(plan.layers[i], target)
    }
    params, quant, powers = replicate((tuple(params), tuple(quant), powers), mesh)
    # Only what R needs travels: nothing for a layer that aims at its own output.
    needed = sorted({j for i in plan.levels[level] for j in reads_targets(plan, i, target)})
    whole = [layer for layer in members if aims_at_block(layer, target) and not layer.silenced]
    closes = sorted({layer.closes for layer in whole})
    summed = sorted({k for layer in members if target == BLOCK for k in layer.input_summands})
    total: Any = None
    for rows, real in groups(len(sampling.weights), sampling.chunk, mesh.size):
        weights = np.asarray(sampling.weights, np.float32)[rows]
        batch = {
            "inputs": tuple(inputs),
            "ctx": ctx,
            "picks": picks,
            "targets": {str(j): targets[j] for j in needed},
            "outputs": {str(j): full_outputs[j] for j in closes},
            "full_inputs": {str(k): full_inputs[k] for k in summed},
        }
        batch = _rows(batch, rows)
        made = run(params, quant, powers, shard_batch({**batch, "weights": weights}, mesh))
        # On one device, chunk by chunk: the same additions for any number of devices.
        made = made if mesh.size == 1 else jax.device_get(made)
        if total is None:
            total = jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype), made)
        for i in range(real):
            total = _accumulated(total, made, np.int32(i))
    return total


def _rows(tree, rows):
    return jax.tree.map(lambda leaf: np.asarray(leaf[rows]), tree)


@jax.jit
def _accumulated(total, stacked, i):
    """Chunk i of a group merged into the total (of which an empty one is the exact neutral element)."""
    parts = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), stacked)
    return [merge(a, b) for a, b in zip(total, parts, strict=True)]


@functools.lru_cache(maxsize=256)
def _full_function(signature: Signature, layers: tuple[Layer, ...], target: str, mesh: Mesh):
    def run(params, inputs, picks):
        taps = _tap_trees(layers, len(signature.modules), {})
        outputs, written = apply_unit(signature, params, taps, inputs, mutable=["observed"])
        targets: list[dict[str, jax.Array]] = []
        for layer, x, pick in zip(layers, tapped_inputs(layers, written), picks, strict=True):
            if not aims_at_block(layer, target):
                y = layer_output(layer, x, params, None)
                targets.append({"rows": take_rows(y, pick), "mean": jnp.mean(y, axis=1)})
                continue
            empty = [{} for _ in signature.modules]
            closed, gain = closed_output(signature, layer, params, empty, inputs, outputs)
            targets.append({"closed": take_rows(closed, pick)} if layer.silenced else {})
            if gain is not None:
                targets[-1]["gain"] = jnp.mean(gain**2, axis=1)
        return list(outputs), targets

    return _sharded(run, mesh, 2)


@functools.lru_cache(maxsize=512)
def _level_function(
    signature: Signature, plan: UnitPlan, level: int, target: str, limit: Limit, mesh: Mesh
):
    members = [plan.layers[i] for i in plan.levels[level]]
    summed = [plan.layers[j] for m in members for j in m.summands] if target == BLOCK else []
    wanted = tuple(dict.fromkeys([*members, *summed]))

    def run(params, quant, powers, batch):
        quant = select(quant, batch["ctx"])
        taps = _tap_trees(wanted, len(signature.modules), quant)
        outputs, written = apply_unit(
            signature, params, taps, batch["inputs"], mutable=["observed"]
        )
        met = dict(zip(wanted, tapped_inputs(wanted, written), strict=True))
        moments = []
        for i, pick in zip(plan.levels[level], batch["picks"], strict=True):
            layer = plan.layers[i]
            x = product_input(site_of(layer, quant), met[layer])
            x = rows_of(layer.operator, x, layer.kernel, pick)
            weights = jnp.repeat(batch["weights"], x.shape[1])
            if aims_at_block(layer, target):
                power = powers.get(str(i))
                args = (signature, layer, i, params, quant, batch, outputs, pick, power)
                r, heard = block_residual(*args)
                weights = weights if heard is None else weights * heard.reshape(-1)
            elif target in LAYER_TARGETS:
                r = layer_residual(plan, i, params, quant, batch, met, x, pick, target)
            else:
                r = jnp.zeros((*x.shape[:2], layer.kernel[-1]), x.dtype)
            rows, lacks = (v.reshape(-1, v.shape[-1]) for v in (x, r))
            parts = hessian_parts(layer.kernel, *limit)
            part = chunk_moments(rows, lacks, weights, parts)
            moments.append(jax.tree.map(lambda leaf: leaf[None], part))
        return moments

    return _sharded(run, mesh, 1, whole=3)


def _sharded(run, mesh: Mesh, split: int, whole: int = 1):
    """`run` with its first `whole` arguments on every device and the other `split` cut by samples."""
    specs = (PartitionSpec(),) * whole + (PartitionSpec(AXIS),) * split
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False
    )
    return jax.jit(mapped)


def _tap_trees(layers: Sequence[Layer], nodes: int, quant: Any) -> list[dict]:
    flat = [flatten_sites(dict(quant[i])) if quant else {} for i in range(nodes)]
    for layer in layers:
        site = flat[layer.node].get(layer.op, SiteQuant())
        flat[layer.node][layer.op] = site.replace(tap=Tap("value"))
    return [nest_sites(tree) for tree in flat]
