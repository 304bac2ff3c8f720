"""Unit-by-unit reconstruction: one stage that BRECQ, TIAR and learned activation steps configure.

For each unit in order of execution: the target is the unit's full-precision output on full-precision
inputs; its inputs come from the stream of the network as quantized so far (`inputs="quantized"`,
"asym" in the official code) or from full precision; what is trained is the soft rounding of its
weights, its activation scales, or both. Then the unit is hardened, frozen, and both streams move on,
so that all inputs and targets together cost one pass of each stream.

Sources: AdaRound (Nagel et al. 2020), BRECQ (Li et al. 2021), QDrop's input mixing (Wei et al. 2022),
TFMQ-DM's temporal reconstruction (Huang et al. 2024). Deliberate departures from the official code:
dropout is off, units run in order of execution, floor(w / scale) is computed once.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from qdiff_jax.models.program import Unit, check_order, subtrees
from qdiff_jax.observe.capture import (
    Pool,
    Stream,
    advance,
    needed_after,
    plan_pool,
    start_stream,
)
from qdiff_jax.runtime.cache import compile_account
from qdiff_jax.runtime.loop import run_steps
from qdiff_jax.runtime.mesh import data_mesh, replicate
from qdiff_jax.stages.objective import initial_optimizer, make_step, sum_of_outputs
from qdiff_jax.stages.partial import (
    discard_partial,
    partial_folder,
    resume_partial,
    save_partial,
)
from qdiff_jax.stages.stage import Model, QuantState, Stage, fold_weights
from qdiff_jax.stages.unit_results import (
    alphas_of,
    apply_result,
    load_result,
    save_result,
    unit_result,
)
from qdiff_jax.stages.unit_steps import ReconstructConfig, for_unit, step_inputs
from qdiff_jax.stages.unit_trees import (
    folded_trees,
    only_weights,
    soft_trees,
    trainable_alphas,
    trainable_scales,
    without_kernels,
)


class Carry(NamedTuple):
    """Everything between two calls of `run`; what must survive a kill is in the store's files."""

    state: QuantState
    full: Stream
    quantized: Stream
    pool: Pool
    position: int
    step: int
    unit: dict | None
    reports: tuple[dict, ...]
    saved: float
    store: pathlib.Path | None


