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

from qdiff_jax.models.program import Signature, apply_unit, node_at
from qdiff_jax.observe.taps import Tap
from qdiff_jax.quant.hessian_size import hessian_parts
from qdiff_jax.quant.moments import Moments, chunk_moments, merge, positions, rows_of, take_rows
from qdiff_jax.quant.timed import select
from qdiff_jax.runtime.mesh import AXIS, replicate, shard_batch
from qdiff_jax.sites import Replacement, SiteQuant, flatten_sites, nest_sites
from qdiff_jax.stages.site_products import layer_output, product_input
from qdiff_jax.stages.unit_structure import Layer, UnitPlan, offset_trees, tapped_inputs


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
) -> tuple[list[np.ndarray], list[dict]]:
    """The unit in full precision: its outputs over the set, and for each layer of the plan what it puts
    out, {"rows" [N, p, N_out], "mean" [N, N_out] over positions}; host arrays.

    allocate(index of the output, shape, dtype): where an output is written.
    """
    run = _full_function(signature, plan.layers, mesh)
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
    hessian_mib: int = 2048,
) -> list[Moments]:
    """Moments of the layers of one level, in the unit as it is quantized so far.

    params: folded where codes are decided, full precision elsewhere. quant: activation quantizers.
    inputs, full_inputs: the unit's inputs in either stream. full_outputs, targets: of `full_pass`.
    target: what R reaches for, hessian_mib: see `ClosedFormConfig`.
    """
    run = _level_function(signature, plan, level, target, hessian_mib, mesh)
    members = [plan.layers[i] for i in plan.levels[level]]
    picks = [layer_picks(layer, sampling) for layer in members]
    params, quant = replicate((tuple(params), tuple(quant)), mesh)
    # Only what R needs travels: nothing for a layer that aims at its own output.
    needed = sorted({j for layer in members for j in _reads_targets(layer, plan, target)})
    closes = sorted({layer.closes for layer in members if _closes(layer, target)})
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
        made = run(params, quant, shard_batch({**batch, "weights": weights}, mesh))
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


BLOCK = "block_fp_output"
LAYER_TARGETS = ("layer_fp_output", BLOCK)


def _closes(layer: Layer, target: str) -> bool:
    return target == BLOCK and layer.closes is not None


def _reads_targets(layer: Layer, plan: UnitPlan, target: str) -> tuple[int, ...]:
    if target not in LAYER_TARGETS or _closes(layer, target):
        return ()
    own = plan.layers.index(layer)
    return (own, *layer.summands) if target == BLOCK else (own,)


@functools.lru_cache(maxsize=256)
def _full_function(signature: Signature, layers: tuple[Layer, ...], mesh: Mesh):
    def run(params, inputs, picks):
        taps = _tap_trees(layers, len(signature.modules), {})
        outputs, written = apply_unit(signature, params, taps, inputs, mutable=["observed"])
        targets = []
        for layer, x, pick in zip(layers, tapped_inputs(layers, written), picks, strict=True):
            y = _output(layer, x, params, None)
            targets.append({"rows": take_rows(y, pick), "mean": jnp.mean(y, axis=1)})
        return list(outputs), targets

    return _sharded(run, mesh, 2)


@functools.lru_cache(maxsize=512)
def _level_function(
    signature: Signature, plan: UnitPlan, level: int, target: str, hessian_mib: int, mesh: Mesh
):
    members = [plan.layers[i] for i in plan.levels[level]]
    summed = [plan.layers[j] for m in members for j in m.summands] if target == BLOCK else []
    wanted = tuple(dict.fromkeys([*members, *summed]))

    def run(params, quant, batch):
        quant = select(quant, batch["ctx"])
        taps = _tap_trees(wanted, len(signature.modules), quant)
        outputs, written = apply_unit(
            signature, params, taps, batch["inputs"], mutable=["observed"]
        )
        met = dict(zip(wanted, tapped_inputs(wanted, written), strict=True))
        moments = []
        for layer, pick in zip(members, batch["picks"], strict=True):
            x = product_input(_site(layer, quant), met[layer])
            x = rows_of(layer.operator, x, layer.kernel, pick)
            weights = jnp.repeat(batch["weights"], x.shape[1])
            if _closes(layer, target):
                r, heard = _block_residual(signature, layer, params, quant, batch, outputs, pick)
                weights = weights if heard is None else weights * heard.reshape(-1)
            elif target in LAYER_TARGETS:
                r = _layer_residual(layer, plan, params, quant, batch, met, x, pick, target)
            else:
                r = jnp.zeros((*x.shape[:2], layer.kernel[-1]), x.dtype)
            rows, lacks = (v.reshape(-1, v.shape[-1]) for v in (x, r))
            parts = hessian_parts(layer.kernel, hessian_mib)
            part = chunk_moments(rows, lacks, weights, parts)
            moments.append(jax.tree.map(lambda leaf: leaf[None], part))
        return moments

    return _sharded(run, mesh, 1, whole=2)


