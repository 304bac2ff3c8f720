"""What a layer must add to its output to reach its target, in a unit as it is quantized so far.

For a layer that closes an output of its unit, of the whole one or with the layers behind it silent
(`unit_structure`), that is what the output lacks of its full-precision value, referred to the layer through
its gain. For any other layer it is what its own output lacks, with what the layers and inputs that are
summed with it lack.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from qdiff_jax.models.program import apply_unit, node_at
from qdiff_jax.quant.moments import take_rows
from qdiff_jax.sites import Replacement, SiteQuant, flatten_sites, nest_sites
from qdiff_jax.stages.site_products import site_output
from qdiff_jax.stages.unit_structure import Layer, UnitPlan, offset_trees

BLOCK = "block_fp_output"
LAYER_TARGETS = ("layer_fp_output", BLOCK)
_FLOOR = (
    0.05  # of a channel's mean g^2: below it a channel is hardly heard, and its lack is not chased
)


def aims_at_block(layer: Layer, target: str) -> bool:
    """Whether the layer is fitted to an output of the unit that it closes."""
    return target == BLOCK and layer.closes is not None


def gated(layer: Layer, target: str) -> bool:
    """Whether it is, through a gain that varies."""
    return aims_at_block(layer, target) and not layer.unit_gain


def reads_targets(plan: UnitPlan, index: int, target: str) -> tuple[int, ...]:
    """Layers whose full-precision targets the residual of layer `index` needs."""
    layer = plan.layers[index]
    if target not in LAYER_TARGETS:
        return ()
    if aims_at_block(layer, target):
        return (index,) if layer.silenced else ()
    return (index, *layer.summands) if target == BLOCK else (index,)


def block_residual(signature, layer, index, params, quant, batch, outputs, pick, power):
    """(R [B, p, N] of a layer that closes an output of the unit; row weights [B, p, 1] or None).

    The output moves by g when the layer's output moves by 1. Where g varies (a gate), the error of the
    unit is sum g^2 |lack / g - change|^2: rows weigh by the mean of g^2 over channels (a constant factor
    of a channel changes nothing), and the quotient is damped where a channel is hardly heard.

    batch: of `unit_moments.level_pass`. outputs: of the unit on it. pick [B, p]: positions. power [N]: what
    a channel's g^2 is measured by, its mean over the whole set in full precision, so that a sample counts
    for the same in whatever company it is summed; None for a gain of 1.
    """
    made, gain = closed_output(signature, layer, params, quant, batch["inputs"], outputs)
    if layer.silenced:
        wanted = batch["targets"][str(index)]["closed"]
    else:
        wanted = take_rows(_positions(batch["outputs"][str(layer.closes)], layer), pick)
    lack = wanted - take_rows(made, pick)
    if gain is None:
        return lack, None
    gain, power, tiny = take_rows(gain, pick), power[None, None, :], jnp.finfo(gain.dtype).tiny
    heard = jnp.mean(gain**2 / (power + tiny), axis=-1, keepdims=True)
    return lack * gain / (gain**2 + _FLOOR * power + tiny), heard


def closed_output(signature, layer, params, quant, inputs, outputs):
    """(the output that the layer closes [B, P, N], what it moves by when the layer's output moves by 1, of
    the same shape or None where that is 1 everywhere). outputs: those of the whole unit."""
    if layer.unit_gain and not layer.silenced:
        return _positions(outputs[layer.closes], layer), None
    silent = [Layer(node, op, layer.operator, (), ()) for node, op in layer.silenced]

    def moved(offset):
        heard = [True] + [False] * len(silent)
        offsets = [offset] + [jnp.zeros(())] * len(silent)
        trees = offset_trees([layer, *silent], offsets, len(signature.modules), heard)
        merged = [_merged(a, b) for a, b in zip(quant, trees, strict=True)]
        result, _ = apply_unit(signature, params, merged, inputs, mutable=["observed"])
        return _positions(result[layer.closes], layer)

    zeros = jnp.zeros((len(jax.tree.leaves(inputs)[0]), *layer.output), jnp.float32)
    if layer.unit_gain:
        return moved(zeros), None
    return jax.jvp(moved, (zeros,), (jnp.ones_like(zeros),))


def layer_residual(plan, index, params, quant, batch, met, x, pick, target):
    """R [B, p, N]: what layer `index`, in full precision on the inputs it meets, lacks of its full-precision
    output; for a block target, with what the layers and inputs that are summed with it lack.

    batch, pick: as in `block_residual`. met: {layer: the input it meets}, as it is. x [B, p, K]: the rows that
    its codes are multiplied with.
    """

    def own(i):
        return batch["targets"][str(i)]

    layer = plan.layers[index]
    kernel, bias = _weights(layer, params)
    site = site_of(layer, quant)
    if site is None or site.substitute is None:
        y = jnp.matmul(x, kernel.reshape(-1, kernel.shape[-1]), precision=lax.Precision.HIGHEST)
        y = y if bias is None else y + bias[None, None, :]
    else:  # Its rows alone do not say what it puts out.
        y = take_rows(layer_output(layer, met[layer], params, site), pick)
    r = own(index)["rows"] - y
    if target != BLOCK:
        return r
    for j in layer.summands:
        other = plan.layers[j]
        y = layer_output(other, met[other], params, site_of(other, quant))
        if other.rows == layer.rows:
            r = r + own(j)["rows"] - take_rows(y, pick)
        else:
            r = r + (own(j)["mean"] - jnp.mean(y, axis=1))[:, None, :]
    for k in layer.input_summands:
        lack = batch["full_inputs"][str(k)] - batch["inputs"][k]
        lack = lack.reshape(lack.shape[0], -1, lack.shape[-1])
        r = r + (take_rows(lack, pick) if lack.shape[1] == layer.rows else lack)
    return r


def layer_output(layer: Layer, x, params, site: SiteQuant | None):
    """[B, P, N]: the layer's output when it reads x, positions flattened."""
    y = site_output(site, layer.operator, x, *_weights(layer, params))
    return y.reshape(y.shape[0], -1, y.shape[-1])


def site_of(layer: Layer, quant) -> SiteQuant | None:
    """What the activation quantizers hold for the layer."""
    return flatten_sites(dict(quant[layer.node])).get(layer.op)


def _positions(y, layer: Layer):
    """[B, P, N] of an output of the unit that the layer closes."""
    return y.reshape(y.shape[0], layer.rows, -1)


def _weights(layer: Layer, params):
    node = node_at(params[layer.node], layer.op)
    return node["kernel"], node.get("bias")


def _merged(quant: Mapping, offsets: Mapping) -> dict:
    """A module's activation quantizers with the offsets put in beside them."""
    flat, other = flatten_sites(dict(quant)), flatten_sites(offsets)
    for name, site in other.items():
        held = flat.get(name, SiteQuant())
        if held.substitute is not None:
            both = (held.substitute, site.substitute.arrays)
            site = site.replace(substitute=Replacement(both, _operator_with_offset))
        flat[name] = site.replace(lhs=held.lhs)
    return nest_sites(flat)


def _operator_with_offset(arrays, operator, lhs, kernel, bias, site):
    """As `unit_structure.with_offset`, of what another `Replacement` puts out."""
    held, (heard, offset) = arrays
    y = held.apply(held.arrays, operator, lhs, kernel, bias, site)
    return jnp.where(heard, y, jnp.zeros_like(y)) + offset.astype(y.dtype)