def reconstruct(
    model: Model,
    units: Sequence[Unit],
    calibration: Any,
    config: ReconstructConfig,
    *,
    name: str = "reconstruct",
    frozen_units: Sequence[str] = (),
    loss=sum_of_outputs,
    keep_alphas: bool = False,
    on_progress=None,
) -> Stage:
    """The stage that reconstructs `units` of `model` on a calibration set.

    calibration: has x [N,H,W,C], t, index, branch [N] and y [N] or None. frozen_units: names of units
    whose weights are already decided (their codes stay as they are, bit for bit).
    keep_alphas: leave {site: alpha} in `aux["alphas"]`, for a later pass to go on from (a site whose
    weight is a `SoftRounding` in the state is trained from its alpha).
    on_progress(done, total, **values): called after each chunk of steps.

    `finish` returns the state with `QTensor` codes (or trained scales) and a report with, per unit,
    the first and last reconstruction loss, the binarised fraction, steps per second, and overall the
    number of network passes spent on inputs and targets.
    """
    check_order(model.program, units, ("x", "t", "y"))
    unknown = sorted(set(frozen_units) - {unit.name for unit in units})
    if unknown:
        raise ValueError(f"{name}: frozen_units {unknown} are not among the units of this pass.")
    if config.devices > len(jax.devices()):
        raise ValueError(
            f"{name}: devices={config.devices} were asked for, but JAX sees {len(jax.devices())}."
        )
    trains_weights = config.trains in ("weights", "both")
    totals = [for_unit(config, unit).steps for unit in units]
    mesh = data_mesh(jax.devices()[: config.devices]) if config.devices > 1 else None

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        stream = start_stream(
            calibration.x, calibration.t, calibration.index, calibration.branch, calibration.y
        )
        spill = None if store is None else store / "spill"
        pool = plan_pool(
            units, model.params, stream, limit_bytes=config.memory_mib << 20, spill=spill
        )
        now = time.monotonic()
        return Carry(state, stream, stream, pool, 0, 0, None, (), now, store)

    def run(carry: Carry, n: int) -> Carry:
        if done(carry):
            return carry
        unit = units[carry.position]
        if carry.unit is None:
            carry = _begin(carry, unit)
        steps = totals[carry.position]
        if carry.unit["trainable"] and carry.step < steps:
            carry = _train(carry, unit, min(n, steps - carry.step))
        if not carry.unit["trainable"] or carry.step >= steps:
            carry = _close(carry, unit)
        return carry

    def done(carry: Carry) -> bool:
        return carry.position >= len(units)

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        passes = carry.full.passes + carry.quantized.passes
        return carry.state, {"units": list(carry.reports), "network_passes": round(passes, 3)}

    def _begin(carry: Carry, unit: Unit) -> Carry:
        """Move the full-precision stream over the unit and set up what is trained in it."""
        needed = needed_after(units, carry.position) | set(unit.inputs) | set(unit.outputs)
        full = advance(
            carry.full,
            unit,
            model.params,
            {},
            batch_size=config.walk_batch,
            pool=carry.pool,
            keep=needed,
            unit_count=len(units),
        )
        trainable, quant = {}, ()
        if unit.name not in frozen_units:
            trainable, quant = _trainables(carry.state.quant, unit)
        # timed: steps run here and their seconds, without compiling and what an earlier run did.
        work = {"trainable": trainable, "losses": [], "timed": np.zeros(2), "result": None}
        carry = carry._replace(full=full, unit=work, step=0)
        if not trainable:
            return carry
        work["result"] = load_result(carry.store, carry.position, unit.name)
        if work["result"] is not None:
            return carry._replace(step=totals[carry.position])
        work["carry"] = _device_carry(carry, unit, trainable, quant)
        at, work["losses"], work["carry"] = resume_partial(
            partial_folder(carry.store, carry.position), totals[carry.position], work["carry"]
        )
        if at:
            logging.info("%s: unit %s continues at step %d", name, unit.name, at)
        return carry._replace(step=at)

    def _trainables(quant: Mapping, unit: Unit) -> tuple[dict, tuple[dict, ...]]:
        trees = (
            soft_trees(model.params, quant, unit) if trains_weights else folded_trees(quant, unit)
        )
        if config.trains == "weights":
            trees = only_weights(trees)
        trainable = {}
        if trains_weights:
            trainable["alpha"] = trainable_alphas(trees)
        if config.trains in ("scales", "both"):
            trainable["scale"] = trainable_scales(trees)
        return {kind: leaves for kind, leaves in trainable.items() if leaves}, trees

    def _device_carry(carry: Carry, unit: Unit, trainable, quant) -> dict:
        source = carry.full if config.inputs == "full_precision" else carry.quantized
        data = {
            "inputs": tuple(source.values[n] for n in unit.inputs),
            "targets": tuple(carry.full.values[n] for n in unit.outputs),
            "ctx": carry.full.ctx,
        }
        if config.inputs == "mixed":
            data["fp_inputs"] = tuple(carry.full.values[n] for n in unit.inputs)
        params = _part(model.params, unit)
        if not trains_weights:
            params, _ = fold_weights(params, _part(carry.state.quant, unit))
        params = tuple(
            without_kernels(p, q) for p, q in zip(subtrees(params, unit), quant, strict=True)
        )
        work = {
            "frozen": (params, quant),
            "data": data,
            "trainable": trainable,
            "optimizer": initial_optimizer(trainable),
        }
        # Copies: the working set is given up to the step, and must share no buffer with the model.
        work = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), work)
        return work if mesh is None else replicate(work, mesh)

    def _train(carry: Carry, unit: Unit, n: int) -> Carry:
        began = time.monotonic()
        stop = carry.step + n
        own = for_unit(config, unit)
        xs = step_inputs(own, carry.state.key, carry.full.size, carry.position, carry.step, stop)
        prob = config.input_prob if config.inputs == "mixed" else None
        step = make_step(unit.signature, config.p, prob, loss, mesh)
        # A fresh chunk owns its buffers, so they can be given up: nothing is copied per chunk.
        with compile_account() as account:
            work, values = run_steps(step, carry.unit["carry"], xs, donate=True)
        objectives, losses = (np.asarray(v) for v in values)
        bad = np.flatnonzero(~np.isfinite(objectives))
        if bad.size:
            raise FloatingPointError(
                f"{name}: the loss of unit {unit.name!r} became {objectives[bad[0]]} at step "
                f"{carry.step + int(bad[0])}; lower the learning rate or check the calibration set. "
                "The units before it are saved and will not be computed again."
            )
        seconds = max(time.monotonic() - began - account.seconds, 0.0)
        unit_work = {
            **carry.unit,
            "carry": work,
            "losses": [*carry.unit["losses"], *losses.tolist()],
            "timed": carry.unit["timed"] + np.array([n, seconds]),
        }
        carry = carry._replace(unit=unit_work, step=stop)
        if on_progress is not None:
            at = sum(totals[: carry.position]) + carry.step
            on_progress(at, sum(totals), unit=unit.name, loss=f"{losses[-1]:.3g}")
        due = time.monotonic() - carry.saved > config.save_seconds
        if carry.store is not None and due and carry.step < totals[carry.position]:
            save_partial(
                partial_folder(carry.store, carry.position),
                carry.step,
                totals[carry.position],
                work,
                unit_work["losses"],
            )
            carry = carry._replace(saved=time.monotonic())
        return carry

    def _close(carry: Carry, unit: Unit) -> Carry:
        """Harden the unit, record it, and move the quantized stream over it."""
        work = carry.unit
        state = carry.state
        report = {"unit": unit.name, "trained": bool(work["trainable"])}
        if work["trainable"]:
            result = work["result"]
            if result is None:
                soft = soft_trees(model.params, state.quant, unit) if trains_weights else ()
                trained = jax.device_get(work["carry"]["trainable"])
                if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained)):
                    raise FloatingPointError(
                        f"{name}: the last step of unit {unit.name!r} left values that are not "
                        "finite; lower the learning rate. The units before it are saved."
                    )
                result = unit_result(soft, trained, work["losses"], work["timed"], keep_alphas)
                save_result(carry.store, carry.position, unit.name, result)
                discard_partial(partial_folder(carry.store, carry.position))
            state = state.replace(quant=apply_result(state.quant, unit, result))
            if keep_alphas:
                alphas = {**state.aux.get("alphas", {}), **alphas_of(unit, result)}
                state = state.replace(aux={**state.aux, "alphas": alphas})
            report.update(result["report"])
        quantized = carry.quantized
        if config.inputs != "full_precision":
            decided = _part(state.quant, unit)
            # With activations trained too, what follows meets them quantized.
            decided = decided if config.trains == "both" else only_weights(decided)
            params, quant = fold_weights(_part(model.params, unit), decided)
            quantized = advance(
                quantized,
                unit,
                params,
                quant,
                batch_size=config.walk_batch,
                pool=carry.pool,
                keep=needed_after(units, carry.position),
                unit_count=len(units),
            )
        keep = needed_after(units, carry.position)
        alive = {n: v for n, v in carry.full.values.items() if n in keep or n in ("x", "t", "y")}
        return carry._replace(
            state=state,
            full=carry.full._replace(values=alive),
            quantized=quantized,
            position=carry.position + 1,
            step=0,
            unit=None,
            reports=(*carry.reports, report),
            saved=time.monotonic(),
        )

    return Stage(name, init, run, finish, done)


def _part(tree: Mapping, unit: Unit) -> dict:
    """The unit's entries of a {block: ...} tree: what it does not own must not reach its compiles."""
    return {name: tree[name] for name in unit.nodes if name in tree}
