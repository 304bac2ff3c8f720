"""One unit in closed form: its layers level by level, then the comparison with nearest rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from qdiff_jax.models.program import Unit, node_at, subtrees
from qdiff_jax.observe.capture import batch_bounds, run_unit, slice_rows
from qdiff_jax.quant.gptq import check_grid
from qdiff_jax.quant.hessian_size import hessian_parts
from qdiff_jax.quant.moments import Moments
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.quantizer import dequantize
from qdiff_jax.sites import SiteQuant, flatten_sites, nest_sites
from qdiff_jax.stages.layer_rounding import (
    ClosedFormConfig,
    LayerResult,
    check_descent,
    round_layer,
)
from qdiff_jax.stages.site_products import bias_of_codes, check_operator, multiplied
from qdiff_jax.stages.stage import fold_weights, has_kernel
from qdiff_jax.stages.unit_moments import Sampling, level_pass
from qdiff_jax.stages.unit_residuals import aims_at_block
from qdiff_jax.stages.unit_structure import UnitPlan
from qdiff_jax.stages.unit_trees import only_weights, replace_weights

_dequantize = jax.jit(dequantize)


class UnitData(NamedTuple):
    """What the rounding of one unit needs; trees come as one per node.

    full_params: full precision. params: folded where codes are decided; both hold what is multiplied where an
    operator multiplies something else than the kernel (`site_products`). operators: those. quant: activation
    quantizers, with the operators.
    inputs, met: the unit's inputs in the full-precision and in the quantized stream. outputs, targets:
    of `unit_moments.full_pass`. ctx: step of each sample. ranges: {"<node>:<op>": QParams}. factors:
    {site: G [N, N]}, or empty.
    """

    full_params: Sequence[Mapping]
    params: Sequence[Mapping]
    operators: Sequence[Mapping]
    quant: Sequence[Mapping]
    inputs: Sequence[Any]
    met: Sequence[Any]
    outputs: Sequence[np.ndarray]
    targets: Sequence[dict]
    ctx: Any
    ranges: Mapping[str, QParams]
    factors: Mapping[str, jax.Array]


def round_unit(
    unit: Unit,
    plan: UnitPlan,
    data: UnitData,
    sampling: Sampling,
    mesh: Mesh,
    config: ClosedFormConfig,
    where: str,
) -> tuple[dict, list[dict], float]:
    """(result for `unit_results`, the unit's parameters with decided weights, passes over the unit).

    where: name of the stage, for messages. Raises FloatingPointError, naming the site, for moments that
    are not finite.
    """
    made, tied = _layers(unit, plan, data, sampling, mesh, config, where)
    closed = replace_weights(data.params, {k: (r.kernel, r.bias) for k, r in made.items()})
    nearest = {k: (r.nearest_kernel, tied.get(k)) for k, r in made.items()}
    plain = replace_weights(data.params, nearest)
    loss = unit_loss(unit, closed, data, sampling, config)
    nearest_loss = unit_loss(unit, plain, data, sampling, config)
    fell_back = not loss <= nearest_loss
    if fell_back:
        logging.warning(
            "%s: unit %s is %.3g from full precision in closed form and %.3g rounded to nearest; its "
            "weights are rounded to nearest.",
            where,
            unit.name,
            loss,
            nearest_loss,
        )
    layers = {
        f"{unit.nodes[layer.node]}/{layer.op}": {
            "loss": float(made[layer.key].loss),
            "nearest_loss": float(made[layer.key].nearest_loss),
            "damping": float(made[layer.key].damping),
            "fits_block": aims_at_block(layer, config.target),
        }
        for layer in plan.layers
    }
    result = {
        "codes": {k: np.asarray(r.nearest if fell_back else r.codes) for k, r in made.items()},
        "scales": {},
        "biases": {},
        "report": {
            "loss": nearest_loss if fell_back else loss,
            "nearest_loss": nearest_loss,
            "fell_back": fell_back,
            "layers": layers,
        },
    }
    biases = tied if fell_back else {k: r.bias for k, r in made.items()}
    kept = made if config.refit_bias and not fell_back else tied
    result["biases"] = {k: np.asarray(biases[k]) for k in kept}
    levels = 1 if config.target == "layer_fp_input" else len(plan.levels)
    size = len(sampling.weights)
    passes = 1.0 + levels + 2.0 * _checked(size, config) / size
    return result, plain if fell_back else closed, passes


def _layers(
    unit, plan, data, sampling, mesh, config, where
) -> tuple[dict[str, LayerResult], dict[str, jax.Array]]:
    """Every layer of the plan, each level on the unit as the levels before it left it; and of the layers whose
    operator ties the bias to the weights, the bias of the nearest codes."""
    params, quant, met = data.params, data.quant, data.met
    alone = config.target == "layer_fp_input"
    if alone:  # Nothing depends on what is rounded: all layers share one pass.
        plan = plan._replace(levels=(tuple(range(len(plan.layers))),))
        params, quant, met = data.full_params, data.operators, data.inputs
    made: dict[str, LayerResult] = {}
    tied: dict[str, jax.Array] = {}
    for level, members in enumerate(plan.levels):
        moments = level_pass(
            unit.signature,
            plan,
            level,
            params,
            quant,
            met,
            data.inputs,
            data.outputs,
            data.targets,
            data.ctx,
            sampling,
            mesh,
            config.target,
            config.hessian_limit,
        )
        for i, moment in zip(members, moments, strict=True):
            layer = plan.layers[i]
            site = f"{unit.nodes[layer.node]}/{layer.op}"
            weights = node_at(params[layer.node], layer.op)
            bias = weights.get("bias")  # a layer without one is given the bias fitted to its codes
            own = round_layer(
                weights["kernel"],
                np.zeros(layer.kernel[-1], np.float32) if bias is None else bias,
                data.ranges[layer.key],
                moment,
                config,
                data.factors.get(site),
            )
            # Host arrays: results bound to a device would compile what reads them a second time.
            own = jax.device_get(own)
            if not np.isfinite(float(own.damping)):
                raise FloatingPointError(
                    f"{where}: the second moments of {site} could not be factored at any damping; look "
                    "for NaN or infinity in the calibration set. The units before it are saved and "
                    "will not be computed again."
                )
            held = flatten_sites(dict(quant[layer.node])).get(layer.op, SiteQuant())
            nearest = bias_of_codes(held, weights, own.nearest_kernel)
            if nearest is not None:
                tied[layer.key] = nearest
                own = _with_bias(own, weights, nearest, moment)
            made[layer.key] = own
            if not alone:
                params = replace_weights(params, {layer.key: (own.kernel, own.bias)})
    return made, tied


def _with_bias(made: LayerResult, weights: Mapping, bias, moments: Moments) -> LayerResult:
    """The result with the loss that nearest codes have with this bias in place of the weights' own."""
    step = np.asarray(bias - weights["bias"], np.float64)
    change = made.nearest_kernel - np.asarray(weights["kernel"], np.float64)
    lack = np.asarray(moments.target_mean) - np.asarray(moments.mean) @ change.reshape(
        -1, step.size
    )
    return made._replace(nearest_loss=made.nearest_loss + step @ step - 2.0 * (step @ lack))


def _checked(size: int, config: ClosedFormConfig) -> int:
    """How many samples a unit is compared on: whole batches."""
    return config.walk_batch * -(-min(config.check_samples, size) // config.walk_batch)


def unit_loss(unit, params, data: UnitData, sampling: Sampling, config: ClosedFormConfig) -> float:
    """Relative squared error of the unit's outputs on the first samples, weighted by sample and summed
    over outputs."""
    size = len(sampling.weights)
    stop = _checked(size, config)
    wrong, whole = np.zeros(len(data.outputs)), np.zeros(len(data.outputs))
    for a, b in batch_bounds(stop, config.walk_batch):
        made = run_unit(
            unit.signature,
            tuple(params),
            tuple(data.quant),
            slice_rows(tuple(data.met), a, b),
            slice_rows(data.ctx, a, b),
        )
        weights = sampling.weights[a:b].astype(np.float64)
        for i, (y, target) in enumerate(zip(made, data.outputs, strict=True)):
            target = np.asarray(target[a:b], np.float64).reshape(b - a, -1)
            error = np.asarray(y, np.float64).reshape(b - a, -1) - target
            wrong[i] += weights @ np.sum(error**2, axis=1)
            whole[i] += weights @ np.sum(target**2, axis=1)
    return float(np.sum(wrong / np.maximum(whole, np.finfo(np.float32).tiny)))


def undecided(params: Mapping, quant: Mapping, unit: Unit) -> tuple[str, ...]:
    """Keys of the unit's weights that have a range and no codes."""
    return tuple(
        f"{node}:{op}"
        for node, (block, tree) in enumerate(zip(unit.nodes, subtrees(quant, unit), strict=True))
        for op, site in flatten_sites(tree).items()
        if isinstance(site.rhs, QParams) and has_kernel(params, f"{block}/{op}")
    )


def check_layers(
    params: Mapping,
    quant: Mapping,
    units: Sequence[Unit],
    chosen: Mapping[str, Sequence[str]],
    config: ClosedFormConfig,
    where: str,
) -> None:
    """Raise ValueError, before anything is rounded, for a weight that cannot be.

    chosen: {name of a unit: keys of its weights that are to be rounded}. where: name of the stage.
    """
    for unit in units:
        flat = [flatten_sites(tree) for tree in subtrees(quant, unit)]
        for key in chosen[unit.name]:
            node, op = key.split(":")
            site = f"{unit.nodes[int(node)]}/{op}"
            held = flat[int(node)][op]
            check_operator(held, f"{site} in {where}")
            check_grid(held.rhs.spec, f"the weight of {site} in {where}")
            shape = np.shape(node_at(params, site)["kernel"])
            parts = hessian_parts(shape, *config.hessian_limit)
            check_descent(config, parts > 1, f"{site} {shape} in {where}")


def weight_ranges(quant: Mapping, unit: Unit) -> dict[str, QParams]:
    """{"<node>:<op>": range} of every weight of the unit without codes."""
    return {
        f"{node}:{op}": site.rhs
        for node, tree in enumerate(subtrees(quant, unit))
        for op, site in flatten_sites(tree).items()
        if isinstance(site.rhs, QParams) and not site.product
    }


def decided_params(params: Mapping, quant: Mapping, unit: Unit) -> list[dict]:
    """The unit's parameters, folded where codes are decided and as `multiplied` elsewhere."""
    quant = {name: quant[name] for name in unit.nodes if name in quant}
    own = multiplied({name: params[name] for name in unit.nodes if name in params}, quant)
    flat = flatten_sites(only_weights(quant))
    held = {name: site for name, site in flat.items() if not isinstance(site.rhs, QParams)}
    return list(subtrees(fold_weights(own, nest_sites(held))[0], unit))


def resumed_params(
    quant: Mapping, unit: Unit, params: Sequence[Mapping], result: Mapping
) -> list[dict]:
    """The unit's parameters with the weights of a result that was read back."""
    ranges = weight_ranges(quant, unit)
    weights = {
        key: (_dequantize(ranges[key], codes), result["biases"].get(key))
        for key, codes in result["codes"].items()
    }
    return replace_weights(params, weights)