def _sharded(run, mesh: Mesh, split: int, whole: int = 1):
    """`run` with its first `whole` arguments on every device and the other `split` cut by samples."""
    specs = (PartitionSpec(),) * whole + (PartitionSpec(AXIS),) * split
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False
    )
    return jax.jit(mapped)


def _layer_residual(layer, plan, params, quant, batch, met, x, pick, target):
    """What the layer, in full precision on the inputs it meets, lacks of its full-precision output; for
    a block target, with what the layers and inputs that are summed with it lack."""

    def own(i):
        return batch["targets"][str(i)]

    index = plan.layers.index(layer)
    kernel, bias = _weights(layer, params)
    site = _site(layer, quant)
    if site is None or site.substitute is None:
        y = jnp.matmul(x, kernel.reshape(-1, kernel.shape[-1]), precision=lax.Precision.HIGHEST)
        y = y if bias is None else y + bias[None, None, :]
    else:  # Its rows alone do not say what it puts out.
        y = take_rows(_output(layer, met[layer], params, site), pick)
    r = own(index)["rows"] - y
    if target != BLOCK:
        return r
    for j in layer.summands:
        other = plan.layers[j]
        y = _output(other, met[other], params, _site(other, quant))
        if other.rows == layer.rows:
            r = r + own(j)["rows"] - take_rows(y, pick)
        else:
            r = r + (own(j)["mean"] - jnp.mean(y, axis=1))[:, None, :]
    for k in layer.input_summands:
        lack = batch["full_inputs"][str(k)] - batch["inputs"][k]
        lack = lack.reshape(lack.shape[0], -1, lack.shape[-1])
        r = r + (take_rows(lack, pick) if lack.shape[1] == layer.rows else lack)
    return r


def _block_residual(signature, layer, params, quant, batch, outputs, pick):
    """(what the unit's output lacks, referred to the layer's output through its gain; row weights).

    The output moves by g when the layer's output moves by 1. Where g varies (a gate), the error of the
    unit is sum g^2 |lack / g - change|^2: rows weigh by the mean of g^2 over channels (a constant factor
    of a channel changes nothing), and the quotient is damped where a channel is hardly heard.
    """
    lack = batch["outputs"][str(layer.closes)] - outputs[layer.closes]
    lack = lack.reshape(lack.shape[0], layer.rows, -1)
    if layer.unit_gain:
        return take_rows(lack, pick), None

    def moved(offset):
        trees = offset_trees((layer,), (offset,), len(signature.modules))
        merged = [_merged(a, b, layer) for a, b in zip(quant, trees, strict=True)]
        result, _ = apply_unit(signature, params, merged, batch["inputs"], mutable=["observed"])
        return result[layer.closes]

    zeros = jnp.zeros((lack.shape[0], *layer.output), lack.dtype)
    gain = jax.jvp(moved, (zeros,), (jnp.ones_like(zeros),))[1].reshape(lack.shape)
    power = jnp.mean(gain**2, axis=(0, 1), keepdims=True)
    floor = 0.05 * power + jnp.finfo(gain.dtype).tiny
    heard = jnp.mean(gain**2 / (power + jnp.finfo(gain.dtype).tiny), axis=-1, keepdims=True)
    return take_rows(lack * gain / (gain**2 + floor), pick), take_rows(heard, pick)


def _merged(quant: Mapping, offsets: Mapping, layer: Layer) -> dict:
    """A module's activation quantizers with the layer's offset put in beside its own."""
    flat, other = flatten_sites(dict(quant)), flatten_sites(offsets)
    for name, site in other.items():
        held = flat.get(name, SiteQuant())
        if held.substitute is not None:
            both = (held.substitute, site.substitute.arrays)
            site = site.replace(substitute=Replacement(both, _moved))
        flat[name] = site.replace(lhs=held.lhs)
    return nest_sites(flat)


def _moved(arrays, operator, lhs, kernel, bias, site):
    """A `Replacement`: what another one puts out, with an offset added."""
    held, offset = arrays
    y = held.apply(held.arrays, operator, lhs, kernel, bias, site)
    return y + offset.astype(y.dtype)


def _tap_trees(layers: Sequence[Layer], nodes: int, quant: Any) -> list[dict]:
    flat = [flatten_sites(dict(quant[i])) if quant else {} for i in range(nodes)]
    for layer in layers:
        site = flat[layer.node].get(layer.op, SiteQuant())
        flat[layer.node][layer.op] = site.replace(tap=Tap("value"))
    return [nest_sites(tree) for tree in flat]


def _site(layer: Layer, quant) -> SiteQuant | None:
    return flatten_sites(dict(quant[layer.node])).get(layer.op)


def _weights(layer: Layer, params):
    node = node_at(params[layer.node], layer.op)
    return node["kernel"], node.get("bias")


def _output(layer: Layer, x, params, site):
    """[B, P, N]: the layer's output when it reads x, positions flattened."""
    y = layer_output(site, layer.operator, x, *_weights(layer, params))
    return y.reshape(y.shape[0], -1, y.shape[-1])
