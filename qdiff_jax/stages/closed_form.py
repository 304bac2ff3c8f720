"""Unit-by-unit rounding in closed form: the same inputs and results as `reconstruct`, without steps.

For each unit in order of execution, layer after layer: second moments of what the layer meets in the
network as quantized so far (with activation quantizers, if the state holds them), a least-squares
target, GPTQ, an exact bias. Both streams walk the block program together, so that all moments and
targets together cost a few passes of each unit over the calibration set, and nothing is run twice.

The target of a layer is what its output still lacks. With "block_fp_output" that is, for the last layer
of each branch of a unit, the full-precision output of the unit minus the unit's present output, seen
through the layer's own gain; which layers these are is found by `unit_structure`, so that residual,
attention and gated transformer blocks need no code of their own. A layer that is added to another one
(a time projection to a convolution) makes up for the other's error. A unit that ends up further from
full precision than nearest rounding would is rounded to nearest, and its report says so.

Sources: GPTQ (Frantar et al. 2023); asymmetric targets as in GPTAQ (Li et al. 2025); block output as in
BRECQ (Li et al. 2021), but solved. K-FAC weights: Martens and Grosse 2015.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from qdiff_jax.models.program import Unit, check_order, subtrees
from qdiff_jax.observe.capture import (
    Pool,
    Stream,
    advance,
    allocate,
    batch_bounds,
    needed_after,
    plan_pool,
    run_unit,
    slice_rows,
    start_stream,
)
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.quantizer import dequantize
from qdiff_jax.runtime.mesh import data_mesh
from qdiff_jax.sites import flatten_sites, nest_sites
from qdiff_jax.stages.layer_rounding import ClosedFormConfig, LayerResult, round_layer
from qdiff_jax.stages.stage import Model, QuantState, Stage, fold_weights, has_kernel
from qdiff_jax.stages.unit_moments import Sampling, full_pass, level_pass
from qdiff_jax.stages.unit_results import apply_result, load_result, save_result
from qdiff_jax.stages.unit_structure import UnitPlan, plan_unit
from qdiff_jax.stages.unit_trees import only_activations, only_weights, replace_weights

_dequantize = jax.jit(dequantize)


class Carry(NamedTuple):
    """Everything between two calls of `run`; what must survive a kill is in the store's files."""

    state: QuantState
    full: Stream
    quantized: Stream
    pool: Pool
    position: int
    reports: tuple[dict, ...]
    store: pathlib.Path | None
    factors: dict | None


