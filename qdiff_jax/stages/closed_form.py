"""Unit-by-unit rounding in closed form: the same inputs and results as `reconstruct`, without steps.

For each unit in order of execution, layer after layer: second moments of what the layer meets in the
network as quantized so far (with activation quantizers, if the state holds them), a least-squares
target, GPTQ, an exact bias. Both streams walk the block program together, so that all moments and
targets together cost a few passes of each unit over the calibration set: one in full precision, one for each
level of layers that read nothing of one another, one to go on to the next unit, and two over a few samples
for the comparison with nearest rounding.

The target of a layer is what its output still lacks. With "block_fp_output" that is, for the last layer
of each branch of a unit, the full-precision value of what the branch is added to minus its present value,
seen through the layer's own gain: the output of the unit, or the residual stream between two branches, as
behind the attention in a transformer block. Which layers these are is found by `unit_structure`, so that
residual, attention and gated transformer blocks need no code of their own. A layer that is added to
another one (a time projection to a convolution) makes up for the other's error. A unit that ends up
further from full precision than nearest rounding would is rounded to nearest, and its report says so.
Beside a low-rank branch the codes are those of what the branch leaves (`site_products`).

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
    slice_rows,
    start_stream,
)
from qdiff_jax.runtime.mesh import data_mesh
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.output_factors import fitting_batch, output_factors
from qdiff_jax.stages.site_products import multiplied
from qdiff_jax.stages.stage import Model, QuantState, Stage
from qdiff_jax.stages.unit_moments import Sampling, full_pass
from qdiff_jax.stages.unit_results import apply_result, load_result, save_result
from qdiff_jax.stages.unit_rounding import (
    UnitData,
    check_layers,
    decided_params,
    resumed_params,
    round_unit,
    undecided,
    weight_ranges,
)
from qdiff_jax.stages.unit_structure import UnitPlan, plan_unit
from qdiff_jax.stages.unit_trees import only_activations, only_operators


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
    on_progress=None,
) -> Stage:
    """The stage that rounds the weights of `units` of `model` on a calibration set.

    Args:
      calibration: has x [N,H,W,C], t, index, branch [N] and y [N] or None; shuffled over steps.
      frozen_units: names of units whose weights are already decided.
      row_weights: [N] non-negative, how much each sample counts (`stages.row_weights`); None for equal.
      on_progress: called with (done, total, unit=..., loss=...) after each unit.

    `finish` returns the state with `QTensor` codes and refitted biases, and a report with, per unit, the
    relative error of its output and that of nearest rounding ("loss", "nearest_loss"), whether it fell
    back to the latter ("fell_back"), and of its layers the losses, the damping and whether they were fitted
    to the sum behind their branch ("fits_block").

    Raises ValueError for units that do not cover the program, frozen units that are not there, weights
    of the wrong length or sign, more devices than there are, and batches that do not divide the set. Before
    the first unit, `init` raises ValueError for a weight to be rounded whose grid is not affine and static,
    whose operator is replaced, or whose Hessian has to be cut while there are sweeps of descent, and for a
    backward pass that does not fit into memory_mib. FloatingPointError for moments that are not finite.
    """
    check_order(model.program, units, ("x", "t", "y"))
    unknown = sorted(set(frozen_units) - {unit.name for unit in units})
    if unknown:
        raise ValueError(f"{name}: frozen_units {unknown} are not among the units of this pass.")
    if config.devices > len(jax.devices()):
        raise ValueError(
            f"{name}: devices={config.devices} were asked for, but JAX sees {len(jax.devices())}."
        )
    size = int(np.shape(calibration.t)[0])
    batch_bounds(size, config.walk_batch)
    backward_batch = config.kronecker_batch or config.walk_batch
    batch_bounds(size, backward_batch)
    sampling = Sampling(config.rows, config.walk_batch, _checked_weights(row_weights, size, name))
    mesh = data_mesh(jax.devices()[: config.devices])
    symmetric = config.target == "layer_fp_input"

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        chosen = {unit.name: _chosen(state, unit) for unit in units}
        check_layers(model.params, state.quant, units, chosen, config, name)
        if config.kronecker_sweeps and any(chosen.values()):
            fitting_batch(model, calibration, backward_batch, config.memory_mib, name)
        stream = start_stream(
            calibration.x, calibration.t, calibration.index, calibration.branch, calibration.y
        )
        spill = None if store is None else store / "spill"
        limit = config.memory_mib << 20
        pool = plan_pool(units, model.params, stream, limit_bytes=limit, spill=spill)
        return Carry(state, stream, stream, pool, 0, (), store, None)

    def run(carry: Carry, n: int) -> Carry:
        # One unit and not n: what it took is on disk before the next one begins.
        return carry if done(carry) else _one_unit(carry, units[carry.position])

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
        chosen = _chosen(carry.state, unit)
        result = load_result(carry.store, carry.position, unit.name) if chosen else None
        fresh = bool(chosen) and result is None
        if fresh and config.kronecker_sweeps and carry.factors is None:
            batch = fitting_batch(model, calibration, backward_batch, config.memory_mib, name)
            carry = carry._replace(
                factors=output_factors(
                    model,
                    calibration,
                    carry.state.key,
                    batch_size=batch,
                    row_weights=sampling.weights,
                )
            )
            # Forward and backward through the whole network, the latter counted twice.
            carry = carry._replace(full=carry.full._replace(passes=carry.full.passes + 3.0))
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
            config.target,
        )
        quant = _activations(carry.state.quant, unit)
        params = decided_params(model.params, carry.state.quant, unit)
        passes = 1.0
        report = {"unit": unit.name, "trained": bool(chosen)}
        if fresh:
            data = UnitData(
                list(subtrees(multiplied(model.params, _own(carry.state.quant, unit)), unit)),
                params,
                list(only_operators(subtrees(carry.state.quant, unit))),
                quant,
                inputs,
                met,
                outputs,
                targets,
                carry.full.ctx,
                weight_ranges(carry.state.quant, unit),
                carry.factors or {},
            )
            result, params, passes = round_unit(unit, plan, data, sampling, mesh, config, name)
            save_result(carry.store, carry.position, unit.name, result)
        elif chosen:
            params = resumed_params(carry.state.quant, unit, params, result)
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

    def _chosen(state: QuantState, unit: Unit) -> tuple[str, ...]:
        return () if unit.name in frozen_units else undecided(model.params, state.quant, unit)

    def _activations(quant: Mapping, unit: Unit) -> list[dict]:
        kept = only_operators if not config.activations or symmetric else only_activations
        return list(kept(subtrees(quant, unit)))

    return Stage(name, init, run, finish, done)


def _own(quant: Mapping, unit: Unit) -> dict:
    return {name: quant[name] for name in unit.nodes if name in quant}


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