def closed_form(
    model: Model,
    units: Sequence[Unit],
    calibration: Any,
    config: ClosedFormConfig = ClosedFormConfig(),
    *,
    name: str = "closed_form",
    frozen_units: Sequence[str] = (),
    row_weights: np.ndarray | None = None,
    factors=None,
    on_progress=None,
) -> Stage:
    """The stage that rounds the weights of `units` of `model` on a calibration set.

    Args:
      calibration: has x [N,H,W,C], t, index, branch [N] and y [N] or None; shuffled over steps.
      frozen_units: names of units whose weights are already decided.
      row_weights: [N] non-negative, how much each sample counts (`stages.row_weights`); None for equal.
      factors: () -> {site: G [N, N]}, called once; for `config.kronecker_sweeps`
        (`stages.output_factors`).
      on_progress: called with (done, total, unit=..., loss=...) after each unit.

    `finish` returns the state with `QTensor` codes and refitted biases, and a report with, per unit, the
    relative error of its output and that of nearest rounding ("loss", "nearest_loss"), whether it fell
    back to the latter, and the losses of its layers.

    Raises ValueError for units that do not cover the program, frozen units that are not there, weights
    of the wrong length or sign, more devices than there are; FloatingPointError for moments that are
    not finite.
    """
    check_order(model.program, units, ("x", "t", "y"))
    unknown = sorted(set(frozen_units) - {unit.name for unit in units})
    if unknown:
        raise ValueError(f"{name}: frozen_units {unknown} are not among the units of this pass.")
    if config.devices > len(jax.devices()):
        raise ValueError(
            f"{name}: devices={config.devices} were asked for, but JAX sees {len(jax.devices())}."
        )
    if config.kronecker_sweeps and factors is None:
        raise ValueError(
            f"{name}: kronecker_sweeps={config.kronecker_sweeps} needs `factors`; pass "
            "functools.partial(output_factors, model, calibration)."
        )
    size = int(np.shape(calibration.t)[0])
    batch_bounds(size, config.walk_batch)
    sampling = Sampling(config.rows, config.walk_batch, _checked_weights(row_weights, size, name))
    mesh = data_mesh(jax.devices()[: config.devices])
    symmetric = config.target == "layer_fp_input"

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        stream = start_stream(
            calibration.x, calibration.t, calibration.index, calibration.branch, calibration.y
        )
        spill = None if store is None else store / "spill"
        limit = config.memory_mib << 20
        pool = plan_pool(units, model.params, stream, limit_bytes=limit, spill=spill)
        return Carry(state, stream, stream, pool, 0, (), store, None)

    def run(carry: Carry, n: int) -> Carry:
        for _ in range(n):
            if not done(carry):
                carry = _one_unit(carry, units[carry.position])
        return carry

    def done(carry: Carry) -> bool:
        return carry.position >= len(units)

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        passes = carry.full.passes + carry.quantized.passes
        fallen = [r["unit"] for r in carry.reports if r.get("fell_back")]
        return carry.state, {
            "units": list(carry.reports),
            "fell_back": fallen,
            "network_passes": round(passes, 3),
        }

    def _one_unit(carry: Carry, unit: Unit) -> Carry:
        began = time.monotonic()
        chosen = () if unit.name in frozen_units else _undecided(model.params, carry.state, unit)
        result = load_result(carry.store, carry.position, unit.name) if chosen else None
        fresh = bool(chosen) and result is None
        if fresh and config.kronecker_sweeps and carry.factors is None:
            carry = carry._replace(factors=factors())
        inputs = tuple(carry.full.values[name] for name in unit.inputs)
        met = tuple(carry.quantized.values[name] for name in unit.inputs)
        plan = UnitPlan((), ())
        if fresh:
            first = slice_rows(inputs, 0, min(2, size))
            plan = plan_unit(unit.signature, subtrees(model.params, unit), first, chosen)
        outputs, targets = full_pass(
            unit.signature,
            plan,
            subtrees(model.params, unit),
            inputs,
            sampling,
            mesh,
            lambda i, shape, dtype: allocate(carry.pool, shape, dtype, unit.outputs[i]),
        )
        quant = _activations(carry.state.quant, unit)
        params = _decided_params(carry.state.quant, unit)
        passes = 1.0
        report = {"unit": unit.name, "trained": bool(chosen)}
        if fresh:
            made, passes = _round(carry, unit, plan, params, quant, inputs, met, outputs, targets)
            result, params = _kept(carry, unit, plan, params, quant, met, outputs, made)
            save_result(carry.store, carry.position, unit.name, result)
        elif chosen:
            params = _resumed(carry.state.quant, unit, params, result)
        state = carry.state
        if chosen:
            state = state.replace(quant=apply_result(state.quant, unit, result))
            report.update(result["report"])
        alive = needed_after(units, carry.position) | {"x", "t", "y"}
        values = {**carry.full.values, **dict(zip(unit.outputs, outputs, strict=True))}
        full = carry.full._replace(
            values={n: v for n, v in values.items() if n in alive},
            passes=carry.full.passes + 1.0 / len(units),
        )
        quantized = full._replace(passes=carry.quantized.passes)
        if not symmetric:
            quantized = advance(
                carry.quantized,
                unit,
                dict(zip(unit.nodes, params, strict=True)),
                dict(zip(unit.nodes, quant, strict=True)),
                batch_size=config.walk_batch,
                pool=carry.pool,
                keep=alive,
                unit_count=len(units),
            )
        quantized = quantized._replace(passes=quantized.passes + (passes - 1.0) / len(units))
        if on_progress is not None:
            shown = f"{report['loss']:.3g}" if "loss" in report else "-"
            on_progress(carry.position + 1, len(units), unit=unit.name, loss=shown)
        logging.debug("%s: %s in %.2f s", name, unit.name, time.monotonic() - began)
        return carry._replace(
            state=state,
            full=full,
            quantized=quantized,
            position=carry.position + 1,
            reports=(*carry.reports, report),
        )

    def _round(carry, unit, plan, params, quant, inputs, met, outputs, targets):
        """{layer key: LayerResult}, and how many passes over the unit that took."""
        if symmetric:  # Nothing depends on what is rounded: all layers share one pass.
            plan = plan._replace(levels=(tuple(range(len(plan.layers))),))
            params, quant, met = (
                list(subtrees(model.params, unit)),
                [{} for _ in unit.nodes],
                inputs,
            )
        made: dict[str, LayerResult] = {}
        ranges = _ranges(carry.state.quant, unit)
        for level, members in enumerate(plan.levels):
            moments = level_pass(
                unit.signature,
                plan,
                level,
                params,
                quant,
                met,
                inputs,
                outputs,
                targets,
                carry.full.ctx,
                sampling,
                mesh,
                config.target,
            )
            for i, moment in zip(members, moments, strict=True):
                layer = plan.layers[i]
                site = f"{unit.nodes[layer.node]}/{layer.op}"
                factor = None if carry.factors is None else carry.factors.get(site)
                node = _node(params[layer.node], layer.op)
                own = round_layer(
                    node["kernel"], node["bias"], ranges[layer.key], moment, config, factor
                )
                if not np.isfinite(float(own.damping)):
                    raise FloatingPointError(
                        f"{name}: the second moments of {site} could not be factored at any damping; "
                        "look for NaN or infinity in the calibration set. The units before it are "
                        "saved and will not be computed again."
                    )
                made[layer.key] = own
                if not symmetric:
                    params = replace_weights(params, {layer.key: (own.kernel, own.bias)})
        return made, 1.0 + len(plan.levels)

    def _kept(carry, unit, plan, params, quant, met, outputs, made):
        """The unit's result and folded parameters: in closed form, or to nearest where that is better."""
        closed = replace_weights(params, {k: (r.kernel, r.bias) for k, r in made.items()})
        plain = replace_weights(params, {k: (r.nearest_kernel, None) for k, r in made.items()})
        loss = _unit_loss(carry, unit, closed, quant, met, outputs)
        nearest = _unit_loss(carry, unit, plain, quant, met, outputs)
        fell_back = not loss <= nearest
        if fell_back:
            logging.warning(
                "%s: unit %s is %.3g from full precision in closed form and %.3g rounded to nearest; "
                "its weights are rounded to nearest.",
                name,
                unit.name,
                loss,
                nearest,
            )
        layers = {
            layer.op if len(unit.nodes) == 1 else f"{unit.nodes[layer.node]}/{layer.op}": {
                "loss": float(made[layer.key].loss),
                "nearest_loss": float(made[layer.key].nearest_loss),
                "damping": float(made[layer.key].damping),
            }
            for layer in plan.layers
        }
        report = {
            "loss": nearest if fell_back else loss,
            "nearest_loss": nearest,
            "fell_back": fell_back,
            "layers": layers,
        }
        result = {
            "codes": {k: np.asarray(r.nearest if fell_back else r.codes) for k, r in made.items()},
            "scales": {},
            "biases": {},
            "report": report,
        }
        if config.refit_bias and not fell_back:
            result["biases"] = {k: np.asarray(r.bias) for k, r in made.items()}
        return result, plain if fell_back else closed

    def _unit_loss(carry, unit, params, quant, met, outputs) -> float:
        """Relative squared error of the unit's outputs on the first samples, rows weighted, summed over
        outputs."""
        stop = config.walk_batch * -(-min(config.check_samples, size) // config.walk_batch)
        wrong, whole = np.zeros(len(outputs)), np.zeros(len(outputs))
        for a, b in batch_bounds(stop, config.walk_batch):
            made = run_unit(
                unit.signature,
                tuple(params),
                tuple(quant),
                slice_rows(met, a, b),
                slice_rows(carry.full.ctx, a, b),
            )
            weights = sampling.weights[a:b]
            for i, (y, target) in enumerate(zip(made, outputs, strict=True)):
                target = np.asarray(target[a:b], np.float64).reshape(b - a, -1)
                error = np.asarray(y, np.float64).reshape(b - a, -1) - target
                wrong[i] += weights @ np.sum(error**2, axis=1)
                whole[i] += weights @ np.sum(target**2, axis=1)
        return float(np.sum(wrong / np.maximum(whole, np.finfo(np.float32).tiny)))

    def _decided_params(quant: Mapping, unit: Unit) -> list[dict]:
        """The unit's parameters, folded where codes are decided and full precision elsewhere."""
        own = {n: model.params[n] for n in unit.nodes if n in model.params}
        decided = _without_ranges(only_weights({n: quant[n] for n in unit.nodes if n in quant}))
        return list(subtrees(fold_weights(own, decided)[0], unit))

    def _activations(quant: Mapping, unit: Unit) -> list[dict]:
        if not config.activations or symmetric:
            return [{} for _ in unit.nodes]
        return list(only_activations(subtrees(quant, unit)))

    def _resumed(quant, unit, params, result) -> list[dict]:
        ranges = _ranges(quant, unit)
        return replace_weights(
            params,
            {
                key: (_dequantize(ranges[key], codes), result["biases"].get(key))
                for key, codes in result["codes"].items()
            },
        )

    return Stage(name, init, run, finish, done)


def _checked_weights(weights, size: int, name: str) -> np.ndarray:
    if weights is None:
        return np.ones(size, np.float32)
    weights = np.asarray(weights, np.float32)
    if weights.shape != (size,) or not (weights >= 0).all() or not weights.sum() > 0:
        raise ValueError(
            f"{name}: row_weights must be {size} non-negative numbers, one for each calibration sample, "
            f"not all zero; got shape {weights.shape}, smallest {weights.min(initial=0)}."
        )
    return weights / weights.mean()


def _undecided(params: Mapping, state: QuantState, unit: Unit) -> tuple[str, ...]:
    """Keys of the unit's weights that have a range and no codes. Raises ValueError for a layer whose
    operator is replaced by another."""
    flat = [flatten_sites(tree) for tree in subtrees(state.quant, unit)]
    keys = []
    for node, (block, tree) in enumerate(zip(unit.nodes, flat, strict=True)):
        for op, site in tree.items():
            if isinstance(site.rhs, QParams) and has_kernel(params, f"{block}/{op}"):
                if site.substitute is not None:
                    raise ValueError(
                        f"{block}/{op} has a substitute operator, whose weights closed-form rounding "
                        "does not know; reconstruct it, or round it to nearest."
                    )
                keys.append(f"{node}:{op}")
    return tuple(keys)


def _ranges(quant: Mapping, unit: Unit) -> dict[str, QParams]:
    return {
        f"{node}:{op}": site.rhs
        for node, tree in enumerate(subtrees(quant, unit))
        for op, site in flatten_sites(tree).items()
        if isinstance(site.rhs, QParams) and not site.product
    }


def _without_ranges(tree: Mapping) -> dict:
    flat = flatten_sites(tree)
    return nest_sites({n: s for n, s in flat.items() if not isinstance(s.rhs, QParams)})


def _node(tree: Mapping, op: str) -> Mapping:
    for part in op.split("/"):
        tree = tree[part]
    return tree
